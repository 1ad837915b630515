"""From a model's inputs to predictions: experts that fail are left out, logits are calibrated, results are checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmoe_rec.model.calibration import Calibration
from mmoe_rec.model.score import log_predictions, predictions
from mmoe_rec.serving.artifact import Artifact
from mmoe_rec.serving.experts import MODELS_OWN, ExpertChoice, GuardedModel

ROWS_AT_A_TIME = 16_384


@dataclass(frozen=True)
class Scored:
    """Of N rows: predictions (N, T), float32, or float64 where a task is a regression; their logs (N, T) float64;
    sentences about experts; whether an expert failed on these rows."""

    values: np.ndarray
    logs: np.ndarray
    warnings: tuple[str, ...] = ()
    failed: bool = False

    @staticmethod
    def joined(parts: Sequence[Scored], tasks: int) -> Scored:
        """The rows of all parts, in order."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return Scored(np.empty((0, tasks), np.float32), np.empty((0, tasks)))
        warnings = tuple(dict.fromkeys(sentence for part in parts for sentence in part.warnings))
        values, logs = (
            np.concatenate(each) for each in zip(*((part.values, part.logs) for part in parts), strict=True)
        )
        return Scored(values, logs, warnings, any(part.failed for part in parts))


class Scorer:
    """A model with its calibration. guarded: the model without the experts that fail."""

    def __init__(self, about: Artifact, guarded: GuardedModel, calibration: Calibration) -> None:
        self.about, self.guarded, self.calibration = about, guarded, calibration
        self._kinds = [task.kind for task in about.tasks]
        self._names = [task.name for task in about.tasks]

    def score(self, inputs: Tensor, choice: ExpertChoice = MODELS_OWN) -> Scored:
        """Predictions of inputs (N, W), see `RankingModel.side_by_side`.

        Raises RuntimeError where the model fails for another reason than an expert, or gives no finite numbers.
        """
        pieces = inputs.split(ROWS_AT_A_TIME) if len(inputs) else ()
        return Scored.joined([self._score(piece, choice) for piece in pieces], len(self._kinds))

    def _score(self, inputs: Tensor, choice: ExpertChoice) -> Scored:
        with torch.inference_mode():
            found = self.guarded.logits(inputs, choice)
            logits = self.calibration.apply(found.logits, self._names)
            values = predictions(logits, self._kinds).numpy()
            logs = log_predictions(logits.double(), self._kinds).numpy()
        if not (np.isfinite(values).all() and np.isfinite(logs).all()):
            # NaN would make the reply invalid JSON, and a ranking by it means nothing.
            raise RuntimeError(f"model '{self.about.name}' gives predictions that are not finite numbers")
        return Scored(values, logs, tuple(found.warnings), found.failed)
