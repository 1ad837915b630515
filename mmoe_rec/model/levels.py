"""Levels of experts and gates: one is MMoE or CGC, several on top of each other are PLE (Tang et al., RecSys 2020).

Experts come in this order: those that all tasks share, then those of the first task alone, and so on. The gate of a
task sees the shared ones and its own. In all levels but the last there is one more gate, the shared one, which sees all
experts; what it mixes is the input of the next level's shared experts, and what a task's gate mixes that of the task's
own experts and gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from mmoe_rec.model.experts import Activation, Compute, Experts
from mmoe_rec.model.gates import Gates, Routing, RoutingRule


def visible_experts(tasks: int, shared: int, own: int, shared_gate: bool) -> Tensor:
    """(gates, E) bool: which experts each task's gate sees, and then the shared gate."""
    visible = torch.zeros(tasks + shared_gate, shared + tasks * own, dtype=torch.bool)
    visible[:, :shared] = True
    for task in range(tasks):
        visible[task, shared + task * own : shared + (task + 1) * own] = True
    if shared_gate:
        visible[-1] = True
    return visible


class Level(nn.Module):
    """Experts and gates on one input, or on one for each task and one for the shared experts.

    inputs: width of what gates read; expert_inputs: of what experts read; shared, own: number of experts of all tasks,
    and of each task alone; first: whether all read the same; last: whether there is no shared gate; per_task: False
    makes one gate for all tasks.
    """

    def __init__(
        self,
        inputs: int,
        expert_inputs: int,
        tasks: int,
        shared: int,
        own: int,
        units: Sequence[int],
        rule: RoutingRule,
        *,
        first: bool,
        last: bool,
        per_task: bool,
        activation: Activation,
        normalise: bool,
        compute: Compute,
    ) -> None:
        super().__init__()
        self.tasks, self.first, self.per_task = tasks, first, per_task
        # Experts that read the same input are computed together: number of the input, and how many read it.
        groups = [(0, shared + tasks * own)] if first else [(tasks, shared), *((task, own) for task in range(tasks))]
        self.sources = [source for source, size in groups if size]
        self.experts = nn.ModuleList(
            Experts(size, expert_inputs, units, activation, normalise, compute) for _, size in groups if size
        )
        if per_task:
            visible = visible_experts(tasks, shared, own, shared_gate=not last)
        else:
            visible = torch.ones(1, shared, dtype=torch.bool)
        self.gates = Gates(inputs, visible, rule)

    def forward(
        self,
        gate_inputs: list[Tensor],
        expert_inputs: list[Tensor],
        top_k: int | None = None,
        usable: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """Mixes (B, gates, U), and how they were mixed; one gate for all tasks gives each task the same mix.

        gate_inputs, expert_inputs: one (B, width) that all read, or one for each task and then the shared one.
        """
        routing: Routing = self.gates(self._gate_inputs(gate_inputs), top_k, usable)
        # Where some experts may not be run at all, none is run on rows that do not use it.
        used = routing.used() if usable is None else (routing.weights > 0).any(1)
        alone = usable is not None
        mixed = self._mixed(expert_inputs, routing.weights, used, alone)
        if not self.per_task:
            mixed = mixed.expand(-1, self.tasks, -1)
            routing = routing._replace(weights=routing.weights.expand(-1, self.tasks, -1))
        return mixed, routing

    def weights_by_expert(self) -> Iterator[tuple[int, list[Tensor]]]:
        """Number of each expert, and its own part of every weight and bias, as views."""
        number = 0
        for index in range(len(self.experts)):
            experts = self._experts(index)
            for place in range(experts.count):
                yield number, [weight[place] for weight in experts.parameters()]
                number += 1

    def _gate_inputs(self, inputs: list[Tensor]) -> Tensor | list[Tensor]:
        # The last level has no shared gate, so nobody reads the shared input.
        return inputs[0] if self.first else inputs[: len(self.gates.visible)]

    def _mixed(self, inputs: list[Tensor], weights: Tensor, used: Tensor | None, alone: bool) -> Tensor:
        total, start = None, 0
        for index, source in enumerate(self.sources):
            experts = self._experts(index)
            part = slice(start, start + experts.count)
            mixed = experts.mix(inputs[source], weights[:, :, part], None if used is None else used[:, part], alone)
            total = mixed if total is None else total + mixed
            start = part.stop
        assert total is not None
        return total

    def _experts(self, index: int) -> Experts:
        experts = self.experts[index]
        assert isinstance(experts, Experts)
        return experts
