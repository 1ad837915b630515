"""Kind `regression` for numbers, such as amounts or durations. A model predicts their mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmoe_rec.task_kinds.task_kind import MIN_LINEAR_PREDICTION, TaskKind

if TYPE_CHECKING:
    from torch import Tensor


class Regression(TaskKind):
    """Kind with numbers as labels and predictions. The loss is the squared error of the standardized label."""

    valid_labels = ("a number or null where it is unobserved", lambda values: ~np.isinf(values))
    valid_predictions = ("a finite number", np.isfinite)
    label_error = "is the label of task '{}' and holds {}, which is infinite or too large for float32. Make it null"
    is_linear = True
    min_prediction, loss_factor = MIN_LINEAR_PREDICTION, 0.5
    loss_name, lightgbm_objective = "squared error", "regression"

    def loss(self, logits: Tensor, labels: Tensor, label_std: float = 1.0) -> Tensor:
        return ((logits - labels) / label_std).square()

    def prediction(self, logits: Tensor) -> Tensor:
        return logits

    def log_prediction(self, logits: Tensor) -> Tensor:
        return logits.clamp(min=MIN_LINEAR_PREDICTION).log()

    def logits(self, predictions: Tensor) -> Tensor:
        return predictions


KIND = Regression("regression")
