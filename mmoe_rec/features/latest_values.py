"""The latest attributes of users and candidates, so that a request can contain ids only.

If the last rows of a user or candidate have equal times, the row with the largest hash counts as the latest. So the
parts of a log can be merged in any order.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
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


@dataclass(eq=False)
class LatestValues:
    """The latest attributes of users or candidates.

    Attributes:
        key: Name of the column with the IDs of users or candidates.
        table: Key and attributes, one row per key.
        times: Request time of each row of `table`, (rows,) int64 microseconds.
        levels: Rows that `extended` added, largest level first. For their keys, they replace all values in `table`.
    """

    key: str
    table: pa.Table
    times: np.ndarray
    levels: "tuple[LatestValues, ...]" = ()

    def __len__(self) -> int:
        return len(self.table)

    @staticmethod
    def from_rows(rows: LogRows, role: LatestRole) -> "LatestValues":
        """Return the latest attributes in rows of a log.

        Args:
            rows: Rows of the log. If the log has no users or candidates (a plain table), the result has no rows.
            role: Whether to read the attributes of users or of candidates.
        """
        schema = rows.schema
        key = schema.columns.user if role == "user" else schema.columns.candidate
        attributes = [column for column, owner in schema.input_columns().items() if owner == role]
        table, times = rows.table.select([key, *(column for column in attributes if column != key)]), rows.times()
        if key not in schema.columns.names:
            table, times = table.slice(0, 0), times[:0]
        return LatestValues(key, table, times)._latest()

    def merged(self, values: "LatestValues") -> "LatestValues":
        """Return the latest attributes in the tables of both objects, without levels."""
        table = pa.concat_tables([self.table, values.table], promote_options="permissive").combine_chunks()
        return LatestValues(self.key, table, np.append(self.times, values.times))._latest()

    @staticmethod
    def merge_all(parts: "Sequence[LatestValues]") -> "LatestValues":
        """Merge one or more `parts` and sort the result by key."""
        merged = reduce(LatestValues.merged, reversed(parts))
        return merged.take(pc.sort_indices(merged.table[merged.key]).to_numpy())

    def take(self, rows: np.ndarray) -> "LatestValues":
        """Return the values at the indices `rows`, without levels."""
        return LatestValues(self.key, self.table.take(pa.array(rows)), self.times[rows])

    def _latest(self) -> "LatestValues":
        """Return the last row of each key, with decoded columns instead of dictionary-encoded columns."""
        last = pd.Series(self.times).groupby(self.hashes).transform("max").to_numpy()
        values = self.take(np.flatnonzero(self.times == last))
        tied = pd.Series(values.hashes).duplicated(keep=False).to_numpy()
        rows = np.flatnonzero(tied)
        rows = rows[np.argsort(hash_rows(values.table.take(pa.array(rows))), kind="stable")]
        rows = rows[~pd.Series(values.hashes[rows]).duplicated(keep="last").to_numpy()]
        values = values.take(np.append(np.flatnonzero(~tied), rows))
        types = [dtype.value_type if pt.is_dictionary(dtype) else dtype for dtype in values.table.schema.types]
        values.table = values.table.cast(pa.schema(zip(values.table.column_names, types, strict=True)))
        return values

    def extended(self, rows: LogRows, role: LatestRole) -> "LatestValues":
        """Return a copy with additional rows in `levels`. The copy shares most data with the original.

        Args:
            rows: Rows of a log. Rows that are older than the current values of their key don't replace them.
            role: Whether to read the attributes of users or of candidates.
        """
        new = LatestValues.from_rows(rows, role)
        for level in (self, *self.levels):
            index = level.find(new.hashes)
            newer = np.flatnonzero(index >= 0)
            newer = newer[level.times[index[newer]] >= new.times[newer]]
            if len(newer):
                new = new.merged(level.take(index[newer]))
        # Convert the columns now, so that all later copies share them.
        _ = self.columns
        result = copy(self)
        result.levels = add_level(self.levels, new, LatestValues.merged)
        # Build the indices now, so that no request has to wait for them.
        _ = [level._index for level in result.levels]
        return result

    @cached_property
    def columns(self) -> dict[str, CachedColumn]:
        """Columns of `table` by name."""
        return {name: CachedColumn(one_array(self.table.column(name))) for name in self.table.column_names}

    @cached_property
    def hashes(self) -> np.ndarray:
        """(rows,) uint64 hashes of the keys in `table`."""
        return hash_column(one_array(self.table.column(self.key)))

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.hashes)
        return self.hashes[order], order.astype(np.int32)

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """Return the (N,) int64 row numbers in `table` of N hashed keys, -1 for keys that `table` lacks.

        `levels` are not searched.
        """
        keys, order = self._index
        queries, positions = find_keys(keys, hashes)
        rows = np.full(len(hashes), -1)
        rows[queries] = order[positions]
        return rows

    def fill_missing_columns(self, given: Mapping[str, pa.Array]) -> dict[str, pa.Array | CachedValues]:
        """Return the columns `given` in a request, which include the key, and add the attributes that `given` lacks.

        Added attributes have the latest values of each key, null for an unseen key.
        """
        keys = given[self.key]
        hashes = hash_column(keys)
        rows, in_level = self.find(hashes), np.zeros(len(keys), bool)
        missing = {name: CachedValues(column, rows) for name, column in self.columns.items() if name not in given}
        for level in reversed(self.levels):
            index = np.where(in_level, -1, level.find(hashes))
            in_level |= index >= 0
            hits = np.flatnonzero(index >= 0)
            if len(hits):
                new = level.table.take(pa.array(index[hits]))
                missing = {name: _with_values(column, hits, one_array(new[name])) for name, column in missing.items()}
        # A stored key equals the key of the request, so cached results for stored keys, such as hashes, can be reused.
        return {**given, **missing, self.key: CachedValues(self.columns[self.key], rows, keys, in_level)}

    def save(self, folder: Path, role: LatestRole) -> None:
        """Write the attributes and, in a second file, their times. Levels are not written.

        Args:
            folder: Existing folder.
            role: Whether the values are of users or of candidates, for the names of the files.
        """
        pq.write_table(self.table, folder / f"latest.{role}.parquet", compression="zstd")
        times = pa.table({"time": pa.array(self.times)})
        pq.write_table(times, _times_file(folder, role), compression="zstd")

    @staticmethod
    def load(folder: Path, role: LatestRole, key: str) -> "LatestValues":
        """Read values that `save` wrote.

        Args:
            folder: Folder of the files.
            role: Whether to read the values of users or of candidates.
            key: Name of the key column.
        """
        table, times = pq.read_table(folder / f"latest.{role}.parquet"), pq.read_table(_times_file(folder, role))
        # Parquet files name the values of lists `element`. The Arrow types of log columns name them `item`.
        types = [pa.list_(dtype.value_type) if pt.is_list(dtype) else dtype for dtype in table.schema.types]
        table = table.cast(pa.schema(zip(table.column_names, types, strict=True)))
        return LatestValues(key, table, times["time"].to_numpy())


def _times_file(folder: Path, role: LatestRole) -> Path:
    return folder / f"latest.{role}.times.parquet"


def _with_values(column: CachedValues, rows: np.ndarray, values: pa.Array) -> CachedValues:
    """Return a copy of a column of N values with new `values` at the indices `rows`."""
    indices, before = column.indices.copy(), column.array()
    indices[rows] = -1
    index = np.arange(len(indices))
    index[rows] = len(indices) + np.arange(len(rows))
    dtype = values.type if pt.is_null(before.type) else before.type
    after = pa.concat_arrays([before.cast(dtype), values.cast(dtype)]).take(pa.array(index))
    return CachedValues(column.column, indices, after)
