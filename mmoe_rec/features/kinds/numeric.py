"""The feature kind `numeric`: a number, standardized or as a quantile bucket, and optionally frequent values as ids."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from mmoe_rec.features.encoder import EncoderContext, FeatureKind, Inputs, InputSpec, NumberEncoder, State
from mmoe_rec.features.layout import TableSpec
from mmoe_rec.features.numeric_statistics import MAX_DISTINCT_VALUES, FrequentValues
from mmoe_rec.log.rows import LogRows
from mmoe_rec.settings.log_columns import ColumnUse
from mmoe_rec.settings.schema import EmbeddingChoices, Feature, InputSemantics, Schema


class NumericFeature(Feature, EmbeddingChoices):
    """A number, standardized or as an embedded quantile bucket. Missing values get an indicator."""

    kind: Literal["numeric"]
    column: str = Field(description="column that the feature reads")
    transform: Literal["standard", "log", "buckets"] = Field(
        "standard",
        description="standard: (x - mean) / standard deviation; log: the same after sign(x) log(1 + |x|); "
        "buckets: an embedding for each quantile bucket",
    )
    buckets: int = Field(32, ge=2, le=4096, description="number of quantile buckets (transform: buckets)")
    values: Literal["auto"] | None = Field(
        None,
        description="auto: add embeddings of frequent exact values, such as 0 or a round price",
    )

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        if self.values is not None and self.transform == "buckets":
            raise ValueError(
                "`values: auto` can't be combined with buckets. Set transform to standard or log, or omit it."
            )
        return self

    def reads(self) -> Mapping[str, ColumnUse]:
        return {self.column: "number"}

    @property
    def has_own_table(self) -> bool:
        return super().has_own_table and (self.transform == "buckets" or self.values is not None)

    def semantics(self, schema: Schema) -> InputSemantics:
        """Describe row 0 as a missing number and other rows as buckets.

        With `values: auto`, row 0 stands for all values that are not frequent, and other rows for frequent values.
        """
        if self.values is None:
            return InputSemantics((self.column,), lambda table, row: f"bucket {row}")
        return InputSemantics(
            (self.column,), lambda table, row: f"frequent value {row}" if row else "others", missing=False
        )


class NumericEncoder(NumberEncoder):
    """Encoder of a number, standardized or as an embedded quantile bucket.

    Attributes:
        edges: Ascending inner edges of the buckets, empty without buckets.
        frequent: Frequent values, each with an embedding of its own. None without `values: auto`.
    """

    feature: NumericFeature

    def __init__(self, name: str, feature: NumericFeature, context: EncoderContext) -> None:
        super().__init__(name, feature, context)
        self.edges = np.empty(0)
        self.frequent = None if feature.values is None else self.number.histogram.frequent_values()

    def values(self, rows: LogRows) -> np.ndarray:
        return self._transform(rows.numbers(self.feature.column))

    def _transform(self, values: np.ndarray) -> np.ndarray:
        return np.sign(values) * np.log1p(np.abs(values)) if self.feature.transform == "log" else values

    def numbers_to_fit(self, rows: LogRows) -> np.ndarray:
        # Find frequent values before the transform, because logarithms are not bitwise equal on all processors.
        return self.values(rows) if self.feature.values is None else rows.numbers(self.feature.column)

    def finish_fit(self) -> None:
        super().finish_fit()
        if self.feature.values is not None:
            self.frequent = self.number.histogram.frequent_values()
            self.number.standardizer = self.number.histogram.map(self._transform).standardizer()
        if self.feature.transform == "buckets":
            self.edges = self.number.histogram.bucket_edges(self.feature.buckets)

    def input_spec(self) -> InputSpec:
        """Return an id input for buckets, or dense inputs and, with `values: auto`, an id input for frequent values."""
        if self.feature.transform != "buckets":
            dense = self.number.inputs()
            if self.frequent is None:
                return InputSpec(dense=dense)
            table = TableSpec(f"{self.name}_value", len(self.frequent.keys) + 1, feature=self.name)
            return InputSpec((table,), ((table.name, table.name, False),), dense)
        table = TableSpec(self.name, len(self.edges) + 2)
        return InputSpec((table,), ((self.name, self.name, False),))

    def encode(self, rows: LogRows) -> Inputs:
        if self.feature.transform != "buckets":
            values = rows.numbers(self.feature.column)
            inputs = Inputs(numbers=[(self._transform(values), self.number)])
            if self.frequent is not None:
                inputs.ids[f"{self.name}_value"] = self.frequent.find(values)
            return inputs
        values = self.values(rows)
        bucket = 1 + np.searchsorted(self.edges, values, side="left")
        return Inputs({self.name: np.where(np.isfinite(values), bucket, 0)})

    def state(self) -> State:
        values = {**super().state().values, "bucket_edges": self.edges.tolist()}
        if self.frequent is not None:
            frequent = self.frequent
            values["frequent"] = [frequent.keys.tolist(), frequent.ids.tolist(), frequent.dropped_bits]
        return State(values)

    def restore(self, state: State) -> None:
        values = dict(state.values)
        self.edges = np.array(values.pop("bucket_edges"), np.float64)
        if self.frequent is not None:
            keys, ids, dropped_bits = values.pop("frequent")
            self.frequent = FrequentValues(np.array(keys, np.int32), np.array(ids, np.int64), dropped_bits)
        super().restore(State(values))

    def max_tables(self) -> tuple[TableSpec, ...]:
        """Return the table, if any, with one row for each possible bucket or frequent value, and row 0."""
        max_ids = self.feature.buckets if self.feature.values is None else MAX_DISTINCT_VALUES
        return tuple(replace(table, rows=max_ids + 1) for table in self.input_spec().tables)

    def example_value(self, use: ColumnUse) -> float | None:
        if use != "number":
            return None
        if self.feature.transform == "buckets":
            return float(self.edges[len(self.edges) // 2]) if len(self.edges) else 0.0
        mean = self.number.standardizer.mean
        return round(float(np.sign(mean) * np.expm1(abs(mean))) if self.feature.transform == "log" else mean, 6)


KIND = FeatureKind(NumericFeature, NumericEncoder)
