"""The dense part in inference: fixed weights, all experts on all rows, in a few large operators.

`mmoe_rec.model.mmoe` computes the same for training and for all that a request may ask of experts: with a module for
each layer, and a product for each expert. For five rows it spends most of its time calling a hundred operators. The
operators here take a third of that time, and nine tenths for five hundred rows. Most models fit: see `FusedMixture.of`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmoe_rec.model.members import Members
from mmoe_rec.model.mmoe import Bottom, Mixture, RankingModel
from mmoe_rec.model.products import Linear, Products, StackedLinear, by_onednn
from mmoe_rec.model.routing import Soft

Weights = tuple[Tensor, Tensor | None]
"""Of a linear layer: (outputs, inputs) and (outputs,); of G layers on inputs of their own: (G, inputs, outputs) and
(G, 1, outputs)."""
Way = Products | Literal["bf16"]
"""What multiplies: a library, in fp32; or torch's choice for bf16, to which rows and weights of the bottom and of
experts, and what these give, are rounded: not gates, which would choose other experts, nor towers and crosses."""


@dataclass(frozen=True)
class FusedMixture:
    """One mixture of experts on one level, each gate of which mixes all experts that it may use.

    linear: multiplies; columns: of the model's inputs, those that it reads, None for all of them; crosses: down and up;
    hidden: the layers of the bottom; experts: the first layer, which all read together, then one weight a layer; gates:
    (G * E, H), with a bias of minus infinity for experts that a gate may not use; towers: one weight a layer.
    """

    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    columns: Tensor | None
    crosses: list[tuple[Weights, Weights]]
    bottom: Bottom
    hidden: list[Weights]
    activate: Callable[[Tensor], Tensor]
    normalise: bool
    experts: list[Weights]
    gates: Weights
    shape: tuple[int, int]
    towers: list[Weights]

    @staticmethod
    def of(mixture: Mixture, way: Way, columns: Tensor | None = None) -> FusedMixture | None:
        """The mixture with its weights as they are now. None where there are several levels, gates that choose some of
        the experts or may use none, experts that read raw inputs, or experts that are still being let in."""
        level, *others = mixture.each_level()
        gates, (experts, *groups) = level.gates, level.each_group()
        chooses = not isinstance(gates.rule, Soft) or gates.settings.serving_top_k is not None
        usable = gates.visible & gates.in_use
        if others or groups or chooses or mixture.raw_inputs or bool(gates.ramp.any()) or not bool(usable.any(1).all()):
            return None
        weight, bias = _together(gates.linear)
        assert bias is not None
        crosses = mixture.bottom.crosses
        pairs = [] if crosses is None else zip(crosses.down, crosses.up, strict=True)
        first, *deeper = experts.layers
        hidden = [_weights(layer) for layer in mixture.bottom.layers if isinstance(layer, Linear)]
        of_experts = [_together(first), *map(_apart, deeper)]
        if way == "bf16":
            hidden, of_experts = ([_rounded(each) for each in part] for part in (hidden, of_experts))
        return FusedMixture(
            (lambda x, weight, bias: by_onednn(x, weight.t(), bias)) if way == "onednn" else functional.linear,
            columns,
            [(_weights(down), _weights(up)) for down, up in pairs],
            mixture.bottom,
            hidden,
            experts.activate,
            experts.normalise,
            of_experts,
            (weight, bias.masked_fill(~usable.flatten(), float("-inf"))),
            (len(gates.visible), experts.count),
            [_apart(layer) for layer in mixture.towers.layers],
        )

    def logits(self, inputs: Tensor) -> Tensor:
        """(B, W) float32 -> (B, T) float32, as `Mixture` gives them."""
        linear, bottom, kind = self.linear, self.bottom, self.experts[0][0].dtype
        x = crossed = inputs if self.columns is None else inputs.index_select(1, self.columns)
        for (down, _), (up, bias) in self.crosses:
            crossed = torch.addcmul(crossed, x, linear(linear(crossed, down, None), up, bias))
        if bottom.bends is not None:
            crossed = torch.cat([crossed, bottom.bends(x[:, -bottom.dense :])], dim=1)
        hidden = crossed  # (B, H)
        for weight, bias in self.hidden:
            hidden = functional.silu(linear(hidden.to(kind), weight, bias), inplace=True)
        gates, experts = self.shape
        (weight, bias), *deeper = self.experts
        outputs = self.activate(linear(hidden.to(kind), weight, bias))
        outputs = outputs.view(len(x), experts, -1).transpose(0, 1)  # (E, B, U)
        for weights in deeper:
            outputs = self.activate(_each(outputs, weights))
        if self.normalise:
            outputs = functional.layer_norm(outputs, outputs.shape[-1:])
        shares = linear(hidden.float(), *self.gates).view(len(x), gates, experts).softmax(2)
        of_tasks = (shares.to(kind) @ outputs.transpose(0, 1)).float().transpose(0, 1)  # (G, B, U)
        *layers, last = self.towers
        for weights in layers:
            of_tasks = functional.silu(_each(of_tasks, weights), inplace=True)
        return _each(of_tasks, last).squeeze(2).t()


def fused_logits(model: RankingModel, way: Way) -> Callable[[Tensor], Tensor] | None:
    """What gives the logits of a model's mixture, or the mean logits of its members, (B, T) float32, by the model's
    inputs (B, W); None where one of them does not fit into a `FusedMixture`."""
    mixture, columns = model.mixture, list[Tensor | None]([None])
    if isinstance(mixture, Members):
        columns = [mixture.get_buffer(f"inputs_{number}") for number in range(len(mixture.members))]
    found = [FusedMixture.of(each, way, its) for each, its in zip(mixture.each_member(), columns, strict=True)]
    fused = [each for each in found if each is not None]
    if len(fused) < len(found):
        return None
    if len(fused) == 1:
        return fused[0].logits
    return lambda inputs: torch.stack([each.logits(inputs) for each in fused]).mean(0)


def _rounded(weights: Weights) -> Weights:
    weight, bias = weights
    return weight.bfloat16(), None if bias is None else bias.bfloat16()


def _each(x: Tensor, weights: Weights) -> Tensor:
    """(G, B, I) -> (G, B, O); one input (1, B, I) may serve all groups."""
    weight, bias = weights
    assert bias is not None
    return torch.baddbmm(bias, x.expand(len(weight), -1, -1), weight)


def _weights(layer: nn.Module) -> Weights:
    assert isinstance(layer, Linear)
    return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()


def _together(layer: nn.Module) -> Weights:
    """Of groups that read the same input, as one layer."""
    assert isinstance(layer, StackedLinear)
    return layer.weight.detach().flatten(0, 1), layer.bias.detach().flatten()


def _apart(layer: nn.Module) -> Weights:
    assert isinstance(layer, StackedLinear)
    return layer.weight.detach().transpose(1, 2).contiguous(), layer.bias.detach().unsqueeze(1)
