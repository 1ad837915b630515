"""From a model's inputs to predictions: experts that fail are left out, logits are calibrated, results are checked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mmoe_rec.inference.artifact import Artifact
from mmoe_rec.inference.experts import MODELS_OWN, ExpertChoice, GuardedModel, LostExpert
from mmoe_rec.model.products import Products, has_onednn, set_products
from mmoe_rec.model.score import Calibration, log_predictions, predictions

# What the model computes of so many rows stays in a processor's cache: 16,384 rows at a time take 1.7 times as long.
PIECE = 1_024
# How long a model's products take is measured with so many rows, so many times; the other way must win by this factor.
_ROWS_TIMED, _TIMES, _MARGIN = 512, 4, 1.2


@dataclass(frozen=True)
class Inside:
    """Of N rows: predictions before calibration (N, T), as in `Scored`; gates (N, T, E) float32, each task's weights of
    the experts of the last level."""

    values: np.ndarray
    gates: np.ndarray


@dataclass(frozen=True)
class Scored:
    """Of N rows: predictions (N, T), float32, or float64 where a task is a regression; their logs (N, T) float64;
    sentences about experts; whether an expert failed on these rows; and what it came from, where that was asked for."""

    values: np.ndarray
    logs: np.ndarray
    warnings: tuple[LostExpert, ...] = ()
    failed: bool = False
    inside: Inside | None = None

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
        insides = [part.inside for part in parts if part.inside is not None]
        inside = None
        if insides:
            gates = np.concatenate([each.gates for each in insides])
            inside = Inside(np.concatenate([each.values for each in insides]), gates)
        return Scored(values, logs, warnings, any(part.failed for part in parts), inside)


class Scorer:
    """A model with its calibration. guarded: the model without the experts that fail."""

    def __init__(self, about: Artifact, guarded: GuardedModel, calibration: Calibration) -> None:
        self.about, self.guarded, self.calibration = about, guarded, calibration
        self._kinds = [task.kind for task in about.tasks]
        self.names = [task.name for task in about.tasks]
        self.products: Products = "blas"

    def multiply_by(self, products: Products) -> None:
        """From now on multiplies by this library, where torch has it; results are equal but for rounding."""
        self.products = products if has_onednn() else "blas"
        set_products(self.guarded.model, self.products)

    def faster_products(self, width: int) -> Products:
        """oneDNN if it is clearly faster here. width: of the inputs. Takes some 50 ms."""
        if not has_onednn():
            return "blas"
        rows, before = torch.zeros(_ROWS_TIMED, width), self.products
        seconds: dict[Products, float] = {}
        for products in ("blas", "onednn"):
            set_products(self.guarded.model, products)
            seconds[products] = min(self._seconds(rows) for _ in range(_TIMES))
        set_products(self.guarded.model, before)
        return "onednn" if seconds["onednn"] * _MARGIN < seconds["blas"] else "blas"

    def _seconds(self, inputs: Tensor) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            self.guarded.model.of_inputs(inputs, None)
        return time.perf_counter() - start

    def score(self, inputs: Tensor, choice: ExpertChoice = MODELS_OWN, explain: bool = False) -> Scored:
        """Predictions of inputs (N, W), see `RankingModel.side_by_side`. explain: give `inside` too.

        Raises RuntimeError where the model fails for another reason than an expert, or gives no finite numbers.
        """
        pieces = inputs.split(PIECE) if len(inputs) else ()
        return Scored.joined([self._score(piece, choice, explain) for piece in pieces], len(self._kinds))

    def _score(self, inputs: Tensor, choice: ExpertChoice, explain: bool) -> Scored:
        rows = len(inputs)
        if self.products == "onednn":
            inputs = _filled_up(inputs)
        with torch.inference_mode():
            found = self.guarded.logits(inputs, choice)
            logits = self.calibration.apply(found.logits[:rows], self.names)
            values = predictions(logits, self._kinds).numpy()
            logs = log_predictions(logits.double(), self._kinds).numpy()
            inside = None
            if explain:
                before = predictions(found.logits[:rows], self._kinds).numpy()
                inside = Inside(before, found.gates[:rows].numpy())
        if not (np.isfinite(values).all() and np.isfinite(logs).all()):
            # NaN would make the reply invalid JSON, and a ranking by it means nothing.
            raise RuntimeError(f"model '{self.about.name}' gives predictions that are not finite numbers")
        return Scored(values, logs, tuple(found.warnings), found.failed, inside)


def _filled_up(inputs: Tensor) -> Tensor:
    """Rows (N, W) with rows of zeros behind them, at most a sixteenth or 15 more.

    oneDNN prepares and keeps products for each number of rows, so there should be few of these.
    """
    step = max(16, 1 << max(0, (len(inputs) - 1).bit_length() - 5))
    missing = -len(inputs) % step
    return functional.pad(inputs, (0, 0, 0, missing)) if missing else inputs
