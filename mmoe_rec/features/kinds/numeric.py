"""The kind `numeric`: a number, standardised or as its quantile bucket."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field

from mmoe_rec.features.encoder import Inputs, Kind, NumberEncoder, Outline, Shared, State
from mmoe_rec.features.layout import Table
from mmoe_rec.log.rows import LogRows
from mmoe_rec.settings.columns import Use
from mmoe_rec.settings.schema import Embedded, Feature, Meaning, Schema


class NumericFeature(Feature):
    """A number, standardised or as its quantile bucket; missing values get an indicator."""

    kind: Literal["numeric"]
    column: str = Field(description="column that the feature reads")
    transform: Literal["standard", "log", "buckets"] = Field(
        "standard",
        description="standard: (x - mean) / deviation; log: the same after sign(x) log(1 + |x|); "
        "buckets: an embedding for each quantile bucket",
    )
    buckets: int = Field(32, ge=2, le=4096, description="number of quantile buckets (transform: buckets)")

    def reads(self) -> Mapping[str, Use]:
        return {self.column: "number"}

    @property
    def has_dim(self) -> bool:
        return super().has_dim and self.transform == "buckets"

    def meaning(self, schema: Schema) -> Meaning:
        """Row 0 is a missing number, the buckets follow."""
        return Meaning((self.column,), lambda table, row: f"bucket {row}")


class EmbeddedNumeric(NumericFeature, Embedded):
    """A number, as a standardised input or as an embedded quantile bucket; missing values get an indicator."""


class NumericEncoder(NumberEncoder):
    """A number, standardised or as an embedded quantile bucket."""

    feature: NumericFeature

    def __init__(self, name: str, feature: NumericFeature, shared: Shared) -> None:
        super().__init__(name, feature, shared)
        self.edges = np.empty(0)

    def values(self, rows: LogRows) -> np.ndarray:
        values = rows.numbers(self.feature.column)
        return np.sign(values) * np.log1p(np.abs(values)) if self.feature.transform == "log" else values

    def finish(self) -> None:
        super().finish()
        if self.feature.transform == "buckets":
            self.edges = self.number.histogram.bucket_edges(self.feature.buckets)

    def outline(self) -> Outline:
        """One dense input (and its indicator), or one id input: row 0 is missing, the buckets follow."""
        if self.feature.transform != "buckets":
            return Outline(dense=self.number.inputs())
        table = Table(self.name, len(self.edges) + 2)
        return Outline((table,), ((self.name, self.name, False),))

    def encode(self, rows: LogRows) -> Inputs:
        values = self.values(rows)
        if self.feature.transform != "buckets":
            return Inputs(numbers=[(values, self.number)])
        bucket = 1 + np.searchsorted(self.edges, values, side="left")
        return Inputs({self.name: np.where(np.isfinite(values), bucket, 0)})

    def state(self) -> State:
        return State({**super().state().values, "bucket_edges": self.edges.tolist()})

    def restore(self, state: State) -> None:
        values = dict(state.values)
        self.edges = np.array(values.pop("bucket_edges"), np.float64)
        super().restore(State(values))

    def largest_tables(self) -> tuple[Table, ...]:
        """All buckets, which a log with fewer values does not fill."""
        return tuple(replace(table, rows=self.feature.buckets + 1) for table in self.outline().tables)

    def typical(self, use: Use) -> float | None:
        if use != "number":
            return None
        if self.feature.transform == "buckets":
            return float(self.edges[len(self.edges) // 2]) if len(self.edges) else 0.0
        mean = self.number.standardiser.mean
        return round(float(np.sign(mean) * np.expm1(abs(mean))) if self.feature.transform == "log" else mean, 6)


KIND = Kind(NumericFeature, EmbeddedNumeric, NumericEncoder)
