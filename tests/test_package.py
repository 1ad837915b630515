"""The package as it is used without the repository: its names in Python, and commands that answer at once.

What was imported before the answer is the measure of "at once" that no busy or slow machine changes.
"""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mmoe_rec
from mmoe_rec.cli.main import COMMANDS
from tests.added_package import ROOT, AddedPackage

HEAVY = {"torch", "torchrec", "fbgemm_gpu", "mlflow", "ray", "sklearn", "matplotlib", "jinja2", "optuna"}
"""Packages that take a second or more to import."""
MISTAKES = {
    **{f"{name} --config C --data.log no/log": "no/log" for name in ("features", "train", "inspect", "tune")},
    "evaluate --config C --model no/model": "no/model",
    "score --model no/model --input configs --output out": "'no/model' holds no model",
    "score --model no/model --output out": "missing option '--input'",
    "refresh --config C --remove-events": "--remove-events requires --journal. Add --journal A.",
    "check-skew --config C --from 2024-01-01 --to 2024-01-02": "missing option '--requests'",
    "train --config no.yaml": "settings file 'no.yaml' does not exist",
    "train --config C --model.expert.count 3": "'--model.expert.count'. Did you mean '--model.experts.count'?",
    "train --config C --sedes 5": "there is no option or setting '--sedes'. Did you mean '--training.seed'?",
    "train --config C --resum": "command line: there is no option or setting '--resum'. Did you mean '--resume'?",
    "train --cofnig C": "command line: there is no option or setting '--cofnig'. Did you mean '--config'?",
    "evaluate --config C --model M --device cpu": "setting '--device'. Did you mean '--training.device'?",
    "serve --model M --prot 80": "command line: there is no option or setting '--prot'. Did you mean '--port'?",
    "score --model M --asof log": "command line: there is no option or setting '--asof'. Did you mean '--as-of'?",
    "doctor --verbose": "no such option '--verbose'. Run the command with --help to list options",
    "trian": "there is no command 'trian'; did you mean 'train'?",
}
"""What is typed wrongly (C: the template) -> a part of the sentence that tells so."""
HELP = ["mmoe_rec --help", *(f"mmoe_rec {name} --help" for name in COMMANDS)]
HELP += [f"pipelines.{path.stem} --help" for path in sorted((ROOT / "pipelines").glob("[a-z]*.py"))]
RUN = """
import contextlib, io, json, runpy, sys
answers = {}
for line in json.loads(sys.argv[1]):
    sys.argv, code, out, err = line.replace(" C ", " configs/template.yaml ").split(), 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
    answers[line] = code or 0, out.getvalue(), err.getvalue(), [*sys.modules]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[int, str, str]]:
    """Exit code and what was printed of all commands, run in one process, which has imported nothing heavy so far."""
    lines = [*HELP, *(f"mmoe_rec {words}" for words in MISTAKES)]
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(lines)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    actual = json.loads(done.stdout)
    for line, (*_, modules) in actual.items():
        assert not HEAVY & set(modules), line
    return {line: (code, out, err) for line, (code, out, err, _) in actual.items()}


# Names


@pytest.mark.parametrize("name", mmoe_rec.__all__)
def test_names_are_found_when_they_are_used(name: str) -> None:
    assert getattr(mmoe_rec, name) is not None
    assert name in dir(mmoe_rec)


def test_an_unknown_name_is_reported() -> None:
    with pytest.raises(AttributeError, match="module 'mmoe_rec' has no attribute 'Rankers'"):
        mmoe_rec.Rankers  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ("numpy", "pyarrow", "torch")
    code = f"import sys, mmoe_rec; mmoe_rec.__version__; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_without_click_one_sentence_says_so() -> None:
    code = "import sys; sys.modules['click'] = None; import mmoe_rec.cli.main"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: the package click is not installed: pip install ")


# Commands


@pytest.mark.parametrize("line", HELP)
def test_help(answers: dict[str, tuple[int, str, str]], line: str) -> None:
    code, out, _ = answers[line]
    assert code == 0
    match line.split():
        case ["mmoe_rec", name, _]:
            assert out.startswith(f"Usage: mmoe-rec {name} [OPTIONS]")
            assert f"\nmmoe-rec {name}" in out
            assert ("mmoe-rec settings" in out) == (name not in ("init", "doctor", "export"))
            assert "--model.experts.count" not in out
            assert out.count("\n") < 60, "a command's help is its own"
        case ["mmoe_rec", _]:
            assert all(f"\n  {name} " in out for name in COMMANDS)
            assert "First steps: draft settings for your log" in out
        case [module, _]:
            assert f"python -m {module}" in out


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_reported_in_one_line(answers: dict[str, tuple[int, str, str]], words: str) -> None:
    code, _, err = answers[f"mmoe_rec {words}"]
    (line,) = err.splitlines()
    assert code == 2
    assert line.startswith("error: ")
    assert MISTAKES[words] in line


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
    template = f"{tmp_path}/mmoe_rec/settings/template.yaml"
    assert error == f"settings file 'no.yaml' does not exist; mmoe-rec init writes one, or start from {template}"
