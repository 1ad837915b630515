"""The backward pass in two parts: that of the dense part first, then that of the tables.

Tables are updated by their optimizer within their backward pass, so what is to be known before anything is updated,
such as whether the gradient is finite, must be known by then. The graph is cut where the tables' outputs enter the
dense part; the gradient that arrives there is handed on later, unchanged. The price is that the ranks' exchange of
dense gradients does not overlap with that of the tables.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class TablesLast:
    """Cuts the graph in front of a model's `mixture` in each training step."""

    def __init__(self, mixture: nn.Module) -> None:
        self._cuts: list[tuple[Tensor, Tensor]] = []
        mixture.register_forward_pre_hook(self._cut)

    def _cut(self, mixture: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        # torchrec's pipeline traces the model by symbols, which are not tensors.
        if not (mixture.training and torch.is_grad_enabled() and isinstance(arguments[0], Tensor)):
            return None
        self._cuts = []
        return tuple(self._leaf(each) if _has_graph(each) else each for each in arguments)

    def _leaf(self, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        self._cuts.append((output, leaf))
        return leaf

    @property
    def finite(self) -> Tensor:
        """() bool: whether the gradients that have arrived at the cut, and their sum, are finite, on this rank."""
        # One pass: an infinity or NaN never leaves a sum.
        found = [leaf.grad.sum() for _, leaf in self._cuts if leaf.grad is not None]
        return torch.stack(found).isfinite().all() if found else torch.tensor(True)

    def rest(self) -> Tensor:
        """What to call `backward` on for the tables' part: its gradient is what has arrived at the cut."""
        parts = [_HandedOn.apply(output, leaf.grad) for output, leaf in self._cuts if leaf.grad is not None]
        self._cuts = []
        return torch.stack(parts).sum() if parts else nothing()


class _HandedOn(torch.autograd.Function):
    """A zero whose gradient, which has to be 1, becomes a given gradient of what went in."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient, None


def nothing() -> Tensor:
    """What has no backward pass, on any rank."""
    return torch.zeros((), requires_grad=True)


def _has_graph(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.requires_grad
