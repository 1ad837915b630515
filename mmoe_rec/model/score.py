"""From logits to calibrated logits, predictions and the one ranking score.

The score multiplies weighted predictions (Zhao et al., RecSys 2019): exp(sum over tasks of weight x log prediction).
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
    """(B, T) logits -> (B, T) predictions, by the kind of each task."""
    return _by_kind(logits, kinds, lambda kind: kind.prediction(logits))


def log_predictions(logits: Tensor, kinds: Sequence[TaskKind]) -> Tensor:
    """(B, T) logits -> (B, T) log predictions, by the kind of each task."""
    return _by_kind(logits, kinds, lambda kind: kind.log_prediction(logits))


def predictions_to_logits(values: Tensor, kinds: Sequence[TaskKind]) -> Tensor:
    """(B, T) predictions -> (B, T) finite logits, by the kind of each task."""
    return _by_kind(values, kinds, lambda kind: kind.logits(values))


def joint_logit(condition: Tensor, conditional: Tensor) -> Tensor:
    """Logit of p q, two probabilities' product, from their logits a and b: -log(e^-a + e^-b + e^-(a + b)). Exact for
    any logits, as nothing is subtracted from 1.
    """
    return -torch.logaddexp(torch.logaddexp(-condition, -conditional), -(condition + conditional))


def add_joint_predictions(values: np.ndarray, layout: Layout) -> dict[str, np.ndarray]:
    """Predictions (N, T) by name of the task; then for each task with `conditional_on`, which predicts the probability
    given the other one, that of both: `GIVEN_and_TASK`, (N,).
    """
    tasks = {task.name: values[:, index] for index, task in enumerate(layout.tasks)}
    return tasks | {name: values[:, given] * values[:, task] for name, (given, task) in layout.joint_outcomes.items()}


def compute_log_scores(logits: Tensor, kinds: Sequence[TaskKind], score_weights: Sequence[float]) -> Tensor:
    """(B, T) logits -> (B,) log score: sum over tasks of weight x log prediction.

    Rank by the log score: its exponential, the score, may be too small for float32 where the log is not.
    """
    weights = torch.tensor(list(score_weights), dtype=logits.dtype, device=logits.device)
    return log_predictions(logits, kinds) @ weights


def _by_kind(logits: Tensor, kinds: Sequence[TaskKind], values_of: Callable[[TaskKind], Tensor]) -> Tensor:
    if len(kinds) != logits.shape[-1]:
        raise ValueError(f"expected one logit for each of {len(kinds)} tasks, found {logits.shape[-1]}")
    values = {kind: values_of(kind) for kind in dict.fromkeys(kinds)}
    first, *others = values.values()
    return torch.stack([values[kind][..., task] for task, kind in enumerate(kinds)], dim=-1) if others else first


def scores_from_log_scores(log_scores: np.ndarray) -> np.ndarray:
    """(N,) float64 scores of (N,) log scores; what is too large for a float64 becomes the largest."""
    return np.exp(np.minimum(log_scores, _LARGEST_LOG))


# Calibrated logits: for each task a rising function of its logit, fitted after training by
# `mmoe_rec.evaluation.calibration`, and kept with the model.


@dataclass(frozen=True)
class TaskCalibration:
    """A rising, piecewise linear function of a logit: straight lines between knots, one slope beyond the outer ones.

    logits, calibrated: (K,) the knots, K at least 1; slope: beyond them. Raises ValueError for what does not rise,
    which would change the order of candidates, or is not finite.
    """

    logits: tuple[float, ...]
    calibrated: tuple[float, ...]
    slope: float

    def __post_init__(self) -> None:
        if not self.logits or len(self.logits) != len(self.calibrated):
            raise ValueError(f"found {len(self.logits)} logits and {len(self.calibrated)} calibrated ones for knots")
        if not all(map(math.isfinite, (*self.logits, *self.calibrated, self.slope))):
            raise ValueError("a knot or the slope is not a finite number")
        steps = [b - a for each in (self.logits, self.calibrated) for a, b in pairwise(each)]
        if min([self.slope, *steps]) <= 0:
            raise ValueError("knots and slope must rise")

    @staticmethod
    def linear(slope: float, offset: float) -> "TaskCalibration":
        """slope x logit + offset."""
        return TaskCalibration((0.0,), (offset,), slope)

    @property
    def max_slope(self) -> float:
        knots = zip(pairwise(self.logits), pairwise(self.calibrated), strict=True)
        return max([self.slope, *((high - low) / (right - left) for (left, right), (low, high) in knots)])

    def apply(self, logits: Tensor) -> Tensor:
        """(B,) logits -> (B,) calibrated logits, of the same type, computed in float64."""
        x = logits.double()
        if len(self.logits) == 1:
            return (self.calibrated[0] + self.slope * (x - self.logits[0])).to(logits.dtype)
        knots, values = (x.new_tensor(each) for each in (self.logits, self.calibrated))
        outer = values.new_tensor([self.slope])
        slopes = torch.cat([outer, values.diff() / knots.diff(), outer])
        # Piece i lies below knot i, piece K above the last one; each goes through the knot at its left or, the first
        # one having none, at its right.
        piece = torch.bucketize(x.contiguous(), knots)
        knot = (piece - 1).clamp(min=0)
        return (values[knot] + slopes[piece] * (x - knots[knot])).to(logits.dtype)


@dataclass(frozen=True)
class Calibration:
    """The functions of a model's tasks by name; a task without one keeps its logits."""

    tasks: Mapping[str, TaskCalibration] = field(default_factory=dict)

    def apply(self, logits: Tensor, names: Sequence[str]) -> Tensor:
        """(B, T) logits -> (B, T) calibrated logits of the same type; names: of the T tasks."""
        if not self.tasks:
            return logits
        columns = zip(names, logits.unbind(1), strict=True)
        return torch.stack([self.tasks[name].apply(x) if name in self.tasks else x for name, x in columns], dim=1)

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON can hold them without loss."""
        return {name: asdict(each) for name, each in self.tasks.items()}


UNCALIBRATED = Calibration()
