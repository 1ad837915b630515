"""Vocabularies, which map ids to rows of an embedding table. An id feature owns a vocabulary, and others can share it.

Row 0 is the missing id, rows 1 to `oov_buckets` are hashed buckets of unseen ids, and the ids of the vocabulary follow.
So a vocabulary can grow at its end without moving a row.
"""

from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt
from pydantic import Field

from mmoe_rec.errors import UserError
from mmoe_rec.log.columns import hash_column
from mmoe_rec.point_in_time.arrays import fill_nulls
from mmoe_rec.settings.log_columns import Role
from mmoe_rec.settings.schema import MAX_TABLE_ROWS, Feature, InputSemantics, Schema

# Look up this many ids or fewer one by one, because a vectorized call takes as long as 70 single lookups.
_MAX_SINGLE_LOOKUPS = 32


class IdCounts:
    """Counts of ids, which workers collect from parts of a log and merge."""

    def __init__(self, *parts: pa.Table) -> None:
        self._parts, self._ordered = list(parts), False

    def add(self, values: pa.Array) -> None:
        """Count the non-null `values`, int64 or strings, dictionary-encoded or not."""
        coded = values if pt.is_dictionary(values.type) else values.dictionary_encode()
        counts = np.bincount(coded.indices.drop_null().to_numpy(), minlength=len(coded.dictionary))
        if len(used := np.flatnonzero(counts)):
            self._add_parts([pa.table({"id": coded.dictionary.take(pa.array(used)), "count": counts[used]})])

    def merge(self, counts: "IdCounts") -> None:
        """Add other counts."""
        self._add_parts(counts._parts)

    def _add_parts(self, parts: list[pa.Table]) -> None:
        self._parts, self._ordered = self._parts + parts, False
        if len(self._parts) > 64:
            self._parts = [self._summed()]

    def to_table(self) -> pa.Table:
        """Return a table with id and count, the most frequent id first. Ties are ordered by id."""
        if not self._parts:
            return pa.table({"id": pa.array([], pa.int64()), "count": pa.array([], pa.int64())})
        if not self._ordered:
            by_count = self._summed().sort_by([("count", "descending"), ("id", "ascending")])
            self._parts, self._ordered = [by_count.combine_chunks()], True
        return self._parts[0]

    @staticmethod
    def from_table(table: pa.Table) -> "IdCounts":
        """Read a `table` that `to_table` returned."""
        return IdCounts(table) if table.num_rows else IdCounts()

    def _summed(self) -> pa.Table:
        summed = pa.concat_tables(self._parts).group_by("id").aggregate([("count", "sum")])
        return summed.rename_columns({"count_sum": "count"})


class VocabularyFeature(Feature):
    """Settings of a feature that has a vocabulary."""

    column: str = Field(description="column that the feature reads")
    min_count: int = Field(
        2, ge=1, description="occurrences in the training rows that an id needs to get its own table row"
    )
    max_size: int | None = Field(
        None, ge=1, lt=MAX_TABLE_ROWS, description="maximum number of ids; the most frequent ids are kept"
    )
    oov_buckets: int = Field(16, ge=1, lt=MAX_TABLE_ROWS, description="number of hashed buckets for unseen ids")
    table: str | None = Field(
        None, description="name of another id feature whose vocabulary and embedding table to share"
    )

    @property
    def table_owner(self) -> str | None:
        return self.table

    def check(self, name: str, schema: Schema) -> None:
        """Raise ValueError if `table` is not the name of a feature with its own table."""
        if self.table is not None:
            check_table_owner(schema, name, "table", self.table)

    def semantics(self, schema: Schema) -> InputSemantics:
        """Describe row 0 as the missing id, the next rows as buckets of unseen ids, and later rows as ids."""
        return meaning_of_ids(schema, tuple(self.reads()), self.table_owner or self)


def check_table_owner(
    schema: Schema,
    name: str,
    key: str,
    target: str,
    kind: type[VocabularyFeature] = VocabularyFeature,
    role: Role | None = None,
) -> None:
    """Raise ValueError if a setting of a feature doesn't name a feature with a vocabulary and table of its own.

    Args:
        schema: Schema of the settings.
        name: Name of the feature.
        key: Name of the setting, such as `of` or `table`.
        target: Value of the setting, the name of another feature.
        kind: Required kind of the other feature.
        role: Required role of the other feature, None for any role.

    Raises:
        ValueError: The other feature has another kind or role, or no table of its own.
    """
    candidates = [
        candidate
        for candidate, feature in schema.features.items()
        if isinstance(feature, kind) and feature.table is None and role in (None, schema.role_of(candidate))
    ]
    if target not in candidates:
        of_role = "" if role is None else f"of the {role} "
        raise ValueError(
            f"feature '{name}': {key} '{target}' is not an id feature {of_role}with a table of its own; "
            f"such features are: {', '.join(candidates) or 'none, add one'}"
        )


def meaning_of_ids(schema: Schema, columns: tuple[str, ...], owner: str | VocabularyFeature) -> InputSemantics:
    """Return the meaning of inputs whose ids are rows of a vocabulary's table.

    Args:
        schema: Schema of the settings.
        columns: Columns that the inputs are computed from.
        owner: Feature that owns the vocabulary, or the name of this feature.
    """
    feature = schema.features[owner] if isinstance(owner, str) else owner
    assert isinstance(feature, VocabularyFeature)
    return InputSemantics(columns, unknown=feature.oov_buckets)


class Vocabulary:
    """Ids of an id feature and their table rows. Other features can share the vocabulary.

    Attributes:
        name: Name of the feature that owns the vocabulary.
        feature: Settings of the feature.
        ids: int64 or string array. The first id has table row 1 + `oov_buckets`, the next ids have the next rows.
        counts: Counts of ids in training rows. `grow` adds the frequent ids.
    """

    def __init__(self, name: str, feature: VocabularyFeature) -> None:
        self.name, self.feature, self.counts = name, feature, IdCounts()
        self.set_ids(pa.array([], pa.int64()))

    def set_ids(self, ids: pa.Array) -> None:
        """Replace the ids.

        Raises:
            UserError: There are too many ids for a table.
        """
        self.ids = ids
        self.__dict__.pop("_index", None)
        if self.rows > MAX_TABLE_ROWS:
            raise UserError(
                f"feature '{self.name}' has {len(ids):,} ids and {self.feature.oov_buckets:,} `oov_buckets`; a table "
                f"has at most {MAX_TABLE_ROWS:,} rows: set `max_size`, or raise `min_count`"
            )

    def grow(self) -> int:
        """Add ids with `min_count` or more occurrences at the end, most frequent first. Return the number of new ids.

        Existing ids keep their rows. The result doesn't depend on the order of the log's rows.

        Raises:
            UserError: There are too many ids for a table.
        """
        feature, before = self.feature, len(self.ids)
        counted = self.counts.to_table()
        ids = counted.filter(pc.greater_equal(counted["count"], feature.min_count))["id"].combine_chunks()
        if before:
            new = ids.filter(pc.invert(pc.is_in(ids, self.ids))) if len(ids) else self.ids[:0]
            ids = pa.concat_arrays([self.ids, new])
        self.set_ids(ids if feature.max_size is None else ids[: max(feature.max_size, before)])
        return len(self.ids) - before

    @property
    def rows(self) -> int:
        """Number of rows of the embedding table."""
        return 1 + self.feature.oov_buckets + len(self.ids)

    @property
    def id_type(self) -> pa.DataType | None:
        """Type of the ids, None if the vocabulary is empty."""
        return self.ids.type if len(self.ids) else None

    @cached_property
    def _index(self) -> Any:
        import pandas as pd

        index = pd.Index(_as_numpy(self.ids))
        # pandas builds the hash table at the first lookup. Look up an id now, because two threads that share the first
        # lookup could read an unfinished table.
        index.get_indexer(index[:1])
        return index

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the index, because pandas pickles it without its hash table."""
        return {name: value for name, value in self.__dict__.items() if name != "_index"}

    def encode(self, values: pa.Array) -> np.ndarray:
        """Return the (N,) int64 table rows of `values`, int64 or strings, dictionary-encoded or not.

        Raises:
            UserError: The ids have another type than the vocabulary.
        """
        dtype = values.type.value_type if pt.is_dictionary(values.type) else values.type
        if pt.is_null(dtype):
            return np.zeros(len(values), np.int64)
        if dtype != (self.id_type or dtype):
            raise UserError(
                f"feature '{self.name}' (column '{self.feature.column}'): ids have type {dtype}, but the model was "
                f"trained on {self.id_type}. Convert the ids to {self.id_type}."
            )
        if pt.is_string(dtype):
            encoded = values.dictionary_encode()
            rows = np.append(self._encode_seen_or_hashed(encoded.dictionary), 0)
            return rows[fill_nulls(encoded.indices, -1).to_numpy()]
        rows = self._encode_seen_or_hashed(fill_nulls(values, 0))
        if values.null_count:
            rows[values.is_null().to_numpy(zero_copy_only=False)] = 0
        return rows

    def decode(self, rows: np.ndarray) -> list[int | None] | list[str | None]:
        """Return the ids of (N,) int64 table `rows`, None for the row of missing ids and for buckets of unseen ids."""
        positions = rows - 1 - self.feature.oov_buckets
        return self.ids.take(pa.array(positions, mask=positions < 0)).to_pylist()

    def _encode_seen_or_hashed(self, values: pa.Array) -> np.ndarray:
        buckets, positions = self.feature.oov_buckets, self._find(values)
        rows = positions.astype(np.int64) + 1 + buckets
        unseen = positions < 0
        if unseen.any():
            hashes = hash_column(values.filter(pa.array(unseen)))
            rows[unseen] = 1 + (hashes % np.uint64(buckets)).astype(np.int64)
        return rows

    def _find(self, values: pa.Array) -> np.ndarray:
        """Return the (N,) integer positions of ids in the vocabulary, -1 for unseen ids."""
        if not len(self.ids):
            return np.full(len(values), -1)
        if len(values) <= _MAX_SINGLE_LOOKUPS:
            return np.array([self._position(value) for value in values.to_pylist()], np.int64)
        positions: np.ndarray = self._index.get_indexer(_as_numpy(values))
        return positions

    def _position(self, value: int | str) -> int:
        try:
            return int(self._index.get_loc(value))
        except KeyError:
            return -1


def _as_numpy(values: pa.Array) -> np.ndarray:
    array = values.to_numpy(zero_copy_only=False)
    return array.astype(object) if pt.is_string(values.type) else array


def row_names(semantics: InputSemantics, table: str, rows: list[int | str], fitted: Path) -> list[str]:
    """Return readable names of table rows, such as the ids of a vocabulary.

    If the file of the vocabulary can't be read, names have the form `row NUMBER`.

    Args:
        semantics: Meaning of the inputs that use the table.
        table: Name of the table.
        rows: Numbers of table rows, or names that are returned as they are.
        fitted: Folder of the fitted features.
    """
    numbers = [row for row in rows if isinstance(row, int)]
    if semantics.row_name is not None:
        names = {row: semantics.row_name(table, row) for row in numbers}
    else:
        names = {row: f"row {row}" for row in numbers}
        with suppress(OSError, pa.ArrowException, KeyError):
            ids = pq.read_table(fitted / f"{table}.vocabulary.parquet", columns=["id"])["id"]
            positions = pa.array([row - semantics.first_seen_row for row in numbers], pa.int64())
            names |= zip(numbers, map(str, ids.take(positions).to_pylist()), strict=True)
    return [names[row] if isinstance(row, int) else row for row in rows]
