"""Slices of rows: by the values of a column, or by buckets of a number that hold about equally many rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from mmoe_rec.errors import UserError

MOST_VALUES = 1_000
"""Of a column, beyond which it is an id or a number, and no slice."""
SHOWN_VALUES = 20
"""That have the most rows; what is left is one slice."""
MISSING, OTHERS = "(missing)", "(all others)"
_BUCKET = re.compile(r"bucket\(\s*(.+?)\s*,\s*(\d+)\s*\)")

Counts = tuple[np.ndarray, np.ndarray]
"""Values, rising, and how many rows have each."""


@dataclass(frozen=True)
class SliceBy:
    """name: as it was asked for; column: of the rows; buckets: how many, None for the column's values."""

    name: str
    column: str
    buckets: int | None = None

    @staticmethod
    def of(word: str, option: str = "--slices") -> SliceBy:
        """From `COLUMN` or `bucket(COLUMN, N)`; option: that named it.

        Raises UserError for a number of buckets that there can't be.
        """
        found = _BUCKET.fullmatch(word.strip())
        if found is None:
            if word.startswith("bucket("):
                raise UserError(f"{option} {word}: expected 'bucket(COLUMN, N)', such as 'bucket(price, 10)'")
            return SliceBy(word, word)
        if not 2 <= int(found[2]) <= 100:
            raise UserError(f"{option} {word}: expected 2 to 100 buckets")
        return SliceBy(word, found[1], int(found[2]))

    def read(self, values: pa.Array) -> pa.Array:
        """Values as strings, or numbers as float64; null where they are missing.

        Raises ValueError, which says what the column holds, where it can't be sliced by.
        """
        values = values.dictionary_decode() if pt.is_dictionary(values.type) else values
        if pt.is_null(values.type):
            return pa.nulls(len(values), self._type)
        if pt.is_floating(values.type):
            values = pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
        if self.buckets is None:
            if pt.is_nested(values.type) or pt.is_binary(values.type):
                raise ValueError(f"holds {values.type}, which rows can't be sliced by")
            return values.cast(pa.string())
        if not (pt.is_integer(values.type) or pt.is_floating(values.type) or pt.is_boolean(values.type)):
            raise ValueError(f"holds {values.type}, and buckets are of numbers")
        return values.cast(pa.float64(), safe=False)

    @property
    def _type(self) -> pa.DataType:
        return pa.string() if self.buckets is None else pa.float64()

    def count(self, values: Sequence[pa.Array]) -> Counts:
        """Of several parts. Raises UserError where there are too many values."""
        joined = pa.chunked_array(values, self._type)
        counted = joined.drop_null().value_counts()
        names, rows = counted.field("values"), counted.field("counts").to_numpy()
        return self._joined(names.to_numpy(zero_copy_only=False), rows)

    def add(self, parts: Sequence[Counts]) -> Counts:
        """Of all parts together. Raises as `count`."""
        names, rows = (np.concatenate([part[side] for part in parts]) for side in (0, 1))
        return self._joined(names, rows)

    def _joined(self, names: np.ndarray, rows: np.ndarray) -> Counts:
        distinct, place = np.unique(names.astype(str) if self.buckets is None else names, return_inverse=True)
        counts = np.bincount(place, rows, len(distinct)).astype(np.int64)
        if self.buckets is None and len(distinct) > MOST_VALUES:
            raise UserError(
                f"column '{self.column}' has more than {MOST_VALUES:,} values, such as {str(distinct[0])!r}: too many "
                f"to slice by; slice by 'bucket({self.column}, 10)' if it is a number"
            )
        return _thinned(distinct, counts) if self.buckets is not None else (distinct, counts)

    def slices(self, counts: Counts) -> Slices:
        """Which there are, by the counts of all rows."""
        values, rows = counts
        if self.buckets is None:
            shown = values[np.sort(np.argsort(-rows, kind="stable")[:SHOWN_VALUES])]
            return Slices(self, tuple(str(each) for each in shown))
        if not len(values):
            return Slices(self, ())
        ends = np.searchsorted(np.cumsum(rows), rows.sum() * np.arange(1, self.buckets) / self.buckets)
        edges = np.unique(values[np.minimum(ends, len(values) - 1)])
        return Slices(self, (), tuple(float(each) for each in edges), (float(values[0]), float(values[-1])))


@dataclass(frozen=True)
class Slices:
    """The slices of a column. values: of those that are shown; edges: last value of each bucket but the last; ends: the
    least and the largest value. A bucket (1, 2] holds what is above 1 and at most 2."""

    by: SliceBy
    values: tuple[str, ...]
    edges: tuple[float, ...] = ()
    ends: tuple[float, float] = (0.0, 0.0)

    @property
    def names(self) -> list[str]:
        """Of all, in the order in which they are best read."""
        if self.by.buckets is None:
            shown = [each if each.strip() and each not in (MISSING, OTHERS) else f"'{each}'" for each in self.values]
            return [*shown, OTHERS, MISSING]
        bounds = [self.ends[0], *self.edges]
        tops = [*self.edges, self.ends[1]]
        if not self.edges:
            return ["all", MISSING]
        for digits in (6, 9, 12, 17):  # as many as tell them apart
            ends = [(f"{low:.{digits}g}", f"{top:.{digits}g}") for low, top in zip(bounds, tops, strict=True)]
            names = [f"{'(' if place else '['}{low}, {top}]" for place, (low, top) in enumerate(ends)]
            if len(set(names)) == len(names):
                break
        return [*names, MISSING]

    def rows(self, values: pa.Array) -> Mapping[str, np.ndarray]:
        """Name -> numbers of its rows among those that have the values; only slices that have rows."""
        missing = values.is_null().to_numpy(zero_copy_only=False)
        if self.by.buckets is None:
            place = pc.fill_null(pc.index_in(values, value_set=pa.array(self.values, pa.string())), len(self.values))
            number = place.to_numpy().astype(np.int64)
        else:
            number = np.searchsorted(self.edges, pc.fill_null(values, 0.0).to_numpy(), side="left")
        names = self.names
        number[missing] = len(names) - 1
        return {names[each]: np.flatnonzero(number == each) for each in np.unique(number)}


def _thinned(values: np.ndarray, rows: np.ndarray, most: int = 4_096) -> Counts:
    """At most so many values, each of which stands for those after the one before."""
    if len(values) <= most:
        return values, rows
    group = np.minimum((np.cumsum(rows) - 1) * most // rows.sum(), most - 1)
    last = np.append(np.flatnonzero(np.diff(group)), len(values) - 1)
    kept = np.union1d([0], last)
    sums = np.add.reduceat(rows, np.append(0, kept[:-1] + 1)) if len(kept) > 1 else np.array([rows.sum()])
    return values[kept], sums
