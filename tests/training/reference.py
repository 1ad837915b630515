"""Tables by their definition: sums of rows, and row-wise Adagrad as a loop over rows in float64."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class ReferenceTables:
    """weights, momentum: of each table, (rows, D) and (rows,) float64; table_of: each input's table."""

    weights: list[np.ndarray]
    momentum: list[np.ndarray]
    table_of: Sequence[int]
    eps: float = 1e-8

    def look_up(self, bags: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
        """(B, sum of widths). bags: of each input, the ids of each row."""
        columns = []
        for table, rows in zip(self.table_of, bags, strict=True):
            weights = self.weights[table]
            columns.append(np.stack([weights[list(ids)].sum(0) for ids in rows]))
        return np.concatenate(columns, axis=1)

    def update(self, bags: Sequence[Sequence[Sequence[int]]], gradient: np.ndarray, rate: float) -> None:
        """One step. gradient: (B, sum of widths)."""
        sums: dict[tuple[int, int], np.ndarray] = defaultdict(lambda: np.zeros(0))
        first = 0
        for table, rows in zip(self.table_of, bags, strict=True):
            width = self.weights[table].shape[1]
            for row, ids in enumerate(rows):
                part = gradient[row, first : first + width].astype(np.float64)
                for each in ids:
                    before = sums.get((table, each))
                    sums[table, each] = part if before is None else before + part
            first += width
        for (table, row), each in sums.items():
            self.momentum[table][row] += np.square(each).mean()
            self.weights[table][row] -= rate * each / (np.sqrt(self.momentum[table][row]) + self.eps)


def random_bags(random: np.random.Generator, rows: Sequence[int], batch: int, longest: int) -> list[list[list[int]]]:
    """Of each input, the ids of each row of a batch: 0 to `longest`, many of them the same; one each if it is 0."""
    bags = []
    for most in rows:
        lengths = random.integers(0, longest + 1, batch) if longest else np.ones(batch, np.int64)
        bags.append([np.minimum(random.geometric(0.1, length) - 1, most - 1).tolist() for length in lengths])
    return bags


def flat(bags: Sequence[Sequence[Sequence[int]]]) -> tuple[list[int], list[int]]:
    """The ids, key-major, and the offsets at which each row's begin."""
    ids = [each for rows in bags for row in rows for each in row]
    lengths = [len(row) for rows in bags for row in rows]
    return ids, [0, *np.cumsum(lengths, dtype=int).tolist()]
