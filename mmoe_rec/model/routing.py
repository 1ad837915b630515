"""How a gate's softmax becomes the weights of the experts that a row is sent to.

Shapes: B rows, G gates, E experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


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
