"""The command `train --resume`, stopped by signals at any moment, by itself and under torchrun."""

import json
import os
import random
import shutil
import signal
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.fork_server import Command, run_command
from tests.processes import children, until


@dataclass(frozen=True)
class Training:
    """A training in a folder of its own, on features that are copied there."""

    log: Path
    work: Path
    program: tuple[str, ...] = ("mmoe_rec",)

    @property
    def command(self) -> list[str]:
        """The same before and after a kill."""
        command = [*self.program, "train", "--config", "configs/synthetic.yaml", "--resume"]
        command += ["--data.log", str(self.log), "--data.work_dir", str(self.work)]
        command += ["--tracking.uri", f"sqlite:///{self.work}/mlflow.db"]
        same = {"precision": "fp32", "matmul_backend": "blas", "table_backend": "fbgemm", "threads": 1}
        training = same | {"batch_size": 64, "checkpoint_steps": 20}
        return [*command, *(f"--training.{name}={value}" for name, value in training.items())]

    def prepare(self, features: Path) -> None:
        """An empty folder but for the features."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        shutil.copytree(features, self.work / "features")

    def start(self) -> Command:
        """The command, which is not waited for."""
        return Command(self.command)

    def finish(self) -> None:
        process = self.start()
        assert process.wait() == 0, process.stderr

    @property
    def saved_step(self) -> int:
        """The step of the last checkpoint, 0 before there is one."""
        file = self.work / "checkpoints" / "latest.json"
        return int(json.loads(file.read_text())["step"]) if file.is_file() else 0

    @property
    def weights(self) -> bytes:
        """Of the model that is served."""
        return (self.work / "model" / "weights.safetensors").read_bytes()

    def query(self, text: str) -> list[tuple[Any, ...]]:
        """Of MLflow's store."""
        with sqlite3.connect(self.work / "mlflow.db") as store:
            return store.execute(text).fetchall()

    def validation(self) -> list[tuple[Any, ...]]:
        """Metrics of all validations, each as often as it was logged."""
        return self.query(
            "select key, step, value from metrics where key like 'validation/%' or key like 'best/%' order by 1, 2, 3"
        )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A training that is not killed, on a synthetic log."""
    folder = tmp_path_factory.mktemp("trainings")
    log = folder / "log"
    built = ["--data.log", str(log), "--data.work_dir", str(folder / "built")]
    for words in (
        ["pipelines.make_synthetic_log", "--out", str(log), "--rows", "20000"],
        ["mmoe_rec", "features", "--config", "configs/synthetic.yaml", *built],
    ):
        assert (made := run_command(*words)).returncode == 0, made.stderr
    whole = Training(log, folder / "whole")
    whole.prepare(folder / "built" / "features")
    whole.finish()
    return whole


def start_until(training: Training, moment: Callable[[Training], bool]) -> Command:
    """A training that has come to a moment, seen by the files that it writes."""
    process = training.start()
    until(lambda: moment(training) or process.poll() is not None, pause=0.01)
    assert process.poll() is None, f"it ended before\n{process.stderr}"
    return process


def has_begun(training: Training) -> bool:
    return (training.work / "checkpoints").is_dir()


def has_saved(training: Training) -> bool:
    return training.saved_step > 0


def has_written_the_model(training: Training) -> bool:
    return (training.work / "model").is_dir()


def test_kills_change_nothing(whole: Training) -> None:
    """Killed before the first checkpoint, twice within training, and while the model is written or registered."""
    chance = random.Random(3)
    training = replace(whole, work=whole.work.with_name("killed"))
    training.prepare(whole.work / "features")
    steps = []
    for moment in (has_begun, has_saved, has_saved, has_written_the_model):
        process = start_until(training, moment)
        with suppress(TimeoutError):
            process.wait(chance.uniform(0, 0.3))
        process.kill()
        steps.append(training.saved_step)
    assert steps[0] == 0, "the first kill came before a checkpoint"
    assert 0 < steps[1] <= steps[2] < steps[3], "training was hit"
    training.finish()
    assert training.weights == whole.weights
    assert training.validation() == whole.validation()
    begun = "select status from runs where run_uuid in (select run_uuid from metrics where key like 'validation/%')"
    assert training.query(begun) == [("FINISHED",)], "runs without a checkpoint stay open"


@pytest.mark.thorough
def test_sigterm_saves_and_the_same_command_goes_on(whole: Training) -> None:
    training = replace(whole, work=whole.work.with_name("terminated"))
    training.prepare(whole.work / "features")
    process = start_until(training, has_saved)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75, process.stderr
    assert process.stderr.splitlines()[-1].startswith("stopped: SIGTERM received, and step ")
    assert training.query("select status from runs") == [("KILLED",)]
    training.finish()
    assert training.weights == whole.weights
    assert training.validation() == whole.validation()
    assert training.query("select status from runs") == [("FINISHED",)]


@pytest.mark.thorough
def test_torchrun_starts_lost_ranks_again_and_they_go_on(whole: Training, tmp_path: Path) -> None:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]

    training = replace(whole, work=tmp_path / "work", program=(*torchrun, "-m", "mmoe_rec"))
    training.prepare(whole.work / "features")
    process = start_until(training, has_saved)
    os.kill(max(children(process.pid, "mmoe_rec")), signal.SIGKILL)
    assert process.wait() == 0, process.stderr
    assert "local_rank: " in process.stderr, "torchrun names it"
    assert "model: " in process.stdout
    assert training.query("select status from runs") == [("FINISHED",)]
    steps = training.query("select max(step) from metrics where key = 'train/learning_rate'")
    assert steps == whole.query("select max(step) from metrics where key = 'train/learning_rate'")
    assert len(training.validation()) == len(whole.validation())
