"""Vocabularies: ids of a column -> rows of an embedding table; an id feature owns one, and others may share it.

Row 0 is the missing id, rows 1 to `oov_buckets` are hashed buckets that unknown ids share, known ids follow. So a
vocabulary can grow at its end without moving any row.
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

_FEW = 32  # ids that are found one by one, as a call for any number of them takes as long as 70


class IdCounts:
    """How often each id occurs; a mergeable partial fit."""

    def __init__(self, *parts: pa.Table) -> None:
        self._parts, self._ordered = list(parts), False

    def add(self, values: pa.Array) -> None:
        """Counts the non-null values of an array of int64 or strings, dictionary-coded or not."""
        coded = values if pt.is_dictionary(values.type) else values.dictionary_encode()
        counts = np.bincount(coded.indices.drop_null().to_numpy(), minlength=len(coded.dictionary))
        if len(there := np.flatnonzero(counts)):
            self._take([pa.table({"id": coded.dictionary.take(pa.array(there)), "count": counts[there]})])

    def merge(self, other: "IdCounts") -> None:
        self._take(other._parts)

    def _take(self, parts: list[pa.Table]) -> None:
        self._parts, self._ordered = self._parts + parts, False
        if len(self._parts) > 64:
            self._parts = [self._summed()]

    def to_table(self) -> pa.Table:
        """id and count, the most frequent ones first; ties are ordered by id."""
        if not self._parts:
            return pa.table({"id": pa.array([], pa.int64()), "count": pa.array([], pa.int64())})
        if not self._ordered:
            by_count = self._summed().sort_by([("count", "descending"), ("id", "ascending")])
            self._parts, self._ordered = [by_count.combine_chunks()], True
        return self._parts[0]

    @staticmethod
    def from_table(table: pa.Table) -> "IdCounts":
        return IdCounts(table) if table.num_rows else IdCounts()

    def _summed(self) -> pa.Table:
        summed = pa.concat_tables(self._parts).group_by("id").aggregate([("count", "sum")])
        return summed.rename_columns({"count_sum": "count"})


class VocabularyFeature(Feature):
    """A feature of ids: the keys of its section that shape a vocabulary."""

    column: str = Field(description="column that the feature reads")
    min_count: int = Field(2, ge=1, description="times an id must occur in the training rows to get a row of its own")
    max_size: int | None = Field(None, ge=1, lt=MAX_TABLE_ROWS, description="keep only this many most frequent ids")
    oov_buckets: int = Field(16, ge=1, lt=MAX_TABLE_ROWS, description="hashed buckets that unknown ids share")
    table: str | None = Field(
        None, description="name of another id feature whose vocabulary and embedding table this one shares"
    )

    @property
    def table_owner(self) -> str | None:
        return self.table

    def check(self, name: str, schema: Schema) -> None:
        """Raises ValueError where `table` does not name a feature with a table of its own."""
        if self.table is not None:
            check_table_owner(schema, name, "table", self.table)

    def semantics(self, schema: Schema) -> InputSemantics:
        """Row 0 is the missing id, the buckets of unknown ids follow, then the known ones."""
        return meaning_of_ids(schema, tuple(self.reads()), self.table_owner or self)


def check_table_owner(
    schema: Schema,
    name: str,
    key: str,
    target: str,
    kind: type[VocabularyFeature] = VocabularyFeature,
    role: Role | None = None,
) -> None:
    """Raises ValueError where `target`, which `key` of a feature names, is not of that kind and role, or does not have
    its own table."""
    possible = [
        each
        for each, feature in schema.features.items()
        if isinstance(feature, kind) and feature.table is None and role in (None, schema.role_of(each))
    ]
    if target not in possible:
        of_role = "" if role is None else f"of the {role} "
        raise ValueError(
            f"feature '{name}': {key} '{target}' is not an id feature {of_role}with a table of its own; "
            f"such features are: {', '.join(possible) or 'none, add one'}"
        )


def meaning_of_ids(schema: Schema, columns: tuple[str, ...], owner: str | VocabularyFeature) -> InputSemantics:
    """The meaning of rows of a table of ids; owner: its feature, or that feature's name."""
    feature = schema.features[owner] if isinstance(owner, str) else owner
    assert isinstance(feature, VocabularyFeature)
    return InputSemantics(columns, unknown=feature.oov_buckets)


class Vocabulary:
    """Ids of an id feature, which other features may share, and their rows of its table.

    ids: int64 or string array, in the order of their rows; counts: what it grows from.
    """

    def __init__(self, name: str, feature: VocabularyFeature) -> None:
        self.name, self.feature, self.counts = name, feature, IdCounts()
        self.set_ids(pa.array([], pa.int64()))

    def set_ids(self, ids: pa.Array) -> None:
        """Replaces the ids. Raises UserError where they are too many for a table."""
        self.ids = ids
        self.__dict__.pop("_index", None)
        if self.rows > MAX_TABLE_ROWS:
            raise UserError(
                f"feature '{self.name}' has {len(ids):,} ids and {self.feature.oov_buckets:,} `oov_buckets`; a table "
                f"has at most {MAX_TABLE_ROWS:,} rows: set `max_size`, or raise `min_count`"
            )

    def grow(self) -> int:
        """Adds rows at the end for ids whose counts suffice, by falling count, and gives their number; no known id
        moves, and the order of the log's rows does not matter. Raises as `set_ids`."""
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
        return 1 + self.feature.oov_buckets + len(self.ids)

    @property
    def id_type(self) -> pa.DataType | None:
        """The type of the known ids, None where there are none."""
        return self.ids.type if len(self.ids) else None

    @cached_property
    def _index(self) -> Any:
        """Of the ids, with its hash table, which pandas builds at the first question: a second thread would look into
        the unfinished table, and miss what is not there yet."""
        import pandas as pd  # which --help does not need

        index = pd.Index(_as_numpy(self.ids))
        index.get_indexer(index[:1])
        return index

    def __getstate__(self) -> dict[str, Any]:
        """Without the index, which pandas would send without its table."""
        return {name: value for name, value in self.__dict__.items() if name != "_index"}

    def encode(self, values: pa.Array) -> np.ndarray:
        """(N,) int64 table rows of an array of int64 or strings, dictionary-coded or not.

        Raises UserError naming the feature for ids of another type than trained on.
        """
        kind = values.type.value_type if pt.is_dictionary(values.type) else values.type
        if pt.is_null(kind):
            return np.zeros(len(values), np.int64)
        if kind != (self.id_type or kind):
            raise UserError(
                f"feature '{self.name}' (column '{self.feature.column}'): ids of type {kind} given where the model was "
                f"trained on {self.id_type}"
            )
        if pt.is_string(kind):
            encoded = values.dictionary_encode()
            rows = np.append(self._encode_known_or_hashed(encoded.dictionary), 0)
            return rows[fill_nulls(encoded.indices, -1).to_numpy()]
        rows = self._encode_known_or_hashed(fill_nulls(values, 0))
        if values.null_count:
            rows[values.is_null().to_numpy(zero_copy_only=False)] = 0
        return rows

    def decode(self, rows: np.ndarray) -> list[int | None] | list[str | None]:
        """The ids at (N,) int64 table rows; None for the missing id, and for those that share a bucket."""
        known = rows - 1 - self.feature.oov_buckets
        return self.ids.take(pa.array(known, mask=known < 0)).to_pylist()

    def _encode_known_or_hashed(self, values: pa.Array) -> np.ndarray:
        buckets, found = self.feature.oov_buckets, self._find(values)
        rows = found.astype(np.int64) + 1 + buckets
        unknown = found < 0
        if unknown.any():
            hashes = hash_column(values.filter(pa.array(unknown)))
            rows[unknown] = 1 + (hashes % np.uint64(buckets)).astype(np.int64)
        return rows

    def _find(self, values: pa.Array) -> np.ndarray:
        """(N,) integer place of each id among the known ones, -1 for an unknown one."""
        if not len(self.ids):
            return np.full(len(values), -1)
        if len(values) <= _FEW:
            return np.array([self._place(each) for each in values.to_pylist()], np.int64)
        places: np.ndarray = self._index.get_indexer(_as_numpy(values))
        return places

    def _place(self, value: int | str) -> int:
        try:
            return int(self._index.get_loc(value))
        except KeyError:
            return -1


def _as_numpy(values: pa.Array) -> np.ndarray:
    array = values.to_numpy(zero_copy_only=False)
    return array.astype(object) if pt.is_string(values.type) else array


def row_names(semantics: InputSemantics, table: str, rows: list[int | str], fitted: Path) -> list[str]:
    """Names for a reader of `rows`, numbers of table rows or words; fitted: folder of the fitted features.

    Where the vocabulary can't be read, the row's number is name enough.
    """
    numbers = [row for row in rows if isinstance(row, int)]
    if semantics.row_name is not None:
        known = {row: semantics.row_name(table, row) for row in numbers}
    else:
        known = {row: f"row {row}" for row in numbers}
        with suppress(OSError, pa.ArrowException, KeyError):
            ids = pq.read_table(fitted / f"{table}.vocabulary.parquet", columns=["id"])["id"]
            places = pa.array([row - semantics.first_seen_row for row in numbers], pa.int64())
            known |= zip(numbers, map(str, ids.take(places).to_pylist()), strict=True)
    return [known[row] if isinstance(row, int) else row for row in rows]
