"""The kind `id`: one id a row, looked up in an embedding table."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import pyarrow as pa

from mmoe_rec.features.encoder import Encoder, Inputs, Kind, Outline, Shared, State
from mmoe_rec.features.layout import Table
from mmoe_rec.features.vocabulary import VocabularyFeature
from mmoe_rec.log.rows import LogRows
from mmoe_rec.settings.log_columns import Use
from mmoe_rec.settings.schema import Embedded


class IdFeature(VocabularyFeature, Embedded):
    """One id a row, embedded."""

    kind: Literal["id"]

    def reads(self) -> Mapping[str, Use]:
        return {self.column: "key"}


class IdEncoder(Encoder):
    """One id a row."""

    feature: VocabularyFeature
    many = False

    def __init__(self, name: str, feature: VocabularyFeature, shared: Shared) -> None:
        super().__init__(name, feature, shared)
        self.vocabulary = shared.vocabularies[feature.shares or name]
        self._owns = self.vocabulary.name == name
        self.counts = self.vocabulary.counts if self._owns else None

    def learn(self, rows: LogRows, known_by: int) -> None:
        if self._owns:
            self.vocabulary.counts.add(rows.coded(self.feature.column))

    def finish(self) -> None:
        if self._owns:
            self.vocabulary.grow()

    def outline(self) -> Outline:
        tables = (Table(self.name, self.vocabulary.rows),) if self._owns else ()
        return Outline(tables, ((self.name, self.vocabulary.name, self.many),))

    def encode(self, rows: LogRows) -> Inputs:
        return Inputs({self.name: rows.each(self.feature.column, self.vocabulary.encode)})

    def state(self) -> State:
        """The vocabulary, if it is this feature's own: known ids in the order of their rows."""
        if not self._owns:
            return State()
        values = {"oov_buckets": self.feature.oov_buckets}
        return State(values, {"vocabulary": pa.table({"id": self.vocabulary.ids})})

    def restore(self, state: State) -> None:
        if self._owns:
            self.vocabulary.set_ids(state.tables["vocabulary"]["id"].combine_chunks())

    def largest_tables(self) -> tuple[Table, ...] | None:
        if self._owns and self.feature.max_size is None:
            return None
        return tuple(replace(table, rows=table.rows + (self.feature.max_size or 0)) for table in self.outline().tables)

    def column_types(self) -> Mapping[str, pa.DataType]:
        known = self.vocabulary.id_type
        return {} if known is None else {self.feature.column: known}

    def typical(self, use: Use) -> Any:
        known = self.vocabulary.ids
        return known[0].as_py() if len(known) else None


KIND = Kind(IdFeature, IdEncoder)
