"""The feature kind `cross`: the hashed combination of columns, looked up in an embedding table."""

from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mmoe_rec.features.encoder import Encoder, FeatureKind, Inputs, InputSpec
from mmoe_rec.features.layout import TableSpec
from mmoe_rec.log.rows import LogRows
from mmoe_rec.settings.log_columns import ColumnUse
from mmoe_rec.settings.schema import MAX_TABLE_ROWS, EmbeddingChoices, Feature, InputSemantics, Schema, Unique


class CrossFeature(Feature, EmbeddingChoices):
    """The hashed combination of two or more columns, embedded."""

    kind: Literal["cross"]
    columns: Annotated[tuple[str, ...], Unique] = Field(min_length=2, description="columns to combine")
    buckets: int = Field(10_000, ge=2, le=MAX_TABLE_ROWS, description="hashed rows of the embedding table")

    def reads(self) -> Mapping[str, ColumnUse]:
        return dict.fromkeys(self.columns, "key")

    def semantics(self, schema: Schema) -> InputSemantics:
        """Name each row of the embedding table by its number: "bucket 7". No row stands for a missing value.

        A missing value is hashed like any other value.
        """
        return InputSemantics(self.columns, lambda table, row: f"bucket {row}", missing=False)


class CrossEncoder(Encoder):
    """Encoder of the hashed combination of columns."""

    feature: CrossFeature

    def input_spec(self) -> InputSpec:
        table = TableSpec(self.name, self.feature.buckets)
        return InputSpec((table,), ((self.name, self.name, False),))

    def encode(self, rows: LogRows) -> Inputs:
        hashes = rows.hashes(self.feature.columns)
        return Inputs({self.name: (hashes % np.uint64(self.feature.buckets)).astype(np.int64)})


KIND = FeatureKind(CrossFeature, CrossEncoder)
