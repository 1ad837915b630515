"""A standardised number, which several kinds share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmoe_rec.features.layout import DenseInput
from mmoe_rec.features.numbers import NumberHistogram, Standardiser, standardised


class DenseNumber:
    """A standardised number, with an indicator input where training rows had missing values."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.histogram = NumberHistogram()
        self.standardiser = Standardiser(0.0, 1.0, False)

    def finish(self) -> None:
        """Turns the histogram into mean and deviation."""
        self.standardiser = self.histogram.standardiser()

    def inputs(self) -> tuple[DenseInput, ...]:
        """The dense inputs."""
        number = DenseInput(self.name, edges=tuple(self.standardiser.edges))
        return (number, DenseInput(f"{self.name}_missing")) if self.standardiser.has_missing else (number,)

    def encode(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """Dense inputs of (N,) float64 values."""
        inputs = {self.name: self.standardiser.apply(values)}
        if self.standardiser.has_missing:
            inputs[f"{self.name}_missing"] = (~np.isfinite(values)).astype(np.float32)
        return inputs


def encode_together(numbers: Sequence[tuple[np.ndarray, DenseNumber]]) -> dict[str, np.ndarray]:
    """What `encode` of each number gives for its (N,) values (at least one number), all in one matrix."""
    matrix = np.array([values for values, _ in numbers], np.float64)
    scales = np.array([(each.standardiser.mean, each.standardiser.deviation) for _, each in numbers])
    finite = np.isfinite(matrix)
    scaled = standardised(matrix, scales[:, :1], scales[:, 1:], finite)
    inputs = dict(zip((each.name for _, each in numbers), scaled, strict=True))
    for (_, each), known in zip(numbers, finite, strict=True):
        if each.standardiser.has_missing:
            inputs[f"{each.name}_missing"] = (~known).astype(np.float32)
    return inputs
