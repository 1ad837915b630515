"""The training loss: masked per task, normalised by the rows observed over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mmoe_rec.features.layout import TaskOutput
from mmoe_rec.training.task_weights import loss_factors


def masked_loss(
    logits: Tensor,
    labels: Tensor,
    observed: Tensor,
    *,
    tasks: Sequence[TaskOutput],
    global_counts: Tensor,
    world_size: int = 1,
    log_variances: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted loss over the observed labels: the total to differentiate, and each task's plain sum.

    logits, labels: (B, T) float32; observed: (B, T) bool; tasks: T, each with its kind and weight; global_counts: (T,)
    observed rows of this step over all ranks; log_variances: (T,), where task weights are learnt (see `task_weights`).
    Returns a scalar and (T,) detached sums over this rank's rows.

    The total is world_size * sum_t weight_t * sum_t / global_counts_t: gradients are averaged over ranks afterwards
    (by data parallelism and by sharded tables alike), so the factor makes them those of the global mean. A task without
    observed rows adds exactly zero, and so does its log variance.
    """
    assert logits.shape == labels.shape == observed.shape, "logits, labels and observed differ in shape"
    assert len(tasks) == logits.shape[1] == len(global_counts), "one entry per task"
    sums = (row_losses(logits, labels, tasks) * observed).sum(0)
    weights = torch.tensor([task.loss_weight for task in tasks], dtype=sums.dtype, device=sums.device)
    scale = world_size * weights / global_counts.to(sums).clamp(min=1)
    if log_variances is None:
        return (scale * sums).sum(), sums.detach()
    # Every rank adds the whole of this term, which the average over ranks leaves as it is.
    uncertainty = (weights * (global_counts > 0) * log_variances).sum() / 2
    return (scale * loss_factors(log_variances, tasks) * sums).sum() + uncertainty, sums.detach()


def row_losses(logits: Tensor, labels: Tensor, tasks: Sequence[TaskOutput]) -> Tensor:
    """(B, T) loss of every row and task: binary cross-entropy, or the squared error of the standardised label."""
    columns = [
        functional.binary_cross_entropy_with_logits(logits[:, index], labels[:, index], reduction="none")
        if task.kind == "binary"
        else ((logits[:, index] - labels[:, index]) / task.deviation).square()
        for index, task in enumerate(tasks)
    ]
    return torch.stack(columns, dim=1)
