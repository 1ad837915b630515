"""Routing rules: which experts a row is sent to for each task, with which weights, and losses on that.

A gate's softmax comes first. The weights of the chosen experts are divided by their sum, except where a model trains at
k = 1: the weight would be 1 whatever the logits, and a gate would never learn. Serving divides where training does.
Outside training a model may run with fewer experts than it was trained with: then every rule takes the k largest
(V-MoE: Riquelme et al., NeurIPS 2021).

A new rule is one subclass of `RoutingRule` and one entry of the list `RULES`.

Shapes: B rows, G gates, E experts, R routers: one chooses experts for each gate, or one for all gates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GateOutput:
    """What a rule chooses from: what gates made of B rows.

    gates: (B, G, E) float32 logits; routers: (B, R, E) float32 logits of the gates, or of the one router that chooses
    for all tasks, less what holds back experts that are being let in; both are minus infinity for an unseen expert.
    probabilities: (B, R, E) float32, the routers' softmax over the experts that may be used, in training with noise and
    dropout. allowed: (R, E) bool, these experts; bias: (E,) float32, the selection bias; k: experts per row and router,
    None for a rule that takes no k.
    """

    gate_logits: Tensor
    router_logits: Tensor
    probabilities: Tensor
    allowed: Tensor
    bias: Tensor
    k: int | None


class Routing(NamedTuple):
    """Where a level's gates sent B rows.

    weights: (B, G, E) float32, what each gate gives each expert, 0 where it does not use it; probabilities: (B, R, E)
    float32, the softmax that experts were chosen by; selected: (B, R, E) bool, None where all are; logits: (B, R, E)
    float32 of the routers; at_most: experts that a router chose for a row, None where that is not known beforehand.
    """

    weights: Tensor
    probabilities: Tensor
    selected: Tensor | None
    logits: Tensor
    max_selected: int | None = None

    def used(self) -> Tensor | None:
        """(B, E) bool, the experts that some gate chose for a row; None where all are."""
        return None if self.selected is None else self.selected.any(1)


class RoutingRule(ABC):
    """How gates choose experts and weigh them. It has no state: what is set, and learnt, is in the gates."""

    name: str
    """What settings call it."""
    summary: str
    """What the help says of it after "mix"."""
    selects_all = False
    """A row goes to all experts in training: a copy of an expert can share its weight, and none can starve."""
    takes_k = True
    """`gates.top_k` says how many experts each row gets in training."""
    uses_selection_bias = False
    """`GateOutput.bias` moves what is selected, so that `gates.balance: bias` can even loads."""
    depends_on_batch = False
    """A row's experts depend on the batch's other rows: the rule is for training, and scoring takes the k largest."""
    selects_at_most_k = False
    """A router selects at most `GateOutput.k` experts for a row, so that a GPU can make room for them beforehand."""
    shared_router = False
    """One router chooses for all tasks, which then see the same experts."""

    @abstractmethod
    def select(self, gated: GateOutput) -> Tensor | None:
        """(B, R, E) bool, the experts of each row; None for all. Never one of probability 0."""

    def weigh(self, gated: GateOutput, selected: Tensor | None, renormalize: bool) -> Tensor:
        """(B, G, E) float32, each gate's weights of the selected experts, 0 elsewhere.

        renormalize: whether the weights of a row sum to 1, or to the probability of what was selected.
        """
        return gated.probabilities if selected is None else keep_selected(gated.probabilities, selected, renormalize)


def masked_softmax(logits: Tensor, allowed: Tensor) -> Tensor:
    """Softmax over the allowed entries of the last dimension, 0 elsewhere; all 0 where none is allowed."""
    some = allowed.any(-1, keepdim=True)
    # Where nothing is allowed, a plain softmax in place of one over nothing, which would be NaN.
    logits = logits.masked_fill(~(allowed | ~some), float("-inf"))
    # Rows next to each other are computed together: on a CPU 8 entries take a tenth so.
    return logits.movedim(-1, 0).contiguous().softmax(0).movedim(0, -1).contiguous() * some


def select_top_k(gated: GateOutput) -> Tensor:
    """(B, R, E) bool: each router's k experts of largest log probability plus bias. Never one of probability 0."""
    import torch

    assert gated.k is not None, "this rule takes a k"
    probabilities = gated.probabilities
    k = min(gated.k, probabilities.shape[-1])
    chosen = (probabilities.log() + gated.bias).topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter_(-1, chosen, True) & (probabilities > 0)


def keep_selected(probabilities: Tensor, selected: Tensor, renormalize: bool) -> Tensor:
    """The selected probabilities, 0 elsewhere, and if asked for divided by their sum."""
    import torch

    weights = probabilities * selected
    if not renormalize:
        return weights
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


# Losses that keep experts in use, on what the gates of one level did. shares: (B,) float32, how much each row counts in
# a mean over rows.


def expert_loads(routing: Routing, row_mask: Tensor) -> Tensor:
    """(E,) float32: each expert's share of all routers' choices together, or its mean probability where every expert is
    used; without gradient. Evenness within each task would forbid tasks to use different experts.

    row_mask: (B,) float32, 1 for a row that counts and 0 for another.
    """
    import torch

    if routing.selected is None:
        loads = torch.tensordot(row_mask, routing.probabilities.detach(), dims=1) / row_mask.sum().clamp(min=1)
    else:
        chosen = torch.tensordot(row_mask, routing.selected.float(), dims=1)
        loads = chosen / chosen.sum(-1, keepdim=True).clamp(min=1)
    return loads.mean(0)


def balance_loss(routing: Routing, loads: Tensor, row_weights: Tensor) -> Tensor:
    """E * sum over experts of load * mean probability (Fedus et al., JMLR 2022, eq. 4): 1 where all are even. loads:
    (E,) of `expert_loads`, over all ranks.
    """
    import torch

    importance = torch.tensordot(row_weights, routing.probabilities.mean(1), dims=1)
    return importance.shape[0] * (loads * importance).sum()


def z_loss(routing: Routing, row_weights: Tensor) -> Tensor:
    """Mean squared logsumexp of the routers' logits (Zoph et al., 2022, eq. 5), which keeps logits small."""
    import torch

    return torch.tensordot(row_weights, routing.logits.logsumexp(-1).square().mean(1), dims=1)


# The rules themselves.


class Soft(RoutingRule):
    """A softmax over all experts (Jacobs et al., 1991), one gate a task (Ma et al., KDD 2018)."""

    name = "soft"
    summary = "all experts"
    selects_all = True
    takes_k = False

    def select(self, gated: GateOutput) -> None:
        """Selects all experts."""


class TopK(RoutingRule):
    """The k largest of the softmax, the others 0 (Shazeer et al., ICLR 2017; k = 1: Fedus et al., JMLR 2022)."""

    name = "top_k"
    summary = "the k best of each task's gate"
    uses_selection_bias = True
    selects_at_most_k = True

    def select(self, gated: GateOutput) -> Tensor:
        return select_top_k(gated)


class ExpertChoice(RoutingRule):
    """Each expert takes the rows that want it most, in training (Zhou et al., NeurIPS 2022): each of the n experts that
    a gate may use takes ceil(B k / n) rows, so a row gets k of them on average.
    """

    name = "expert_choice"
    summary = "in training the rows that each expert wants most"
    depends_on_batch = True

    def select(self, gated: GateOutput) -> Tensor:
        import torch

        assert gated.k is not None
        probabilities = gated.probabilities
        rows = len(probabilities)
        seen = gated.allowed.sum(-1, keepdim=True).clamp(min=1)  # (G, 1)
        capacities = (rows * gated.k + seen - 1) // seen
        # A GPU sorts all rows for any number of them, and the host would have to wait to learn this one.
        most = rows if probabilities.is_cuda else min(rows, int(capacities.max()))
        most_wanted = probabilities.topk(most, dim=0).indices  # (C, G, E) places of rows
        taken = torch.arange(most, device=probabilities.device)[:, None, None] < capacities
        chosen = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(
            0, most_wanted, taken.expand_as(most_wanted)
        )
        return chosen & (probabilities > 0)


class SharedRoute(TopK):
    """One router picks k experts for all tasks, and each task's gate weighs these: exactly k are computed per row."""

    name = "shared_route"
    summary = "k experts chosen for all tasks together"
    shared_router = True

    def weigh(self, gated: GateOutput, selected: Tensor | None, renormalize: bool) -> Tensor:
        """Each gate's softmax over the selected."""
        assert selected is not None
        # The router's logits are part of the weights, or it would get no gradient.
        weights = masked_softmax(gated.gate_logits + gated.router_logits, selected)
        if not renormalize:
            weights = weights * keep_selected(gated.probabilities, selected, renormalize=False).sum(-1, keepdim=True)
        return weights


RULES: list[RoutingRule] = [Soft(), TopK(), ExpertChoice(), SharedRoute()]
"""The rules that settings may name."""


def get_rule(name: str) -> RoutingRule:
    """The rule that settings call by this name, which they have checked."""
    return next(rule for rule in RULES if rule.name == name)
