"""Calibrated logits, predictions and the ranking score.

The score is the product over tasks of prediction ^ weight (Zhao et al., RecSys 2019). It is computed as exp(sum over
tasks of weight x log prediction).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmoe_rec.features.layout import Layout
from mmoe_rec.task_kinds.task_kind import TaskKind

_LARGEST_LOG = float(np.log(np.finfo(np.float64).max))


def predictions(logits: Tensor, kinds: Sequence[TaskKind]) -> Tensor:
    """Convert logits to predictions.

    Args:
        logits: (B, T).
        kinds: Kinds of the T tasks.
    """
    return _by_kind(logits, kinds, lambda kind: kind.prediction(logits))


def log_predictions(logits: Tensor, kinds: Sequence[TaskKind]) -> Tensor:
    """Convert logits to finite log predictions by the kind of each task.

    Args:
        logits: (B, T).
        kinds: Kinds of the T tasks.
    """
    return _by_kind(logits, kinds, lambda kind: kind.log_prediction(logits))


def predictions_to_logits(values: Tensor, kinds: Sequence[TaskKind]) -> Tensor:
    """Convert predictions to finite logits by the kind of each task.

    Args:
        values: (B, T).
        kinds: Kinds of the T tasks.
    """
    return _by_kind(values, kinds, lambda kind: kind.logits(values))


def joint_logit(condition: Tensor, conditional: Tensor) -> Tensor:
    """Return the logit of the product of two probabilities with logits a and b: -log(e^-a + e^-b + e^-(a + b)).

    Args:
        condition: Logits a of the first event.
        conditional: Logits b of the second event, given the first.
    """
    return -torch.logaddexp(torch.logaddexp(-condition, -conditional), -(condition + conditional))


def add_joint_predictions(values: np.ndarray, layout: Layout) -> dict[str, np.ndarray]:
    """Return predictions (N,) by task name, with joint predictions.

    A task with `conditional_on` predicts a conditional probability. The joint prediction `CONDITION_and_TASK` is the
    probability that both events happen.

    Args:
        values: (N, T) predictions.
        layout: Layout with the tasks.
    """
    tasks = {task.name: values[:, index] for index, task in enumerate(layout.tasks)}
    return tasks | {
        name: values[:, condition] * values[:, task] for name, (condition, task) in layout.joint_outcomes.items()
    }


def compute_log_scores(logits: Tensor, kinds: Sequence[TaskKind], score_weights: Sequence[float]) -> Tensor:
    """Return the log scores (B,). Rank by log scores, since scores may be too small for float32.

    Args:
        logits: (B, T).
        kinds: Kinds of the T tasks.
        score_weights: Weights of the T tasks.
    """
    weights = torch.tensor(list(score_weights), dtype=logits.dtype, device=logits.device)
    return log_predictions(logits, kinds) @ weights


def _by_kind(logits: Tensor, kinds: Sequence[TaskKind], values_of: Callable[[TaskKind], Tensor]) -> Tensor:
    if len(kinds) != logits.shape[-1]:
        raise ValueError(f"expected one logit for each of {len(kinds)} tasks, not {logits.shape[-1]}")
    values = {kind: values_of(kind) for kind in dict.fromkeys(kinds)}
    first, *rest = values.values()
    return torch.stack([values[kind][..., task] for task, kind in enumerate(kinds)], dim=-1) if rest else first


def scores_from_log_scores(log_scores: np.ndarray) -> np.ndarray:
    """Return the scores (N,) float64 of log scores (N,), limited to the largest float64."""
    return np.exp(np.minimum(log_scores, _LARGEST_LOG))


# Calibration applies an increasing function to each task's logit. `mmoe_rec.evaluation.calibration` fits the functions
# after training, and the model stores them.


@dataclass(frozen=True)
class TaskCalibration:
    """Increasing function from a logit to a calibrated logit. Straight lines connect K points, called knots.

    Attributes:
        logits: Logits of the K knots, K at least 1.
        calibrated: Calibrated logits of the knots.
        slope: Slope of the function below the first knot and above the last.

    Raises:
        ValueError: The function isn't increasing, which would change the order of candidates, or isn't finite.
    """

    logits: tuple[float, ...]
    calibrated: tuple[float, ...]
    slope: float

    def __post_init__(self) -> None:
        if not self.logits or len(self.logits) != len(self.calibrated):
            raise ValueError(f"{len(self.logits)} logits don't match {len(self.calibrated)} calibrated logits of knots")
        if not all(map(math.isfinite, (*self.logits, *self.calibrated, self.slope))):
            raise ValueError("a logit or the slope of a calibration is not finite")
        steps = [high - low for values in (self.logits, self.calibrated) for low, high in pairwise(values)]
        if min([self.slope, *steps]) <= 0:
            raise ValueError("knots and slope must increase")

    @staticmethod
    def linear(slope: float, offset: float) -> "TaskCalibration":
        """Return the function slope x logit + offset.

        Args:
            slope: Factor above 0.
            offset: Calibrated value of logit 0.
        """
        return TaskCalibration((0.0,), (offset,), slope)

    @property
    def max_slope(self) -> float:
        knots = zip(pairwise(self.logits), pairwise(self.calibrated), strict=True)
        return max([self.slope, *((high - low) / (right - left) for (left, right), (low, high) in knots)])

    def apply(self, logits: Tensor) -> Tensor:
        """Return the calibrated logits (B,), computed in float64, in the type of `logits`."""
        x = logits.double()
        if len(self.logits) == 1:
            return (self.calibrated[0] + self.slope * (x - self.logits[0])).to(logits.dtype)
        knots, values = (x.new_tensor(points) for points in (self.logits, self.calibrated))
        outer = values.new_tensor([self.slope])
        slopes = torch.cat([outer, values.diff() / knots.diff(), outer])
        # K knots separate K + 1 lines. Compute each line from the knot at its left, and line 0 from the knot at its
        # right.
        line = torch.bucketize(x.contiguous(), knots)
        knot = (line - 1).clamp(min=0)
        return (values[knot] + slopes[line] * (x - knots[knot])).to(logits.dtype)


@dataclass(frozen=True)
class Calibration:
    """Calibrations of a model's tasks by name. Tasks without a calibration keep their logits."""

    tasks: Mapping[str, TaskCalibration] = field(default_factory=dict)

    def apply(self, logits: Tensor, names: Sequence[str]) -> Tensor:
        """Return calibrated logits, (B, T) of the type of `logits`.

        Args:
            logits: (B, T).
            names: Names of the T tasks.
        """
        if not self.tasks:
            return logits
        columns = zip(names, logits.unbind(1), strict=True)
        return torch.stack([self.tasks[name].apply(x) if name in self.tasks else x for name, x in columns], dim=1)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, without loss."""
        return {name: asdict(calibration) for name, calibration in self.tasks.items()}


UNCALIBRATED = Calibration()
