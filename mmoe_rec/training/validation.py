"""Validation during training: sums that every rank adds to, so that no rank ever holds all predictions."""

import math
from collections.abc import Iterable, Sequence
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
from mmoe_rec.settings.training import Training
from mmoe_rec.training.losses import row_losses

# Logits are counted in bins of 1/256 between -32 and 32: the AUC is exact up to ties within a bin.
BINS_PER_UNIT = 256
MAX_LOGIT = 32
BINS = 2 * MAX_LOGIT * BINS_PER_UNIT


@dataclass(frozen=True)
class Validation:
    """Result of one validation.

    loss: mean per task (nats, or squared deviations of a regression), by the name of the label that the task is learnt
    from, and weighted as in training; auc: per binary task with both classes, over the rows of its own label, weighted
    as in training too; experts: how the tasks used them. Of binary tasks, over the rows of their own label:
    calibration, predicted / observed, weighted as in training; rarer, how many rows have the label that is rarer.
    """

    loss: dict[str, float]
    auc: dict[str, float]
    experts: ExpertUtilization
    calibration: dict[str, float] = field(default_factory=dict)
    rarer_label_rows: dict[str, int] = field(default_factory=dict)

    def tasks_monitored_by_auc(self, monitor: str) -> list[str]:
        """The tasks whose AUC decides which model is best: those with FEWEST rows of either label. None: by loss."""
        return [
            task
            for task in self.auc
            if monitor == "auc" and self.rarer_label_rows.get(task, MIN_RARER_ROWS) >= MIN_RARER_ROWS
        ]

    def objective(self, monitor: str, layout: ModelLayout) -> float:
        """What the best model has the most of: mean AUC of `tasks_monitored_by_auc`, or minus the weighted loss."""
        if told := self.tasks_monitored_by_auc(monitor):
            return sum(self.auc[task] for task in told) / len(told)
        tasks = [task for task in layout.tasks if task.loss_label in self.loss]
        return -sum(task.loss_weight * self.loss[task.loss_label] for task in tasks)

    def to_metrics(self, section: str = "validation") -> dict[str, float]:
        """Losses, areas and calibration by name, for a section of charts in MLflow."""
        names = ("loss", "auc", "calibration")
        return {f"{section}/{task}.{name}": value for name in names for task, value in getattr(self, name).items()}


class ValidationSums:
    """What a validation adds up, of this rank's batches until `exchange`.

    experts: (T, E) bool, the experts that each task uses.
    """

    def __init__(self, layout: Layout, experts: Tensor) -> None:
        self.layout, tasks = layout, len(layout.tasks)
        self.binary = {task.name: index for index, task in enumerate(layout.tasks) if task.kind.is_binary}
        self.counts = torch.zeros(tasks, 2, BINS, dtype=torch.float64)
        self.rows = torch.zeros(tasks, 2, dtype=torch.float64)
        self.loss = torch.zeros(tasks, 2, dtype=torch.float64)
        self.calibration = torch.zeros(tasks, 2, dtype=torch.float64)  # of predictions and labels
        self.utilization = UtilizationAccumulator(experts)

    def add(self, outputs: Outputs, batch: Batch, counted: Tensor) -> None:
        """Adds a batch that was scored without placement, its tasks in the order of the layout.

        outputs: on any device; batch: in main memory, as all is but what gates did; counted: (B,) bool, the rows with a
        label, on the device of the outputs.
        """
        self.utilization.add(outputs, counted)
        logits, labels, own = outputs.logits.cpu(), batch.labels, batch.observed
        losses = row_losses(logits, labels, self.layout.tasks) * batch.observed
        weighted = losses if batch.weights is None else losses * batch.weights[:, None]
        self.loss += torch.stack([weighted.double().sum(0), batch.observed_weights.double()], dim=1)
        if self.layout.joint_outcomes:  # of a task with `conditional_on`, the rows in which the given one came true
            own = own.clone()
            for given, task in self.layout.joint_outcomes.values():
                own[:, task] &= labels[:, given] == 1
        _count(self.counts, self.rows, logits, labels, own, batch.weights)
        weights = own if batch.weights is None else own * batch.weights[:, None]
        predicted = weights * logits.double().sigmoid()
        self.calibration += torch.stack([predicted.sum(0), (weights * labels.double()).sum(0)], dim=1)

    def all_reduce(self, device: torch.device) -> None:
        """Makes the sums those of all ranks: a collective call."""
        for total in (self.counts, self.rows, self.loss, self.calibration, self.utilization.sums):
            _add_up(total, device)

    def result(self) -> Validation:
        """The validation of all rows that were added. Raises UserError where no label was observed."""
        if self.utilization.sums[-1] == 0:
            raise UserError("no row of the validation split has an observed label; move `split.validation_end`")
        losses = zip(self.layout.tasks, self.loss.tolist(), strict=True)
        counts, sums = self.counts.numpy(), self.calibration
        areas = {name: float(auc_of_counts(counts[t, 1], counts[t, 0])) for name, t in self.binary.items()}
        return Validation(
            {task.loss_label: total / weight for task, (total, weight) in losses if weight > 0},
            {name: area for name, area in areas.items() if not math.isnan(area)},
            self.utilization.result(),
            {name: float(sums[t, 0] / sums[t, 1]) for name, t in self.binary.items() if sums[t, 1] > 0},
            {name: int(self.rows[t].min()) for name, t in self.binary.items()},
        )


@torch.no_grad()
def validate(
    model: RankingModel,
    batches: Iterable[Batch],
    layout: Layout,
    device: torch.device,
    stop: StopRequest | None = None,
) -> Validation | None:
    """Scores this rank's batches without placement and adds up over all ranks. A collective call.

    Gives None as soon as a rank was asked to stop.
    """
    sums = ValidationSums(layout, model.experts_in_use)
    model.eval()
    for each in batches:
        if stop is not None:
            flag = torch.tensor(int(stop.signal is not None))
            _add_up(flag, device)
            if flag:
                model.train()
                return None
        batch = each.to(device, non_blocking=True)
        sums.add(model(batch), each, batch.observed.any(1))
    model.train()
    sums.all_reduce(device)
    return sums.result()


@torch.no_grad()
def validate_on_one_process(
    model: RankingModel, rows: EncodedDataset, layout: ModelLayout, batch_size: int, calibration: Calibration
) -> Validation:
    """Scores all rows with a model over `PlainTables`, on this process. rows: with outcomes."""
    sums = ValidationSums(layout, model.experts_in_use)
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
    """Adds rows to `counts` (T, 2, BINS), by their weights (B,), and to `rows` (T, 2), by their number."""
    bins = ((logits.double() + MAX_LOGIT) * BINS_PER_UNIT).long().clamp(0, BINS - 1)
    for task in range(len(counts)):
        known = observed[:, task]
        for label in (0, 1):
            mine = known & (labels[:, task] == label)
            counted = None if weights is None else weights[mine]
            counts[task, label] += torch.bincount(bins[mine, task], counted, minlength=BINS)
            rows[task, label] += mine.sum()


def _add_up(total: Tensor, device: torch.device) -> None:
    """Over all ranks, in place."""
    if dist.get_world_size() > 1:
        summed = total.to(device)
        dist.all_reduce(summed)
        total.copy_(summed)


# What a training's validations say in words: why a state was chosen, and what in them should worry its owner.


MAX_PLAUSIBLE_RATIO = 2.0  # predictions over labels, or the other way round, beyond which a warning is given
_ERRORS = 1.96
MIN_STEPS, SHORT_RUN_STEPS = 50, 300
MAX_LATE_GAIN = 0.005
"""Of the mean AUC or the loss: what the second half of the steps, in which the learning rate falls, may always gain."""


def explain_choice(best: Validation, step: int, monitor: str) -> list[str]:
    """One sentence, then one for each binary task whose AUC had no say although it was asked for."""
    how = f"{_name_objective(best, monitor)} is the {'highest' if best.tasks_monitored_by_auc(monitor) else 'lowest'}"
    without = [
        f"the AUC of '{task}' had no say: {rows} selecting rows have its rarer label, and it takes {MIN_RARER_ROWS}"
        for task, rows in best.rarer_label_rows.items()
        if monitor == "auc" and rows < MIN_RARER_ROWS
    ]
    return [f"best validation, at step {step}: {how}", *without]


def _name_objective(best: Validation, monitor: str) -> str:
    judged = best.tasks_monitored_by_auc(monitor)
    names = " and ".join(filter(None, (", ".join(judged[:-1]), *judged[-1:])))
    return f"the {'mean ' if len(judged) > 1 else ''}AUC of {names}" if judged else "the weighted loss"


def find_undertraining(
    history: Sequence[tuple[int, Validation]], best_step: int, layout: ModelLayout, settings: Training
) -> str | None:
    """What follows "the model" where its training seems to have ended too early; None where not.

    history: (step, validation), the last one of the last step. Too early is after a few steps, or with a last state
    that is the best, and better than after half of the steps: after fewer than `SHORT_RUN_STEPS` steps by what four
    digits show, else by more than a share of `MAX_LATE_GAIN`. What was started from another model is held to
    `MAX_LATE_GAIN` alone.
    """
    (steps, last), by, is_new = history[-1], settings.monitor, history[0][0] > 0
    advice = (
        f"take more training.epochs (now {settings.epochs}), a smaller training.batch_size (now "
        f"{settings.batch_size}), or a higher training.learning_rate (now {settings.learning_rate:g})"
    )
    if steps < MIN_STEPS and is_new:
        return f"had {steps:,} step{'s' * (steps != 1)} of training, and learns little in so few; {advice}"
    now = last.objective(by, layout)
    before = max((each.objective(by, layout) for step, each in history if 2 * step <= steps + 1), default=now)
    if best_step < steps or now - before <= (
        1e-4 if steps < SHORT_RUN_STEPS and is_new else MAX_LATE_GAIN * abs(before)
    ):
        return None
    return (
        f"was still getting better when its training ended: {_name_objective(last, by)} was {abs(before):.4f} after "
        f"half of the {steps:,} steps and is {abs(now):.4f}; {advice}"
    )


def find_warnings(best: Validation, calibration: str) -> list[str]:
    """A sentence for each task that ranks worse than chance, or too well to be true, and for each whose probabilities
    are far off.

    best: of the model as it is served; calibration: the setting `training.calibration`.
    """
    found = []
    advice = "train longer (training.epochs, a smaller batch_size), or set training.calibration to temperature"
    if calibration != "none":
        advice = f"the {calibration} calibration was left out or does not hold: look for drift with `mmoe-rec inspect`"
    for task, auc in best.auc.items():
        rows = best.rarer_label_rows.get(task, MIN_RARER_ROWS)
        if auc < 0.5:
            found.append(
                f"the validation AUC of '{task}' is {auc:.3f}, below .5: nothing shows that it ranks. It has {rows} "
                "rows of its rarer label, the label may be inverted, or validation unlike training"
            )
        elif auc > SUSPICIOUS_AUC and rows >= MIN_RARER_ROWS:
            found.append(f"the validation AUC of '{task}' is {auc:.4f}, {SUSPICIOUS_AUC_ADVICE}")
    for task, ratio in best.calibration.items():
        # Beyond FURTHEST, and the 95% interval for so many rows of the rarer label does not hold 1.
        apart = abs(math.log(ratio)) if ratio > 0 else math.inf
        error = _ERRORS / math.sqrt(max(best.rarer_label_rows.get(task, 0), 1))
        if apart > max(math.log(MAX_PLAUSIBLE_RATIO), error):
            too = "high" if ratio > 1 else "low"
            off = f"the probabilities of '{task}' are too {too}: {ratio:.2f} times what was observed on validation rows"
            found.append(f"{off}; {advice}")
    return found
