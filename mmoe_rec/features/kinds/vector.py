"""The feature kind `vector`: a list of numbers per row, standardized."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import pyarrow.types as pt
from pydantic import Field

from mmoe_rec.errors import UserError
from mmoe_rec.features.encoder import FeatureKind, Inputs, InputSpec, NumberEncoder
from mmoe_rec.features.layout import DenseInput
from mmoe_rec.log.rows import LogRows
from mmoe_rec.settings.log_columns import ColumnUse
from mmoe_rec.settings.schema import Feature, InputSemantics, Schema


class VectorFeature(Feature):
    """A list of `size` numbers per row, such as a text embedding, standardized. A missing vector becomes zeros."""

    kind: Literal["vector"]
    column: str = Field(description="column with lists of `size` numbers")
    size: int = Field(ge=1, description="length of every list")

    def reads(self) -> Mapping[str, ColumnUse]:
        return {self.column: "vector"}

    @property
    def list_lengths(self) -> Mapping[str, int]:
        return {self.column: self.size}

    def semantics(self, schema: Schema) -> InputSemantics:
        return InputSemantics((self.column,), zeros_missing=True)


class VectorEncoder(NumberEncoder):
    """Encoder of a vector, standardized with one mean and standard deviation over all elements."""

    feature: VectorFeature

    def values(self, rows: LogRows) -> np.ndarray:
        return read_vectors(rows, self.name, self.feature.column, self.feature.size)

    def input_spec(self) -> InputSpec:
        return InputSpec(dense=tuple(DenseInput(f"{self.name}_{index}") for index in range(self.feature.size)))

    def encode(self, rows: LogRows) -> Inputs:
        """Return one dense input for each element of the standardized vector, 0 if the vector is missing."""
        scaled = self.number.standardizer.apply(self.values(rows))
        return Inputs(dense={f"{self.name}_{index}": scaled[:, index] for index in range(self.feature.size)})


def read_vectors(rows: LogRows, feature: str, name: str, size: int) -> np.ndarray:
    """Return the vectors of N rows, (N, size) float64, NaN if missing.

    Args:
        rows: N rows.
        feature: Name of the feature, for the message.
        name: Name of the column with lists of numbers.
        size: Required length of every list.

    Raises:
        UserError: A list has another length.
    """
    column, matrix = rows.column(name), np.full((len(rows), size), np.nan)
    if pt.is_null(column.type):
        return matrix
    lengths = column.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False)
    wrong = lengths[(lengths >= 0) & (lengths != size)]
    if len(wrong):
        raise UserError(
            f"feature '{feature}': column '{name}' holds a list of {wrong[0]} numbers, but `size` is {size}"
        )
    matrix[lengths == size] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, size)
    return matrix


KIND = FeatureKind(VectorFeature, VectorEncoder)
