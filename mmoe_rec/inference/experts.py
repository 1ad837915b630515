"""Which experts score a request, and what happens where one of them fails.

An expert whose weights are not finite numbers is taken out when the model is loaded. One that raises an error, or whose
values are not finite, is found by running each on its own, and left out of that request: the gates share its weight
among the others. Where a task has no expert left, its prediction is the tower's for no input, the same for every
candidate. The reply's warnings report all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmoe_rec.inference.errors import RequestError
from mmoe_rec.log.given import check_count
from mmoe_rec.model.mmoe import Outputs, RankingModel


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
