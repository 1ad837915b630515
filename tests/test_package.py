"""The package as it is used without the repository: its command, and its names in Python."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mmoe_rec
from mmoe_rec.cli.main import COMMANDS
from tests.added_package import AddedPackage
from tests.pipelines.imports import ROOT, answer


@pytest.mark.parametrize("name", mmoe_rec.__all__)
def test_names_are_found_when_they_are_used(name: str) -> None:
    assert getattr(mmoe_rec, name) is not None
    assert name in dir(mmoe_rec)


def test_an_unknown_name_is_told() -> None:
    with pytest.raises(AttributeError, match="module 'mmoe_rec' has no attribute 'Rankers'"):
        mmoe_rec.Rankers  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ("numpy", "pyarrow", "torch")
    use = "mmoe_rec.__version__"
    code = f"import sys, mmoe_rec; {use}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_commands_are_listed_without_one() -> None:
    found = answer("mmoe_rec", "--help")
    assert (found.code, found.imported) == (0, ())
    for name in COMMANDS:
        assert f"\n  {name} " in found.out
    assert "First steps: adapt a copy of configs/template.yaml" in found.out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_begins_with_the_command(name: str) -> None:
    found = answer("mmoe_rec", name, "--help")
    assert (found.code, found.imported) == (0, ())
    assert found.out.startswith(f"Usage: mmoe-rec {name} [OPTIONS]")
    assert f"\n\nmmoe-rec {name}" in found.out
    assert ("--model.experts.count" in found.out) == (name not in ("score", "serve", "off-policy", "doctor"))


def test_mistakes_are_told_without_importing_much(tmp_path: Path) -> None:
    found = answer("mmoe_rec", "train", "--config", str(tmp_path / "no.yaml"))
    assert (found.code, found.imported) == (2, ())
    assert found.err.startswith("error: ")
    found = answer("mmoe_rec", "trian")
    assert (found.code, found.imported) == (2, ())
    assert found.err == "error: there is no command 'trian'; did you mean 'train'?\n"
    assert answer("mmoe_rec").code == 2


def test_an_installed_package_has_the_template(tmp_path: Path) -> None:
    """As the wheel is made: errors and help name a file that is there."""
    included = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    package = AddedPackage(tmp_path)
    for source, target in included["wheel"]["force-include"].items():
        shutil.copy(ROOT / source, tmp_path / target)
    printed = package.run("""
from mmoe_rec.settings.load import TEMPLATE, load_settings
print(load_settings(TEMPLATE).name)
try:
    load_settings("no.yaml")
except Exception as error:
    print(error)
""")
    name, error = printed.splitlines()
    assert name == "template"
    assert error == f"settings file 'no.yaml' does not exist; start from {tmp_path}/mmoe_rec/settings/template.yaml"
