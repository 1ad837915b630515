"""The latest known attributes of users and candidates, so that a request may hold ids only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from mmoe_rec.log.hashing import hash_column
from mmoe_rec.log.request_rows import Stored, StoredColumn
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time.arrays import one_array
from mmoe_rec.point_in_time.index import KeyIndex
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
