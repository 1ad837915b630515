"""The doctor's checks of made-up machines, and one run on this machine."""

import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from mmoe_rec.cli import doctor
from mmoe_rec.cli.doctor import COMPATIBLE_VERSIONS, check_folder, check_imports, check_mlflow, check_packages
from tests.commands import run
from tests.inference.running_server import free_port

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
RIGHT = {"torch": "2.14.1", "torchrec": "1.9.2", "fbgemm-gpu-cpu": "1.9.0"}


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, ""),
        ({"torch": "2.14.1+cpu"}, ""),
        ({"torchrec": "", "fbgemm-gpu-cpu": ""}, ""),
        ({"torch": "2.13.0"}, "needed: torchrec==1.8.0, fbgemm-gpu-cpu==1.8.0"),
        ({"torch": "2.15.0"}, "needed: torch 2.11 or 2.12 or 2.13 or 2.14"),
        ({"torchrec": ""}, "needed: torchrec==1.9.2"),
        ({"fbgemm-gpu-cpu": ""}, "needed: fbgemm-gpu-cpu==1.9.0"),
        ({"fbgemm-gpu-cpu": "", "fbgemm-gpu": "1.9.0"}, ""),
        ({"fbgemm-gpu": "1.9.0"}, "needed: one build of fbgemm alone"),
    ],
)
def test_torch_torchrec_and_fbgemm_go_together(changes: dict[str, str], needed: str) -> None:
    actual = check_packages({name: version for name, version in (RIGHT | changes).items() if version})
    assert bool(actual.fix) == bool(needed)
    assert needed in actual.text
    assert ("needed" in actual.text) == bool(needed)


def test_pyproject_asks_for_the_newest_trio_and_takes_every_torch_of_the_table() -> None:
    """So that `uv sync` in a new environment gives three that go together."""
    torchrec, fbgemm = COMPATIBLE_VERSIONS[[*COMPATIBLE_VERSIONS][-1]]
    extras = PROJECT["project"]["optional-dependencies"]
    for build, extra in doctor.BUILDS.items():
        torch, *others = extras[f"tables-{extra}"]
        assert others == [f"torchrec=={torchrec}", f"{build}=={fbgemm}"]
        taken = SpecifierSet(torch.removeprefix("torch"))
        assert [f"2.{minor}" for minor in range(5, 20) if taken.contains(f"2.{minor}.1")] == [*COMPATIBLE_VERSIONS]


@pytest.mark.parametrize(
    ("program", "error"),
    [("import os; os.kill(os.getpid(), 11)", "exit code -11"), ("raise ImportError('no {}')", "ImportError: no torch")],
)
def test_a_library_that_does_not_load_is_reported(monkeypatch: pytest.MonkeyPatch, program: str, error: str) -> None:
    monkeypatch.setattr(doctor, "PROBE", program)
    (actual,) = check_imports(RIGHT)
    assert actual.text.startswith("importing torch, fbgemm_gpu, torchrec, lightgbm, mlflow fails: ")
    assert error in actual.text
    assert actual.fix


def test_a_card_needs_its_build_of_fbgemm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE", "print('NVIDIA H100')")
    with_cpu, with_cuda = (list(check_imports({"torchrec": "1.9.2", build: "1.9.0"}))[-1] for build in doctor.BUILDS)
    assert (with_cpu.text, bool(with_cpu.fix)) == ("NVIDIA H100", True)
    assert (with_cuda.text, with_cuda.fix) == ("NVIDIA H100", "")


def test_mlflow_is_asked_and_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_mlflow("sqlite:///mlflow.db").fix == ""
    assert list(tmp_path.iterdir()) == []
    assert check_mlflow(f"http://127.0.0.1:{free_port()}").fix.startswith("start the server")


def test_the_work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_folder(tmp_path / "later" / "work").fix == ""
    assert not (tmp_path / "later").exists()
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert check_folder(tmp_path / "work").fix.startswith("set data.work_dir to a folder")


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(SystemExit) as end:
        run("doctor")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["packages", "imports", "devices", "MLflow", "work"]
    assert {line.split()[0] for line in lines} == {"ok"}
    assert end.value.code == 0
