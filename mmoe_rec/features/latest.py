"""The latest known attributes of users and candidates, so that a request may hold ids only.

`RecentValues` adds what has become known since the table was made. The latest row of each counts; of rows of one
instant the one with the greatest values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy
from functools import cached_property
from itertools import repeat
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from mmoe_rec.log.hashing import hash_column
from mmoe_rec.log.request_rows import Stored, StoredColumn
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time.arrays import one_array
from mmoe_rec.point_in_time.join import KeyIndex
from mmoe_rec.settings.schema import Schema


class LatestParts:
    """Last row of each key, collected batch by batch; a partial fit that is merged in any order.

    Of rows of one instant the one with the greatest values counts, column by column, whatever their order. Of a plain
    table, whose rows have no such key, only the types of columns are kept.
    """

    def __init__(self, schema: Schema, role: Literal["user", "candidate"]) -> None:
        self.key = schema.columns.user if role == "user" else schema.columns.candidate
        attributes = [column for column, of in schema.input_columns().items() if of == role]
        self.columns = [self.key, *(column for column in attributes if column != self.key)]
        self.is_known = self.key in schema.columns.names
        self._waiting: list[pa.Table] = []

    def add(self, rows: LogRows) -> None:
        """Takes the rows' values where they are later than those known."""
        # Numbers as names: columns of a log may have any name.
        table = rows.table.select(self.columns).rename_columns([str(place) for place in range(len(self.columns))])
        table = table.append_column(_TIME, pa.array(rows.times()))
        self._take(_latest(table if self.is_known else table.slice(0, 0)))

    def merge(self, other: LatestParts) -> None:
        """Takes another one's values where they are later."""
        for table in other._waiting:
            self._take(table)

    def _take(self, table: pa.Table) -> None:
        self._waiting.append(table)
        # Seldom enough to be cheap, and soon enough to hold not much more than the latest rows.
        if sum(map(len, self._waiting[1:])) > len(self._waiting[0]) + _ROWS_WAITING:
            self._waiting = [self._together()]

    def _together(self) -> pa.Table:
        if len(self._waiting) == 1:
            return self._waiting[0]
        return _latest(pa.concat_tables(self._waiting, promote_options="permissive").combine_chunks())

    def latest(self) -> tuple[pa.Table, np.ndarray]:
        """The last row of each key, in no order, and (K,) int64 its time, microseconds."""
        table = self._together()
        times = table.column(_TIME).to_numpy()
        return table.drop_columns([_TIME]).rename_columns(self.columns), times

    def finish(self) -> LatestValues:
        """The table of latest values, ordered by key."""
        table = self._together().sort_by(_KEY).combine_chunks()
        times = table.column(_TIME).to_numpy()
        return LatestValues(self.key, table.drop_columns([_TIME]).rename_columns(self.columns), times)


_ROWS_WAITING = 131_072
_TIME, _KEY = "time", "0"


def _latest(table: pa.Table) -> pa.Table:
    """The last row of each key, with strings decoded."""
    table = _without_repeats(table, [_TIME, _KEY])
    times = table.column(_TIME).to_numpy()
    group, keys = pd.factorize(hash_column(one_array(table.column(_KEY))))
    last = np.full(len(keys), np.iinfo(np.int64).min)
    np.maximum.at(last, group, times)
    rows = np.flatnonzero(times == last[group])
    table, group = _decoded(table.take(pa.array(rows))), group[rows]
    if len(rows) > len(keys):
        order = _order_by_values(table)
        result = np.empty(len(keys), np.int64)
        result[group[order]] = order  # of equal times the last, which is the greatest
        table = table.take(pa.array(result))
    return table


def _decoded(table: pa.Table) -> pa.Table:
    return pa.table(
        {
            name: column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
            for name, column in zip(table.column_names, table.columns, strict=True)
        }
    )


def _without_repeats(table: pa.Table, first: list[str]) -> pa.Table:
    """Leaves out rows that equal the row before in all columns: most rows of a request say the same of its user."""
    same = np.ones(max(len(table) - 1, 0), bool)
    for name in [*first, *(each for each in table.column_names if each not in first)]:
        if not same.any():
            return table
        same &= _equals_row_before(one_array(table.column(name)))
    return table.filter(pa.array(np.append(True, ~same))) if len(table) else table


def _equals_row_before(column: pa.Array) -> np.ndarray:
    if pa.types.is_null(column.type):
        return np.ones(len(column) - 1, bool)
    if pa.types.is_dictionary(column.type):
        column = column.indices
    if pa.types.is_nested(column.type):  # which Arrow cannot compare
        return np.zeros(len(column) - 1, bool)
    equal = pc.fill_null(pc.equal(column[1:], column[:-1]), False)
    both_null = pc.and_(column[1:].is_null(), column[:-1].is_null())
    return pc.or_(equal, both_null).to_numpy(zero_copy_only=False)


def _order_by_values(table: pa.Table) -> np.ndarray:
    """(N,) int64 rising order of rows by all their columns."""
    ranks = []
    for name in table.column_names:
        values = table.column(name).to_pandas()
        if pa.types.is_nested(table.schema.field(name).type):
            values = values.map(lambda each: None if each is None else repr(each.tolist()))
        ranks.append(pd.factorize(values, sort=True)[0])
    return np.lexsort(ranks[::-1])


class LatestValues:
    """One row a key. times: (rows,) int64 microseconds of the requests that they come from, where that is known."""

    def __init__(self, key: str, table: pa.Table, times: np.ndarray | None = None) -> None:
        self.key = key
        self.table = table
        self.times = times

    @cached_property
    def columns(self) -> dict[str, StoredColumn]:
        """The columns by name."""
        return {name: StoredColumn(one_array(self.table.column(name))) for name in self.table.column_names}

    @cached_property
    def _index(self) -> tuple[KeyIndex, np.ndarray]:
        hashes = hash_column(one_array(self.table.column(self.key)))
        order = np.argsort(hashes)
        return KeyIndex(hashes[order]), order.astype(np.int32)

    def find(self, keys: pa.Array) -> np.ndarray:
        """(N,) int64 row of each key, -1 for an unknown one."""
        return self._find(hash_column(keys))

    def _find(self, hashes: np.ndarray) -> np.ndarray:
        index, order = self._index
        found, place = index.find(hashes)
        rows = np.full(len(hashes), -1)
        rows[found] = order[place]
        return rows

    def completed(self, given: Mapping[str, pa.Array]) -> dict[str, pa.Array | Stored]:
        """Columns of N rows with those that are not given beside them, null for unknown keys. The keys are given."""
        return self._completed(given, hash_column(given[self.key]))

    def _completed(self, given: Mapping[str, pa.Array], hashes: np.ndarray) -> dict[str, pa.Array | Stored]:
        keys, rows = given[self.key], self._find(hashes)
        columns = {name: Stored(column, rows) for name, column in self.columns.items() if name not in given}
        # What is known of a key that is known is the same as of the given one.
        return {**given, **columns, self.key: Stored(self.columns[self.key], rows, keys)}


Values = tuple[Any, ...]
_Recent = tuple[int, Values | None]
_T = TypeVar("_T")
Changes = list[tuple[int, int, Values | None]]
"""Hash of a key, time of its latest row (microseconds), and its values, None where the table has the same."""


class RecentValues(LatestValues):
    """A table of latest values, with what came later of the users or candidates that were seen since.

    It never changes: `with_changes` gives another one, which shares most of it.

    times: (K,) int64 microseconds of the rows that the table's values are of; None where they are not known.
    """

    def __init__(self, key: str, table: pa.Table, times: np.ndarray | None = None) -> None:
        super().__init__(key, table)
        self.times = times
        # In each, the newest come last, and each is less than a quarter as long as the one before, so that few are
        # asked, and a change is copied few times.
        self._levels: tuple[dict[int, _Recent], ...] = ()
        self._others: tuple[dict[int, Values | None], ...] = ()  # of keys that have had other values than the table's

    def changes(self, rows: LogRows, schema: Schema, as_of: int) -> Changes:
        """What rows of the log, which have all columns of the table, say that the table does not.

        as_of: time of the table's last row, microseconds, which stands for those that are not known.
        """
        parts = LatestParts(schema, "user" if self.key == schema.columns.user else "candidate")
        parts.add(rows)
        table, times = parts.latest()
        hashes = hash_column(one_array(table.column(self.key)))
        place = self._find(hashes)
        known = place >= 0
        same = known.copy()
        for name in table.column_names:
            same &= _same(one_array(table.column(name)), one_array(self.table.column(name)), place)
        before = np.full(len(place), as_of) if self.times is None else _at(self.times, place)
        is_wanted = ~known | (times > before)
        for row in np.flatnonzero(known & (times == before) & ~same) if self.times is not None else ():
            values = tuple(column[int(row)].as_py() for column in table.columns)
            is_wanted[row] = self._is_greater(int(hashes[row]), values, None)
        news = table.filter(pa.array(is_wanted & ~same))
        return [
            *_changes(hashes, times, is_wanted & same, repeat(None)),
            *_changes(hashes, times, is_wanted & ~same, zip(*(each.to_pylist() for each in news.columns), strict=True)),
        ]

    def with_changes(self, changes: Changes) -> RecentValues:
        """The same with changes, which may be older than what is known."""
        newest: dict[int, _Recent] = {}
        for key, time, values in changes:
            before = newest.get(key) or self._known(key)
            if before is None or time > before[0] or (time == before[0] and self._is_greater(key, values, before[1])):
                newest[key] = time, values
        if not newest:
            return self
        others = {
            key: values
            for key, (_, values) in newest.items()
            if values is not None or any(key in level for level in self._others)
        }
        _ = self.columns, self._index  # made once, and shared
        changed = copy(self)
        changed._levels, changed._others = _grown(self._levels, newest), _grown(self._others, others)
        return changed

    def _known(self, key: int) -> _Recent | None:
        """What came later of a key's hash than the table."""
        for level in reversed(self._levels):
            if (found := level.get(key)) is not None:
                return found
        return None

    def _is_greater(self, key: int, values: Values | None, other: Values | None) -> bool:
        """Whether values win over others of the same key and instant; None is those of the table."""
        index, order = self._index
        place = order[index.find(np.array([key], np.uint64))[1]]
        row = None if not len(place) else self.table.slice(place[0], 1)
        own = () if row is None else tuple(column[0].as_py() for column in row.columns)
        return _rank(own if values is None else values) > _rank(own if other is None else other)

    def completed(self, given: Mapping[str, pa.Array]) -> dict[str, pa.Array | Stored]:
        """As of `LatestValues`, with what came later."""
        hashes = hash_column(given[self.key])
        columns = self._completed(given, hashes)
        if not self._others:
            return columns
        keys = hashes.tolist()
        asked, found = set(keys), dict[int, Values | None]()
        for level in self._others:
            found |= {key: level[key] for key in level.keys() & asked}
        later = {row: values for row, key in enumerate(keys) if (values := found.get(key)) is not None} if found else {}
        if not later:
            return columns
        mask = np.zeros(len(given[self.key]), bool)
        mask[list(later)] = True
        for number, name in enumerate(self.table.column_names):
            column = columns[name]
            if name == self.key:
                assert isinstance(column, Stored)
                columns[name] = Stored(column.column, column.places, column.given, mask)
            elif name not in given:
                assert isinstance(column, Stored)
                values = _replaced(column.array(), mask, [each[number] for each in later.values()])
                columns[name] = Stored(column.column, np.where(mask, -1, column.places), values)
        return columns


def _grown(levels: tuple[dict[int, _T], ...], newest: dict[int, _T]) -> tuple[dict[int, _T], ...]:
    after = [*levels, newest] if newest else [*levels]
    while len(after) > 1 and len(after[-2]) < 4 * len(after[-1]):
        after[-2:] = [after[-2] | after[-1]]
    return tuple(after)


def _changes(hashes: np.ndarray, times: np.ndarray, some: np.ndarray, values: Iterable[Values | None]) -> Changes:
    """Of some of the (N,) keys, and of as many values at least."""
    return list(zip(hashes[some].tolist(), times[some].tolist(), values, strict=False))


def _at(times: np.ndarray, place: np.ndarray) -> np.ndarray:
    """(N,) times at places, of which -1 is none."""
    return times[place] if len(times) else np.zeros(len(place), np.int64)


def _same(values: pa.Array, table: pa.Array, place: np.ndarray) -> np.ndarray:
    """(N,) bool whether values equal those of the table at places, of which -1 is none."""
    if pt.is_null(values.type) or pt.is_null(table.type) or pt.is_nested(values.type):
        theirs = table.take(pa.array(np.maximum(place, 0))).to_pylist() if len(table) else [None] * len(place)
        return np.array([one == other for one, other in zip(values.to_pylist(), theirs, strict=True)], bool)
    if not len(table):
        return np.zeros(len(place), bool)
    theirs = table.take(pa.array(np.maximum(place, 0)))
    equal = pc.fill_null(pc.equal(values, theirs.cast(values.type)), False)
    return pc.or_(equal, pc.and_(values.is_null(), theirs.is_null())).to_numpy(zero_copy_only=False)


def _rank(values: Values) -> tuple[Any, ...]:
    """What orders rows of one instant, column by column, nulls first."""
    return tuple((each is not None, repr(each) if isinstance(each, list) else each) for each in values)


def _replaced(column: pa.Array, mask: np.ndarray, values: list[Any]) -> pa.Array:
    """A column with other values where `mask` is true."""
    if pt.is_null(column.type) or pt.is_nested(column.type):
        every = column.to_pylist()
        for row, value in zip(np.flatnonzero(mask).tolist(), values, strict=True):
            every[row] = value
        return pa.array(every) if pt.is_null(column.type) else pa.array(every, column.type)
    return pc.replace_with_mask(column, pa.array(mask), pa.array(values, column.type))
