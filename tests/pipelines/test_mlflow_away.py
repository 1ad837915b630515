"""Trainings while MLflow's server is away: nothing of them is lost, and all is told in one sentence."""

import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmoe_rec.evaluation import evaluate as evaluation
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.training.loop import Trainer
from tests import commands
from tests.inference.running_server import free_port, running_program
from tests.pipelines.learnable_log import settings_tree, write_files

pytestmark = pytest.mark.thorough


class TrackingServer:
    """MLflow's server with its database and files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._port, self._running = folder, free_port(), ExitStack()
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        programs = Path(sys.executable).parent
        words = [str(programs / "mlflow"), "server", "--backend-store-uri", f"sqlite:///{self.folder / 'store.db'}"]
        words += ["--artifacts-destination", str(self.folder / "files"), "--port", str(self._port), "--workers", "1"]
        own = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        # Without its workers for jobs, which nobody here needs.
        env = {**own, "PATH": f"{programs}{os.pathsep}{own['PATH']}", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        log = self.folder / "server.log"
        self._running.enter_context(running_program(words, f"{self.uri}/health", log, cwd=self.folder, env=env))

    def stop(self) -> None:
        """Connections are refused, and open ones break off."""
        self._running.close()

    def query(self, text: str, *values: Any) -> list[tuple[Any, ...]]:
        with sqlite3.connect(self.folder / "store.db") as store:
            return store.execute(text, values).fetchall()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    write_files(folder)
    return folder / "log"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    server = TrackingServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.stop()


class Training:
    """The command in a folder of its own."""

    def __init__(self, folder: Path, log: Path, server: TrackingServer, name: str) -> None:
        tree = settings_tree(folder, data={"log": str(log), "work_dir": str(folder / "work")})
        tree |= {"name": name, "tracking": {"uri": server.uri}}
        self.work, self.server, self.name = folder / "work", server, name
        self.config = folder / "settings.yaml"
        self.config.write_text(yaml.safe_dump(tree), encoding="utf-8")

    def run(self, *words: str) -> int:
        return commands.exit_code("train", "--config", self.config, *words)

    def metrics(self) -> list[tuple[Any, ...]]:
        """All of training and validation: name, step and value in the order in which they were measured."""
        return self.server.query(
            "select key, step, value from metrics join runs using (run_uuid) join experiments using (experiment_id) "
            "where experiments.name = ? and key not like '%data_wait%' and key not like '%rows_per_s%' "
            "and key not like 'system/%' "
            "order by key, timestamp, step",
            self.name,
        )

    def versions(self) -> list[tuple[Any, ...]]:
        return self.server.query("select version from model_versions where name = ?", self.name)

    def plots(self) -> set[str]:
        """Names of the figures that the server holds."""
        run, _ = self.finished()
        return {path.name for path in self.server.folder.glob(f"files/*/{run}/artifacts/plots/**/*.png")}

    def finished(self) -> tuple[str, str]:
        """Id and status of its only run."""
        runs = "select run_uuid, status from runs join experiments using (experiment_id) where experiments.name = ?"
        (run,) = self.server.query(runs, self.name)
        return run[0], run[1]

    def misses_nothing(self, whole: "Training") -> None:
        """The server holds what it holds of a training that it has always answered."""
        assert self.metrics() == whole.metrics()
        assert self.plots() == whole.plots()
        assert len(self.plots()) > 3
        assert self.finished()[1] == "FINISHED"
        assert self.versions() == [(1,)]
        assert not list((self.work / "unsent").glob("*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, log: Path, server: TrackingServer) -> Training:
    """The training while the server answers all the time."""
    training = Training(tmp_path_factory.mktemp("whole"), log, server, "whole")
    assert training.run() == 0
    return training


@pytest.mark.timeout(300)
def test_a_server_that_stays_away_is_reported_afterwards(
    tmp_path: Path,
    log: Path,
    server: TrackingServer,
    whole: Training,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mmoe_rec.training.train.MAX_WAIT_SECONDS", 1.5)
    training, validate = Training(tmp_path, log, server, "afterwards"), Trainer._validate

    def leave(*arguments: Any) -> Any:
        server.stop()
        return validate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_validate", leave)
        assert training.run() == 75
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.splitlines()[-1] == (
        f"stopped: MLflow at '{server.uri}' does not answer (Connection refused). The model in "
        f"'{training.work / 'model'}' is complete but not registered. To register it, run the "
        "command with --resume once MLflow answers"
    )
    Ranker.load(training.work / "model")
    assert training.versions() == []

    assert training.run("--resume") == 2
    said = capsys.readouterr().err
    # Nothing else is printed: it is told before any work is done.
    assert said == f"error: MLflow at '{server.uri}' does not answer (Connection refused)\n"

    server.start()
    assert training.run("--resume") == 0
    training.misses_nothing(whole)
    assert "registered as models:/afterwards@champion" in capsys.readouterr().out


@pytest.mark.timeout(300)
def test_a_server_that_is_away_is_reported_at_once_and_an_evaluation_is_not_lost(
    tmp_path: Path,
    log: Path,
    server: TrackingServer,
    whole: Training,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log_evaluation = evaluation.log_evaluation

    def away(*arguments: Any) -> None:
        server.stop()
        log_evaluation(*arguments)

    monkeypatch.setattr(evaluation, "log_evaluation", away)
    commands.run("evaluate", "--config", str(whole.config), "--model", "models:/whole@champion")
    said = capsys.readouterr()
    assert "auc" in said.out
    out = whole.work / "evaluation"
    assert (out / "metrics.json").is_file()
    message = f"MLflow at '{server.uri}' does not answer (Connection refused)"
    assert said.err.splitlines()[-1] == f"{message}: the evaluation is in '{out}', but not in MLflow"

    training = Training(tmp_path, log, server, "start")
    assert training.run() == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not training.work.exists(), "no features are built for it"
