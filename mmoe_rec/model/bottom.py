"""The shared bottom: crosses and bends on the wide input, then hidden layers, which experts and gates sit on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmoe_rec.model.crosses import Crosses
from mmoe_rec.model.piecewise import PiecewiseLinear
from mmoe_rec.model.towers import mlp


class Bottom(nn.Module):
    """(B, W) inputs -> (B, H) hidden.

    edges: for each of the last D inputs, the dense ones, the edges of its piecewise-linear encoding (at least two, or
    none to leave it as it is). cross_layers: 0 leaves crosses out.
    """

    def __init__(
        self,
        inputs: int,
        edges: Sequence[Sequence[float]],
        units: Sequence[int],
        dropout: float = 0.0,
        cross_layers: int = 0,
        cross_rank: int = 32,
    ) -> None:
        super().__init__()
        self.dense = len(edges)
        self.crosses = Crosses(inputs, cross_layers, cross_rank) if cross_layers else None
        self.bends = PiecewiseLinear(edges) if any(len(each) > 1 for each in edges) else None
        width = inputs + (self.bends.outputs if self.bends else 0)
        self.layers = mlp(width, units, dropout)
        self.outputs = units[-1] if units else width

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) float32 -> (B, H)."""
        crossed = x if self.crosses is None else self.crosses(x)
        if self.bends is not None:
            crossed = torch.cat([crossed, self.bends(x[:, -self.dense :]).to(crossed.dtype)], dim=1)
        hidden: Tensor = self.layers(crossed)
        return hidden
