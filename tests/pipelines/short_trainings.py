"""Trainings by the command on a small log, in this process: whole ones, and ones that end in the middle."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mmoe_rec.tracking.registry import ModelVersion, find_champion
from mmoe_rec.training.loop import Trainer
from tests.commands import refuse, run
from tests.pipelines.learnable_log import START, learnable_log, settings_tree

FIRST_DAY = {"train_end": "2024-03-06", "validation_end": "2024-03-08"}
SECOND_DAY = {"train_end": "2024-03-10", "validation_end": "2024-03-10T12:00"}
SMALL = {
    "precision": "fp32",
    "matmul_backend": "blas",
    "table_backend": "fbgemm",
    "threads": 1,
    "device": "cpu",
    "batch_size": 64,
    "epochs": 1,
    "checkpoint_steps": 5,
}
# 1,204 validation rows can't rule out small losses of a task.
LENIENT = {"max_metric_drop": 0.2, "resamples": 200}
RATES = {"learning_rate": 0.01, "table_learning_rate": 0.1}
SLOW = ("--training.learning_rate", "1e-9", "--training.table_learning_rate", "1e-9")
"""Words of trainings that learn next to nothing."""
NAME = "learnable"


@dataclass(frozen=True)
class World:
    """A folder with a log of eight days, of which two more may come, and all that is made of it."""

    folder: Path

    @staticmethod
    def of(folder: Path) -> "World":
        """Writes the first days of the log, and a settings file for them and for the days after."""
        (folder / "log").mkdir(parents=True)
        log = learnable_log(rows=6_000)
        new = log["time"].to_numpy() >= START + np.timedelta64(8, "D")
        pq.write_table(log.filter(pa.array(~new)), folder / "log" / "first.parquet")
        pq.write_table(log.filter(pa.array(new)), folder / "later.parquet")
        for name, split in (("first", FIRST_DAY), ("second", SECOND_DAY)):
            tree = settings_tree(folder, split=split, training=SMALL | RATES, evaluation=LENIENT)
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        return World(folder)

    def add_a_day(self) -> None:
        """The later file comes, and features are extended by it."""
        (self.folder / "later.parquet").rename(self.folder / "log" / "later.parquet")
        run("features", "--config", str(self.folder / "second.yaml"), "--extend")

    def train(self, *words: str, day: str = "first") -> None:
        run("train", "--config", str(self.folder / f"{day}.yaml"), *words)

    @property
    def uri(self) -> str:
        """Of MLflow's store."""
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    @property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(self.uri, self.uri)

    def champion(self, alias: str = "champion") -> ModelVersion | None:
        """The version that holds an alias."""
        return find_champion(NAME, alias, self.uri)

    def champion_version(self, alias: str = "champion") -> str | None:
        """The number of that version."""
        actual = self.champion(alias)
        return None if actual is None else actual.number

    @property
    def work(self) -> Path:
        """All that is made of the log."""
        return self.folder / "work"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.work / "checkpoints"


class Killed(BaseException):
    """As sudden as a kill."""


@contextmanager
def dying_after(steps: int, seed: int | None = None) -> Iterator[None]:
    """Trainings die after so many steps. seed: only those of this one."""
    step = Trainer._step

    def dying(trainer: Trainer, *arguments: Any) -> bool | None:
        actual = step(trainer, *arguments)
        if trainer.result.steps == steps and seed in (None, trainer.settings.seed):
            raise Killed
        return actual

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", dying)
        try:
            yield
        except Killed:
            return
    raise AssertionError(f"the training came to its end before step {steps}")


def refused(capsys: pytest.CaptureFixture, world: World, *words: str, day: str = "first") -> str:
    """The sentence with which a training refuses."""
    return refuse(capsys, "train", "--config", world.folder / f"{day}.yaml", *words)
