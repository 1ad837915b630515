"""Losses that keep experts in use, on what the gates of one level did. Shapes as in `mmoe_rec.model.routing`.

shares: (B,) float32, what each row counts in a mean over rows; by default all count 1 / B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmoe_rec.model.routing import Routing


def expert_loads(routing: Routing, counted: Tensor | None = None) -> Tensor:
    """(E,) float32: each expert's share of all routers' choices together, without gradient; they sum to 1.

    Summed over tasks: evenness within each task would forbid that tasks use different experts. counted: as in
    `Routing.loads`.
    """
    return routing.loads(counted).mean(0)


def balance_loss(routing: Routing, loads: Tensor, shares: Tensor | None = None) -> Tensor:
    """E * sum over experts of load * mean probability (Fedus et al., JMLR 2022, eq. 4): 1 where all are even.

    loads: (E,) of `expert_loads`, over all ranks; a constant, so that gradients go to the mean probability alone.
    """
    importance = _mean_over_rows(routing.probabilities.mean(1), shares)
    return importance.shape[0] * (loads * importance).sum()


def z_loss(routing: Routing, shares: Tensor | None = None) -> Tensor:
    """Mean squared logsumexp of the routers' logits (Zoph et al., 2022, eq. 5), which keeps logits small."""
    return _mean_over_rows(routing.logits.logsumexp(-1).square().mean(1), shares)


def _mean_over_rows(values: Tensor, shares: Tensor | None) -> Tensor:
    """Of (B,) or (B, E)."""
    return values.mean(0) if shares is None else torch.tensordot(shares, values, dims=1)
