"""Encoded rows: what a fitted pipeline makes of a table of log rows, in the order of a `Layout`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from mmoe_rec.features.arrays import one_array
from mmoe_rec.features.layout import Layout


def label_types(layout: Layout) -> dict[str, pa.DataType]:
    """Name of each task and outcome -> type of its encoded labels.

    A regression's are float64: between float32 numbers of 1.7e9, as of times in seconds, there are steps of 128.
    """
    kinds = {task.name: task.kind for task in layout.tasks} | dict.fromkeys(layout.outcomes, "binary")
    return {name: pa.float64() if kind == "regression" else pa.float32() for name, kind in kinds.items()}


@dataclass(frozen=True)
class Ragged:
    """Any number of ids a row. values: (sum of lengths,) int64; lengths: (N,) int32."""

    values: np.ndarray
    lengths: np.ndarray

    @cached_property
    def offsets(self) -> np.ndarray:
        """(N + 1,) int64: the values of row i are `values[offsets[i] : offsets[i + 1]]`."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths, dtype=np.int64)])

    def slice(self, start: int, stop: int) -> Ragged:
        """Rows start to stop (exclusive, at most N), as views."""
        return Ragged(self.values[self.offsets[start] : self.offsets[stop]], self.lengths[start:stop])

    def take(self, rows: np.ndarray) -> Ragged:
        """The given rows, in the given order."""
        lengths = self.lengths[rows]
        return Ragged(self.values[consecutive(self.offsets[rows], lengths)], lengths)


def consecutive(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(sum of lengths,) int64: start, start + 1 and so on of each of N lists, one list after the other."""
    if not lengths.all():
        filled = np.flatnonzero(lengths)
        starts, lengths = starts[filled], lengths[filled]
    ends = np.cumsum(lengths, dtype=np.int64)
    steps = np.ones(ends[-1] if len(ends) else 0, np.int64)
    steps[:1] = starts[:1]
    steps[ends[:-1]] = starts[1:] - starts[:-1] - lengths[:-1] + 1
    return np.cumsum(steps, out=steps)


@dataclass(frozen=True)
class SharedRagged:
    """Any number of ids a row, where many rows have the same: row i has list `number[i]`, (N,) int64."""

    lists: Ragged
    number: np.ndarray

    def take(self, rows: np.ndarray | slice) -> SharedRagged:
        """The given rows, in the given order."""
        return SharedRagged(self.lists, self.number[rows])

    def expand(self) -> Ragged:
        """A list for each row."""
        return self.lists.take(self.number)

    @staticmethod
    def join(parts: Sequence[SharedRagged]) -> SharedRagged:
        """The rows of all parts, in order."""
        firsts = np.cumsum([0, *(len(part.lists.lengths) for part in parts)])[:-1]
        lists = join([part.lists for part in parts])
        assert isinstance(lists, Ragged)
        return SharedRagged(lists, np.concatenate([p.number + first for p, first in zip(parts, firsts, strict=True)]))


def join(parts: Sequence[np.ndarray | Ragged]) -> np.ndarray | Ragged:
    """The rows of all parts (at least one, all of one kind), in order."""
    ragged = [part for part in parts if isinstance(part, Ragged)]
    if not ragged:
        return np.concatenate([np.asarray(part) for part in parts])
    values = np.concatenate([part.values for part in ragged])
    return Ragged(values, np.concatenate([part.lengths for part in ragged]))


# Lists of ids in an encoded file.
IDS = pa.list_(pa.field("element", pa.int32(), nullable=False))


@dataclass(frozen=True)
class Encoded:
    """N encoded rows.

    ids: name -> (N,) int64 for one id a row, `Ragged` for any number; dense: (N, D) float32, columns as in
    `layout.dense`.
    """

    ids: dict[str, np.ndarray | Ragged]
    dense: np.ndarray

    def __len__(self) -> int:
        return len(self.dense)

    def slice(self, start: int, stop: int) -> Encoded:
        """Rows start to stop (exclusive, at most N), as views."""
        ids = {
            name: each.slice(start, stop) if isinstance(each, Ragged) else each[start:stop]
            for name, each in self.ids.items()
        }
        return Encoded(ids, self.dense[start:stop])

    def take(self, rows: np.ndarray) -> Encoded:
        """The given rows, in the given order."""
        ids = {name: each.take(rows) if isinstance(each, Ragged) else each[rows] for name, each in self.ids.items()}
        return Encoded(ids, self.dense[rows])

    def to_arrow(self, layout: Layout) -> dict[str, pa.Array]:
        """Columns `id.NAME` (int32 or list of int32) and `dense.NAME` (float32), none of which has nulls."""
        columns: dict[str, pa.Array] = {}
        for each in layout.ids:
            value = self.ids[each.name]
            if isinstance(value, Ragged):
                offsets = np.concatenate([[0], np.cumsum(value.lengths)]).astype(np.int32)
                values = pa.array(value.values.astype(np.int32, copy=False))
                columns[f"id.{each.name}"] = pa.ListArray.from_arrays(pa.array(offsets), values, type=IDS)
            else:
                columns[f"id.{each.name}"] = pa.array(value.astype(np.int32))
        for index, dense in enumerate(layout.dense):
            columns[f"dense.{dense.name}"] = pa.array(np.ascontiguousarray(self.dense[:, index]))
        return columns

    @staticmethod
    def from_arrow(table: pa.Table, layout: Layout) -> Encoded:
        """Reads the columns that `to_arrow` made."""
        ids: dict[str, np.ndarray | Ragged] = {}
        for each in layout.ids:
            column = one_array(table.column(f"id.{each.name}"))
            if each.many:
                lengths = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int32)
                ids[each.name] = Ragged(column.flatten().to_numpy().astype(np.int64), lengths)
            else:
                ids[each.name] = column.to_numpy().astype(np.int64)
        dense = np.empty((table.num_rows, len(layout.dense)), np.float32)
        for index, each_dense in enumerate(layout.dense):
            dense[:, index] = table.column(f"dense.{each_dense.name}").to_numpy()
        return Encoded(ids, dense)
