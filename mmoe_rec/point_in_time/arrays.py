"""Arrays of a table's columns, and lists of different lengths."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa


def one_array(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array; a single chunk is given as it is, while pyarrow would copy it."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def concat_tables(tables: Sequence[pa.Table]) -> pa.Table:
    """The rows of all tables (at least one), in order."""
    return pa.concat_tables(tables, promote_options="permissive").combine_chunks() if len(tables) > 1 else tables[0]


def rebatch(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The rows of all tables, in order, as tables of exactly `rows` rows, the last one fewer."""
    waiting, wanted = list[pa.Table](), rows
    for table in tables:
        while len(table) >= wanted:
            yield concat_tables([*waiting, table.slice(0, wanted)])
            table, waiting, wanted = table.slice(wanted), [], rows  # noqa: PLW2901 - the rest of it
        if len(table):
            waiting.append(table)
            wanted -= len(table)
    if waiting:
        yield concat_tables(waiting)


def fill_nulls(array: pa.Array, value: object) -> pa.Array:
    """An array with `value` for nulls; one without nulls is given as it is, while pyarrow would copy it."""
    return array.fill_null(value) if array.null_count else array


@dataclass(frozen=True)
class Ragged:
    """Any number of ids a row. values: (sum of lengths,) int64; lengths: (N,) int32."""

    values: np.ndarray
    lengths: np.ndarray

    @cached_property
    def offsets(self) -> np.ndarray:
        """(N + 1,) int64: the values of row i are `values[offsets[i] : offsets[i + 1]]`."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths, dtype=np.int64)])

    def slice(self, start: int, stop: int) -> "Ragged":
        """Rows start to stop (exclusive, at most N), as views."""
        return Ragged(self.values[self.offsets[start] : self.offsets[stop]], self.lengths[start:stop])

    def take(self, rows: np.ndarray) -> "Ragged":
        lengths = self.lengths.take(rows)
        return Ragged(self.values.take(concat_ranges(self.offsets.take(rows), lengths)), lengths)


def concat_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
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
class DedupedRagged:
    """Any number of ids a row, where many rows have the same: row i has list `number[i]`, (N,) int64."""

    lists: Ragged
    inverse: np.ndarray

    def take(self, rows: np.ndarray | slice) -> "DedupedRagged":
        return DedupedRagged(self.lists, self.inverse[rows])

    def expand(self) -> Ragged:
        """A list for each row."""
        return self.lists.take(self.inverse)

    @staticmethod
    def concat(parts: "Sequence[DedupedRagged]") -> "DedupedRagged":
        firsts = np.cumsum([0, *(len(part.lists.lengths) for part in parts)])[:-1]
        lists = concat_ragged([part.lists for part in parts])
        return DedupedRagged(lists, np.concatenate([p.inverse + first for p, first in zip(parts, firsts, strict=True)]))


def concat_ragged(parts: Sequence[Ragged]) -> Ragged:
    """The rows of all parts (at least one), in order."""
    return Ragged(np.concatenate([part.values for part in parts]), np.concatenate([part.lengths for part in parts]))
