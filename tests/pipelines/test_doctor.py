"""The doctor's sentences for made-up machines, and one run on this machine."""

import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

from mmoe_rec.cli import doctor
from mmoe_rec.cli.doctor import TOGETHER, Check, Machine, run_checks
from tests.commands import run

PROJECT = tomllib.loads(doctor.PYPROJECT.read_text(encoding="utf-8"))
REQUIRED = doctor.read_requirements()
RIGHT = {"torch": "2.14.1", "torchrec": "1.9.2", "fbgemm-gpu-cpu": "1.9.0"}
CUDA = {"torch": "2.14.1", "torchrec": "1.9.2", "fbgemm-gpu": "1.9.0"}
OTHERS = {name: version for name, version in doctor.find_versions(REQUIRED).items() if name not in (*RIGHT, *CUDA)}
DONE = {"stage": "done", "choices": {"cpu": "fp32"}, "cards": []}
CARDS = {"cards": ["NVIDIA H100 80 GiB"]}
WELL = Machine(REQUIRED, {**OTHERS, **RIGHT}, python=(3, 11), system="Linux", processor="x86_64", probe=DONE)


def check(name: str, **changes: Any) -> Check:
    """The check of a machine that differs from one where all is well."""
    return next(each for each in run_checks(replace(WELL, **changes)) if each.name == name)


def packages(versions: dict[str, str], **changes: Any) -> Check:
    return check("packages", versions={**OTHERS, **versions}, **changes)


def test_all_is_well() -> None:
    checks = list(run_checks(WELL))
    assert {(each.status, each.fix) for each in checks} == {("ok", "")}
    assert len(checks) == 5
    on_a_card = replace(WELL, versions={**OTHERS, **CUDA}, has_driver=True, probe=DONE | CARDS)
    assert {each.status for each in run_checks(on_a_card)} == {"ok"}


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10), "fail"), ((3, 11), "ok"), ((3, 14), "ok"), ((3, 15), "fail"), ((4, 11), "fail")]
)
def test_python_version(version: tuple[int, int], status: str) -> None:
    assert check("Python", python=version).status == status
    taken = SpecifierSet(PROJECT["project"]["requires-python"])
    assert taken.contains(".".join(map(str, version))) == (status == "ok")


@pytest.mark.parametrize(
    ("system", "processor", "status"),
    [
        ("Linux", "aarch64", "ok"),
        ("Linux", "ppc64le", "warn"),
        ("Darwin", "arm64", "warn"),
        ("Windows", "AMD64", "fail"),
    ],
)
def test_platform(system: str, processor: str, status: str) -> None:
    assert check("platform", system=system, processor=processor).status == status


@pytest.mark.parametrize("release", TOGETHER)
def test_the_trio_is_that_of_the_installed_torch(release: str) -> None:
    """Minor numbers go together: torch 2.N, torchrec and fbgemm 1.(N - 5). A torch that is taken stays."""
    torchrec, fbgemm = TOGETHER[release]
    minor = int(release.split(".")[1]) - 5
    assert torchrec.startswith(f"1.{minor}.")
    assert fbgemm == f"1.{minor}.0"
    right = {"torch": f"{release}.7+cpu", "torchrec": torchrec, "fbgemm-gpu-cpu": fbgemm}
    assert packages(right).status == "ok"
    wrong = packages(right | {"fbgemm-gpu-cpu": "1.2.0"}, uv=False)
    assert (wrong.status, wrong.text) == ("fail", f"fbgemm-gpu-cpu 1.2.0 (needs =={fbgemm})")
    assert wrong.fix.startswith(f"pip install 'torch=={release}.*' ")
    assert f" fbgemm-gpu-cpu=={fbgemm} " in wrong.fix
    assert wrong.fix.endswith(f" && pip install --no-deps torchrec=={torchrec}")


def test_a_torch_that_is_too_new_is_replaced() -> None:
    found = packages(RIGHT | {"torch": "2.15.0"}, uv=False)
    assert (found.status, found.text) == ("fail", "torch 2.15.0 (needs ==2.14.*)")
    assert found.fix.startswith("pip install 'torch==2.14.*' ")
    assert packages(RIGHT | {"torch": "2.15.0"}).fix == "uv sync --extra cpu"
    missing = packages({"torch": "2.14.1", "torchrec": "1.9.2"}, has_driver=True, uv=False)
    assert missing.text == "fbgemm-gpu is missing"
    assert " fbgemm-gpu==1.9.0 " in missing.fix


def test_pyproject_asks_for_the_newest_trio_and_takes_every_torch_of_the_table() -> None:
    """So that `uv sync` in a new environment gives three that go together."""
    newest = list(TOGETHER)[-1]
    torchrec, fbgemm = TOGETHER[newest]
    assert REQUIRED["torchrec"] == f"torchrec=={torchrec}"
    assert all(REQUIRED[build] == f"{build}=={fbgemm}" for build in doctor.BUILDS.values())
    taken = SpecifierSet(REQUIRED["torch"].removeprefix("torch"))
    minors = [int(release.split(".")[1]) for release in TOGETHER]
    assert [minor for minor in range(5, 20) if taken.contains(f"2.{minor}.1")] == minors
    (package,) = PROJECT["tool"]["uv"]["dependency-metadata"]
    assert tuple(package["requires-dist"]) == doctor.TORCHREC_NEEDS


def test_without_torchrec_and_fbgemm_tables_are_plain() -> None:
    bare = {name: version for name, version in OTHERS.items() if name not in ("tensordict", "torchmetrics", "tqdm")}
    bare["torch"] = "2.14.1"
    found = check("packages", versions=bare, uv=False)
    assert found.status == "warn"
    assert found.text.startswith("torch 2.14.1 and ")
    assert found.text.endswith("; without torchrec and fbgemm: plain PyTorch tables, one process")
    assert " torchmetrics==1.0.3 tqdm && pip install --no-deps torchrec==1.9.2" in found.fix
    assert check("packages", versions=bare, processor="ppc64le").status == "ok"
    assert "tensordict is missing" in check("packages", versions={**bare, **RIGHT}).text


@pytest.mark.parametrize(
    ("versions", "changes", "found", "fix"),
    [
        (RIGHT | CUDA, {}, "both builds of fbgemm", "pip uninstall -y fbgemm-gpu-cpu fbgemm-gpu && pip install"),
        (CUDA, {}, "no NVIDIA driver (libnvidia-ml.so.1)", "fbgemm-gpu-cpu==1.9.0"),
        (RIGHT, {"has_driver": True, "probe": DONE | CARDS}, "NVIDIA H100 80 GiB, where", " fbgemm-gpu==1.9.0"),
    ],
)
def test_fbgemm_build_that_does_not_suit_the_machine(
    versions: dict[str, str], changes: dict[str, Any], found: str, fix: str
) -> None:
    told = check("devices", versions={**OTHERS, **versions}, uv=False, **changes)
    assert told.status == "fail"
    assert found in told.text
    assert fix in told.fix


@pytest.mark.parametrize(
    ("stage", "error", "fix"),
    [
        ("import fbgemm_gpu", "OSError: libnvidia-ml.so.1: cannot open", "--reinstall-package fbgemm-gpu-cpu"),
        ("import fbgemm_gpu", "OSError: libcudart.so.13: cannot open", "# torch is built for CUDA 12.8"),
        ("import torch", "ImportError: libstdc++.so.6: cannot open", "apt-get install -y libstdc++6"),
        ("import lightgbm", "OSError: libgomp.so.1: cannot open", "zlib1g libgomp1"),
        ("train a model for a few steps", "died of SIGILL", "use another machine"),
        ("import torch", "no answer after 300 seconds", "mmoe-rec doctor  # once more"),
    ],
)
def test_failed_steps_name_the_stage_the_error_and_what_to_type(stage: str, error: str, fix: str) -> None:
    told = check("training steps", probe={"stage": stage, "error": error, "torch_cuda": "12.8"})
    assert (told.status, told.text) == ("fail", f"could not {stage}: {error}")
    assert fix in told.fix


def test_packages_outside_their_ranges() -> None:
    versions = {**OTHERS, **RIGHT, "pandas": "2.1.4"}
    del versions["pydantic"]
    told = check("packages", versions=versions)
    assert (told.status, told.text) == ("fail", "pandas 2.1.4 (needs <4,>=2.2), pydantic is missing")


def test_devices() -> None:
    no_card = check("devices", versions={**OTHERS, **CUDA}, has_driver=True)
    assert (no_card.status, no_card.text) == ("warn", "an NVIDIA driver is here, but torch sees no device")
    on_a_card = check("devices", versions={**OTHERS, **CUDA}, has_driver=True, probe=DONE | CARDS)
    assert (on_a_card.status, on_a_card.text) == ("ok", "NVIDIA H100 80 GiB")


@pytest.mark.parametrize(
    ("program", "stage", "error"),
    [
        ("import os; os.kill(os.getpid(), 11)", "import torch", "died of SIGSEGV"),
        ("import time; time.sleep(3600)", "import torch", "no answer after 1 seconds"),
        ("raise ImportError('no such thing')", "import torch", "ImportError: no such thing"),
    ],
)
def test_a_crash_while_importing_is_reported_with_its_stage(
    monkeypatch: pytest.MonkeyPatch, program: str, stage: str, error: str
) -> None:
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 1)
    monkeypatch.setattr(doctor, "PROBE", f"""print('{{"stage": "import torch"}}', flush=True); {program}""")
    assert doctor.run_probe() == {"stage": stage, "error": error}


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_exit_code_and_what_to_type_on_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, status: Any, code: int
) -> None:
    long_command = "pip install " + " ".join(f"package-{number}==1.0" for number in range(30))
    told = Check("name", "[red]found[/red]", "" if status == "ok" else long_command, warns=status == "warn")
    monkeypatch.setattr(doctor, "look", lambda: WELL)
    monkeypatch.setattr(doctor, "run_checks", lambda _: [told])
    with pytest.raises(SystemExit) as end:
        run("doctor")
    output = capsys.readouterr().out
    assert end.value.code == code
    assert "[red]found[/red]" in output
    assert (f"    {long_command}\n" in output) == (status != "ok")


def test_this_machine() -> None:
    words = [sys.executable, "-m", "mmoe_rec", "doctor"]
    done = subprocess.run(words, cwd=doctor.PYPROJECT.parent, capture_output=True, text=True, check=False)
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line]
    for name in ("Python", "packages", "devices", "training steps"):
        assert any(status == "ok" and rest.startswith(name) for status, rest in lines), done.stdout
    assert done.returncode == any(line[0] == "fail" for line in lines)


def test_an_installed_package_needs_what_the_repository_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PYPROJECT", Path("/no/pyproject.toml"))
    assert doctor.read_requirements().keys() == REQUIRED.keys()
