"""The latest known attributes of users and candidates, so that a request may hold ids only.

The latest row of each counts; of rows of one instant the one with the greatest hash. So parts of a log may be taken in
any order: each is a `LatestValues`, and so is what is known of several (`merged`).
"""

from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property, reduce
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from mmoe_rec.log.columns import hash_column, hash_rows
from mmoe_rec.log.rows import CachedColumn, CachedValues, LogRows
from mmoe_rec.point_in_time.arrays import one_array
from mmoe_rec.point_in_time.join import add_level, find_keys

LatestRole = Literal["user", "candidate"]


class LatestValues:
    """One row a key. times: (rows,) int64 microseconds of the requests that they come from.

    levels: what came later, the largest first; a later level says all that is known of its keys.
    """

    levels: "tuple[LatestValues, ...]" = ()

    def __init__(self, key: str, table: pa.Table, times: np.ndarray) -> None:
        self.key, self.table, self.times = key, table, times

    def __len__(self) -> int:
        return len(self.table)

    @staticmethod
    def from_rows(rows: LogRows, role: LatestRole) -> "LatestValues":
        """What rows of a log say last. Of a plain table, which has no such key, only the types of columns are kept."""
        schema = rows.schema
        key = schema.columns.user if role == "user" else schema.columns.candidate
        attributes = [column for column, of in schema.input_columns().items() if of == role]
        table, times = rows.table.select([key, *(column for column in attributes if column != key)]), rows.times()
        if key not in schema.columns.names:
            table, times = table.slice(0, 0), times[:0]
        return LatestValues(key, table, times)._latest()

    def merged(self, other: "LatestValues") -> "LatestValues":
        tables = pa.concat_tables([self.table, other.table], promote_options="permissive").combine_chunks()
        return LatestValues(self.key, tables, np.append(self.times, other.times))._latest()

    @staticmethod
    def merge_all(parts: "Sequence[LatestValues]") -> "LatestValues":
        """What all parts (at least one) say, ordered by key."""
        whole = reduce(LatestValues.merged, reversed(parts))
        return whole.take(pc.sort_indices(whole.table[whole.key]).to_numpy())

    def take(self, rows: np.ndarray) -> "LatestValues":
        return LatestValues(self.key, self.table.take(pa.array(rows)), self.times[rows])

    def _latest(self) -> "LatestValues":
        """The last row of each key, with strings decoded."""
        last = pd.Series(self.times).groupby(self.hashes).transform("max").to_numpy()
        values = self.take(np.flatnonzero(self.times == last))
        tied = pd.Series(values.hashes).duplicated(keep=False).to_numpy()
        rows = np.flatnonzero(tied)
        rows = rows[np.argsort(hash_rows(values.table.take(pa.array(rows))), kind="stable")]
        rows = rows[~pd.Series(values.hashes[rows]).duplicated(keep="last").to_numpy()]
        values = values.take(np.append(np.flatnonzero(~tied), rows))
        types = [kind.value_type if pt.is_dictionary(kind) else kind for kind in values.table.schema.types]
        values.table = values.table.cast(pa.schema(zip(values.table.column_names, types, strict=True)))
        return values

    def extended(self, rows: LogRows, role: LatestRole) -> "LatestValues":
        """These values and those of rows, which may be older. This object stays as it is, and shares most."""
        new = LatestValues.from_rows(rows, role)
        for known in (self, *self.levels):
            place = known.find(new.hashes)
            there = np.flatnonzero(place >= 0)
            there = there[known.times[place[there]] >= new.times[there]]
            if len(there):
                new = new.merged(known.take(place[there]))
        _ = self.columns  # with what functions make of them, which all that come after share
        result = copy(self)
        result.levels = add_level(self.levels, new, LatestValues.merged)
        _ = [level._index for level in result.levels]  # for which no request has to wait
        return result

    @cached_property
    def columns(self) -> dict[str, CachedColumn]:
        return {name: CachedColumn(one_array(self.table.column(name))) for name in self.table.column_names}

    @cached_property
    def hashes(self) -> np.ndarray:
        """(rows,) uint64 hashes of the keys."""
        return hash_column(one_array(self.table.column(self.key)))

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.hashes)
        return self.hashes[order], order.astype(np.int32)

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """(N,) int64 row of each key's hash, -1 for an unknown one; levels are not asked."""
        keys, order = self._index
        found, place = find_keys(keys, hashes)
        rows = np.full(len(hashes), -1)
        rows[found] = order[place]
        return rows

    def fill_missing_columns(self, given: Mapping[str, pa.Array]) -> dict[str, pa.Array | CachedValues]:
        """Columns of N rows with those that are not given beside them, null for unknown keys. The keys are given."""
        keys = given[self.key]
        hashes = hash_column(keys)
        rows, later = self.find(hashes), np.zeros(len(keys), bool)
        lacking = {name: CachedValues(column, rows) for name, column in self.columns.items() if name not in given}
        for level in reversed(self.levels):
            place = np.where(later, -1, level.find(hashes))
            later |= place >= 0
            there = np.flatnonzero(place >= 0)
            if len(there):
                new = level.table.take(pa.array(place[there]))
                lacking = {name: _replaced(each, there, one_array(new[name])) for name, each in lacking.items()}
        # What is known of a key that is known is the same as of the given one.
        return {**given, **lacking, self.key: CachedValues(self.columns[self.key], rows, keys, later)}

    def save(self, folder: Path, role: LatestRole) -> None:
        """Writes the values, and beside them the time of each."""
        pq.write_table(self.table, folder / f"latest.{role}.parquet", compression="zstd")
        times = pa.table({"time": pa.array(self.times)})
        pq.write_table(times, _times_of(folder, role), compression="zstd")

    @staticmethod
    def load(folder: Path, role: LatestRole, key: str) -> "LatestValues":
        """What `save` wrote."""
        table, times = pq.read_table(folder / f"latest.{role}.parquet"), pq.read_table(_times_of(folder, role))
        # Parquet calls what lists hold `element`, canonical columns `item`.
        types = [pa.list_(kind.value_type) if pt.is_list(kind) else kind for kind in table.schema.types]
        table = table.cast(pa.schema(zip(table.column_names, types, strict=True)))
        return LatestValues(key, table, times["time"].to_numpy())


def _times_of(folder: Path, role: LatestRole) -> Path:
    return folder / f"latest.{role}.times.parquet"


def _replaced(column: CachedValues, rows: np.ndarray, values: pa.Array) -> CachedValues:
    """A column of N values with other values in the given rows."""
    indices, before = column.indices.copy(), column.array()
    indices[rows] = -1
    index = np.arange(len(indices))
    index[rows] = len(indices) + np.arange(len(rows))
    kind = values.type if pt.is_null(before.type) else before.type
    after = pa.concat_arrays([before.cast(kind), values.cast(kind)]).take(pa.array(index))
    return CachedValues(column.column, indices, after)
