"""The kind `regression`: a number, such as an amount or a duration. A model predicts its mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmoe_rec.task_kinds.task_kind import SMALLEST_VALUE, TaskKind

if TYPE_CHECKING:
    from torch import Tensor


class Regression(TaskKind):
    """Labels and predictions are numbers, and the loss is the squared error of the standardized label."""

    labels = ("a number or null where it is unobserved", lambda values: ~np.isinf(values))
    predictions = ("a finite number", np.isfinite)
    wrong_label = "task '{}' holds {}, too large for 32 bits; make it null"
    is_linear = True
    smallest, loss_factor = SMALLEST_VALUE, 0.5
    loss_name, objective = "squared error", "regression"

    def loss(self, logits: Tensor, labels: Tensor, deviation: float = 1.0) -> Tensor:
        return ((logits - labels) / deviation).square()

    def prediction(self, logits: Tensor) -> Tensor:
        return logits

    def log_prediction(self, logits: Tensor) -> Tensor:
        return logits.clamp(min=SMALLEST_VALUE).log()

    def logits(self, predictions: Tensor) -> Tensor:
        return predictions


KIND = Regression("regression")
