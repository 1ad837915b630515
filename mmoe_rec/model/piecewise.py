"""Piecewise-linear encoding of numbers (Gorishniy et al., NeurIPS 2022, eq. 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PiecewiseLinear(nn.Module):
    """Each number as K parts: how far it reaches into each of the K intervals between its edges, 0 to 1.

    The first linear layer above then fits any piecewise-linear function of the number, with bends at the edges, where a
    standardised number alone gives it a single slope. A number with fewer edges than others has fewer parts.
    """

    def __init__(self, edges: Sequence[Sequence[float]]) -> None:
        super().__init__()
        column, low, width = [], [], []
        for index, each in enumerate(edges):
            for a, b in zip(each, each[1:], strict=False):
                column.append(index)
                low.append(a)
                width.append(b - a)
        self.column: Tensor
        self.low: Tensor
        self.width: Tensor
        self.register_buffer("column", torch.tensor(column, dtype=torch.int64), persistent=False)
        self.register_buffer("low", torch.tensor(low), persistent=False)
        self.register_buffer("width", torch.tensor(width), persistent=False)

    @property
    def outputs(self) -> int:
        """Parts of all numbers together."""
        return len(self.column)

    def forward(self, numbers: Tensor) -> Tensor:
        """(B, D) float32 -> (B, outputs) float32."""
        parts = (numbers.index_select(1, self.column) - self.low) / self.width
        return parts.clamp(0.0, 1.0)
