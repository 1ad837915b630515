"""Vocabularies: ids of a column -> rows of an embedding table.

Row 0 is the missing id, rows 1 to `oov_buckets` are hashed buckets that unknown ids share, known ids follow. So a
vocabulary can grow at its end without moving any row.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from mmoe_rec.errors import UserError
from mmoe_rec.log.hashing import hash_column
from mmoe_rec.point_in_time.arrays import filled, shared_index


class IdCounts:
    """How often each id occurs; a mergeable partial fit."""

    def __init__(self) -> None:
        self._parts: list[pa.Table] = []

    def add(self, values: pa.Array) -> None:
        """Counts the non-null values of an array of int64 or strings, dictionary-coded or not."""
        if pt.is_dictionary(values.type):
            counts = np.bincount(values.indices.drop_null().to_numpy(), minlength=len(values.dictionary))
            found = np.flatnonzero(counts)
            ids, counts = values.dictionary.take(pa.array(found)), counts[found]
        else:
            counted = values.drop_null().value_counts()
            ids, counts = counted.field("values"), counted.field("counts")
        if len(ids):
            self._parts.append(pa.table({"id": ids, "count": counts}))
        if len(self._parts) > 64:
            self._parts = [self._summed()]

    def merge(self, other: IdCounts) -> None:
        """Adds what another one counted."""
        self._parts += other._parts
        if len(self._parts) > 64:
            self._parts = [self._summed()]

    def to_table(self) -> pa.Table:
        """id and count, the most frequent ones first; ties are ordered by id."""
        if not self._parts:
            return pa.table({"id": pa.nulls(0), "count": pa.array([], pa.int64())})
        return self._summed().sort_by([("count", "descending"), ("id", "ascending")]).combine_chunks()

    @staticmethod
    def from_table(table: pa.Table) -> IdCounts:
        """The counts that `to_table` gave."""
        counts = IdCounts()
        counts._parts = [table] if table.num_rows else []
        return counts

    def _summed(self) -> pa.Table:
        summed = pa.concat_tables(self._parts).group_by("id").aggregate([("count", "sum")])
        return summed.rename_columns({"count_sum": "count"})

    def vocabulary(self, min_count: int, max_size: int | None, oov_buckets: int) -> Vocabulary:
        """The most frequent ids, in an order that does not depend on that of the rows."""
        if not self._parts:
            return Vocabulary(pa.array([], pa.int64()), oov_buckets)
        counted = self.to_table()
        counted = counted.filter(pc.greater_equal(counted["count"], min_count))
        return Vocabulary(counted["id"].combine_chunks()[:max_size], oov_buckets)


class Vocabulary:
    """Known ids, an int64 or string array in the order of their rows, and the number of hashed buckets."""

    def __init__(self, known: pa.Array, oov_buckets: int) -> None:
        self.known = known
        self.oov_buckets = oov_buckets

    def grown(self, counts: IdCounts, min_count: int, max_size: int | None) -> Vocabulary:
        """With rows at the end for ids that have become frequent, in the order by count; no known id moves."""
        new = counts.vocabulary(min_count, None, self.oov_buckets).known
        if len(self.known) and len(new):
            new = new.filter(pc.invert(pc.is_in(new, self.known)))
        if max_size is not None:
            new = new[: max(0, max_size - len(self.known))]
        if not len(new):
            return self
        return Vocabulary(pa.concat_arrays([self.known, new]) if len(self.known) else new, self.oov_buckets)

    @property
    def rows(self) -> int:
        """Rows of the embedding table."""
        return 1 + self.oov_buckets + len(self.known)

    @cached_property
    def _index(self) -> pd.Index:
        return shared_index(_as_numpy(self.known))

    def encode(self, values: pa.Array) -> np.ndarray:
        """(N,) int64 table rows of an array of int64 or strings, dictionary-coded or not.

        Raises UserError for ids of the other type.
        """
        kind = values.type.value_type if pt.is_dictionary(values.type) else values.type
        if pt.is_null(kind):
            return np.zeros(len(values), np.int64)
        if len(self.known) and kind != self.known.type:
            raise UserError(f"ids of type {kind} given where the model was trained on {self.known.type}")
        if pt.is_string(kind):
            encoded = values.dictionary_encode()
            rows = np.append(self._encode_known_or_hashed(encoded.dictionary), 0)
            return rows[filled(encoded.indices, -1).to_numpy()]
        rows = self._encode_known_or_hashed(filled(values, 0))
        if values.null_count:
            rows[values.is_null().to_numpy(zero_copy_only=False)] = 0
        return rows

    def _encode_known_or_hashed(self, values: pa.Array) -> np.ndarray:
        found = self._index.get_indexer(pd.Index(_as_numpy(values))) if len(self.known) else np.full(len(values), -1)
        rows = found.astype(np.int64) + 1 + self.oov_buckets
        unknown = found < 0
        if unknown.any():
            hashes = hash_column(values.filter(pa.array(unknown)))
            rows[unknown] = 1 + (hashes % np.uint64(self.oov_buckets)).astype(np.int64)
        return rows


def _as_numpy(values: pa.Array) -> np.ndarray:
    array = values.to_numpy(zero_copy_only=False)
    return array.astype(object) if pt.is_string(values.type) else array
