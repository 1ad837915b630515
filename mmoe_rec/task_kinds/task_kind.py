"""The base of all kinds of tasks: a kind decides what labels are, how they are learnt, and what is predicted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

ValueRule = tuple[str, Callable[[np.ndarray], np.ndarray]]
"""A description of valid values, and a function that returns which of (N,) values are valid."""
MIN_LINEAR_PREDICTION = 1e-6
"""The smallest prediction of a linear kind in a product. The score would be 0 at 0, whatever other tasks say."""


class TaskKind(str, ABC):
    """A kind of task. It equals its name, which settings, layouts and reports hold.

    Methods on tensors import torch as they run, because rooms that don't need torch use kinds too.

    Attributes:
        labels: Valid labels. NaN is an unobserved label.
        predictions: Valid predictions.
        label_error: End of a sentence about a wrong label in a log, with a place for the task and one for the value.
        is_binary: Whether labels are 0 and 1, and logits are log odds. Then tasks have positive labels, AUC and
            calibration, and can be conditional on each other.
        is_linear: Whether the logit is the prediction, in the label's unit. Then models learn standardized labels,
            files hold them in float64, and predictions may be 0 or less.
        min_prediction: Smallest prediction that enters a product of predictions.
        guarded: Metric of which a task may not lose more than the margin.
        loss_name: Words for the loss.
        loss_factor: Factor of the mean loss where task weights are learnt; see `mmoe_rec.training.losses`.
        objective: LightGBM's name of the loss.
        mean_label_name: Words for the mean label.
    """

    valid_labels: ValueRule
    valid_predictions: ValueRule
    label_error: str
    is_binary = False
    is_linear = False
    min_prediction = 0.0
    guardrail_metric = "r2"
    loss_name: str
    loss_factor = 1.0
    lightgbm_objective: str
    mean_label_name = "mean label"

    @property
    def metrics_kind(self) -> str:
        """The kind whose metrics tasks of this kind have, besides metrics of this kind alone."""
        return "binary" if self.is_binary else "regression"

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor, label_std: float = 1.0) -> Tensor:
        """Return the losses of rows. deviation: standard deviation of a linear kind's training labels. Shapes (B,)."""

    @abstractmethod
    def prediction(self, logits: Tensor) -> Tensor:
        """Return predictions of logits of any shape."""

    @abstractmethod
    def log_prediction(self, logits: Tensor) -> Tensor:
        """Return log predictions of logits of any shape, finite for any logit."""

    @abstractmethod
    def logits(self, predictions: Tensor) -> Tensor:
        """Return finite logits of predictions of any shape, the inverse of `prediction`."""

    def losses(self, logits: np.ndarray, labels: np.ndarray, label_std: float = 1.0) -> np.ndarray:
        """Return the same as `loss` for arrays, in float64."""
        import torch

        return self.loss(torch.from_numpy(logits).double(), torch.from_numpy(labels).double(), label_std).numpy()

    def count_minority(self, labels: np.ndarray) -> int:
        """Count the labels that limit a fit: those of the rarer class, or all if there are no classes."""
        return int(min(labels.sum(), (1 - labels).sum())) if self.is_binary else len(labels)

    def label_mean_and_std(self, labels: np.ndarray) -> tuple[float, float]:
        """Return the mean and the standard deviation by which labels are standardized, 0 and 1 for none."""
        return (labels.mean(), labels.std() or 1.0) if self.is_linear else (0.0, 1.0)

    def format_mean(self, mean: float) -> str:
        """Format a mean label. Large ones, such as times, keep every unit."""
        return f"{mean:,.0f}" if 1000 <= abs(mean) < 1e15 else f"{mean:.4g}"

    def describe_labels(self, total: float, observed: int) -> str:
        """Describe observed labels by their sum and number."""
        return f"{observed:,} observed" + (f", mean {self.format_mean(total / observed)}" if observed else "")
