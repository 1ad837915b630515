"""Task weights that are learnt with the model, from how uncertain each task is (Kendall, Gal and Cipolla, CVPR 2018).

Each task has a learnt log variance s. A regression whose errors are Gaussian with variance exp(s) has the negative log
likelihood exp(-s) L / 2 + s / 2 for the mean squared error L; a classification whose logits are divided by exp(s) has
about exp(-s) L + s / 2 for the mean cross-entropy L (their equation 10). A task's `loss_weight` w multiplies its whole
term, w (c exp(-s) L + s / 2) with c = 1 (binary) or 1/2 (regression): on L alone it would cancel, as s would follow it.
At the best s, L counts w / (2 L), whatever the kind: the tasks' gradients are those of w / 2 x log L.

The log variances are a parameter of the model in training only, beside what is served: they are in checkpoints, and
neither an artifact nor a warm start knows them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmoe_rec.features.layout import TaskOutput

NAME = "log_variances"


def add_log_variances(model: nn.Module, tasks: Sequence[TaskOutput]) -> None:
    """Gives a model its log variances, (T,) float32 zeros, as a parameter of its own; before it is sharded."""
    model.register_parameter(NAME, nn.Parameter(torch.zeros(len(tasks))))


def log_variances(model: nn.Module) -> nn.Parameter | None:
    """Those of a model, None where it has none. Read anew where used: a parameter's identity is the optimizer's."""
    return getattr(model, NAME, None)


def loss_factors(logs: Tensor, tasks: Sequence[TaskOutput]) -> Tensor:
    """(T,) log variances -> (T,) what each task's mean loss is multiplied by, besides its `loss_weight`."""
    halves = torch.tensor([1.0 if task.kind == "binary" else 0.5 for task in tasks], dtype=logs.dtype)
    return halves.to(logs.device) * torch.exp(-logs)
