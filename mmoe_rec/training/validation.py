"""Validation during training, and warnings about its results.

Ranks exchange sums instead of predictions, so that no rank ever needs all predictions in memory.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from mmoe_rec.auc import MIN_RARER_ROWS, SUSPICIOUS_AUC, SUSPICIOUS_AUC_ADVICE, auc_of_counts
from mmoe_rec.batches.batch import Batch, make_batch
from mmoe_rec.batches.encoded_dataset import EncodedDataset
from mmoe_rec.errors import StopRequest, UserError
from mmoe_rec.features.layout import Layout
from mmoe_rec.model.mmoe import Outputs, RankingModel
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.model.score import Calibration
from mmoe_rec.model.utilization import ExpertUtilization, UtilizationAccumulator
from mmoe_rec.training.losses import row_losses

# The AUC is computed from counts of rows in bins of logits between -32 and 32. Each bin has a width of 1/256. The AUC
# is exact except that rows in the same bin count as ties.
BINS_PER_UNIT = 256
MAX_LOGIT = 32
BINS = 2 * MAX_LOGIT * BINS_PER_UNIT


@dataclass(frozen=True)
class Validation:
    """Result of one validation. Rows are weighted as in training.

    Attributes:
        loss: Mean loss of each task, keyed by `TaskOutput.loss_label`, in nats (binary) or squared standard deviations
            (regression).
        auc: AUC of each binary task that has both classes, over the rows with an observed label of this task. With
            `conditional_on`, only rows in which the label of the condition is 1 count.
        experts: How the tasks used the experts.
        calibration: Predicted number of positives / observed number of positives, for each binary task and over the
            same rows as the AUC.
        rarer_label_rows: Unweighted number of rows with the rarer class of each binary task.
    """

    loss: dict[str, float]
    auc: dict[str, float]
    experts: ExpertUtilization
    calibration: dict[str, float] = field(default_factory=dict)
    rarer_label_rows: dict[str, int] = field(default_factory=dict)

    def tasks_monitored_by_auc(self, monitor: str) -> list[str]:
        """Return the tasks whose AUC selects the best step: none unless `monitor` (`training.monitor`) is "auc".

        Each class of these tasks has at least `MIN_RARER_ROWS` rows.
        """
        rows = self.rarer_label_rows
        return [task for task in self.auc if monitor == "auc" and rows.get(task, MIN_RARER_ROWS) >= MIN_RARER_ROWS]

    def objective(self, monitor: str, layout: ModelLayout) -> float:
        """Return the mean AUC of `tasks_monitored_by_auc`, or without such tasks the negative weighted sum of losses.

        Args:
            monitor: The setting `training.monitor`.
            layout: Tasks with their loss weights.
        """
        if auc_tasks := self.tasks_monitored_by_auc(monitor):
            return sum(self.auc[task] for task in auc_tasks) / len(auc_tasks)
        tasks = [task for task in layout.tasks if task.loss_label in self.loss]
        return -sum(task.loss_weight * self.loss[task.loss_label] for task in tasks)

    def to_metrics(self, section: str = "validation") -> dict[str, float]:
        """Return losses, AUCs and calibration by metric name, such as `SECTION/TASK.auc`."""
        names = ("loss", "auc", "calibration")
        return {f"{section}/{task}.{name}": value for name in names for task, value in getattr(self, name).items()}


class _ValidationSums:
    """Sums of a validation. They cover the batches of this rank until `all_reduce` adds the sums of other ranks."""

    def __init__(self, layout: Layout, experts: Tensor) -> None:
        self.layout, tasks = layout, len(layout.tasks)
        self.binary = {task.name: index for index, task in enumerate(layout.tasks) if task.kind.is_binary}
        self.counts = torch.zeros(tasks, 2, BINS, dtype=torch.float64)
        self.rows = torch.zeros(tasks, 2, dtype=torch.float64)
        self.loss = torch.zeros(tasks, 2, dtype=torch.float64)
        self.calibration = torch.zeros(tasks, 2, dtype=torch.float64)  # Each task's sum of predictions, and of labels.
        self.utilization = UtilizationAccumulator(experts)

    def add(self, outputs: Outputs, batch: Batch, counted: Tensor) -> None:
        """Add a batch in main memory, given the model's outputs and whether each row has any observed label."""
        self.utilization.add(outputs, counted)
        logits, labels, observed = outputs.logits.cpu(), batch.labels, batch.observed
        losses = row_losses(logits, labels, self.layout.tasks) * batch.observed
        weighted = losses if batch.weights is None else losses * batch.weights[:, None]
        self.loss += torch.stack([weighted.double().sum(0), batch.observed_weights.double()], dim=1)
        if self.layout.joint_outcomes:  # For a task with `conditional_on`, count rows whose condition's label is 1.
            observed = observed.clone()
            for condition, task in self.layout.joint_outcomes.values():
                observed[:, task] &= labels[:, condition] == 1
        _count(self.counts, self.rows, logits, labels, observed, batch.weights)
        weights = observed if batch.weights is None else observed * batch.weights[:, None]
        predicted = weights * logits.double().sigmoid()
        self.calibration += torch.stack([predicted.sum(0), (weights * labels.double()).sum(0)], dim=1)

    def all_reduce(self, device: torch.device) -> None:
        """Add the sums of all other ranks. All ranks must call this together."""
        for total in (self.counts, self.rows, self.loss, self.calibration, self.utilization.sums):
            _all_reduce(total, device)

    def result(self) -> Validation:
        """Return the validation of all added rows. Raise UserError if no row has an observed label."""
        if self.utilization.sums[-1] == 0:
            raise UserError("The validation split has no row with an observed label. Move split.validation_end.")
        losses = zip(self.layout.tasks, self.loss.tolist(), strict=True)
        counts, sums = self.counts.numpy(), self.calibration
        aucs = {name: float(auc_of_counts(counts[t, 1], counts[t, 0])) for name, t in self.binary.items()}
        return Validation(
            {task.loss_label: total / weight for task, (total, weight) in losses if weight > 0},
            {name: auc for name, auc in aucs.items() if not math.isnan(auc)},
            self.utilization.result(),
            {name: float(sums[t, 0] / sums[t, 1]) for name, t in self.binary.items() if sums[t, 1] > 0},
            {name: int(self.rows[t].min()) for name, t in self.binary.items()},
        )


@torch.no_grad()
def validate(
    model: RankingModel, batches: Iterable[Batch], layout: Layout, device: torch.device, stop: StopRequest | None = None
) -> Validation | None:
    """Validate a model on the batches of all ranks, without placement features. All ranks must call this together.

    Args:
        model: Model to validate.
        batches: Batches of this rank, in main memory.
        layout: Layout with the tasks.
        device: Device of the model.
        stop: Signal to stop, which is read before every batch. None never stops.

    Returns:
        The validation over all ranks, or None as soon as any rank is asked to stop.

    Raises:
        UserError: No row has an observed label.
    """
    sums = _ValidationSums(layout, model.experts_in_use)
    model.eval()
    for host_batch in batches:
        if stop is not None:
            flag = torch.tensor(int(stop.signal is not None))
            _all_reduce(flag, device)
            if flag:
                model.train()
                return None
        batch = host_batch.to(device, non_blocking=True)
        sums.add(model(batch), host_batch, batch.observed.any(1))
    model.train()
    sums.all_reduce(device)
    return sums.result()


@torch.no_grad()
def validate_on_one_process(
    model: RankingModel, rows: EncodedDataset, layout: ModelLayout, batch_size: int, calibration: Calibration
) -> Validation:
    """Validate a model whose tables are `PlainTables`, in one process without a process group.

    Args:
        model: Model to validate.
        rows: Encoded rows with labels.
        layout: Layout of the model.
        batch_size: Rows per forward pass.
        calibration: Calibration to apply to the logits.

    Raises:
        UserError: No row has an observed label.
    """
    sums = _ValidationSums(layout, model.experts_in_use)
    names = [task.name for task in layout.tasks]
    model.eval()
    for part, _ in rows.stream(batch_size):
        batch = make_batch(part.encoded, layout, part.labels, None, part.weights, torchrec=False)
        outputs = model(batch)
        calibrated = outputs._replace(logits=calibration.apply(outputs.logits.cpu(), names))
        sums.add(calibrated, batch, batch.observed.any(1))
    return sums.result()


def _count(
    counts: Tensor, rows: Tensor, logits: Tensor, labels: Tensor, observed: Tensor, weights: Tensor | None
) -> None:
    """Add the weights of rows to `counts[task, class, bin of logit]`, and numbers of rows to `rows[task, class]`."""
    bins = ((logits.double() + MAX_LOGIT) * BINS_PER_UNIT).long().clamp(0, BINS - 1)
    for task in range(len(counts)):
        for label in (0, 1):
            selected = observed[:, task] & (labels[:, task] == label)
            selected_weights = None if weights is None else weights[selected]
            counts[task, label] += torch.bincount(bins[selected, task], selected_weights, minlength=BINS)
            rows[task, label] += selected.sum()


def _all_reduce(total: Tensor, device: torch.device) -> None:
    """Sum a tensor in main memory over all ranks, in place."""
    if dist.get_world_size() > 1:
        summed = total.to(device)
        dist.all_reduce(summed)
        total.copy_(summed)


# Sentences about the validations of a run: why a step was chosen, and warnings.

MAX_PLAUSIBLE_RATIO = 2.0  # Warn if the sums of predictions and of labels differ by more than this factor.
_Z_95 = 1.96  # A 95% interval extends this many standard errors to both sides.


def explain_choice(best: Validation, step: int, monitor: str) -> list[str]:
    """Return a sentence about why a step was selected, and a sentence for each binary task with too few labels.

    Args:
        best: The best validation.
        step: Step of the best validation.
        monitor: The setting `training.monitor`.
    """
    tasks = best.tasks_monitored_by_auc(monitor)
    names = " and ".join(filter(None, (", ".join(tasks[:-1]), *tasks[-1:])))
    mean = "mean " * (len(tasks) > 1)
    how = f"the {mean}AUC of {names} is the highest" if tasks else "the weighted loss is the lowest"
    ignored = [
        f"the AUC of '{task}' was ignored: {rows} selection rows have its rarer label, at least {MIN_RARER_ROWS} are "
        "needed"
        for task, rows in best.rarer_label_rows.items()
        if monitor == "auc" and rows < MIN_RARER_ROWS
    ]
    return [f"best validation, at step {step}: {how}", *ignored]


def find_warnings(best: Validation, calibration: str) -> list[str]:
    """Return warnings about tasks with an AUC below 0.5 or implausibly near 1, or with badly calibrated probabilities.

    Args:
        best: Validation of the served model.
        calibration: The setting `training.calibration`.
    """
    problems = []
    advice = "set training.calibration to temperature"
    if calibration != "none":
        advice = f"the {calibration} calibration was skipped or doesn't hold: look for drift with `mmoe-rec inspect`"
    for task, auc in best.auc.items():
        rows = best.rarer_label_rows.get(task, MIN_RARER_ROWS)
        if auc < 0.5:
            problems.append(
                f"the validation AUC of '{task}' is {auc:.3f}, below .5, which is no better than chance. Its rarer "
                f"label may have too few rows ({rows}), its label may be inverted, or validation differs from training"
            )
        elif auc > SUSPICIOUS_AUC and rows >= MIN_RARER_ROWS:
            problems.append(f"the validation AUC of '{task}' is {auc:.4f}, {SUSPICIOUS_AUC_ADVICE}")
    for task, ratio in best.calibration.items():
        # Warn if the ratio of predictions and labels exceeds the limit and its 95% interval excludes 1. The standard
        # error follows from the number of rows with the rarer label.
        log_ratio = abs(math.log(ratio)) if ratio > 0 else math.inf
        error = _Z_95 / math.sqrt(max(best.rarer_label_rows.get(task, 0), 1))
        if log_ratio > max(math.log(MAX_PLAUSIBLE_RATIO), error):
            direction = "high" if ratio > 1 else "low"
            problems.append(
                f"the probabilities of '{task}' are too {direction}: {ratio:.2f} times the mean label on validation "
                f"rows; {advice}"
            )
    return problems
