"""Routing rules, which choose and weight the experts of a row for each task, and losses on the routing.

Each gate computes a softmax over the experts. A rule then chooses experts, and the weights of the chosen experts are
divided by their sum. A model that trains with one expert per row (k = 1) skips the division in training and serving.
The only weight would otherwise be 1 for any logits, and the gate would get no gradient.

Outside training, a model may run with fewer experts than in training. Every rule then takes the k largest (V-MoE,
Riquelme et al., NeurIPS 2021).

To add a rule, write a subclass of `RoutingRule` and add it to the list `RULES`.

Shapes: B rows, G gates, E experts, R routers. A router chooses experts. Each gate is a router, or there is one router
for all gates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GateOutput:
    """Outputs of G gates and R routers for B rows and E experts. A `RoutingRule` chooses experts from them.

    Attributes:
        gate_logits: (B, G, E) float32, minus infinity for experts that the gate doesn't see.
        router_logits: (B, R, E) float32, logits of the routers, lowered for new experts (see `Gates.ramp`).
        probabilities: (B, R, E) float32, softmax of the routers over allowed experts. Training adds noise and dropout.
        allowed: (R, E) bool, the experts that may be used.
        bias: (E,) float32, added to log probabilities by rules with a selection bias.
        k: Experts per row and router, None if neither the rule nor serving limits them.
    """

    gate_logits: Tensor
    router_logits: Tensor
    probabilities: Tensor
    allowed: Tensor
    bias: Tensor
    k: int | None


class Routing(NamedTuple):
    """Routing of B rows by the gates of a level.

    Attributes:
        weights: (B, G, E) float32, the weight of each expert in a gate, 0 for unused experts.
        probabilities: (B, R, E) float32, the softmax that chose the experts.
        selected: (B, R, E) bool, None if all experts are selected.
        logits: (B, R, E) float32, logits of the routers without noise.
        max_selected: Maximum number of experts per row and router, None if the rule sets no maximum.
    """

    weights: Tensor
    probabilities: Tensor
    selected: Tensor | None
    logits: Tensor
    max_selected: int | None = None

    def used(self) -> Tensor | None:
        """Return the experts that some gate chose for a row, (B, E) bool, or None for all experts."""
        return None if self.selected is None else self.selected.any(1)


class RoutingRule(ABC):
    """Rule by which gates choose and weight experts. A rule has no state. Weights and settings belong to `Gates`."""

    name: str
    """Name in the settings."""
    summary: str
    """Description in the help of `gates.routing`."""
    selects_all = False
    """Whether a row uses all experts in training. An expert and an added copy can then share the expert's weight."""
    takes_k = True
    """Whether `gates.top_k` sets the number of experts per row in training."""
    uses_selection_bias = False
    """Whether `select` adds `GateOutput.bias`, which the setting `gates.balance: bias` requires."""
    depends_on_batch = False
    """Whether a row's experts depend on other rows of the batch. Scoring then takes the k largest instead."""
    selects_at_most_k = False
    """Whether a router selects at most `GateOutput.k` experts per row, so that a GPU can reserve memory for them."""
    shared_router = False
    """Whether one router chooses for all tasks, which then use the same experts."""

    @abstractmethod
    def select(self, gated: GateOutput) -> Tensor | None:
        """Select the experts of each row, (B, R, E) bool, or None for all. Never select an expert of probability 0."""

    def weigh(self, gated: GateOutput, selected: Tensor | None, renormalize: bool) -> Tensor:
        """Return each gate's weights of the selected experts, (B, G, E) float32, 0 elsewhere.

        Args:
            gated: Outputs of the gates.
            selected: Result of `select`.
            renormalize: Whether a row's weights sum to 1, or else to the total probability of the selected experts.
        """
        return gated.probabilities if selected is None else _keep_selected(gated.probabilities, selected, renormalize)


def masked_softmax(logits: Tensor, allowed: Tensor) -> Tensor:
    """Return the softmax over the allowed entries of the last dimension, 0 elsewhere.

    Args:
        logits: (..., E).
        allowed: (..., E) bool. If no entry is allowed, all results are 0.
    """
    some = allowed.any(-1, keepdim=True)
    # A softmax without allowed entries would be NaN. Take the softmax over all entries instead, and multiply it by 0.
    logits = logits.masked_fill(~(allowed | ~some), float("-inf"))
    # Transpose, so that a CPU's vector instructions process many rows at once. With 8 experts, the softmax then takes a
    # tenth of the time.
    return logits.movedim(-1, 0).contiguous().softmax(0).movedim(0, -1).contiguous() * some


def select_top_k(gated: GateOutput) -> Tensor:
    """Select each router's k experts with the largest log probability + `bias`, (B, R, E) bool."""
    import torch

    assert gated.k is not None, "this rule takes a k"
    probabilities = gated.probabilities
    k = min(gated.k, probabilities.shape[-1])
    chosen = (probabilities.log() + gated.bias).topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter_(-1, chosen, True) & (probabilities > 0)


def _keep_selected(probabilities: Tensor, selected: Tensor, renormalize: bool) -> Tensor:
    """Return the selected probabilities, 0 elsewhere, and divide them by their sum if `renormalize` is true."""
    import torch

    weights = probabilities * selected
    if not renormalize:
        return weights
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


# Loads of the experts of one level, and losses on the routing that keep experts in use and logits small.


def expert_loads(routing: Routing, row_mask: Tensor) -> Tensor:
    """Return the load of each expert, which is the fraction of the routers' choices that went to it, (E,) float32.

    If every row uses all experts, the load is the mean probability. There is one load for all tasks together, because
    balancing each task separately would keep tasks from using different experts.

    Args:
        routing: Routing of a level.
        row_mask: (B,) float32, 1 for rows that count and 0 for other rows.
    """
    import torch

    if routing.selected is None:
        loads = torch.tensordot(row_mask, routing.probabilities.detach(), dims=1) / row_mask.sum().clamp(min=1)
    else:
        chosen = torch.tensordot(row_mask, routing.selected.float(), dims=1)
        loads = chosen / chosen.sum(-1, keepdim=True).clamp(min=1)
    return loads.mean(0)


def balance_loss(routing: Routing, loads: Tensor, row_weights: Tensor) -> Tensor:
    """Return E * sum over experts of load * mean probability (Fedus et al., JMLR 2022, eq. 4), 1 for equal loads.

    Args:
        routing: Routing of a level.
        loads: (E,) loads from `expert_loads`, over all ranks.
        row_weights: (B,) weights of the rows, which sum to 1.
    """
    import torch

    importance = torch.tensordot(row_weights, routing.probabilities.mean(1), dims=1)
    return importance.shape[0] * (loads * importance).sum()


def z_loss(routing: Routing, row_weights: Tensor) -> Tensor:
    """Return the mean squared logsumexp of router logits (Zoph et al., 2022, eq. 5), which keeps the logits small.

    Args:
        routing: Routing of a level.
        row_weights: (B,) weights of the rows, which sum to 1.
    """
    import torch

    return torch.tensordot(row_weights, routing.logits.logsumexp(-1).square().mean(1), dims=1)


class Soft(RoutingRule):
    """Softmax over all experts (Jacobs et al., 1991), with one gate per task (Ma et al., KDD 2018)."""

    name = "soft"
    summary = "all experts"
    selects_all = True
    takes_k = False

    def select(self, gated: GateOutput) -> None:
        """Select all experts."""


class TopK(RoutingRule):
    """The k largest of the softmax, 0 elsewhere (Shazeer et al., ICLR 2017; k = 1: Fedus et al., JMLR 2022)."""

    name = "top_k"
    summary = "the k best experts of each task's gate"
    uses_selection_bias = True
    selects_at_most_k = True

    def select(self, gated: GateOutput) -> Tensor:
        return select_top_k(gated)


class ExpertChoice(RoutingRule):
    """In training, each expert takes the rows that prefer it most (Zhou et al., NeurIPS 2022).

    For a gate, each of the n allowed experts takes ceil(B k / n) rows, so a row gets k experts on average.
    """

    name = "expert_choice"
    summary = "experts that pick their rows in training"
    depends_on_batch = True

    def select(self, gated: GateOutput) -> Tensor:
        import torch

        assert gated.k is not None
        probabilities = gated.probabilities
        rows = len(probabilities)
        seen = gated.allowed.sum(-1, keepdim=True).clamp(min=1)  # (G, 1)
        capacities = (rows * gated.k + seen - 1) // seen
        # On a GPU, `topk` sorts all rows anyway, and reading the largest capacity would make the host wait.
        max_rows = rows if probabilities.is_cuda else min(rows, int(capacities.max()))
        preferred_rows = probabilities.topk(max_rows, dim=0).indices  # (max_rows, G, E)
        taken = torch.arange(max_rows, device=probabilities.device)[:, None, None] < capacities
        chosen = torch.zeros_like(probabilities, dtype=torch.bool)
        chosen.scatter_(0, preferred_rows, taken.expand_as(preferred_rows))
        return chosen & (probabilities > 0)


class SharedRoute(TopK):
    """One router picks k experts for all tasks, and each task's gate weights them. Exactly k experts run per row."""

    name = "shared_route"
    summary = "k experts for all tasks together"
    shared_router = True

    def weigh(self, gated: GateOutput, selected: Tensor | None, renormalize: bool) -> Tensor:
        assert selected is not None
        # Add the router's logits to the gates' logits. The router would otherwise get no gradient.
        weights = masked_softmax(gated.gate_logits + gated.router_logits, selected)
        if not renormalize:
            weights = weights * _keep_selected(gated.probabilities, selected, renormalize=False).sum(-1, keepdim=True)
        return weights


RULES: list[RoutingRule] = [Soft(), TopK(), ExpertChoice(), SharedRoute()]
"""Rules that the setting `gates.routing` may name."""


def get_rule(name: str) -> RoutingRule:
    """Return the rule with this name, which the settings have validated."""
    return next(rule for rule in RULES if rule.name == name)
