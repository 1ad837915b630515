"""The routing rules: which experts a row is sent to for each task, and with which weights. `RULES` lists them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmoe_rec.model.routing_rule import Gated, RoutingRule, kept, largest, masked_softmax

if TYPE_CHECKING:
    from torch import Tensor


class Soft(RoutingRule):
    """A softmax over all experts (Jacobs et al., 1991), one gate a task (Ma et al., KDD 2018)."""

    name = "soft"
    summary = "all experts"
    mixes_all = True
    takes_k = False

    def select(self, gated: Gated) -> None:
        """All of them."""


class TopK(RoutingRule):
    """The k largest of the softmax, the others 0 (Shazeer et al., ICLR 2017; k = 1: Fedus et al., JMLR 2022)."""

    name = "top_k"
    summary = "the k best of each task's gate"
    takes_bias = True
    k_a_row = True

    def select(self, gated: Gated) -> Tensor:
        """Each gate's k largest."""
        return largest(gated)


class ExpertChoice(RoutingRule):
    """Each expert takes the rows that want it most, in training (Zhou et al., NeurIPS 2022).

    Each of the n experts that a gate may use takes ceil(B k / n) rows, so that a row gets k of them on average. Loads
    are even by construction; but whether a row gets an expert depends on the other rows of its batch.
    """

    name = "expert_choice"
    summary = "in training the rows that each expert wants most"
    rows_compete = True

    def select(self, gated: Gated) -> Tensor:
        """Each expert's rows."""
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


class SharedRoute(RoutingRule):
    """One router picks k experts for all tasks, and each task's gate weighs these: exactly k are computed per row."""

    name = "shared_route"
    summary = "k experts chosen for all tasks together"
    takes_bias = True
    k_a_row = True
    one_router = True

    def select(self, gated: Gated) -> Tensor:
        """The router's k largest."""
        return largest(gated)

    def weigh(self, gated: Gated, selected: Tensor | None, renormalise: bool) -> Tensor:
        """Each gate's softmax over the selected."""
        assert selected is not None
        # The router's logits are part of the weights, or it would get no gradient.
        weights = masked_softmax(gated.gates + gated.routers, selected)
        if not renormalise:
            weights = weights * kept(gated.probabilities, selected, renormalise=False).sum(-1, keepdim=True)
        return weights


RULES: list[RoutingRule] = [
    Soft(),
    TopK(),
    ExpertChoice(),
    SharedRoute(),
]
"""The rules that settings may name."""


def rule_named(name: str) -> RoutingRule:
    """The rule that settings call by this name; raises ValueError where there is none."""
    for rule in RULES:
        if rule.name == name:
            return rule
    raise ValueError(f"no routing rule is called {name!r}, there are {', '.join(rule.name for rule in RULES)}")
