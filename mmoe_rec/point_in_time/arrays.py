"""Helpers for Arrow arrays and tables, and for lists of different lengths."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa


def one_array(column: pa.ChunkedArray) -> pa.Array:
    """Return a chunked `column` as one array. Unlike pyarrow's `combine_chunks`, don't copy a single chunk."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def concat_tables(tables: Sequence[pa.Table]) -> pa.Table:
    """Concatenate one or more `tables`. Types may differ, as with pyarrow's `promote_options="permissive"`."""
    return pa.concat_tables(tables, promote_options="permissive").combine_chunks() if len(tables) > 1 else tables[0]


def rebatch(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Yield the rows of all tables in order, as tables of equal size. The last table can be smaller.

    Args:
        tables: Tables with the same columns.
        rows: Number of rows per table.
    """
    pending, missing = list[pa.Table](), rows
    for table in tables:
        while len(table) >= missing:
            yield concat_tables([*pending, table.slice(0, missing)])
            table, pending, missing = table.slice(missing), [], rows  # noqa: PLW2901 - the remaining rows
        if len(table):
            pending.append(table)
            missing -= len(table)
    if pending:
        yield concat_tables(pending)


def fill_nulls(array: pa.Array, value: object) -> pa.Array:
    """Replace nulls. Unlike pyarrow's `fill_null`, don't copy an array without nulls.

    Args:
        array: Array of any type.
        value: Replacement for nulls.
    """
    return array.fill_null(value) if array.null_count else array


@dataclass(frozen=True)
class Ragged:
    """Lists of ids, one list for each of N rows.

    Attributes:
        values: (sum of lengths,) int64 ids of all lists.
        lengths: (N,) int32 lengths of the lists.
    """

    values: np.ndarray
    lengths: np.ndarray

    @cached_property
    def offsets(self) -> np.ndarray:
        """Bounds of the lists in `values`, shape (N + 1,), int64. Row i has `values[offsets[i] : offsets[i + 1]]`."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths, dtype=np.int64)])

    def slice(self, start: int, stop: int) -> "Ragged":
        """Return the lists of consecutive rows, without copying the ids.

        Args:
            start: First row.
            stop: End of the rows (exclusive, at most N).
        """
        return Ragged(self.values[self.offsets[start] : self.offsets[stop]], self.lengths[start:stop])

    def take(self, rows: np.ndarray) -> "Ragged":
        """Return copies of the lists of the rows with the indices `rows`, in this order."""
        lengths = self.lengths.take(rows)
        return Ragged(self.values.take(concat_ranges(self.offsets.take(rows), lengths)), lengths)


def concat_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate N ranges of integers, such as 3 to 5 and 8 to 9 into [3, 4, 5, 8, 9].

    Args:
        starts: (N,) first integer of each range.
        lengths: (N,) length of each range.

    Returns:
        (sum of lengths,) int64 integers.
    """
    if not lengths.all():
        non_empty = np.flatnonzero(lengths)
        starts, lengths = starts[non_empty], lengths[non_empty]
    ends = np.cumsum(lengths, dtype=np.int64)
    steps = np.ones(ends[-1] if len(ends) else 0, np.int64)
    steps[:1] = starts[:1]
    steps[ends[:-1]] = starts[1:] - starts[:-1] - lengths[:-1] + 1
    return np.cumsum(steps, out=steps)


@dataclass(frozen=True)
class DedupedRagged:
    """Lists of ids, one list for each of N rows. Rows with the same ids can share a stored list.

    Attributes:
        lists: Stored lists.
        inverse: (N,) int64 index in `lists` of each row's list.
    """

    lists: Ragged
    inverse: np.ndarray

    def take(self, rows: np.ndarray | slice) -> "DedupedRagged":
        """Return the lists of `rows`, which are indices or a slice, without copying stored lists."""
        return DedupedRagged(self.lists, self.inverse[rows])

    def expand(self) -> Ragged:
        """Return a copy with a separate list for each row."""
        return self.lists.take(self.inverse)

    @staticmethod
    def concat(parts: "Sequence[DedupedRagged]") -> "DedupedRagged":
        """Concatenate the rows of one or more `parts`."""
        firsts = np.cumsum([0, *(len(part.lists.lengths) for part in parts)])[:-1]
        lists = concat_ragged([part.lists for part in parts])
        return DedupedRagged(lists, np.concatenate([p.inverse + first for p, first in zip(parts, firsts, strict=True)]))


def concat_ragged(parts: Sequence[Ragged]) -> Ragged:
    """Concatenate the rows of one or more `parts`."""
    return Ragged(np.concatenate([part.values for part in parts]), np.concatenate([part.lengths for part in parts]))
