"""Sparse compute: rows are gathered by the expert they were sent to, and each expert multiplies its own rows only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dispatch:
    """N pairs of an expert and a row that was sent to it, ordered by expert.

    experts, rows: (N,) int64; counts: rows of each of the E experts.
    """

    experts: Tensor
    rows: Tensor
    counts: list[int]

    @staticmethod
    def of(used: Tensor) -> Dispatch:
        """The pairs of (B, E) bool."""
        experts, rows = used.t().nonzero(as_tuple=True)
        return Dispatch(experts, rows, torch.bincount(experts, minlength=used.shape[1]).tolist())

    def __len__(self) -> int:
        return len(self.rows)


class _Grouped(torch.autograd.Function):
    """Linear layers of E experts over rows that are ordered by expert; every result is written where it stays.

    Weights of higher precision than the rows are cast one expert at a time, while they are in the cache anyway, and so
    are their gradients: with many experts, casting all of them takes longer than the products.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, counts: Sequence[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        out = x.new_empty(len(x), weight.shape[1])
        for expert, start, stop in _parts(counts):
            torch.addmm(bias[expert].to(x.dtype), x[start:stop], weight[expert].to(x.dtype).t(), out=out[start:stop])
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        to_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        to_weight = torch.empty_like(weight)
        to_bias = weight.new_empty(weight.shape[:2])
        for expert, start, stop in _parts(ctx.counts):
            part = gradient[start:stop]
            if to_x is not None:
                torch.mm(part, weight[expert].to(x.dtype), out=to_x[start:stop])
            if weight.dtype == x.dtype:
                torch.mm(part.t(), x[start:stop], out=to_weight[expert])
            else:
                to_weight[expert].copy_(torch.mm(part.t(), x[start:stop]))
            torch.sum(part, dim=0, dtype=weight.dtype, out=to_bias[expert])
        for expert, count in enumerate(ctx.counts):
            if count == 0:
                to_weight[expert].zero_()
                to_bias[expert].zero_()
        return to_x, to_weight, to_bias, None


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor, counts: Sequence[int]) -> Tensor:
    """(N, I) rows ordered by expert, (E, O, I) weights, (E, O) biases, rows of each expert -> (N, O) like the rows."""
    out: Tensor = _Grouped.apply(x, weight, bias, counts)
    return out


def combine(values: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
    """(N, U) outputs of a dispatch's pairs, (B, G, E) weights -> (B, G, U), summed over experts."""
    rows, gates, _ = weights.shape
    own = weights[dispatch.rows, :, dispatch.experts].to(values.dtype)  # (N, G)
    weighted = (own.unsqueeze(2) * values.unsqueeze(1)).flatten(1)
    summed = values.new_zeros(rows, gates * values.shape[1]).index_add(0, dispatch.rows, weighted)
    return summed.unflatten(1, (gates, values.shape[1]))


def _parts(counts: Sequence[int]) -> list[tuple[int, int, int]]:
    """Expert, first row and end of each expert that has rows."""
    parts, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            parts.append((expert, start, start + count))
        start += count
    return parts
