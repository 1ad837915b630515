"""Products of many small layers: one input for all of them, an input for each, or rows sent to each by a gate.

G independent layers of one shape are stored as one weight. Measured on CPU: inputs that all groups share go through one
large product; groups with inputs of their own go through a loop of products over slices, which beats a strided batched
product (but for oneDNN in fp32, nothing is copied). What the slices of all groups lie in is one tensor in either
direction, so that activations and their gradients are one pass over memory without gaps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmoe_rec.model.multiply import (
    Multiplying,
    Products,
    for_products,
    linear,
    multiply_into,
    taken,
    weights_gradient_into,
)

# oneDNN, which multiplies in half precision on a CPU, prepares products anew for each new number of rows, which takes
# as long as the product of some hundred rows: whole blocks of rows keep these numbers few.
ONEDNN_BLOCK = 16


class StackedLinear(Multiplying):
    """G independent linear layers from `inputs` to `outputs`, each initialised as `nn.Linear` would be.

    State: weight (G, outputs, inputs), bias (G, outputs).
    """

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(groups, outputs))
        bound = 1 / math.sqrt(inputs) if inputs else 0.0
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """An input for each group: (B, G, inputs) -> (B, G, outputs)."""
        if torch._C._functorch.peek_interpreter_stack() is not None:  # torch.func maps over backward passes of its own
            return torch.einsum("bgi,goi->bgo", x, self.weight) + self.bias
        out: Tensor = _Stacked.apply(for_products(x), self.weight, self.bias, self.products)
        return out

    def shared(self, x: Tensor) -> Tensor:
        """One input for all groups: (B, inputs) -> (B, G * outputs), group-major."""
        return linear(x, self.weight.flatten(0, 1), self.bias.flatten(), self.products)

    def extra_repr(self) -> str:
        """Shape for printing."""
        groups, outputs, inputs = self.weight.shape
        return f"groups={groups}, inputs={inputs}, outputs={outputs}"


class _Stacked(torch.autograd.Function):
    """Linear layers of G groups, each over its own slice of the rows, whose results lie in one tensor.

    Weights of higher precision than the rows are cast, and so are their gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, products: Products) -> Tensor:
        ctx.dtype, ctx.products = weight.dtype, taken(x, products)
        own, by_group = weight.to(x.dtype), _by_group(x, ctx.products)
        ctx.save_for_backward(by_group, own)
        out = x.new_empty(*x.shape[:2], weight.shape[1])
        for rows, result, each, each_bias in zip(by_group, out.unbind(1), own, bias.to(x.dtype), strict=True):
            multiply_into(result, rows, each.t(), each_bias, ctx.products)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        by_group, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        gradients = _by_group(gradient, ctx.products)
        to_weight, to_x = torch.empty_like(weight), None
        for part, rows, result in zip(gradients, by_group, to_weight, strict=True):
            weights_gradient_into(result, part, rows, ctx.products)
        if ctx.needs_input_grad[0]:
            to_x = gradient.new_empty(*gradient.shape[:2], weight.shape[2])
            for part, each, result in zip(gradients, weight, to_x.unbind(1), strict=True):
                multiply_into(result, part, each, None, ctx.products)
        return to_x, to_weight.to(ctx.dtype), gradient.sum(0).to(ctx.dtype), None


def _by_group(x: Tensor, products: Products) -> Tensor:
    """(B, G, I) to (G, B, I), as a view but for oneDNN, which takes no rows with gaps."""
    turned = x.transpose(0, 1)
    return turned.contiguous() if products == "onednn" else turned


# Sparse compute: rows are gathered by the expert they were sent to, and each expert multiplies its own rows only.


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
        """From (B, E) bool. Each expert gets a multiple of `block` places; row 0 fills those that nobody asks for."""
        experts, rows = used.t().nonzero(as_tuple=True)
        counts = used.sum(0)
        sizes = (counts + block - 1) // block * block
        place = torch.arange(len(rows), device=used.device) + (_starts(sizes) - _starts(counts))[experts]
        nth = used.cumsum(1)[rows, experts] - 1
        of_row = used.sum(1, keepdim=True)
        filled = torch.arange(int(of_row.max()), device=used.device) < of_row
        places, owners = torch.zeros_like(filled, dtype=torch.int64), torch.zeros_like(filled, dtype=torch.int64)
        places[rows, nth], owners[rows, nth] = place, experts
        # A result that is not a row's own would reach it times 0, which is NaN if the result is.
        places = torch.where(filled, places, places[:, :1])
        in_place = rows.new_zeros(int(sizes.sum())).index_copy(0, place, rows)
        return Dispatch(in_place, sizes.tolist(), places, owners, filled)


class _Grouped(torch.autograd.Function):
    """Linear layers of E experts over rows that are ordered by expert, whose results lie in one tensor.

    Weights of higher precision than the rows are cast one expert at a time, while they are in the cache anyway, and so
    are their gradients: with many experts, casting all of them takes longer than the products.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, counts: list[int], products: Products) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts, ctx.products = counts, taken(x, products)
        out = x.new_empty(len(x), weight.shape[1])
        parts = zip(x.split(counts), out.split(counts), weight, bias.to(x.dtype), strict=True)
        for rows, result, own_weight, own_bias in parts:
            multiply_into(result, rows, own_weight.to(x.dtype).t(), own_bias, ctx.products)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        to_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        to_weight, to_bias = torch.empty_like(weight), x.new_empty(weight.shape[:2])
        xs, gradients = x.split(ctx.counts), gradient.split(ctx.counts)
        if to_x is not None:
            for part, own_weight, result in zip(gradients, weight, to_x.split(ctx.counts), strict=True):
                multiply_into(result, part, own_weight.to(x.dtype), None, ctx.products)
        for part, inputs, own_weight, own_bias in zip(gradients, xs, to_weight, to_bias, strict=True):
            if weight.dtype == x.dtype:
                weights_gradient_into(own_weight, part, inputs, ctx.products)
            else:
                own_weight.copy_(torch.mm(part.t(), inputs))
            torch.sum(part, dim=0, out=own_bias)
        return to_x, to_weight, to_bias.to(weight.dtype), None, None


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor, counts: list[int], products: Products = "blas") -> Tensor:
    """(S, I) rows ordered by expert, (E, O, I) weights, (E, O) biases, rows of each expert -> (S, O) like the rows."""
    out: Tensor = _Grouped.apply(x, weight, bias, counts, products)
    return out


def combine(values: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
    """(S, U) outputs of a dispatch's places, (B, G, E) weights -> (B, G, U), summed over experts."""
    own = weights.gather(2, dispatch.experts.unsqueeze(1).expand(-1, weights.shape[1], -1))  # (B, G, K)
    of_row = values.index_select(0, dispatch.places.flatten()).unflatten(0, dispatch.places.shape)  # (B, K, U)
    return torch.bmm((own * dispatch.filled.unsqueeze(1)).to(values.dtype), of_row)


def _starts(counts: Tensor) -> Tensor:
    """Where each of successive groups begins (E,)."""
    return counts.cumsum(0) - counts
