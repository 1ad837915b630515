"""What keeps experts in use during training, added to the loss or nudged after each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmoe_rec.model.mmoe import RankingModel
from mmoe_rec.model.routing_rule import Routing, balance_loss, expert_loads, z_loss
from mmoe_rec.settings.model import Model


@dataclass(frozen=True)
class Balancing:
    """weight: of the balance loss; bias_rate: by how much a selection bias changes in a step at the peak learning rate;
    z_weight: of the z-loss; 0 leaves each out. ramp_steps: steps until an added expert is fully in.
    """

    weight: float = 0.0
    bias_rate: float = 0.0
    z_weight: float = 0.0
    ramp_steps: int = 1000

    @staticmethod
    def of(model: Model) -> Balancing:
        """As the `model` section of the settings says."""
        gates = model.gates
        return Balancing(
            gates.balance_weight if gates.balance == "loss" else 0.0,
            gates.bias_rate if gates.balance == "bias" else 0.0,
            gates.z_loss,
            gates.ramp_steps,
        )

    @property
    def needs_loads(self) -> bool:
        """Whether the loads of all ranks are asked for."""
        return self.weight > 0 or self.bias_rate > 0

    def loss(self, routings: Sequence[Routing], loads: Sequence[Tensor], shares: Tensor) -> Tensor | float:
        """What is added to the loss: the mean over levels of the weighted balance loss and z-loss.

        loads: (E,) of each level, over all ranks; shares: (B,) float32, how much each row counts; their mean over ranks
        sums to 1.
        """
        total: Tensor | float = 0.0
        if self.weight > 0:
            pairs = zip(routings, loads, strict=True)
            total = total + self.weight * sum(balance_loss(*pair, shares) for pair in pairs) / len(routings)
        if self.z_weight > 0:
            total = total + self.z_weight * sum(z_loss(routing, shares) for routing in routings) / len(routings)
        return total

    def after_step(self, model: RankingModel, loads: Sequence[Tensor], share: float) -> None:
        """Advances the state of the gates; loads as in `loss`, or empty where they are not needed.

        share: of the peak learning rate. The bias comes to rest with the weights: the loads of one step are noisy, and
        what they last did to it stays in the model.
        """
        for index, each in enumerate(model.mixture.gates):
            each.let_in(self.ramp_steps)
            if self.bias_rate > 0:
                each.even_out(loads[index], self.bias_rate * share)


def loads_of(routings: Sequence[Routing], counted: Tensor) -> Tensor:
    """(sum of E,) float32: the loads of all levels, one after the other, times the number of rows that they are of.

    counted: (B,) float32, 1 for a row that counts and 0 for another.
    """
    return counted.sum() * torch.cat([expert_loads(routing, counted) for routing in routings])


def split_loads(loads: Tensor, routings: Sequence[Routing]) -> list[Tensor]:
    """The inverse: (E,) of each level."""
    return list(loads.split([routing.probabilities.shape[-1] for routing in routings]))
