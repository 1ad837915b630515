"""The kind `id`: one id a row, looked up in an embedding table."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import pyarrow as pa

from mmoe_rec.features.encoder import Encoder, EncoderContext, FeatureKind, Inputs, InputSpec, State
from mmoe_rec.features.layout import TableSpec
from mmoe_rec.features.vocabulary import VocabularyFeature
from mmoe_rec.log.rows import LogRows
from mmoe_rec.settings.log_columns import ColumnUse
from mmoe_rec.settings.schema import EmbeddingChoices


class IdFeature(VocabularyFeature, EmbeddingChoices):
    """One id a row, embedded."""

    kind: Literal["id"]

    def reads(self) -> Mapping[str, ColumnUse]:
        return {self.column: "key"}


class IdEncoder(Encoder):
    """One id a row."""

    feature: VocabularyFeature
    is_list = False

    def __init__(self, name: str, feature: VocabularyFeature, shared: EncoderContext) -> None:
        super().__init__(name, feature, shared)
        self.vocabulary = shared.vocabularies[feature.table_owner or name]
        self._owns = self.vocabulary.name == name
        self.counts = self.vocabulary.counts if self._owns else None

    def partial_fit(self, rows: LogRows, label_cutoff: int) -> None:
        if self._owns:
            self.vocabulary.counts.add(rows.raw_column(self.feature.column))

    def finish_fit(self) -> None:
        if self._owns:
            self.vocabulary.grow()

    def input_spec(self) -> InputSpec:
        tables = (TableSpec(self.name, self.vocabulary.rows),) if self._owns else ()
        return InputSpec(tables, ((self.name, self.vocabulary.name, self.is_list),))

    def encode(self, rows: LogRows) -> Inputs:
        return Inputs({self.name: rows.apply(self.feature.column, self.vocabulary.encode)})

    def state(self) -> State:
        """The vocabulary, if it is this feature's own: known ids in the order of their rows."""
        if not self._owns:
            return State()
        values = {"oov_buckets": self.feature.oov_buckets}
        return State(values, {"vocabulary": pa.table({"id": self.vocabulary.ids})})

    def restore(self, state: State) -> None:
        if self._owns:
            self.vocabulary.set_ids(state.tables["vocabulary"]["id"].combine_chunks())

    def max_tables(self) -> tuple[TableSpec, ...] | None:
        if self._owns and self.feature.max_size is None:
            return None
        return tuple(
            replace(table, rows=table.rows + (self.feature.max_size or 0)) for table in self.input_spec().tables
        )

    def column_types(self) -> Mapping[str, pa.DataType]:
        known = self.vocabulary.id_type
        return {} if known is None else {self.feature.column: known}

    def example_value(self, use: ColumnUse) -> Any:
        known = self.vocabulary.ids
        return known[0].as_py() if len(known) else None


KIND = FeatureKind(IdFeature, IdEncoder)
