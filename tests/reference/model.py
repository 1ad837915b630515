"""The mixture-of-experts model, its loss and its score, a row, a task and an expert at a time, in float64.

Weights are the entries of a model's `state_dict`, by name. All functions can be differentiated.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Weights = dict[str, Tensor]


def embed(table: Tensor, ids: Sequence[int]) -> Tensor:
    """The mean of some rows of an embedding table, zeros without any."""
    return table[list(ids)].sum(0) / max(len(ids), 1)


def attend(
    weights: Weights, events: Sequence[Tensor], candidate: Tensor, same: Sequence[Sequence[bool]], length: int
) -> Tensor:
    """What the events of a list, the oldest first, say of a candidate. same: of each, which of its ids, that come first
    in it, are the candidate's."""
    total = torch.zeros_like(weights["event.bias"])
    for place, event in enumerate(events):
        hidden = weights["event.weight"] @ event + weights["event.bias"] + weights["later"][len(events) - 1 - place]
        hidden = hidden + weights["candidate.weight"] @ candidate
        hidden = hidden + weights["product.weight"] @ (event[: len(candidate)] * candidate)
        total = total + functional.silu(hidden + weights["same.weight"] @ torch.tensor(same[place], dtype=total.dtype))
    return weights["output.weight"] @ total / math.sqrt(length)


def layers(
    weights: Weights, prefix: str, x: Tensor, group: int | None = None, activation: Any = functional.silu
) -> Tensor:
    """Linear layers, each followed by the activation. group: of stacked ones, the network."""
    number = 0
    while f"{prefix}.{number}.weight" in weights:
        weight, bias = (weights[f"{prefix}.{number}.{part}"] for part in ("weight", "bias"))
        x = activation(weight @ x + bias if group is None else weight[group] @ x + bias[group])
        number += 1
    return x


@dataclass
class Mixture:
    """The dense part. weights: of a `Mixture`, by name; edges: of each of the last inputs, for piecewise-linear ones.

    shared, own: how many experts all tasks see, and each task has; rule, k: how gates choose experts.
    """

    weights: Weights
    tasks: int
    shared: int
    own: int = 0
    edges: Sequence[Sequence[float]] = ()
    rule: str = "soft"
    k: int = 2
    activation: Any = functional.silu
    normalize: bool = False
    raw_inputs: bool = False

    def __post_init__(self) -> None:
        self.weights = {name: weight.double() for name, weight in self.weights.items()}

    def bottom(self, x: Tensor) -> Tensor:
        """Crosses, then each number's reach into the intervals between its edges, then hidden layers."""
        crossed, number = x, 0
        while f"bottom.crosses.up.{number}.weight" in self.weights:
            up, down = (self.weights[f"bottom.crosses.{part}.{number}.weight"] for part in ("up", "down"))
            crossed = x * (up @ down @ crossed + self.weights[f"bottom.crosses.up.{number}.bias"]) + crossed
            number += 1
        reaches = [
            ((value.detach() - low) / (high - low)).clamp(0, 1)  # numbers are data: no gradient
            for value, edges in zip(x[len(x) - len(self.edges) :], self.edges, strict=True)
            for low, high in pairwise(edges)
        ]
        return layers(self.weights, "bottom.layers", torch.cat([crossed, *(reache[None] for reache in reaches)]))

    def gates(self, level: int, gate_inputs: list[Tensor], visible: list[list[int]]) -> list[dict[int, Tensor]]:
        """For each gate, its weight of each expert that it chose."""
        prefix = f"levels.{level}.gates"
        linear, bias = self.weights[f"{prefix}.linear.weight"], self.weights[f"{prefix}.linear.bias"]
        logits = [linear[gate] @ gate_inputs[gate] + bias[gate] for gate in range(len(visible))]
        if self.rule == "shared_route":
            route = self.weights[f"{prefix}.route.weight"][0] @ gate_inputs[0] + self.weights[f"{prefix}.route.bias"][0]
            return shared_route(logits, route, self.k)
        return [
            weigh(logit[seen], seen, self.k if self.rule == "top_k" else None)
            for logit, seen in zip(logits, visible, strict=True)
        ]

    def forward_row(self, x: Tensor, placement: Tensor | None = None) -> Tensor:
        """(T,) logits of a row's inputs; with placement, the placement tower's are added, as in training."""
        hidden = self.bottom(x)
        levels = 1 + max(int(name.split(".")[1]) for name in self.weights if name.startswith("levels."))
        expert_input = torch.cat([hidden, x]) if self.raw_inputs else hidden
        gate_inputs, expert_inputs = [hidden] * (self.tasks + 1), [expert_input] * (self.tasks + 1)
        for level in range(levels):
            outputs = self.experts(level, expert_inputs)
            one_gate = len(self.weights[f"levels.{level}.gates.linear.weight"]) == 1
            visible = self.visible(last=level == levels - 1) if not one_gate else [list(range(self.shared))]
            chosen = self.gates(level, gate_inputs, visible)
            mixes = [sum(weight * outputs[expert] for expert, weight in item.items()) for item in chosen]
            if one_gate:
                chosen, mixes = chosen * self.tasks, mixes * self.tasks
            gate_inputs = expert_inputs = mixes
        logits = torch.stack([self._tower(mixes[task], task) for task in range(self.tasks)])
        if placement is not None:
            placed = layers(self.weights, "placement.layers", placement)
            logits = logits + self.weights["placement.logits.weight"] @ placed + self.weights["placement.logits.bias"]
        return logits

    def forward(self, inputs: Tensor, placement: Tensor | None = None) -> Tensor:
        places = [None] * len(inputs) if placement is None else placement.double()
        return torch.stack([self.forward_row(x, place) for x, place in zip(inputs.double(), places, strict=True)])

    def visible(self, last: bool) -> list[list[int]]:
        """The experts of each gate: shared ones come first, then each task's own. The shared gate sees all."""
        shared, own = list(range(self.shared)), self.own
        gates = [shared + [self.shared + task * own + index for index in range(own)] for task in range(self.tasks)]
        return gates if last else [*gates, list(range(self.shared + self.tasks * own))]

    def experts(self, level: int, expert_inputs: list[Tensor]) -> list[Tensor]:
        """The output of each expert. On the first level all read the same; later ones read their gate's mix."""
        outputs = []
        groups = [(self.tasks, self.shared), *((task, self.own) for task in range(self.tasks))]
        if level == 0:
            groups = [(0, self.shared + self.tasks * self.own)]
        for number, (source, size) in enumerate(group for group in groups if group[1]):
            prefix = f"levels.{level}.experts.{number}.layers"
            for expert in range(size):
                output = layers(self.weights, prefix, expert_inputs[source], expert, self.activation)
                outputs.append(functional.layer_norm(output, output.shape) if self.normalize else output)
        return outputs

    def _tower(self, x: Tensor, task: int) -> Tensor:
        count = sum(name.startswith("towers.layers") and name.endswith("weight") for name in self.weights)
        for number in range(count):
            weight, bias = (self.weights[f"towers.layers.{number}.{part}"][task] for part in ("weight", "bias"))
            x = weight @ x + bias if number == count - 1 else functional.silu(weight @ x + bias)
        return x[0]


def weigh(logits: Tensor, experts: Sequence[int], k: int | None) -> dict[int, Tensor]:
    """A softmax over some experts; with k only the largest, whose weights sum to 1 unless k is 1."""
    probabilities = logits.softmax(0)
    order = sorted(range(len(experts)), key=lambda place: -probabilities[place].item())[:k]
    total = probabilities[order].sum() if k is not None and k > 1 else 1.0
    return {experts[place]: probabilities[place] / total for place in order}


def shared_route(logits: list[Tensor], route: Tensor, k: int) -> list[dict[int, Tensor]]:
    """One router chooses k experts for all gates, each gate weighs them; at k = 1 by the router's probability."""
    probabilities = route.softmax(0)
    chosen = sorted(weigh(route, range(len(route)), k))
    kept = probabilities[chosen].sum() if k == 1 else 1.0
    each = [(gate[chosen] + route[chosen]).softmax(0) * kept for gate in logits]
    return [dict(zip(chosen, weights, strict=True)) for weights in each]


def expert_choice(logits: Tensor, k: int) -> Tensor:
    """(B, G, E) logits -> weights: each expert takes the ceil(B k / E) rows that want it most."""
    probabilities, chosen = logits.softmax(-1), torch.zeros_like(logits)
    rows, gates, experts = logits.shape
    for gate in range(gates):
        for expert in range(experts):
            wanted = probabilities[:, gate, expert]
            chosen[wanted.argsort(descending=True)[: math.ceil(rows * k / experts)], gate, expert] = 1
    kept = probabilities * chosen
    return kept / kept.sum(-1, keepdim=True).clamp(min=1e-9)


def loss(
    logits: Tensor, labels: Tensor, observed: Tensor, tasks: Sequence[Any], weights: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The sum over tasks of weight x mean loss of the observed labels, and each task's sum.

    tasks: with `name`, `kind`, `loss_weight`, `std` and `conditional_on`; weights: (B,) of rows.
    """
    total, sums = logits.new_zeros(()), []
    for place, task in enumerate(tasks):
        summed, counted = logits.new_zeros(()), 0.0
        for row in range(len(logits)):
            if observed[row, place]:
                weight = 1.0 if weights is None else float(weights[row])
                summed, counted = (
                    summed + weight * _row_loss(logits[row], labels[row, place], tasks, place),
                    counted + weight,
                )
        sums.append(summed)
        total = total + task.loss_weight * summed / (counted or 1.0)
    return total, sums


def _row_loss(logits: Tensor, label: Tensor, tasks: Sequence[Any], place: int) -> Tensor:
    task = tasks[place]
    if task.kind == "regression":
        return ((logits[place] - label) / task.std) ** 2
    probability = logits[place].sigmoid()
    if task.conditional_on is not None:  # the probability of both
        probability = probability * logits[[item.name for item in tasks].index(task.conditional_on)].sigmoid()
    return -(label * probability.log() + (1 - label) * (1 - probability).log())


def score(logits: Tensor, tasks: Sequence[Any]) -> Tensor:
    """(B,) products of weighted predictions: probabilities, or a regression's value, at least 1e-6."""
    result = torch.ones(len(logits), dtype=logits.dtype)
    for place, task in enumerate(tasks):
        column = logits[:, place]
        result = result * (column.sigmoid() if task.kind == "binary" else column.clamp(min=1e-6)) ** task.score_weight
    return result


def adagrad(table: Tensor, momentum: Tensor, gradient: Tensor, rate: float, eps: float = 1e-8) -> None:
    """One step of row-wise Adagrad, in place. table, gradient: (rows, D); momentum: (rows,)."""
    for row in gradient.abs().sum(1).nonzero().flatten().tolist():
        momentum[row] += gradient[row].square().mean()
        table[row] -= rate * gradient[row] / (momentum[row].sqrt() + eps)
