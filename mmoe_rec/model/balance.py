"""Losses that keep experts in use, on what the gates of one level did. Shapes as in `mmoe_rec.model.routing`."""

from __future__ import annotations

from torch import Tensor

from mmoe_rec.model.routing import Routing


def expert_loads(routing: Routing) -> Tensor:
    """(E,) float32: each expert's share of all routers' choices together, without gradient; they sum to 1.

    Summed over tasks: evenness within each task would forbid that tasks use different experts.
    """
    return routing.loads().mean(0)


def balance_loss(routing: Routing, loads: Tensor) -> Tensor:
    """E * sum over experts of load * mean probability (Fedus et al., JMLR 2022, eq. 4): 1 where all are even.

    loads: (E,) of `expert_loads`, over all ranks; a constant, so that gradients go to the mean probability alone.
    """
    importance = routing.probabilities.mean((0, 1))
    return importance.shape[0] * (loads * importance).sum()


def z_loss(routing: Routing) -> Tensor:
    """Mean squared logsumexp of the routers' logits (Zoph et al., 2022, eq. 5), which keeps logits small."""
    return routing.logits.logsumexp(-1).square().mean()
