"""The kind `id`: one id a row, looked up in an embedding table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import pyarrow as pa

from mmoe_rec.features.encoder import Encoder, Inputs, Kind, Outline, Shared, State
from mmoe_rec.features.layout import Table
from mmoe_rec.features.vocabulary import Vocabulary, VocabularyFeature
from mmoe_rec.log.rows import LogRows
from mmoe_rec.settings.columns import Use
from mmoe_rec.settings.schema import Embedded


class IdFeature(VocabularyFeature):
    """One id a row."""

    kind: Literal["id"]

    def reads(self) -> Mapping[str, Use]:
        return {self.column: "key"}


class EmbeddedId(IdFeature, Embedded):
    """One id a row, embedded."""


class IdEncoder(Encoder):
    """One id a row."""

    feature: VocabularyFeature
    many = False

    def __init__(self, name: str, feature: VocabularyFeature, shared: Shared) -> None:
        super().__init__(name, feature, shared)
        self.owner = shared.owners[feature.shares or name]
        self._owns = self.owner.name == name
        self.counts = self.owner.counts if self._owns else None

    def learn(self, rows: LogRows, known_by: int) -> None:
        if self._owns:
            self.owner.counts.add(rows.coded(self.feature.column))

    def finish(self) -> None:
        if self._owns:
            self.owner.finish()

    def outline(self) -> Outline:
        tables = (Table(self.name, self.owner.vocabulary.rows),) if self._owns else ()
        return Outline(tables, ((self.name, self.owner.name, self.many),))

    def encode(self, rows: LogRows) -> Inputs:
        return Inputs({self.name: rows.each(self.feature.column, self.owner.encode)})

    def state(self) -> State:
        """The vocabulary, if it is this feature's own: known ids in the order of their rows."""
        if not self._owns:
            return State()
        vocabulary = self.owner.vocabulary
        return State({"oov_buckets": vocabulary.oov_buckets}, {"vocabulary": pa.table({"id": vocabulary.ids})})

    def restore(self, state: State) -> None:
        if self._owns:
            known = state.tables["vocabulary"]["id"].combine_chunks()
            self.owner.vocabulary = Vocabulary(known, state.values["oov_buckets"])

    def largest_tables(self) -> tuple[Table, ...] | None:
        if self._owns and self.feature.max_size is None:
            return None
        return tuple(replace(table, rows=table.rows + (self.feature.max_size or 0)) for table in self.outline().tables)

    def column_types(self) -> Mapping[str, pa.DataType]:
        return {} if self.owner.id_type is None else {self.feature.column: self.owner.id_type}

    def typical(self, use: Use) -> Any:
        known = self.owner.vocabulary.ids
        return known[0].as_py() if len(known) else None


KIND = Kind(IdFeature, EmbeddedId, IdEncoder)
