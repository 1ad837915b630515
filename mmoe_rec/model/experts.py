"""The shared experts of the mixture (Ma et al., KDD 2018): E small networks of one shape on one hidden vector."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmoe_rec.model.stacked import StackedLinear


class Experts(nn.Module):
    """E networks of linear layers, each followed by SiLU.

    SiLU rather than ReLU: HoME (Kuaishou, 2024) found ReLU experts more than 90% zeros.
    """

    def __init__(self, count: int, inputs: int, units: Sequence[int]) -> None:
        super().__init__()
        assert count > 0, "a mixture needs at least one expert"
        assert units, "an expert needs at least one layer"
        self.count = count
        widths = [inputs, *units]
        self.layers = nn.ModuleList(StackedLinear(count, width, below) for width, below in pairwise(widths))

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, H) -> (B, E, U), the last of `units` wide."""
        first, *others = self.layers
        assert isinstance(first, StackedLinear)
        parts = list(functional.silu(first.shared(hidden)).chunk(self.count, dim=1))
        for layer in others:
            parts = [functional.silu(part) for part in layer(parts)]
        return torch.stack(parts, dim=1)
