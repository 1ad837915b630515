"""Utilization of experts by tasks, measured at the gates of the last level over many rows.

Shapes: B rows, T tasks, E experts of the last level.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import PlainValidator
from torch import Tensor

from mmoe_rec.model.mmoe import Outputs

# A gate is polarized if one expert gets more than this fraction of the weight (Zhao et al., RecSys 2019, section 4).
POLARIZED_ABOVE = 0.8
# An expert is underused below this fraction of the mean load.
UNDERUSED_BELOW = 0.05

Fractions = Annotated[Tensor, PlainValidator(lambda value: torch.as_tensor(value, dtype=torch.float64))]
"""Float64 tensor that pydantic can read from a list of numbers in JSON."""


@dataclass(frozen=True)
class ExpertUtilization:
    """Utilization of each expert by each task. NaN if the task's gate can't use the expert, or the expert is masked.

    Attributes:
        weights: (T, E) float64, the mean weight of an expert in a task's gate.
        loads: (T, E) float64, the fraction of the task's choices that went to an expert. For soft gates, which don't
            choose, the fraction of the weight.
    """

    weights: Fractions
    loads: Fractions

    @property
    def total_loads(self) -> Tensor:
        """Load of each expert over all tasks, (E,). The loads sum to 1. NaN if no task can use the expert."""
        return self.loads.nan_to_num().mean(0).masked_fill(self.loads.isnan().all(0), math.nan)

    @property
    def max_over_mean(self) -> float:
        """Largest load divided by the mean load. 1 if all loads are equal."""
        loads = _numbers(self.total_loads)
        return float(loads.max() / loads.mean()) if len(loads) else 1.0

    @property
    def entropy(self) -> float:
        """Entropy of `total_loads` divided by the log of the number of experts. 1 if all loads are equal."""
        return _entropy(_numbers(self.total_loads))

    @property
    def polarized(self) -> list[bool]:
        """Whether each task's gate gives more than POLARIZED_ABOVE of its weight to one of several experts."""
        return [len(seen := _numbers(weights)) > 1 and float(seen.max()) > POLARIZED_ABOVE for weights in self.weights]

    def to_metrics(self, tasks: list[str]) -> dict[str, float]:
        metrics = {
            "gates/load_entropy": self.entropy,
            "gates/load_max_over_mean": self.max_over_mean,
            "gates/polarized_fraction": sum(self.polarized) / len(tasks),
        }
        for task, name in enumerate(tasks):
            metrics[f"gates/{name}.entropy"] = _entropy(_numbers(self.weights[task]))
            for expert in (~self.weights[task].isnan()).nonzero().flatten().tolist():
                metrics[f"gates/{name}/expert_{expert}.weight"] = float(self.weights[task, expert])
                metrics[f"gates/{name}/expert_{expert}.load"] = float(self.loads[task, expert])
        return metrics

    @property
    def underused(self) -> list[int]:
        """Indices of the experts with less than UNDERUSED_BELOW of the mean load."""
        loads = self.total_loads
        return (loads < UNDERUSED_BELOW * _numbers(loads).mean()).nonzero().flatten().tolist()

    def findings(self, tasks: list[str]) -> list[str]:
        """Return a sentence for each underused expert and for each polarized gate."""
        loads = self.total_loads
        sentences = [
            f"expert {expert} is underused: it gets {loads[expert]:.2%} of the load, compared with "
            f"{_numbers(loads).mean():.1%} on average. It costs computation, not accuracy"
            for expert in self.underused
        ]
        for name, polarized, weights in zip(tasks, self.polarized, self.weights, strict=True):
            if polarized:
                expert = int(weights.nan_to_num().argmax())
                sentences.append(
                    f"the gate of '{name}' is polarized: expert {expert} gets {weights[expert]:.0%} of its weight. "
                    "Predictions depend on this expert. To spread the weight, set model.gates.dropout to 0.1"
                )
        return sentences


class UtilizationAccumulator:
    """Running sums of gate outputs. The `sums` of several ranks can be added.

    Attributes:
        visible: (T, E) bool, the experts in use that the gate of each task sees.
        sums: (2 T E + 1,) float64: weights by task and expert, choices by task and expert, and the number of rows.
    """

    def __init__(self, visible: Tensor) -> None:
        self.visible = visible
        self.sums = torch.zeros(2 * visible.numel() + 1, dtype=torch.float64, device=visible.device)

    def add(self, outputs: Outputs, row_mask: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            outputs: Outputs of the model.
            row_mask: (B,) bool, whether to count a row. None counts all rows.
        """
        last = outputs.routings[-1]
        weights = chosen = last.weights.double()
        if last.selected is not None:
            selected = last.selected.double()
            chosen = (selected / selected.sum(-1, keepdim=True).clamp(min=1)).expand_as(weights)
        rows = weights.new_ones(len(weights)) if row_mask is None else row_mask.to(weights)
        sums = [torch.einsum("b,bte->te", rows, values).flatten() for values in (weights, chosen)]
        self.sums += torch.cat([*sums, rows.sum()[None]])

    def result(self) -> ExpertUtilization:
        """Return the means over all added rows."""
        sums, unseen = self.sums.cpu(), ~self.visible.cpu()
        weights, choices = sums[:-1].unflatten(0, (2, *unseen.shape)).unbind()
        fractions = choices / choices.sum(-1, keepdim=True).clamp(min=1e-300)
        return ExpertUtilization(*(means.masked_fill(unseen, math.nan) for means in (weights / sums[-1], fractions)))


def _numbers(values: Tensor) -> Tensor:
    """Return the values (n,) that aren't NaN."""
    return values[~values.isnan()]


def _entropy(fractions: Tensor) -> float:
    """Return the entropy of fractions (n,) divided by log n, 1 for a single fraction."""
    if len(fractions) < 2:
        return 1.0
    return float(-torch.special.xlogy(fractions, fractions).sum() / math.log(len(fractions)))
