"""A standardised number, which several kinds share."""

from __future__ import annotations

import numpy as np

from mmoe_rec.features.layout import DenseInput
from mmoe_rec.features.numbers import NumberHistogram, Standardiser


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
