"""Trainings by the command, killed with SIGKILL at random moments and resumed until they end."""

import json
import random
import shutil
import sqlite3
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.fork_server import Command, run_command

CONFIG = "configs/synthetic.yaml"


@dataclass(frozen=True)
class Training:
    """A training in a folder of its own, on features that are copied there."""

    log: Path
    work: Path

    @property
    def command(self) -> list[str]:
        """The same before and after a kill."""
        command = ["mmoe_rec", "train", "--config", CONFIG, "--resume"]
        command += ["--data.log", str(self.log), "--data.work", str(self.work)]
        command += ["--tracking.uri", f"sqlite:///{self.work}/mlflow.db"]
        same = {"precision": "fp32", "products": "blas", "tables": "fbgemm", "threads": 1}
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

    def finish(self) -> float:
        """Runs to the end; the seconds that this took."""
        started = time.monotonic()
        process = self.start()
        assert process.wait() == 0, process.stderr
        return time.monotonic() - started

    def run_and_kill(self, seconds: float) -> bool:
        """Kills after so many seconds; False where the training came to its end before."""
        process = self.start()
        try:
            assert process.wait(seconds) == 0, process.stderr
        except TimeoutError:
            process.kill()
            return True
        return False

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


def whole_training(folder: Path, rows: int = 20_000) -> tuple[Training, float]:
    """A training that is not killed, on a synthetic log, and the seconds that it took."""
    log = folder / "log"
    built = ["--data.log", str(log), "--data.work", str(folder / "built")]
    for words in (
        ["pipelines.make_synthetic_log", "--out", str(log), "--rows", str(rows)],
        ["mmoe_rec", "features", "--config", CONFIG, *built],
    ):
        assert (made := run_command(*words)).returncode == 0, made.stderr
    whole = Training(log, folder / "whole")
    whole.prepare(folder / "built" / "features")
    return whole, whole.finish()


def kill_and_compare(whole: Training, kills: int, seconds: float, seed: int) -> dict[str, int]:
    """Kills trainings so many times, within `seconds` after each start, and compares each end with the whole one's.

    One that comes to its end is begun anew, until there were enough kills.
    """
    chance = random.Random(seed)
    training = replace(whole, work=whole.work.with_name("killed"))
    found = {"kills": 0, "ends": 0, "same_weights": 0, "same_metrics": 0, "one_run": 0}
    training.prepare(whole.work / "features")
    while True:
        if found["kills"] < kills and training.run_and_kill(chance.uniform(0, seconds)):
            found["kills"] += 1
            continue
        training.finish()  # or sees that it is finished
        found["ends"] += 1
        found["same_weights"] += training.weights == whole.weights
        found["same_metrics"] += training.validation() == whole.validation()
        found["one_run"] += training.query("select status from runs") == [("FINISHED",)]
        if found["kills"] == kills:
            return found
        training.prepare(whole.work / "features")
