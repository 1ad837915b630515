"""From logits to predictions and to the one ranking score.

The score multiplies weighted predictions (Zhao et al., RecSys 2019): exp(sum over tasks of weight x log prediction).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mmoe_rec.features.layout import Layout

# The smallest regression value that enters a product: zero or less would make the score 0 whatever the other tasks say.
SMALLEST_VALUE = 1e-6
_LARGEST_LOG = float(np.log(np.finfo(np.float64).max))


def predictions(logits: Tensor, kinds: Sequence[str]) -> Tensor:
    """(B, T) logits -> (B, T) predictions: a probability for a binary task, the value itself for a regression."""
    return torch.where(_is_binary(logits, kinds), logits.sigmoid(), logits)


def log_predictions(logits: Tensor, kinds: Sequence[str]) -> Tensor:
    """(B, T) logits -> (B, T) log predictions.

    Binary: log sigmoid, exact for any logit. Regression: the log of the value, or of SMALLEST_VALUE if that is larger.
    """
    regression = logits.clamp(min=SMALLEST_VALUE).log()
    return torch.where(_is_binary(logits, kinds), functional.logsigmoid(logits), regression)


def logit_of_both(given: Tensor, conditional: Tensor) -> Tensor:
    """Logit of p q, two probabilities' product, from their logits a and b: -log(e^-a + e^-b + e^-(a + b)).

    Exact for any logits, and so are log(p q) and log(1 - p q) as log sigmoids of it and of minus it: nothing is
    subtracted from 1. From p q / (1 - p q), where p = 1 / (1 + e^-a).
    """
    return -torch.logaddexp(torch.logaddexp(-given, -conditional), -(given + conditional))


def with_outcomes(values: np.ndarray, layout: Layout) -> dict[str, np.ndarray]:
    """Predictions (N, T) by name of the task; then for each task with `given` the probability of both, (N,) each.

    A task with `given` predicts the probability given the other one; both together are `GIVEN_and_TASK`.
    """
    tasks = {task.name: values[:, index] for index, task in enumerate(layout.tasks)}
    return tasks | {name: values[:, given] * values[:, task] for name, (given, task) in layout.outcomes.items()}


def fuse(logits: Tensor, kinds: Sequence[str], score_weights: Sequence[float]) -> Tensor:
    """(B, T) logits -> (B,) log score: sum over tasks of weight x log prediction.

    Rank by the log score: its exponential, the score, may be too small for float32 where the log is not.
    """
    weights = torch.tensor(list(score_weights), dtype=logits.dtype, device=logits.device)
    return log_predictions(logits, kinds) @ weights


def _is_binary(logits: Tensor, kinds: Sequence[str]) -> Tensor:
    if len(kinds) != logits.shape[-1]:
        raise ValueError(f"expected one logit for each of {len(kinds)} tasks, found {logits.shape[-1]}")
    return torch.tensor([kind == "binary" for kind in kinds], device=logits.device)


def from_logs(log_scores: np.ndarray) -> np.ndarray:
    """(N,) float64 scores of (N,) log scores; what is too large for a float64 becomes the largest."""
    return np.exp(np.minimum(log_scores, _LARGEST_LOG))
