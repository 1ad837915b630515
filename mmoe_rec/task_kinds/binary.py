"""Kind `binary` for events that happen or not. A model predicts their probability."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmoe_rec.task_kinds.task_kind import TaskKind

if TYPE_CHECKING:
    from torch import Tensor


class Binary(TaskKind):
    """Kind with labels 0 and 1, predicted probabilities, and the cross-entropy loss in nats."""

    valid_labels = (
        "0, 1 or null where it is unobserved",
        lambda values: np.isnan(values) | (values == 0) | (values == 1),
    )
    valid_predictions = ("a probability", lambda values: (values >= 0) & (values <= 1))
    label_error = (
        "is the label of the binary task '{}' and holds {}, neither 0 nor 1. Fix the data, or set the task's kind "
        "to regression"
    )
    is_binary = True
    guardrail_metric, loss_name, lightgbm_objective = "auc", "logloss", "binary"
    mean_label_name = "fraction of positive labels"

    def loss(self, logits: Tensor, labels: Tensor, label_std: float = 1.0) -> Tensor:
        from torch.nn import functional

        return functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")

    def prediction(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def log_prediction(self, logits: Tensor) -> Tensor:
        from torch.nn import functional

        return functional.logsigmoid(logits)

    def logits(self, predictions: Tensor) -> Tensor:
        return predictions.double().logit(1e-12)

    def format_mean(self, mean: float) -> str:
        return f"{mean:.2%}"

    def describe_labels(self, total: float, observed: int) -> str:
        return f"{total:,.0f} positive of {observed:,} observed"


KIND = Binary("binary")
