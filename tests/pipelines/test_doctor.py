"""The doctor's sentences for made-up machines, and one run on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from mmoe_rec.cli import doctor
from mmoe_rec.jobs import machine as checks
from mmoe_rec.jobs.machine import GIB, Check, Installer, Probe
from tests.commands import run

ROOT = doctor.PYPROJECT.parent
REQUIRED = doctor.requirements()
UV = Installer(uv=True, build="cpu", required=REQUIRED).beside("2.14.1")
PIP = Installer(uv=False, build="cpu", required=REQUIRED).beside("2.14.1")
PIP_CUDA = Installer(uv=False, build="cuda", required=REQUIRED).beside("2.14.1")
RIGHT = {"torch": "2.14.1", "torchrec": "1.9.2", "fbgemm-gpu-cpu": "1.9.0"}
BOTH = {**RIGHT, "fbgemm-gpu": "1.9.0"}
CUDA = {"torch": "2.14.1", "torchrec": "1.9.2", "fbgemm-gpu": "1.9.0"}
CARDS = [("NVIDIA H100", 80 * GIB)]


def outcome(check: Check) -> tuple[str, str, str]:
    return check.status, check.found, check.fix


def test_requirements_name_both_builds_and_what_torchrec_needs_besides_them():
    assert {"torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "mlflow", "tensordict", "torchmetrics"} <= set(
        REQUIRED
    )
    assert REQUIRED["torchmetrics"] == "torchmetrics==1.0.3"


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ((3, 10, 13), "fail"),
        ((3, 11, 0), "ok"),
        ((3, 12, 9), "ok"),
        ((3, 13, 5), "ok"),
        ((3, 14, 1), "ok"),
        ((3, 15, 0), "fail"),
        ((4, 11, 0), "fail"),
    ],
)
def test_python_version(version, status):
    check = checks.check_python(version)
    assert check.status == status
    assert check.found == ".".join(map(str, version))
    assert check.fix.startswith("uv run --python 3.11 --extra cpu") == (status == "fail")
    required = tomllib.loads(doctor.PYPROJECT.read_text(encoding="utf-8"))["project"]["requires-python"]
    assert SpecifierSet(required).contains(".".join(map(str, version))) == (status == "ok")


@pytest.mark.parametrize(
    ("system", "machine", "status"),
    [
        ("Linux", "x86_64", "ok"),
        ("Linux", "aarch64", "ok"),
        ("Linux", "ppc64le", "warn"),
        ("Darwin", "arm64", "warn"),
        ("Windows", "AMD64", "fail"),
    ],
)
def test_platform(system, machine, status):
    assert checks.check_platform(system, machine).status == status


def test_missing_system_files_are_named_with_their_package():
    assert checks.check_system_files([], True).status == "ok"
    assert outcome(checks.check_system_files(["libstdc++.so.6"], False)) == (
        "fail",
        "missing: libstdc++.so.6, the time zone database",
        "apt-get install -y libstdc++6 tzdata",
    )


def test_trio_that_goes_together():
    for versions in (RIGHT, CUDA, RIGHT | {"torch": "2.14.0+cpu"}):
        check = checks.check_trio(versions, UV)
        assert check.status == "ok", check
        assert check.fix == ""
    assert checks.check_trio(RIGHT, UV).found == "torch 2.14.1, torchrec 1.9.2, fbgemm-gpu-cpu 1.9.0"


NOTE = "  # the three releases go together"


@pytest.mark.parametrize("torch", [*checks.TOGETHER, "2.10", "2.15", "3.14", None])
def test_the_trio_is_that_of_the_installed_torch(torch):
    """Minor numbers go together: torch 2.N, torchrec and fbgemm 1.(N - 5)."""
    minor = int(torch.split(".")[1]) if torch in checks.TOGETHER else 14
    found = UV.beside(torch and f"{torch}.0+cu130").required
    assert found["torch"] == f"torch==2.{minor}.*"
    assert found["torchrec"].startswith(f"torchrec==1.{minor - 5}.")
    for build in checks.BUILDS.values():
        assert found[build] == f"{build}==1.{minor - 5}.0"
    assert found["mlflow"] == REQUIRED["mlflow"]
    versions = {name: found[name].split("==")[1].replace("*", "7") for name in ("torch", "torchrec", "fbgemm-gpu")}
    assert checks.check_trio(versions, PIP_CUDA.beside(torch)).status == "ok"


def test_mismatched_trio():
    """A torch of a release that is supported stays."""
    versions = {"torch": "2.13.0", "torchrec": "1.9.2", "fbgemm-gpu-cpu": "1.8.0"}
    found = "torch 2.13.0, torchrec 1.9.2 (needs ==1.8.0), fbgemm-gpu-cpu 1.8.0"
    assert outcome(checks.check_trio(versions, UV.beside("2.13.0"))) == ("fail", found, "uv sync --extra cpu" + NOTE)
    assert outcome(checks.check_trio(versions, PIP.beside("2.13.0"))) == (
        "fail",
        found,
        "pip install fbgemm-gpu-cpu==1.8.0 && pip install --no-deps torchrec==1.8.0" + NOTE,
    )


def test_a_torch_that_is_too_old_or_too_new_is_replaced():
    versions = {"torch": "2.15.0", "torchrec": "1.9.2", "fbgemm-gpu-cpu": "1.9.0"}
    assert outcome(checks.check_trio(versions, PIP.beside("2.15.0"))) == (
        "fail",
        "torch 2.15.0 (needs ==2.14.*), torchrec 1.9.2, fbgemm-gpu-cpu 1.9.0",
        "pip install 'torch==2.14.*' fbgemm-gpu-cpu==1.9.0 && pip install --no-deps torchrec==1.9.2" + NOTE,
    )


def test_a_build_for_another_release_of_cuda():
    probe = Probe("import fbgemm_gpu", "OSError: libcudart.so.13: cannot open shared object file", torch_cuda="12.8")
    assert checks.check_tables(probe, PIP_CUDA.beside("2.11.0+cu128")).fix == (
        "pip install --force-reinstall 'torch==2.11.*' fbgemm-gpu==1.6.0 && pip install --force-reinstall --no-deps "
        "torchrec==1.6.1  # torch is built for CUDA 12.8, fbgemm for another release of CUDA"
    )


def test_pyproject_asks_for_the_newest_trio_and_takes_every_torch_of_the_table():
    """So that `uv sync` in a new environment gives three that go together."""
    newest = list(checks.TOGETHER)[-1]
    torchrec, fbgemm = checks.TOGETHER[newest]
    assert REQUIRED["torchrec"] == f"torchrec=={torchrec}"
    assert {REQUIRED[build] for build in checks.BUILDS.values()} == {
        f"{build}=={fbgemm}" for build in checks.BUILDS.values()
    }
    taken = SpecifierSet(REQUIRED["torch"].removeprefix("torch"))
    assert all(taken.contains(f"{release}.1") for release in checks.TOGETHER)
    (oldest, *_), above = checks.TOGETHER, f"2.{int(newest.split('.')[1]) + 1}.0"
    assert not taken.contains(above)
    assert not taken.contains(f"2.{int(oldest.split('.')[1]) - 1}.1")


def test_missing_part_of_the_trio_is_that_of_this_machine():
    without = {"torch": "2.14.1", "torchrec": "1.9.2"}
    assert checks.check_trio(without, UV).found == "torch 2.14.1, torchrec 1.9.2, fbgemm-gpu-cpu is missing"
    check = checks.check_trio(without, PIP_CUDA)
    assert check.found == "torch 2.14.1, torchrec 1.9.2, fbgemm-gpu is missing"
    assert "fbgemm-gpu==1.9.0" in check.fix
    assert checks.check_fbgemm_build(without, False, 0, PIP).fix == "pip install fbgemm-gpu-cpu==1.9.0"
    assert checks.check_trio({}, UV).status == "fail"


def test_without_torchrec_and_fbgemm_tables_are_plain():
    without = {"torch": "2.14.1"}
    check = checks.check_trio(without, UV)
    found = "torch 2.14.1, without torchrec and fbgemm: plain PyTorch tables, one process"
    assert (check.status, check.found) == ("warn", found)
    assert check.fix.startswith("uv sync --extra cpu  #")
    assert checks.check_trio(without, PIP).fix.startswith(
        "pip install pyre-extensions tensordict torchmetrics==1.0.3 tqdm fbgemm-gpu-cpu==1.9.0"
        " && pip install --no-deps torchrec==1.9.2  #"
    )
    assert outcome(checks.check_trio(without, UV, offered=False)) == ("ok", found, "")
    assert outcome(checks.check_fbgemm_build(without, False, 0, PIP)) == ("ok", "none is needed without torchrec", "")
    on_a_card = checks.check_fbgemm_build(without, True, 1, PIP_CUDA)
    assert on_a_card.found == "none, but torch sees 1 CUDA device: tables cannot train there"
    assert "--training.device cpu" in on_a_card.fix
    versions = doctor.installed_versions(REQUIRED)
    assert "tensordict" in checks.check_packages({"torchrec": "1.9.2"}, PIP)[-1].found
    for name in ("torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "tensordict", "torchmetrics", "pyre-extensions"):
        versions.pop(name, None)
    assert {check.status for check in checks.check_packages(versions, PIP)} == {"ok"}


def test_both_fbgemm_builds():
    found = "fbgemm-gpu and fbgemm-gpu-cpu are both installed, into the same folder: one breaks the other"
    fix_uv = "uv sync --extra cpu --reinstall-package fbgemm-gpu-cpu"
    fix_pip = "pip uninstall -y fbgemm-gpu-cpu fbgemm-gpu && pip install fbgemm-gpu{}==1.9.0"
    assert outcome(checks.check_fbgemm_build(BOTH, False, 0, UV)) == ("fail", found, fix_uv)
    assert outcome(checks.check_fbgemm_build(BOTH, False, 0, PIP)) == ("fail", found, fix_pip.format("-cpu"))
    assert outcome(checks.check_fbgemm_build(BOTH, True, 1, PIP_CUDA)) == ("fail", found, fix_pip.format(""))


def test_fbgemm_build_that_does_not_suit_the_machine():
    without_driver = checks.check_fbgemm_build(CUDA, False, 0, UV)
    assert without_driver.status == "fail"
    assert "no NVIDIA driver (libnvidia-ml.so.1)" in without_driver.found
    assert without_driver.fix.startswith("uv sync --extra cpu")

    cpu_on_a_card = checks.check_fbgemm_build(RIGHT, True, 1, PIP_CUDA)
    assert cpu_on_a_card.status == "fail"
    assert cpu_on_a_card.found.startswith("CPU build, but torch sees 1 CUDA device:")
    assert "pip install fbgemm-gpu==1.9.0" in cpu_on_a_card.fix

    assert outcome(checks.check_fbgemm_build(RIGHT, False, 0, UV)) == ("ok", "CPU build", "")
    assert outcome(checks.check_fbgemm_build(CUDA, True, 8, PIP_CUDA)) == ("ok", "CUDA build", "")


@pytest.mark.parametrize(
    ("probe", "fix"),
    [
        (
            Probe("import fbgemm_gpu", "OSError: libnvidia-ml.so.1: cannot open shared object file"),
            "uv sync --extra cpu --reinstall-package fbgemm-gpu-cpu",
        ),
        (
            Probe("import fbgemm_gpu", "ModuleNotFoundError: No module named 'fbgemm_gpu'"),
            "uv sync --extra cpu --reinstall-package fbgemm-gpu-cpu",
        ),
        (
            # What is left after one build was removed beside the other.
            Probe("import torchrec", "OSError: Could not load this library: /deeplearning/fbgemm/fbgemm_gpu:permute"),
            "uv sync --extra cpu --reinstall-package fbgemm-gpu-cpu",
        ),
        (
            Probe("import torch", "ImportError: libstdc++.so.6: cannot open shared object file"),
            "apt-get install -y libstdc++6",
        ),
        (Probe("look up an embedding", "died of SIGILL"), "use another machine"),
        (Probe("import torch", "no answer after 300 seconds"), "mmoe-rec doctor  # once more"),
        (
            Probe("import torchrec", "AttributeError: x"),
            "uv sync --extra cpu --reinstall-package torch --reinstall-package torchrec "
            "--reinstall-package fbgemm-gpu-cpu",
        ),
    ],
)
def test_failed_lookup_names_the_stage_the_error_and_what_to_type(probe, fix):
    check = checks.check_tables(probe, UV)
    assert check.status == "fail"
    assert check.found == f"could not {probe.stage}: {probe.error}"
    assert fix in check.fix


def test_failed_lookup_under_pip():
    assert checks.check_tables(Probe("import torchrec", "AttributeError: x"), PIP).fix == (
        "pip install --force-reinstall 'torch==2.14.*' fbgemm-gpu-cpu==1.9.0"
        " && pip install --force-reinstall --no-deps torchrec==1.9.2"
    )


def test_packages_outside_their_ranges():
    versions = doctor.installed_versions(REQUIRED) | {"mlflow": "3.17.2", "pandas": "2.1.4"}
    del versions["pydantic"]
    found = {check.name: check for check in checks.check_packages(versions, PIP)}
    assert outcome(found["mlflow"]) == ("ok", "3.17.2", "")
    assert outcome(found["pandas"]) == ("fail", "pandas 2.1.4 (needs <4,>=2.2)", "pip install 'pandas>=2.2,<4'")
    assert outcome(found["other packages"]) == ("fail", "pydantic is missing", "pip install 'pydantic>=2.11,<3'")


def test_uvicorn():
    assert outcome(checks.check_uvicorn("/env/bin/uvicorn", "/env/bin/uvicorn", UV)) == ("ok", "/env/bin/uvicorn", "")
    assert outcome(checks.check_uvicorn(None, None, UV)) == (
        "fail",
        "not found",
        "uv sync --extra cpu --reinstall-package uvicorn",
    )
    assert outcome(checks.check_uvicorn("/usr/bin/uvicorn", None, PIP)) == (
        "fail",
        "/usr/bin/uvicorn belongs to another environment",
        "pip install --force-reinstall uvicorn",
    )
    not_on_path = checks.check_uvicorn(None, "/my env/bin/uvicorn", UV)
    assert not_on_path.status == "warn"
    assert "`mlflow models serve` would not find it" in not_on_path.found
    assert not_on_path.fix == "export PATH='/my env/bin':$PATH"


@pytest.mark.parametrize(
    ("cores", "threads", "status"),
    [(8, None, "ok"), (8, "4", "ok"), (1, "1", "ok"), (8, "1", "warn"), (8, "16", "warn"), (8, "many", "warn")],
)
def test_threads(cores, threads, status):
    assert checks.check_cpu(cores, threads).status == status


def test_devices():
    assert outcome(checks.check_cuda(Probe(cards=CARDS), True)) == ("ok", "NVIDIA H100 80 GiB", "")
    assert checks.check_cuda(Probe(), False).found == "none: models train on the CPU"
    unseen = checks.check_cuda(Probe(torch_cuda="13.0"), True)
    assert unseen.status == "warn"
    assert "built for CUDA 13.0" in unseen.fix
    found = checks.check_choices(Probe(choices={"cpu": "fp32, 2 threads", "cuda": "bf16"})).found
    assert found == "cpu: fp32, 2 threads; cuda: bf16"
    assert checks.check_choices(Probe()).status == "warn"


def test_memory_and_disk():
    assert outcome(checks.check_memory(16 * GIB, 8 * GIB)) == ("ok", "8.0 GiB available of 16.0 GiB", "")
    assert checks.check_memory(16 * GIB, GIB).status == "warn"
    assert [checks.check_disk(free * GIB, "here").status for free in (0, 2, 50)] == ["fail", "warn", "ok"]


def test_the_look_up_without_torchrec():
    doctor._expect_sums(doctor._plain_sums())
    with pytest.raises(ArithmeticError, match="expected sums of 2 and 1"):
        doctor._expect_sums(doctor._plain_sums() + 1)


def test_uv_environment_is_recognised(tmp_path, monkeypatch):
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\nuv = 0.9.0\n")
    assert doctor.made_by_uv(tmp_path)
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\n")
    assert not doctor.made_by_uv(tmp_path)
    (tmp_path / "pyvenv.cfg").unlink()
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert not doctor.made_by_uv(tmp_path)


def _probe_with(monkeypatch, program: str) -> Probe:
    run = subprocess.run
    monkeypatch.setattr(
        doctor.subprocess, "run", lambda command, **options: run([sys.executable, "-c", program], **options)
    )
    return doctor.run_probe()


def test_a_crash_while_importing_is_reported_with_its_stage(monkeypatch):
    crash = """print('{"stage": "import torch"}', flush=True); import os; os.kill(os.getpid(), 11)"""
    probe = _probe_with(monkeypatch, crash)
    assert (probe.stage, probe.error) == ("import torch", "died of SIGSEGV")


def test_a_process_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 1)
    program = """print('{"stage": "import torch"}', flush=True); import time; time.sleep(3600)"""
    probe = _probe_with(monkeypatch, program)
    assert (probe.stage, probe.error) == ("import torch", "no answer after 1 seconds")


def test_a_process_that_fails_at_once_is_reported_by_its_last_line(monkeypatch):
    probe = _probe_with(monkeypatch, "raise ImportError('no such thing')")
    assert (probe.stage, probe.error) == ("start Python", "ImportError: no such thing")


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_exit_code_and_what_to_type_on_one_line(monkeypatch, capsys, status, code):
    long_command = "pip install " + " ".join(f"package-{number}==1.0" for number in range(30))
    check = Check("name", status, "[red]found[/red]", "" if status == "ok" else long_command)
    monkeypatch.setattr(doctor, "run_checks", lambda: [check])
    with pytest.raises(SystemExit) as exit_:
        run("doctor")
    output = capsys.readouterr().out
    assert exit_.value.code == code
    assert "[red]found[/red]" in output
    assert (f"    {long_command}\n" in output) == (status != "ok")


def test_json_of_this_machine():
    command = [sys.executable, "-m", "mmoe_rec", "doctor", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert done.returncode == (0 if report["ok"] else 1)
    for name in ("Python", "torch trio", "fbgemm build", "embedding lookup", "mlflow", "other packages"):
        assert checks[name]["status"] == "ok", checks[name]


def test_what_torchrec_needs_is_what_uv_is_told():
    settings = tomllib.loads(doctor.PYPROJECT.read_text(encoding="utf-8"))["tool"]["uv"]
    (package,) = settings["dependency-metadata"]
    assert tuple(package["requires-dist"]) == doctor.TORCHREC_NEEDS


def test_an_installed_package_needs_what_the_repository_does(monkeypatch):
    monkeypatch.setattr(doctor, "PYPROJECT", Path("/no/pyproject.toml"))
    assert doctor.requirements().keys() == REQUIRED.keys()


def test_scripts_are_found_where_their_package_put_them():
    assert Path(str(doctor.installed_script("uvicorn"))).is_file()
    assert doctor.installed_script("no-such-package") is None
