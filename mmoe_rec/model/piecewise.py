"""Piecewise-linear encoding of numbers (Gorishniy et al., NeurIPS 2022, eq. 1)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class PiecewiseLinear(nn.Module):
    """Each number as K parts: how far it reaches into each of the K intervals between its edges, 0 to 1.

    The first linear layer above then fits any piecewise-linear function of the number, with bends at the edges, where a
    standardised number alone gives it a single slope. A number with fewer edges than others has fewer parts.
    """

    def __init__(self, edges: Sequence[Sequence[float]]) -> None:
        super().__init__()
        intervals = [(index, *ends) for index, each in enumerate(edges) for ends in pairwise(each)]
        column, low, high = zip(*intervals, strict=True) if intervals else ((), (), ())
        slope = 1.0 / (torch.tensor(high) - torch.tensor(low))
        self.column: Tensor
        self.slope: Tensor
        self.low: Tensor
        self.register_buffer("column", torch.tensor(column, dtype=torch.int64), persistent=False)
        self.register_buffer("slope", slope, persistent=False)
        self.register_buffer("low", torch.tensor(low), persistent=False)

    @property
    def outputs(self) -> int:
        """Parts of all numbers together."""
        return len(self.column)

    def forward(self, numbers: Tensor) -> Tensor:
        """(B, D) float32 -> (B, outputs) float32. Numbers are data: no gradient flows back to them."""
        # The difference first: it is exact where the edges lie so near that their distance is small beside themselves.
        parts = numbers.detach().index_select(1, self.column).sub_(self.low)
        return parts.mul_(self.slope).clamp_(0.0, 1.0)
