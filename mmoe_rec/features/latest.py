"""The latest known attributes of users and candidates, so that a request may hold ids only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pandas as pd
import pyarrow as pa

from mmoe_rec.features.hashing import hash_column
from mmoe_rec.features.rows import LogRows


class LatestParts:
    """Last row of each key, collected batch by batch; a mergeable partial fit."""

    def __init__(self, key: str, columns: Sequence[str]) -> None:
        self.key = key
        self.columns = [key, *(column for column in columns if column != key)]
        self._table: pa.Table | None = None
        self._times = np.empty(0, np.int64)

    def add(self, rows: LogRows) -> None:
        """Takes the rows' values where they are later than those known; at equal times the later row wins."""
        table = rows.table.select(self.columns)
        times = rows.times()
        if self._table is not None:
            table = pa.concat_tables([self._table, table], promote_options="permissive").combine_chunks()
            times = np.concatenate([self._times, times])
        keys = hash_column(table.column(self.key).combine_chunks())
        order = np.argsort(times, kind="stable")
        last = order[~pd.Series(keys[order]).duplicated(keep="last").to_numpy()]
        self._table, self._times = table.take(pa.array(last)), times[last]

    def finish(self) -> LatestValues:
        """The table of latest values, ordered by key."""
        assert self._table is not None
        return LatestValues(self.key, self._table.sort_by(self.key).combine_chunks())


class LatestValues:
    """One row a key."""

    def __init__(self, key: str, table: pa.Table) -> None:
        self.key = key
        self.table = table

    @cached_property
    def _index(self) -> pd.Index:
        return pd.Index(hash_column(self.table.column(self.key).combine_chunks()))

    def find(self, keys: pa.Array) -> np.ndarray:
        """(N,) int64 row of each key, -1 for an unknown one."""
        return self._index.get_indexer(pd.Index(hash_column(keys)))

    def values(self, column: str, found: np.ndarray) -> pa.Array:
        """(N,) values of a column at the rows that `find` gave; null for unknown keys."""
        return self.table.column(column).combine_chunks().take(pa.array(found, mask=found < 0))
