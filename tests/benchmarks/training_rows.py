"""The rows and sizes that the benchmark of training gives to every contestant. Needs numpy alone."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np

IDS, DIM, NUMBERS, TASKS = 20, 16, 5, 2
EXPERTS, EXPERT_UNITS, TOWER_UNITS = 8, (128, 64), (32,)
BATCH = 4096
WARM_UP = 10
ID_NAMES = [f"id{index}" for index in range(IDS)]
NUMBER_NAMES = [f"number{index}" for index in range(NUMBERS)]
T = TypeVar("T")


@dataclass(frozen=True)
class TrainingRows:
    """ids (N, IDS) int64 below `table_rows`, numbers (N, NUMBERS) float32, labels (N, TASKS) float32, 0 or 1."""

    ids: np.ndarray
    numbers: np.ndarray
    labels: np.ndarray

    def by_name(self) -> dict[str, np.ndarray]:
        """Ids and numbers, a column each."""
        ids = {name: np.ascontiguousarray(column) for name, column in zip(ID_NAMES, self.ids.T, strict=True)}
        numbers = {
            name: np.ascontiguousarray(column) for name, column in zip(NUMBER_NAMES, self.numbers.T, strict=True)
        }
        return ids | numbers


def draw(rows: int, table_rows: int) -> TrainingRows:
    """Uniform ids, so that every table is touched all over: the worst case for caches and for optimizers."""
    chance = np.random.default_rng(0)
    numbers = chance.normal(size=(rows, NUMBERS)).astype(np.float32)
    labels = (chance.random((rows, TASKS)) < 1 / (1 + np.exp(-numbers[:, :TASKS]))).astype(np.float32)
    return TrainingRows(chance.integers(0, table_rows, (rows, IDS)), numbers, labels)


def operations_per_row() -> int:
    """Floating-point operations of the dense part for one row: two for each weight, forward and twice that backward."""
    inputs = IDS * DIM + NUMBERS
    experts = EXPERTS * weights(inputs, *EXPERT_UNITS)
    gates = TASKS * weights(inputs, EXPERTS) + TASKS * EXPERTS * EXPERT_UNITS[-1]
    towers = TASKS * weights(EXPERT_UNITS[-1], *TOWER_UNITS, 1)
    return 3 * 2 * (experts + gates + towers)


def weights(*widths: int) -> int:
    """Of linear layers between these widths."""
    return sum(above * below for above, below in pairwise(widths))


class Clock:
    """Watches the batches that a contestant asks for: seconds between the end of its warm-up and the last one.

    seconds: after so many, no further batch is given, as some would take an hour.
    """

    def __init__(self, seconds: float = float("inf")) -> None:
        self.limit = seconds
        self.times: list[float] = []

    def watch(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches."""
        begin = time.perf_counter()
        for batch in batches:
            self.times.append(time.perf_counter())
            if self.times[-1] - begin > self.limit and len(self.times) > 3:
                return
            yield batch

    @property
    def rows_per_s(self) -> float:
        """From the last of the warm-up's batches, or the first where there are few."""
        first = WARM_UP if len(self.times) > 2 * WARM_UP else 1
        return (len(self.times) - 1 - first) * BATCH / (self.times[-1] - self.times[first])
