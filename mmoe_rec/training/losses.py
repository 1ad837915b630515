"""Training loss. Each task's loss is the mean over the task's observed labels on all ranks."""

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
    """Compute the weighted loss over the observed labels of B rows and T tasks.

    The total is world_size * sum over tasks t of loss_weight_t * loss_sum_t / global_counts_t, where loss_sum_t is
    the sum of this rank's losses times `weights`. Ranks average their gradients, so the factor world_size yields the
    gradient of the global mean. A task without observed labels adds exactly 0.

    Args:
        logits: Shape (B, T), float32, or float64 if a task is a regression.
        labels: Labels as for `row_losses`. Same shape and dtype as the logits.
        observed: Whether each label is observed. Shape (B, T), bool.
        tasks: The T tasks.
        global_counts: Number of observed labels of each task in this step on all ranks, or the sum of the weights of
            these rows. Shape (T,).
        world_size: Number of ranks.
        weights: Weights of the rows, above 0. None weights all rows equally. Shape (B,), float64.
        log_variances: Result of the function `log_variances`. None if task weights aren't learned. Shape (T,).

    Returns:
        The total to differentiate (scalar), and loss_sum_t of each task, without gradient. Shape (T,).
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
    else:  # Divide weights by their sum in float64, because float32 can't represent very large or small weights.
        parts = (losses * (weights[:, None] / totals).to(losses)).sum(0)
        sums = parts.detach() * totals
    if log_variances is None:
        return (scale * parts).sum(), sums
    # Every rank adds the whole term of the log variances. It counts once, because ranks average their gradients.
    uncertainty = (task_weights * (global_counts > 0) * log_variances).sum() / 2
    return (scale * loss_factors(log_variances, tasks) * parts).sum() + uncertainty, sums


def row_losses(logits: Tensor, labels: Tensor, tasks: Sequence[TaskOutput]) -> Tensor:
    """Compute the loss of every row and task: cross-entropy, or squared error in squared standard deviations.

    A task with `conditional_on`, such as a purchase given a click, is trained on joint labels (clicked and purchased).
    The prediction for a joint label is the product of both tasks' probabilities (ESMM: Ma et al., SIGIR 2018).

    Args:
        logits: Logits of B rows. Shape (B, T).
        labels: Labels, joint for tasks with `conditional_on`. Shape (B, T).
        tasks: The T tasks.

    Returns:
        Losses, shape (B, T).
    """
    positions = {task.name: index for index, task in enumerate(tasks)}
    columns = []
    for index, task in enumerate(tasks):
        logit, label = logits[:, index], labels[:, index]
        if task.conditional_on is not None:
            logit = joint_logit(logits[:, positions[task.conditional_on]], logit)
        columns.append(task.kind.loss(logit, label, task.std))
    return torch.stack(columns, dim=1)


# Task weights learned from the uncertainty of each task (Kendall, Gal and Cipolla, CVPR 2018).
#
# Each task has a learned log variance s. A regression with Gaussian errors of variance exp(s) has the negative log
# likelihood exp(-s) L / 2 + s / 2, where L is the mean squared error. A classification with logits divided by exp(s)
# has about exp(-s) L + s / 2, where L is the mean cross-entropy (equation 10). A task's `loss_weight` multiplies the
# whole sum. Multiplying only L would have no effect, because s would adapt and cancel the weight. Checkpoints contain
# the log variances. Artifacts don't, because predictions don't need them.

LOG_VARIANCES = "log_variances"


def add_log_variances(model: nn.Module, tasks: Sequence[TaskOutput]) -> None:
    """Make task weights learned by adding log variances to a model that isn't sharded yet.

    Args:
        model: Model, which gets the log variances as one more parameter: zeros, shape (T,), float32.
        tasks: The T tasks.
    """
    model.register_parameter(LOG_VARIANCES, nn.Parameter(torch.zeros(len(tasks))))


def log_variances(model: nn.Module) -> nn.Parameter | None:
    """Return the log variances of a model, None if it has none. Sharding may replace them, so call it afterward."""
    return getattr(model, LOG_VARIANCES, None)


def loss_factors(log_vars: Tensor, tasks: Sequence[TaskOutput]) -> Tensor:
    """Return the factor of each task's mean loss, shape (T,): exp(-s), or exp(-s) / 2 for a regression.

    Args:
        log_vars: Log variances s, shape (T,).
        tasks: The T tasks.
    """
    factors = cached_constant(tuple(task.kind.loss_factor for task in tasks), log_vars.dtype, log_vars.device)
    return factors * torch.exp(-log_vars)
