"""The gates: which experts a row is sent to for each task, and with which weights.

soft          a softmax over all experts (Jacobs et al., 1991), one gate a task (Ma et al., KDD 2018);
top_k         the k largest of it, the others 0 (Shazeer et al., ICLR 2017; k = 1: Fedus et al., JMLR 2022);
expert_choice each expert takes the rows that want it most, in training (Zhou et al., NeurIPS 2022);
shared_route  one router picks k experts for all tasks, and each task's gate weighs these: exactly k are computed a row.

The softmax comes first. The weights of the chosen are divided by their sum, but not at k = 1 of a model that trains so:
the weight would be 1 whatever the logits, and a gate would never learn. Serving divides where training does; a model
that trains at k = 1 alone never does, so that towers read what they were trained on.

Logits are computed in fp32 whatever the precision of experts (Fedus et al., section 2.4), as in serving: in bf16 one
row in a hundred would train other experts than it is served by.

Gate dropout: each expert is left out of a gate with some probability in training, then the rest is renormalised (Zhao
et al., RecSys 2019).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mmoe_rec.model.stacked import StackedLinear

RoutingKind = Literal["soft", "top_k", "expert_choice", "shared_route"]
# An added expert's logits begin so far below their own value, then rise to it.
RAMP = 10.0


@dataclass(frozen=True)
class RoutingRule:
    """How gates choose.

    top_k: experts a row and gate in training; random_top_k: draw 1 to top_k of them at each step instead;
    serving_top_k: outside training, None is as in training; dropout: probability of leaving an expert out in training;
    noise: standard deviation of what is added to logits in training.
    """

    kind: RoutingKind = "soft"
    top_k: int = 2
    random_top_k: bool = False
    serving_top_k: int | None = None
    dropout: float = 0.0
    noise: float = 0.0

    def renormalises(self, k: int) -> bool:
        """Whether the weights of k chosen experts are divided by their sum."""
        return self.kind == "soft" or (self.top_k > 1 and (k > 1 or not self.random_top_k))


class Gates(nn.Module):
    """G gates over E experts, all computed by one product.

    State: linear (G, E, inputs); route (1, E, inputs) of a shared route; masked (E,) bool, experts that are out of use;
    ramp (E,) float32, 1 for an added expert that is not used yet and 0 for one that is used in full; selection_bias
    (E,) float32, added to the logits that experts are chosen by but not to those of their weights (Wang et al., 2024:
    loss-free balancing, there to sigmoids; to a softmax's probabilities it evens far less, as these are near 0 and 1).

    visible: (G, E) bool, the experts that a gate may use at all.
    """

    def __init__(self, inputs: int, visible: Tensor, rule: RoutingRule) -> None:
        super().__init__()
        gates, experts = visible.shape
        self.rule = rule
        self.linear = StackedLinear(gates, inputs, experts)
        self.route = StackedLinear(1, inputs, experts) if rule.kind == "shared_route" else None
        self.visible: Tensor
        self.masked: Tensor
        self.ramp: Tensor
        self.selection_bias: Tensor
        self.register_buffer("visible", visible.clone(), persistent=False)
        self._sees_all = not visible.is_meta and bool(visible.all())
        self.register_buffer("masked", torch.zeros(experts, dtype=torch.bool))
        self.register_buffer("ramp", torch.zeros(experts))
        self.register_buffer("selection_bias", torch.zeros(experts))

    def forward(self, inputs: Tensor | list[Tensor], top_k: int | None = None, usable: Tensor | None = None) -> Routing:
        """One input (B, inputs) for all gates, or one for each -> where the rows go.

        top_k: experts a row and gate, instead of the rule's, outside training; usable: (E,) bool, the only experts that
        may be used, on top of those that are masked. Raises ValueError for expert choice outside training without a k.
        """
        allowed = self._allowed(usable)
        with torch.autocast(self.visible.device.type, enabled=False):
            logits = self._logits(inputs)
            if self.route is None:
                return self._by_gate(logits, allowed, top_k)
            assert isinstance(inputs, Tensor), "a shared route has one input"
            return self._by_route(self.route.shared(inputs.float()).unsqueeze(1), logits, allowed, top_k)

    def _logits(self, inputs: Tensor | list[Tensor]) -> Tensor:
        """(B, G, E) float32, minus infinity for what a gate does not see."""
        if isinstance(inputs, Tensor):
            logits = self.linear.shared(inputs.float()).unflatten(1, self.visible.shape)
        else:
            logits = torch.stack(self.linear([each.float() for each in inputs]), dim=1)
        return logits if self._sees_all else logits.masked_fill(~self.visible, float("-inf"))

    @property
    def in_use(self) -> Tensor:
        """(E,) bool: experts that are neither masked nor still wholly out since they were added."""
        return ~(self.masked | (self.ramp >= 1))

    def _allowed(self, usable: Tensor | None) -> Tensor:
        """(G, E) bool."""
        allowed = self.visible & self.in_use
        return allowed if usable is None else allowed & usable

    def _by_gate(self, logits: Tensor, allowed: Tensor, top_k: int | None) -> Routing:
        probabilities = self._probabilities(logits - RAMP * self.ramp, allowed)
        k = self._k(top_k)
        if k is None:
            return Routing(probabilities, probabilities, None, logits)
        if self.training and self.rule.kind == "expert_choice":
            selected = chosen_by_experts(probabilities, k, allowed)
        else:
            selected = largest(probabilities, k, self.selection_bias)
        return Routing(kept(probabilities, selected, self.rule.renormalises(k)), probabilities, selected, logits)

    def _by_route(self, route: Tensor, logits: Tensor, allowed: Tensor, top_k: int | None) -> Routing:
        route = route - RAMP * self.ramp
        probabilities = self._probabilities(route, allowed[:1])
        k = self._k(top_k)
        assert k is not None, "a shared route always chooses"
        selected = largest(probabilities, k, self.selection_bias)
        # The route's logits are part of the weights, or it would get no gradient.
        weights = masked_softmax(logits + route, selected)
        if not self.rule.renormalises(k):
            weights = weights * kept(probabilities, selected, renormalise=False).sum(-1, keepdim=True)
        return Routing(weights, probabilities, selected, route)

    def _probabilities(self, logits: Tensor, allowed: Tensor) -> Tensor:
        """Softmax over what may be used (B, G, E)."""
        if self.training and self.rule.noise > 0:
            logits = logits + self.rule.noise * torch.randn_like(logits)
        if self.training and self.rule.dropout > 0:
            allowed = keep_some(torch.rand_like(logits) >= self.rule.dropout, allowed)
        return masked_softmax(logits, allowed)

    def _k(self, asked: int | None) -> int | None:
        """Experts a row and gate; None is all."""
        rule = self.rule
        if not self.training:
            k = rule.serving_top_k if asked is None else asked
            if k is None and rule.kind == "expert_choice":
                raise ValueError("expert choice depends on which rows are scored together: it needs a k to score with")
            if k is not None:
                return k
        if rule.kind == "soft":
            return None
        if self.training and rule.random_top_k:
            return int(torch.randint(1, rule.top_k + 1, ()))
        return rule.top_k

    def rows_of(self, expert: int) -> list[Tensor]:
        """The weights and biases that give an expert's logits, as views."""
        layers = [self.linear] if self.route is None else [self.linear, self.route]
        return [each[:, expert] for layer in layers for each in (layer.weight, layer.bias)]

    @torch.no_grad()
    def even_out(self, loads: Tensor, rate: float) -> None:
        """Moves each expert's selection bias by `rate` towards the mean of the loads (E,) of a step, over all ranks.

        Experts that are masked or being let in have no part in it: their bias would make up for what keeps them out.
        """
        settled = ~self.masked & (self.ramp <= 0)
        moved = self.selection_bias + rate * (loads[settled].mean() - loads).sign()
        self.selection_bias.copy_(torch.where(settled, moved, self.selection_bias))

    @torch.no_grad()
    def let_in(self, steps: int) -> None:
        """Lets added experts in a little more, so that they are wholly in after so many calls."""
        self.ramp.sub_(1 / steps).clamp_(min=0)


def keep_some(keep: Tensor, allowed: Tensor) -> Tensor:
    """What is kept (..., E) bool of what is allowed, or all that is allowed where nothing of it would be kept.

    A softmax over the kept experts' logits equals the dropped and renormalised softmax; with none kept it would be NaN.
    """
    kept_here = keep & allowed
    return torch.where(kept_here.any(-1, keepdim=True), kept_here, allowed)


# How a gate's softmax becomes the weights of the experts that a row is sent to.
#
# Shapes: B rows, G gates, E experts.


class Routing(NamedTuple):
    """Where a level's gates sent B rows.

    weights: (B, G, E) float32, what each gate gives each expert, 0 where it does not use it; probabilities: (B, R, E)
    float32, the softmax that experts were chosen by, of R routers (one a gate, or one for all of them); selected:
    (B, R, E) bool, the chosen ones, or None where all are; logits: (B, R, E) float32 of the routers, minus infinity
    for an expert that one does not see.
    """

    weights: Tensor
    probabilities: Tensor
    selected: Tensor | None
    logits: Tensor

    def used(self) -> Tensor | None:
        """(B, E) bool, the experts that some gate chose for a row; None where all are."""
        return None if self.selected is None else self.selected.any(1)

    def loads(self, counted: Tensor | None = None) -> Tensor:
        """(R, E) float32: the share of a router's choices that fall on each expert, without gradient.

        Where every expert is used the mean probability takes the place of that share. counted: (B,) float32, 1 for a
        row that counts and 0 for another; None is 1 for all.
        """
        if self.selected is None:
            probabilities = self.probabilities.detach()
            if counted is None:
                return probabilities.mean(0)
            return torch.tensordot(counted, probabilities, dims=1) / counted.sum().clamp(min=1)
        selected = self.selected.float()
        chosen = selected.sum(0) if counted is None else torch.tensordot(counted, selected, dims=1)
        return chosen / chosen.sum(-1, keepdim=True).clamp(min=1)


def masked_softmax(logits: Tensor, allowed: Tensor) -> Tensor:
    """Softmax over the allowed entries of the last dimension, 0 elsewhere; all 0 where none is allowed."""
    some = allowed.any(-1, keepdim=True)
    # Where nothing is allowed, a plain softmax in place of one over nothing, which would be NaN.
    return logits.masked_fill(~(allowed | ~some), float("-inf")).softmax(-1) * some


def largest(probabilities: Tensor, k: int, bias: Tensor | None = None) -> Tensor:
    """(..., E) bool: the k experts of largest probability, or of largest log probability plus bias.

    Never one of probability 0.
    """
    ranked = probabilities if bias is None else probabilities.log() + bias
    chosen = _places_of_largest(ranked, min(k, ranked.shape[-1]))
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter_(-1, chosen, True) & (probabilities > 0)


def _places_of_largest(values: Tensor, k: int) -> Tensor:
    """(..., k) int64. On a CPU a few maxima, one after the other, take half as long as `topk`."""
    if k > 3 or values.is_cuda:
        return values.topk(k, dim=-1, sorted=False).indices
    found = [values.argmax(-1, keepdim=True)]
    for _ in range(1, k):
        values = values.scatter(-1, found[-1], float("-inf"))
        found.append(values.argmax(-1, keepdim=True))
    return torch.cat(found, dim=-1)


def chosen_by_experts(probabilities: Tensor, k: int, seen: Tensor) -> Tensor:
    """(B, G, E) bool: each expert takes the rows that want it most (Zhou et al., NeurIPS 2022).

    seen: (G, E) bool, the experts that a gate may use; each of these n takes ceil(B k / n), so that a row gets k of
    them in the mean. Loads are even by construction; but whether a row gets an expert depends on the other rows of its
    batch.
    """
    rows = len(probabilities)
    capacities = [min(rows, math.ceil(rows * k / max(1, count))) for count in seen.sum(-1).tolist()]
    most_wanted = probabilities.topk(max(capacities), dim=0).indices
    place = torch.arange(len(most_wanted), device=seen.device)[:, None, None]
    taken = place < torch.tensor(capacities, device=seen.device)[:, None]
    chosen = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(0, most_wanted, taken.expand_as(most_wanted))
    return chosen & (probabilities > 0)


def kept(probabilities: Tensor, selected: Tensor, renormalise: bool) -> Tensor:
    """The selected probabilities, 0 elsewhere, and if asked for divided by their sum."""
    weights = probabilities * selected
    if not renormalise:
        return weights
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


# Losses that keep experts in use, on what the gates of one level did. Shapes as in `mmoe_rec.model.gates`.
#
# shares: (B,) float32, what each row counts in a mean over rows; by default all count 1 / B.


def expert_loads(routing: Routing, counted: Tensor | None = None) -> Tensor:
    """(E,) float32: each expert's share of all routers' choices together, without gradient; they sum to 1.

    Summed over tasks: evenness within each task would forbid that tasks use different experts. counted: as in
    `Routing.loads`.
    """
    return routing.loads(counted).mean(0)


def balance_loss(routing: Routing, loads: Tensor, shares: Tensor | None = None) -> Tensor:
    """E * sum over experts of load * mean probability (Fedus et al., JMLR 2022, eq. 4): 1 where all are even.

    loads: (E,) of `expert_loads`, over all ranks; a constant, so that gradients go to the mean probability alone.
    """
    importance = _mean_over_rows(routing.probabilities.mean(1), shares)
    return importance.shape[0] * (loads * importance).sum()


def z_loss(routing: Routing, shares: Tensor | None = None) -> Tensor:
    """Mean squared logsumexp of the routers' logits (Zoph et al., 2022, eq. 5), which keeps logits small."""
    return _mean_over_rows(routing.logits.logsumexp(-1).square().mean(1), shares)


def _mean_over_rows(values: Tensor, shares: Tensor | None) -> Tensor:
    """Of (B,) or (B, E)."""
    return values.mean(0) if shares is None else torch.tensordot(shares, values, dims=1)
