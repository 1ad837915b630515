"""Task towers over the gated experts, and the placement tower that absorbs bias (Zhao et al., RecSys 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmoe_rec.model.stacked import StackedLinear


class Towers(nn.Module):
    """T independent networks, one per task: SiLU hidden layers, then one logit."""

    def __init__(self, tasks: int, inputs: int, units: Sequence[int]) -> None:
        super().__init__()
        widths = [inputs, *units, 1]
        self.layers = nn.ModuleList(StackedLinear(tasks, width, below) for width, below in pairwise(widths))

    @property
    def output_bias(self) -> nn.Parameter:
        """(T, 1) what is added to each task's logit last."""
        last = self.layers[-1]
        assert isinstance(last, StackedLinear)
        return last.bias

    def forward(self, gated: Tensor) -> Tensor:
        """(B, T, U) -> logits (B, T)."""
        parts = list(gated.unbind(1))
        for layer in self.layers[:-1]:
            parts = [functional.silu(part) for part in layer(parts)]
        return torch.cat(self.layers[-1](parts), dim=1)


class PlacementTower(nn.Module):
    """A shallow network from placement inputs to a logit per task, added to the main logits in training.

    In training the whole placement of a row is hidden with probability `dropout` (its logits are 0), so that the model
    does not lean on placement, which serving does not know.
    """

    def __init__(self, inputs: int, tasks: int, units: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.layers = mlp(inputs, units)
        self.logits = nn.Linear(units[-1] if units else inputs, tasks)

    def forward(self, placement: Tensor) -> Tensor:
        """(B, P) -> logits (B, T)."""
        logits: Tensor = self.logits(self.layers(placement))
        if self.training and self.dropout > 0:
            shown = torch.rand(len(logits), 1, device=logits.device) >= self.dropout
            logits = logits * shown
        return logits


def mlp(inputs: int, units: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """Linear layers of the given widths, each followed by SiLU and, if asked for, dropout."""
    layers: list[nn.Module] = []
    for width in units:
        layers += [nn.Linear(inputs, width), nn.SiLU()]
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
        inputs = width
    return nn.Sequential(*layers)
