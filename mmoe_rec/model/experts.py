"""The experts of the mixture (Ma et al., KDD 2018): E small networks of one shape on one hidden vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmoe_rec.model.grouped import HALF_PRECISION_BLOCK, Dispatch, combine, grouped_linear
from mmoe_rec.model.precision import for_products
from mmoe_rec.model.stacked import StackedLinear

Activation = Literal["silu", "relu"]
Compute = Literal["auto", "dense", "grouped"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": functional.silu, "relu": functional.relu}
# Grouped products are worth it while rows are sent to at most this share of the experts, and always if an expert has
# this many weights (measured, see tests/benchmarks/experts.py).
GROUPED_BELOW = 0.75
GROUPED_FROM_WEIGHTS = 100_000


class Experts(nn.Module):
    """E networks of linear layers, each followed by the activation; normalise: then each output to mean 0, variance 1.

    HoME (Kuaishou, 2024) found ReLU experts more than 90% zeros and of different scales: hence SiLU, and normalising.

    compute: `dense` runs all experts on all rows in few large products, `grouped` each on the rows sent to it, `auto`
    whichever is faster for the share of experts in use.
    """

    def __init__(
        self,
        count: int,
        inputs: int,
        units: Sequence[int],
        activation: Activation = "silu",
        normalise: bool = False,
        compute: Compute = "auto",
    ) -> None:
        super().__init__()
        assert count > 0, "a mixture needs at least one expert"
        assert units, "an expert needs at least one layer"
        self.count = count
        self.activation, self.normalise, self.compute = activation, normalise, compute
        widths = [inputs, *units]
        self.weights_each = sum(width * below for below, width in pairwise(widths))
        self.layers = nn.ModuleList(StackedLinear(count, width, below) for width, below in pairwise(widths))

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, H) -> (B, E, U), the last of `units` wide: every expert on every row."""
        activate = ACTIVATIONS[self.activation]
        first, *others = self.layers
        assert isinstance(first, StackedLinear)
        parts = list(activate(first.shared(hidden)).chunk(self.count, dim=1))
        for layer in others:
            parts = [activate(part) for part in layer(parts)]
        return self._normalised(torch.stack(parts, dim=1))

    def sent(self, hidden: Tensor, dispatch: Dispatch) -> Tensor:
        """(B, H) -> (S, U): the outputs of a dispatch's places, each expert on the rows sent to it."""
        activate = ACTIVATIONS[self.activation]
        x = hidden.index_select(0, dispatch.rows)
        for layer in self.layers:
            assert isinstance(layer, StackedLinear)
            x = activate(grouped_linear(x, layer.weight, layer.bias, dispatch.counts))
        return self._normalised(x)

    def mix(self, hidden: Tensor, weights: Tensor, used: Tensor | None, alone: bool = False) -> Tensor:
        """(B, H), weights (B, G, E) float32 -> (B, G, U), the experts' weighted sum for each gate.

        used: (B, E) bool, the experts that some gate uses for a row; None is all of them. alone: run an expert on rows
        that use it only, whatever `compute` says.
        """
        if used is not None and (alone or self.takes_grouped(used)):
            hidden = for_products(hidden)
            dispatch = Dispatch.of(used, HALF_PRECISION_BLOCK if hidden.dtype.itemsize == 2 else 1)
            return combine(self.sent(hidden, dispatch), weights, dispatch)
        experts = self(hidden)
        return torch.bmm(weights.to(experts.dtype), experts)

    def takes_grouped(self, used: Tensor) -> bool:
        """Whether `mix` runs experts on their own rows only, where (B, E) of them are in use."""
        if self.compute != "auto":
            return self.compute == "grouped"
        return self.weights_each >= GROUPED_FROM_WEIGHTS or int(used.sum()) <= GROUPED_BELOW * used.numel()

    def _normalised(self, outputs: Tensor) -> Tensor:
        return functional.layer_norm(outputs, outputs.shape[-1:]) if self.normalise else outputs
