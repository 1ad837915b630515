"""The rows of requests: what describes a request stands once, and is spread over its candidates where rows need it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from mmoe_rec.log.columns import combine
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time.join import LookUps
from mmoe_rec.settings.schema import Schema

Function = Callable[[pa.Array], np.ndarray]


class StoredColumn:
    """A column of (S,) values that stays as it is: what functions make of each value is computed once, when first asked
    for, which costs a request nothing but a look at the results."""

    def __init__(self, values: pa.Array) -> None:
        self.values = values
        self._made: dict[Function, np.ndarray] = {}

    def each(self, function: Function, places: np.ndarray) -> np.ndarray:
        """(N,) what a function makes of the values at (N,) int64 places, and of null at place -1."""
        if function not in self._made:
            self._made[function] = np.append(function(self.values), function(pa.nulls(1, self.values.type)))
        return self._made[function].take(places, mode="wrap")


@dataclass(frozen=True)
class Stored:
    """N values of a stored column, by (N,) int64 places; -1 is null, or what is `given` there, (N,) values.

    known: (N,) bool which values are known, though they may not be stored; None where all that are known are stored.
    """

    column: StoredColumn
    places: np.ndarray
    given: pa.Array | None = None
    known: np.ndarray | None = None

    @property
    def unknown(self) -> np.ndarray:
        """(N,) bool whether a value is not known."""
        return self.places < 0 if self.known is None else (self.places < 0) & ~self.known

    def array(self) -> pa.Array:
        """The values."""
        if self.given is not None:
            return self.given
        return self.column.values.take(pa.array(self.places, mask=self.places < 0))

    def each(self, function: Function) -> np.ndarray:
        """(N,) what a function makes of each value."""
        made = self.column.each(function, self.places)
        if self.given is not None and len(unknown := np.flatnonzero(self.places < 0)):
            made[unknown] = function(self.given.take(pa.array(unknown)))
        return made

    def take(self, rows: np.ndarray) -> Stored:
        """The values of the given rows, (M,) int64, in the given order."""
        given = None if self.given is None else self.given.take(pa.array(rows))
        return Stored(self.column, self.places[rows], given, None if self.known is None else self.known[rows])


class FewRows(LogRows):
    """N rows given as canonical columns, which ask few of many events: each look-up is searched for itself."""

    _ask = staticmethod(LookUps.of_each)

    def __init__(self, columns: Mapping[str, pa.Array | Stored], rows: int, schema: Schema) -> None:
        self._columns, self._rows = columns, rows
        self._start(schema)

    def unknown(self, name: str) -> np.ndarray:
        """(N,) bool whether a column's values are none of those that are known; False where none are stored."""
        column = self._columns[name]
        return column.unknown if isinstance(column, Stored) else np.zeros(self._rows, bool)

    @cached_property
    def table(self) -> pa.Table:
        """All columns as Arrow."""
        return pa.table({name: self.coded(name) for name in self._columns})

    def __len__(self) -> int:
        return self._rows

    def has(self, name: str) -> bool:
        """Whether the rows have this column."""
        return name in self._columns

    def coded(self, name: str) -> pa.Array:
        """A column as one array, with strings as they are held."""
        column = self._columns[name]
        return column.array() if isinstance(column, Stored) else column

    def each(self, name: str, function: Function) -> np.ndarray:
        """(N,) what a function makes of a column's values."""
        column = self._columns[name]
        return column.each(function) if isinstance(column, Stored) else function(column)


class RequestRows(FewRows):
    """N candidates of R requests. shared: the R requests, with the columns of user and context; columns: of the
    candidates, N values each; of: (N,) int64 the request of each candidate."""

    def __init__(self, shared: FewRows, columns: Mapping[str, pa.Array | Stored], of: np.ndarray) -> None:
        super().__init__(columns, len(of), shared.schema)
        self.shared, self.of = shared, of
        self._spread: dict[str, pa.Array] = {}

    @cached_property
    def table(self) -> pa.Table:
        """All columns, of requests too, as Arrow."""
        return pa.table({name: self.coded(name) for name in (*self._columns, *self.shared._columns)})

    def has(self, name: str) -> bool:
        """Whether the candidates or the requests have this column."""
        return name in self._columns or self.shared.has(name)

    def coded(self, name: str) -> pa.Array:
        """A column as one array, with strings as they are held."""
        if name in self._columns:
            return super().coded(name)
        if name not in self._spread:
            self._spread[name] = self.shared.coded(name).take(pa.array(self.of))
        return self._spread[name]

    def taken(self, name: str, rows: np.ndarray) -> pa.Array:
        """A column's values of the given candidates, (M,) int64, in the given order."""
        columns, places = (self._columns, rows) if name in self._columns else (self.shared._columns, self.of[rows])
        column = columns[name]
        return column.take(places).array() if isinstance(column, Stored) else column.take(pa.array(places))

    def each(self, name: str, function: Function) -> np.ndarray:
        """(N,) what a function makes of a column's values."""
        return super().each(name, function) if name in self._columns else self.shared.each(name, function)[self.of]

    def times(self, name: str | None = None) -> np.ndarray:
        """(N,) int64, as of `LogRows`."""
        name = name or self.schema.columns.time
        if name in self._columns:
            return super().times(name)
        if name not in self._times:
            self._times[name] = self.shared.times(name)[self.of]
        return self._times[name]

    def hashes(self, names: Sequence[str]) -> np.ndarray:
        """(N,) uint64 hash of one column or of the combination of several."""
        key = tuple(names)
        if key not in self._hashes:
            if not any(name in self._columns for name in key):
                self._hashes[key] = self.shared.hashes(key)[self.of]
            elif len(key) > 1:
                self._hashes[key] = combine([self.hashes([name]) for name in key])
            else:
                return super().hashes(key)
        return self._hashes[key]
