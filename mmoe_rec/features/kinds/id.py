"""The feature kind `id`: one id per row, looked up in an embedding table."""

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
    """One id per row, embedded."""

    kind: Literal["id"]

    def reads(self) -> Mapping[str, ColumnUse]:
        return {self.column: "key"}


class IdEncoder(Encoder):
    """Encoder of one id per row."""

    feature: VocabularyFeature
    is_list = False

    def __init__(self, name: str, feature: VocabularyFeature, context: EncoderContext) -> None:
        super().__init__(name, feature, context)
        self.vocabulary = context.vocabularies[feature.table_owner or name]
        self._owns_table = self.vocabulary.name == name
        self.counts = {"": self.vocabulary.counts} if self._owns_table else {}

    def partial_fit(self, rows: LogRows, label_cutoff: int) -> None:
        """Count the ids in training rows if the feature owns its vocabulary (has no `table`).

        Args:
            rows: Training rows.
            label_cutoff: Not used.
        """
        if self._owns_table:
            self.vocabulary.counts.add(self._ids(rows))

    def _ids(self, rows: LogRows) -> pa.Array:
        return rows.raw_column(self.feature.column)

    def finish_fit(self) -> None:
        if self._owns_table:
            self.vocabulary.grow()

    def input_spec(self) -> InputSpec:
        tables = (TableSpec(self.name, self.vocabulary.rows),) if self._owns_table else ()
        return InputSpec(tables, ((self.name, self.vocabulary.name, self.is_list),))

    def encode(self, rows: LogRows) -> Inputs:
        return Inputs({self.name: rows.apply(self.feature.column, self.vocabulary.encode)})

    def state(self) -> State:
        """Return the ids of the vocabulary in the order of the table rows, or nothing if another feature owns it."""
        if not self._owns_table:
            return State()
        values = {"oov_buckets": self.feature.oov_buckets}
        return State(values, {"vocabulary": pa.table({"id": self.vocabulary.ids})})

    def restore(self, state: State) -> None:
        if self._owns_table:
            self.vocabulary.set_ids(state.tables["vocabulary"]["id"].combine_chunks())

    def max_tables(self) -> tuple[TableSpec, ...] | None:
        if self._owns_table and self.feature.max_size is None:
            return None
        return tuple(
            replace(table, rows=table.rows + (self.feature.max_size or 0)) for table in self.input_spec().tables
        )

    def example_value(self, use: ColumnUse) -> Any:
        ids = self.vocabulary.ids
        return ids[0].as_py() if len(ids) else None


KIND = FeatureKind(IdFeature, IdEncoder)
