"""How much each task uses each expert: what the gates of the last level did over many rows, in words too."""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import PlainValidator
from torch import Tensor

from mmoe_rec.model.mmoe import Outputs

# A gate that gives one expert more than this share of its weight is polarised (Zhao et al., RecSys 2019, section 4).
POLARIZED_ABOVE = 0.8
# An expert with less than this share of the mean load is hardly used.
UNDERUSED_BELOW = 0.05

Shares = Annotated[Tensor, PlainValidator(lambda value: torch.as_tensor(value, dtype=torch.float64))]
"""Lists of numbers in JSON."""


@dataclass(frozen=True)
class ExpertUtilization:
    """weights: (T, E) float64, the mean weight that a task's gate gives an expert; loads: (T, E) float64, the share of
    the task's choices that fell on it. NaN where a task does not see an expert, or the expert is out of use.
    """

    weights: Shares
    loads: Shares

    @property
    def total_loads(self) -> Tensor:
        """(E,) each expert's share of the loads of all tasks; they sum to 1. NaN for one that no task uses."""
        return self.loads.nan_to_num().mean(0).masked_fill(self.loads.isnan().all(0), math.nan)

    @property
    def max_over_mean(self) -> float:
        """The largest load over the mean load: 1 where all are even."""
        loads = _numbers(self.total_loads)
        return float(loads.max() / loads.mean()) if len(loads) else 1.0

    @property
    def entropy(self) -> float:
        """Entropy of the loads of all tasks together over log E: 1 where all are even."""
        return _entropy(_numbers(self.total_loads))

    @property
    def polarized(self) -> list[bool]:
        """Whether one of several experts has more than POLARISED of a task's weight, by task."""
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
        """Experts with less than HARDLY of the mean load."""
        loads = self.total_loads
        return (loads < UNDERUSED_BELOW * _numbers(loads).mean()).nonzero().flatten().tolist()

    def findings(self, tasks: list[str]) -> list[str]:
        """A sentence for each expert that is hardly used, and for each gate that settles on one."""
        loads = self.total_loads
        found = [
            f"expert {expert} is hardly used: it gets {loads[expert]:.2%} of the load, where an even share is "
            f"{_numbers(loads).mean():.1%}; it costs computation, not accuracy"
            for expert in self.underused
        ]
        for name, polarized, weights in zip(tasks, self.polarized, self.weights, strict=True):
            if polarized:
                expert = int(weights.nan_to_num().argmax())
                found.append(
                    f"the gate of '{name}' settles on expert {expert} with {weights[expert]:.0%} of its weight: good "
                    f"predictions, until that expert is masked; model.gates.dropout of 0.1 spreads the weight"
                )
        return found


class UtilizationAccumulator:
    """Adds up what gates did; sums of several ranks may be added to each other.

    visible: (T, E) bool, the experts that each task sees and that are in use; sums: (2 T E + 1,) float64 on the model's
    device, weights and choices of each task and expert, then the number of rows.
    """

    def __init__(self, visible: Tensor) -> None:
        self.visible = visible
        self.sums = torch.zeros(2 * visible.numel() + 1, dtype=torch.float64, device=visible.device)

    def add(self, outputs: Outputs, row_mask: Tensor | None = None) -> None:
        """Adds a batch. counted: (B,) bool, the rows that count; None is all."""
        last = outputs.routings[-1]
        weights = chosen = last.weights.double()
        if last.selected is not None:
            selected = last.selected.double()
            chosen = (selected / selected.sum(-1, keepdim=True).clamp(min=1)).expand_as(weights)
        rows = weights.new_ones(len(weights)) if row_mask is None else row_mask.to(weights)
        sums = [torch.einsum("b,bte->te", rows, each).flatten() for each in (weights, chosen)]
        self.sums += torch.cat([*sums, rows.sum()[None]])

    def result(self) -> ExpertUtilization:
        """The means of all rows that were added."""
        sums, unseen = self.sums.cpu(), ~self.visible.cpu()
        weights, choices = sums[:-1].unflatten(0, (2, *unseen.shape)).unbind()
        shares = choices / choices.sum(-1, keepdim=True).clamp(min=1e-300)
        means = ((weights / sums[-1]).masked_fill(unseen, math.nan), shares.masked_fill(unseen, math.nan))
        return ExpertUtilization(*means)


def _numbers(values: Tensor) -> Tensor:
    """(n,) what is not NaN."""
    return values[~values.isnan()]


def _entropy(shares: Tensor) -> float:
    """The entropy of shares (n,) that sum to 1, over log n; 1 for a single one."""
    if len(shares) < 2:
        return 1.0
    return float(-torch.special.xlogy(shares, shares).sum() / math.log(len(shares)))
