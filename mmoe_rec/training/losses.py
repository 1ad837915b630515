"""The training loss: masked per task, normalised by the rows observed over all ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmoe_rec.devices import cached_constant
from mmoe_rec.features.layout import TaskOutput
from mmoe_rec.model.model_layout import ModelTask
from mmoe_rec.model.score import joint_logit


def masked_loss(
    logits: Tensor,
    labels: Tensor,
    observed: Tensor,
    *,
    tasks: Sequence[ModelTask],
    global_counts: Tensor,
    world_size: int = 1,
    weights: Tensor | None = None,
    log_variances: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted loss over the observed labels: the total to differentiate, and each task's plain sum.

    logits, labels: (B, T) float32, or float64 where a task is a regression; observed: (B, T) bool; global_counts: (T,)
    observed rows of this step over all ranks, or the sums of their weights; weights: (B,) float64 of the rows, above 0;
    log_variances: (T,), where task weights are learnt. Returns a scalar and (T,) detached sums over this rank's rows.

    The total is world_size * sum_t weight_t * sum_t / global_counts_t: gradients are averaged over ranks afterwards
    (by data parallelism and by sharded tables alike), so the factor makes them those of the global mean. A task without
    observed rows adds exactly zero, and so does its log variance.
    """
    assert logits.shape == labels.shape == observed.shape, "logits, labels and observed differ in shape"
    assert len(tasks) == logits.shape[1] == len(global_counts), "one entry per task"
    losses = row_losses(logits, labels, tasks) * observed
    totals = torch.where(global_counts > 0, global_counts, 1)
    task_weights = cached_constant(tuple(task.loss_weight for task in tasks), losses.dtype, losses.device)
    scale = world_size * task_weights
    if weights is None:
        parts = losses.sum(0)
        sums, scale = parts.detach(), scale / totals.to(losses)
    else:  # weights of any size are divided by their sum before they meet float32
        parts = (losses * (weights[:, None] / totals).to(losses)).sum(0)
        sums = parts.detach() * totals
    if log_variances is None:
        return (scale * parts).sum(), sums
    # Every rank adds the whole of this term, which the average over ranks leaves as it is.
    uncertainty = (task_weights * (global_counts > 0) * log_variances).sum() / 2
    return (scale * loss_factors(log_variances, tasks) * parts).sum() + uncertainty, sums


def row_losses(logits: Tensor, labels: Tensor, tasks: Sequence[TaskOutput]) -> Tensor:
    """(B, T) loss of every row and task.

    labels: of each task's `loss_label`. That of a task with `conditional_on` is its outcome over all rows, predicted
    by the product of both tasks' probabilities, through which both learn (ESMM: Ma et al., SIGIR 2018).
    """
    places = {task.name: index for index, task in enumerate(tasks)}
    columns = []
    for index, task in enumerate(tasks):
        logit, label = logits[:, index], labels[:, index]
        if task.conditional_on is not None:
            logit = joint_logit(logits[:, places[task.conditional_on]], logit)
        columns.append(task.kind.loss(logit, label, task.std))
    return torch.stack(columns, dim=1)


# Task weights that are learnt with the model, from how uncertain each task is (Kendall, Gal and Cipolla, CVPR 2018).
#
# Each task has a learnt log variance s. A regression whose errors are Gaussian with variance exp(s) has the negative
# log likelihood exp(-s) L / 2 + s / 2 for the mean squared error L; a classification whose logits are divided by exp(s)
# has about exp(-s) L + s / 2 for the mean cross-entropy L (their equation 10). A task's `loss_weight` multiplies its
# whole term: on L alone it would cancel, as s would follow it. Checkpoints hold the log variances, artifacts do not.

LOG_VARIANCES = "log_variances"


def add_log_variances(model: nn.Module, tasks: Sequence[TaskOutput]) -> None:
    """Gives a model its log variances, (T,) float32 zeros, as a parameter of its own; before it is sharded."""
    model.register_parameter(LOG_VARIANCES, nn.Parameter(torch.zeros(len(tasks))))


def log_variances(model: nn.Module) -> nn.Parameter | None:
    """Those of a model, None where it has none. Read anew where used: a parameter's identity is the optimizer's."""
    return getattr(model, LOG_VARIANCES, None)


def loss_factors(logs: Tensor, tasks: Sequence[TaskOutput]) -> Tensor:
    """(T,) log variances -> (T,) what each task's mean loss is multiplied by, besides its `loss_weight`."""
    return cached_constant(tuple(task.kind.loss_factor for task in tasks), logs.dtype, logs.device) * torch.exp(-logs)
