"""From a model's inputs to predictions: experts that fail are left out, logits are calibrated, results are checked.

An expert whose weights are not finite numbers is taken out when the model is loaded. One that raises an error, or whose
values are not finite, is found by running each on its own, and left out of that request: the gates share its weight
among the others. Where a task has no expert left, its prediction is the tower's for no input, the same for every
candidate. The reply's warnings report all of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mmoe_rec.errors import RequestError
from mmoe_rec.inference.artifact import Artifact
from mmoe_rec.log.given import check_count
from mmoe_rec.model.mmoe import Outputs, RankingModel
from mmoe_rec.model.products import Products, has_onednn, set_products
from mmoe_rec.model.score import Calibration, log_predictions, predictions

# What the model computes of so many rows stays in a processor's cache: 16,384 rows at a time take 1.7 times as long.
PIECE = 1_024
# How long a model's products take is measured with so many rows, so many times; the other way must win by this factor.
_ROWS_TIMED, _TIMES, _MARGIN = 512, 4, 1.2


@dataclass(frozen=True)
class ExpertChoice:
    """What a request asks of the experts. top_k: experts per row and gate, None is the model's own number; masked:
    numbers of experts to leave out.
    """

    top_k: int | None = None
    masked: tuple[int, ...] = ()


MODELS_OWN = ExpertChoice()


class LostExpert(str):
    """A sentence of a reply's `warnings` that an expert is lost, which servers count apart from other sentences."""

    __slots__ = ()


class Guarded(NamedTuple):
    """Logits (B, T), each task's weights of the experts of the last level (B, T, E), a sentence for each thing that
    went wrong, and whether an expert failed on these rows."""

    logits: Tensor
    gates: Tensor
    warnings: list[LostExpert]
    failed: bool


class GuardedModel:
    """A `RankingModel` over `PlainTables` that scores without the experts that fail.

    tasks: names, for warnings; broken: experts whose weights are not finite numbers.
    """

    def __init__(self, model: RankingModel, tasks: Sequence[str]) -> None:
        self.model, self.tasks = model.eval(), tasks
        self.experts = model.visible_experts.shape[1]
        self.broken = _take_out_broken(model)

    def choice(self, top_k: Any, masked: Any) -> ExpertChoice:
        """A request's `gate_top_k` and `mask_experts`, checked. Raises RequestError."""
        check_count("gate_top_k", top_k)
        if top_k is not None and top_k > self.experts:
            raise RequestError(f"gate_top_k is {top_k}, and the model has {self.experts} experts")
        if masked is None:
            return ExpertChoice(top_k)
        if not isinstance(masked, list | tuple) or any(isinstance(e, bool) or not isinstance(e, int) for e in masked):
            raise RequestError("mask_experts must be a list of experts' numbers, such as [0, 3]")
        for expert in masked:
            if not 0 <= expert < self.experts:
                raise RequestError(f"mask_experts names expert {expert}; the model has 0 to {self.experts - 1}")
        return ExpertChoice(top_k, tuple(sorted(set(masked))))

    def logits(self, inputs: Tensor, choice: ExpertChoice = MODELS_OWN) -> Guarded:
        """Logits (B, T) of inputs (B, W).

        Raises RuntimeError where the model fails for another reason than an expert.
        """
        warnings = [
            f"expert {expert} has weights that are not finite numbers and is out of use" for expert in self.broken
        ]
        usable = self.all_but(choice.masked) if choice.masked else None
        try:
            found = self._forward(inputs, choice.top_k, usable)
        except Exception:
            found = None
        if failing := found is None or not _is_finite(found):
            failed = self._failed(inputs, choice)
            warnings += [f"expert {expert} failed and was left out: {reason}" for expert, reason in failed.items()]
            usable = self.all_but([*choice.masked, *failed])
            found = self._forward(inputs, choice.top_k, usable)
        assert found is not None
        gates = found.routings[-1].weights.expand(-1, len(self.tasks), -1)  # one gate may serve all tasks
        return Guarded(found.logits, gates, [*map(LostExpert, warnings + self._bias_only(usable))], failing)

    def _forward(self, inputs: Tensor, top_k: int | None, usable: Tensor | None) -> Outputs:
        with torch.inference_mode():
            return self.model.of_inputs(inputs, None, top_k=top_k, usable=usable)

    def _failed(self, inputs: Tensor, choice: ExpertChoice) -> dict[int, str]:
        """Experts that fail when each is run on its own, and why."""
        # What fails here is no expert's fault.
        without = self._forward(inputs, choice.top_k, self._only(None))
        if not without.routings[0].probabilities.isfinite().all():
            raise RuntimeError("what experts and gates read has values that are not finite numbers")
        failed = {}
        for expert in range(self.experts):
            if expert in choice.masked:
                continue
            try:
                if not _is_finite(self._forward(inputs, choice.top_k, self._only(expert))):
                    failed[expert] = "its values are not finite numbers"
            except Exception as error:
                failed[expert] = " ".join(str(error).split())[:200] or type(error).__name__
        return failed

    def _bias_only(self, usable: Tensor | None) -> list[str]:
        left = self.model.experts_in_use
        some = (left if usable is None else left & usable).any(1).tolist()
        return [
            f"no expert is left for '{task}': its prediction is the same for every candidate"
            for task, any_left in zip(self.tasks, some, strict=True)
            if not any_left
        ]

    def _only(self, expert: int | None) -> Tensor:
        usable = torch.zeros(self.experts, dtype=torch.bool)
        if expert is not None:
            usable[expert] = True
        return usable

    def all_but(self, experts: Iterable[int]) -> Tensor:
        """(E,) bool: False for the given experts."""
        usable = torch.ones(self.experts, dtype=torch.bool)
        usable[list(experts)] = False
        return usable


def _is_finite(outputs: Outputs) -> bool:
    """Whether all logits and all gate probabilities are finite: a gate with NaN chooses nothing."""
    found = [outputs.logits, *(routing.probabilities for routing in outputs.routings)]
    return all(bool(each.isfinite().all()) for each in found)


@torch.no_grad()
def _take_out_broken(model: RankingModel) -> list[int]:
    """Masks experts with a weight that is not finite; gives their numbers."""
    broken: set[int] = set()
    for level in model.mixture.each_level():
        for number, weights in level.weights_by_expert():
            if not all(weight.isfinite().all() for weight in weights):
                broken.add(number)
                for weight in weights:
                    weight.zero_()  # a weight of 0 times NaN would still be NaN
    for gates in model.mixture.gates:
        for expert in range(gates.visible.shape[1]):
            if not all(part.isfinite().all() for part in gates.rows_of(expert)):
                broken.add(expert)
                for part in gates.rows_of(expert):
                    part.zero_()
        gates.masked[list(broken)] = True
    return sorted(broken)


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
