"""Soft gates, one per task (Ma et al., KDD 2018), with gate dropout (Zhao et al., RecSys 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SoftGates(nn.Module):
    """One softmax over E experts for each of T tasks, all computed by one linear layer."""

    def __init__(self, inputs: int, tasks: int, experts: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.tasks = tasks
        self.experts = experts
        self.dropout = dropout
        self.linear = nn.Linear(inputs, tasks * experts)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, H) -> weights (B, T, E) float32 that sum to 1 over the experts."""
        logits = self.linear(hidden).float().unflatten(1, (self.tasks, self.experts))
        if self.training and self.dropout > 0:
            keep = torch.rand_like(logits) >= self.dropout
            logits = logits.masked_fill(~keep_some(keep), float("-inf"))
        return logits.softmax(-1)


def keep_some(keep: Tensor) -> Tensor:
    """A mask (..., E) bool in which a gate that lost all its experts keeps them all.

    A softmax over the kept experts' logits equals the dropped and renormalised softmax; with none kept it would be NaN.
    """
    return keep | ~keep.any(-1, keepdim=True)
