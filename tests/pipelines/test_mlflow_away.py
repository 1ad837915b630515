"""Trainings while MLflow's server is away: nothing of them is lost, and all is told in one sentence."""

import os
import socket
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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


class Door:
    """Passes connections on to a port of this machine while it is open."""

    def __init__(self, behind: int) -> None:
        self.behind, self.port = behind, free_port()
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []

    def open(self) -> None:
        """Connections are taken."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._take, args=(self._listener,), daemon=True).start()

    def shut(self) -> None:
        """Connections are refused, and those that are open break off."""
        assert self._listener is not None
        for each in [self._listener, *self._open]:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._open.clear()

    def _take(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self.behind))
                self._open += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    @staticmethod
    def _pass_on(one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        with suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)


class TrackingServer:
    """A server that runs. uri: by the door."""

    def __init__(self, folder: Path, door: Door) -> None:
        self.folder, self.door, self.uri = folder, door, f"http://127.0.0.1:{door.port}"

    def query(self, text: str, *values: Any) -> list[tuple[Any, ...]]:
        """Of its database."""
        with sqlite3.connect(self.folder / "store.db") as store:
            return store.execute(text, values).fetchall()


@contextmanager
def tracking_server(folder: Path) -> Iterator[TrackingServer]:
    """MLflow's server with its database and files in a folder, the door open."""
    port = free_port()
    programs = Path(sys.executable).parent
    words = [str(programs / "mlflow"), "server", "--backend-store-uri", f"sqlite:///{folder / 'store.db'}"]
    words += ["--artifacts-destination", str(folder / "files"), "--port", str(port), "--workers", "1"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    # Without its workers for jobs, which nobody here needs.
    env = {**own, "PATH": f"{programs}{os.pathsep}{own['PATH']}", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with running_program(words, f"http://127.0.0.1:{port}/health", folder / "server.log", cwd=folder, env=env):
        door = Door(port)
        door.open()
        try:
            yield TrackingServer(folder, door)
        finally:
            with suppress(AssertionError, OSError):
                door.shut()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    write_files(folder)
    return folder / "log"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    with tracking_server(tmp_path_factory.mktemp("server")) as running:
        yield running


class Training:
    """The command in a folder of its own. at_validation: number of a validation -> what happens before it."""

    def __init__(self, folder: Path, log: Path, server: TrackingServer, name: str) -> None:
        tree = settings_tree(folder, data={"log": str(log), "work": str(folder / "work")})
        tree |= {"name": name, "tracking": {"uri": server.uri}}
        self.work, self.server, self.name = folder / "work", server, name
        self.config = folder / "settings.yaml"
        self.config.write_text(yaml.safe_dump(tree), encoding="utf-8")

    def run(self, *words: str, at_validation: dict[int, Callable[[], None]] | None = None) -> int:
        """Its exit code."""
        validate, validations = Trainer._validate, iter(range(100))

        def watched(trainer: Trainer, *arguments: Any) -> Any:
            (at_validation or {}).get(next(validations), lambda: None)()
            return validate(trainer, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "_validate", watched)
            return commands.exit_code("train", "--config", self.config, *words)

    def metrics(self) -> list[tuple[Any, ...]]:
        """All of training and validation: name, step and value in the order in which they were measured."""
        return self.server.query(
            "select key, step, value from metrics join runs using (run_uuid) join experiments using (experiment_id) "
            "where experiments.name = ? and key not like '%waiting%' and key not like '%rows_per_s%' "
            "and key not like 'system/%' "
            "order by key, timestamp, step",
            self.name,
        )

    def versions(self) -> list[tuple[Any, ...]]:
        """Of the model."""
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
def test_a_server_that_stays_away_is_told_afterwards(
    tmp_path: Path,
    log: Path,
    server: TrackingServer,
    whole: Training,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mmoe_rec.training.train.PATIENCE_SECONDS", 1.5)
    training = Training(tmp_path, log, server, "afterwards")
    assert training.run(at_validation={0: server.door.shut}) == 75
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.splitlines()[-1] == (
        f"stopped: MLflow at '{server.uri}' does not answer (Connection refused); the trained model in "
        f"'{training.work / 'model'}' is whole but not registered: the same command with --resume does it once MLflow "
        "answers"
    )
    Ranker.load(training.work / "model")
    assert training.versions() == []

    assert training.run("--resume") == 2
    said = capsys.readouterr().err
    # Nothing else is printed: it is told before any work is done.
    assert said == f"error: MLflow at '{server.uri}' does not answer (Connection refused)\n"

    server.door.open()
    assert training.run("--resume") == 0
    training.misses_nothing(whole)
    assert "registered as models:/afterwards@champion" in capsys.readouterr().out


@pytest.mark.timeout(300)
def test_an_evaluation_is_not_lost(
    server: TrackingServer, whole: Training, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_evaluation = evaluation.log_evaluation

    def away(*arguments: Any) -> None:
        server.door.shut()
        try:
            log_evaluation(*arguments)
        finally:
            server.door.open()

    monkeypatch.setattr(evaluation, "log_evaluation", away)
    commands.run("evaluate", "--config", str(whole.config), "--model", "models:/whole@champion")
    said = capsys.readouterr()
    assert "auc" in said.out
    out = whole.work / "evaluation"
    assert (out / "metrics.json").is_file()
    told = f"MLflow at '{server.uri}' does not answer (Connection refused)"
    assert said.err.splitlines()[-1] == f"{told}: the evaluation is in '{out}', but not in MLflow"


def test_a_server_that_is_away_at_the_start_is_told_at_once(
    tmp_path: Path, log: Path, server: TrackingServer, capsys: pytest.CaptureFixture
) -> None:
    training = Training(tmp_path, log, server, "start")
    server.door.shut()
    try:
        assert training.run() == 2
    finally:
        server.door.open()
    assert capsys.readouterr().err == f"error: MLflow at '{server.uri}' does not answer (Connection refused)\n"
    assert not training.work.exists(), "no features are built for it"
