"""The experts of the mixture (Ma et al., KDD 2018): E small networks of one shape on one hidden vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmoe_rec.model.stacked import StackedLinear, for_products

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


# On a CPU, products in half precision are prepared anew for each number of rows not met before, which takes as long as
# the product of some hundred rows: whole blocks of rows make for few numbers.
# Sparse compute: rows are gathered by the expert they were sent to, and each expert multiplies its own rows only.


HALF_PRECISION_BLOCK = 16


@dataclass(frozen=True)
class Dispatch:
    """Which of E experts run on which of B rows: S places, those of one expert next to each other.

    rows: (S,) int64, the row in each place; counts: places of each expert; places, experts: (B, K) int64, where the up
    to K results of a row are, and whose they are; filled: (B, K) bool, False where a row has fewer.
    """

    rows: Tensor
    counts: list[int]
    places: Tensor
    experts: Tensor
    filled: Tensor

    @staticmethod
    def of(used: Tensor, block: int = 1) -> Dispatch:
        """Of (B, E) bool. Each expert gets a multiple of `block` places; row 0 fills those that nobody asks for."""
        experts, rows = used.t().nonzero(as_tuple=True)
        counts = used.sum(0)
        sizes = (counts + block - 1) // block * block
        place = torch.arange(len(rows), device=used.device) + (_starts(sizes) - _starts(counts))[experts]
        nth = used.cumsum(1)[rows, experts] - 1
        of_row = used.sum(1, keepdim=True)
        filled = torch.arange(int(of_row.max()), device=used.device) < of_row
        places, owners = torch.zeros_like(filled, dtype=torch.int64), torch.zeros_like(filled, dtype=torch.int64)
        places[rows, nth], owners[rows, nth] = place, experts
        # A result that is not a row's own would reach it as 0 times that, which is NaN if it is.
        places = torch.where(filled, places, places[:, :1])
        in_place = rows.new_zeros(int(sizes.sum())).index_copy(0, place, rows)
        return Dispatch(in_place, sizes.tolist(), places, owners, filled)


class _Grouped(torch.autograd.Function):
    """Linear layers of E experts over rows that are ordered by expert; every result is written where it stays.

    Weights of higher precision than the rows are cast one expert at a time, while they are in the cache anyway, and so
    are their gradients: with many experts, casting all of them takes longer than the products.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        out = x.new_empty(len(x), weight.shape[1])
        parts = zip(x.split(counts), out.split(counts), weight, bias.to(x.dtype), strict=True)
        for rows, result, own_weight, own_bias in parts:
            torch.addmm(own_bias, rows, own_weight.to(x.dtype).t(), out=result)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        to_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        to_weight, to_bias = torch.empty_like(weight), x.new_empty(weight.shape[:2])
        xs, gradients = x.split(ctx.counts), gradient.split(ctx.counts)
        if to_x is not None:
            for part, own_weight, result in zip(gradients, weight, to_x.split(ctx.counts), strict=True):
                torch.mm(part, own_weight.to(x.dtype), out=result)
        for part, inputs, own_weight, own_bias in zip(gradients, xs, to_weight, to_bias, strict=True):
            if weight.dtype == x.dtype:
                torch.mm(part.t(), inputs, out=own_weight)
            else:
                own_weight.copy_(torch.mm(part.t(), inputs))
            torch.sum(part, dim=0, out=own_bias)
        return to_x, to_weight, to_bias.to(weight.dtype), None


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor, counts: list[int]) -> Tensor:
    """(S, I) rows ordered by expert, (E, O, I) weights, (E, O) biases, rows of each expert -> (S, O) like the rows."""
    out: Tensor = _Grouped.apply(x, weight, bias, counts)
    return out


def combine(values: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
    """(S, U) outputs of a dispatch's places, (B, G, E) weights -> (B, G, U), summed over experts."""
    own = weights.gather(2, dispatch.experts.unsqueeze(1).expand(-1, weights.shape[1], -1))  # (B, G, K)
    of_row = values.index_select(0, dispatch.places.flatten()).unflatten(0, dispatch.places.shape)  # (B, K, U)
    return torch.bmm((own * dispatch.filled.unsqueeze(1)).to(values.dtype), of_row)


def _starts(counts: Tensor) -> Tensor:
    """Where each of successive groups begins (E,)."""
    return counts.cumsum(0) - counts
