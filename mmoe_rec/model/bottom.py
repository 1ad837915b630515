"""The shared bottom under experts and gates: feature crosses, bent numbers, hidden layers.

Shapes: B rows, W width of all inputs, D dense inputs, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmoe_rec.model.products import Linear

if TYPE_CHECKING:
    from mmoe_rec.settings import model as section


class Bottom(nn.Module):
    """The shared bottom, which experts and gates sit on: crosses and bends on the wide input, then hidden layers.

    edges: for each of the last D inputs, the dense ones, the edges of its piecewise-linear encoding (at least two, or
    none to leave it as it is).
    """

    def __init__(self, inputs: int, edges: Sequence[Sequence[float]], settings: section.Bottom) -> None:
        super().__init__()
        self.dense = len(edges)
        self.crosses = Crosses(inputs, settings.cross_layers, settings.cross_rank) if settings.cross_layers else None
        bends = settings.piecewise and any(len(each) > 1 for each in edges)
        self.bends = PiecewiseLinear(edges) if bends else None
        width = inputs + (self.bends.outputs if self.bends else 0)
        self.layers = mlp(width, settings.units, settings.dropout)
        self.outputs = settings.units[-1] if settings.units else width

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) float32 -> (B, H)."""
        crossed = x if self.crosses is None else self.crosses(x)  # (B, W)
        if self.bends is None:
            return self.layers(crossed)
        bends = self.bends(x[:, -self.dense :])
        if not self.layers:
            return torch.cat([crossed, bends.to(crossed.dtype)], dim=1)
        first, *others = self.layers
        hidden: Tensor = first(crossed, bends)
        for layer in others:
            hidden = layer(hidden)
        return hidden


class Crosses(nn.Module):
    """Feature crosses: DCN-v2 with low-rank weights (Wang et al., WWW 2021, eq. 2), (B, W) -> (B, W).

    x_{l+1} = x_0 * (U_l V_l x_l + b_l) + x_l, for `layers` layers of the given rank.
    """

    def __init__(self, inputs: int, layers: int, rank: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(Linear(inputs, rank, bias=False) for _ in range(layers))
        self.up = nn.ModuleList(Linear(rank, inputs) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, W)."""
        crossed = x
        for down, up in zip(self.down, self.up, strict=True):
            crossed = x * up(down(crossed)) + crossed
        return crossed


class PiecewiseLinear(nn.Module):
    """Piecewise-linear encoding of numbers (Gorishniy et al., NeurIPS 2022, eq. 1): how far each reaches into each of
    the intervals between its edges, 0 to 1. The layer above then fits any function with bends at the edges.
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


def mlp(inputs: int, units: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """Linear layers of the given widths, each followed by SiLU and, if asked for, dropout."""
    layers: list[nn.Module] = []
    for width in units:
        layers += [Linear(inputs, width), nn.SiLU()]
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
        inputs = width
    return nn.Sequential(*layers)
