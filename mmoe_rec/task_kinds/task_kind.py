"""Base class of the task kinds. A kind defines valid labels, the loss and the prediction of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

ValueRule = tuple[str, Callable[[np.ndarray], np.ndarray]]
"""Description of valid values, and a function that returns whether each of the values (N,) is valid."""
MIN_LINEAR_PREDICTION = 1e-6
"""Lower limit of a linear task's prediction in the ranking score, where a factor of 0 would hide the other tasks."""


class TaskKind(str, ABC):
    """Kind of a task. An instance is also a string, the name of the kind in settings, layouts and reports.

    Attributes:
        valid_labels: Rule for valid labels. NaN is an unobserved label.
        valid_predictions: Rule for valid predictions.
        label_error: Error about a wrong label, to be appended to the column's name. The two `{}` stand for the task and
            the value.
        is_binary: Whether labels are 0 and 1, and logits are log odds. Binary tasks have positive labels, AUC and
            calibration, and can be conditional on another binary task.
        is_linear: Whether the logit is the prediction, in the label's unit. Models of linear tasks learn standardized
            labels, files store labels in float64, and predictions may be 0 or negative.
        min_prediction: Lower limit of predictions in the ranking score, which raises lower predictions to it.
        guardrail_metric: Metric in which a new model may not lose more than `evaluation.max_metric_drop`.
        loss_name: Name of the loss in reports.
        loss_factor: Factor of the mean loss if training learns the weights of tasks (see `mmoe_rec.training.losses`).
        lightgbm_objective: LightGBM's name for the loss.
        mean_label_name: Name of the mean label in reports.
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
        """Name of the kind, `binary` or `regression`, whose metrics apply to tasks of this kind."""
        return "binary" if self.is_binary else "regression"

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor, label_std: float = 1.0) -> Tensor:
        """Return the loss of each row, (B,).

        Args:
            logits: Shape (B,).
            labels: Shape (B,).
            label_std: Standard deviation of the training labels. Linear kinds divide errors by this number.
        """

    @abstractmethod
    def prediction(self, logits: Tensor) -> Tensor:
        """Return the predictions for logits of any shape."""

    @abstractmethod
    def log_prediction(self, logits: Tensor) -> Tensor:
        """Return finite log predictions for logits of any shape."""

    @abstractmethod
    def logits(self, predictions: Tensor) -> Tensor:
        """Return finite logits for predictions of any shape, the inverse of `prediction`."""

    def losses(self, logits: np.ndarray, labels: np.ndarray, label_std: float = 1.0) -> np.ndarray:
        """Return the loss of each row, (B,) float64, from arrays instead of tensors.

        Args:
            logits: Shape (B,).
            labels: Shape (B,).
            label_std: As in `loss`.
        """
        import torch

        return self.loss(torch.from_numpy(logits).double(), torch.from_numpy(labels).double(), label_std).numpy()

    def count_minority(self, labels: np.ndarray) -> int:
        """Return the number of labels of the rarer class, or of all labels if the kind has no classes."""
        return int(min(labels.sum(), (1 - labels).sum())) if self.is_binary else len(labels)

    def label_mean_and_std(self, labels: np.ndarray) -> tuple[float, float]:
        """Return the mean and standard deviation that standardize labels, or 0 and 1 for kinds that aren't linear."""
        return (labels.mean(), labels.std() or 1.0) if self.is_linear else (0.0, 1.0)

    def format_mean(self, mean: float) -> str:
        """Format a mean label. Means from 1000 keep all digits before the decimal point."""
        return f"{mean:,.0f}" if 1000 <= abs(mean) < 1e15 else f"{mean:.4g}"

    def describe_labels(self, total: float, observed: int) -> str:
        """Return a phrase for reports with the number of observed labels, and their mean or number of positives.

        Args:
            total: Sum of the labels.
            observed: Number of observed labels.
        """
        return f"{observed:,} observed" + (f", mean {self.format_mean(total / observed)}" if observed else "")
