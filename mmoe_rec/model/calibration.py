"""Calibrated logits: for each task a rising function of its logit, fitted after training and kept with the model.

A model whose order is right may still give probabilities that are too high or too low, and the score multiplies
probabilities. As calibrated values are logits again, predictions and score follow from them as from the model's own.
`mmoe_rec.evaluation.fit_calibration`, which serving does not need, fits the functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TaskCalibration:
    """A rising, piecewise linear function of a logit: straight lines between knots, one slope beyond the outer ones.

    logits, calibrated: (K,) the knots, K at least 1, rising in both; slope: beyond the outer knots, above 0. One knot
    makes a straight line. Raises ValueError for knots or a slope that do not rise or are not finite: what does not rise
    would change the order of candidates.
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
    def line(slope: float, offset: float) -> TaskCalibration:
        """slope x logit + offset."""
        return TaskCalibration((0.0,), (offset,), slope)

    @property
    def steepest(self) -> float:
        """The largest slope."""
        knots = zip(pairwise(self.logits), pairwise(self.calibrated), strict=True)
        return max([self.slope, *((high - low) / (right - left) for (left, right), (low, high) in knots)])

    def apply(self, logits: Tensor) -> Tensor:
        """(B,) logits -> (B,) calibrated logits, of the same type, computed in float64."""
        x = logits.double()
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
        return {
            name: {"logits": list(each.logits), "calibrated": list(each.calibrated), "slope": each.slope}
            for name, each in self.tasks.items()
        }

    @staticmethod
    def from_dict(tree: Mapping[str, Any]) -> Calibration:
        """The calibration that `to_dict` gave. Raises KeyError, TypeError or ValueError for anything else."""
        return Calibration(
            {
                name: TaskCalibration(tuple(each["logits"]), tuple(each["calibrated"]), each["slope"])
                for name, each in tree.items()
            }
        )


UNCALIBRATED = Calibration()
