"""The dense part in inference: fixed weights, all experts on all rows, in a few large operators.

`mmoe_rec.model.mmoe` computes the same for training and for all that a request may ask of experts: with a module for
each layer, and a product for each expert. For five rows it spends most of its time calling a hundred operators. The
operators here take a third of that time, and nine tenths for five hundred rows. Most models fit: see
`build_fused_forward`.
"""

from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmoe_rec.errors import UserError
from mmoe_rec.model.matmul import Linear, MatmulBackend, StackedLinear, onednn_linear
from mmoe_rec.model.mmoe import Mixture, RankingModel
from mmoe_rec.model.routing import Soft

Weights = tuple[Tensor, Tensor | None]
"""Of a linear layer: (outputs, inputs) and (outputs,); of G layers on inputs of their own: (G, inputs, outputs) and
(G, 1, outputs)."""
# Random rows to compare, and differences to accept, as a fraction of the largest logit: float64 rounds by 1e-7 at most.
_ROWS, _TOLERANCE = 16, 1e-4


def build_fused_forward(mixture: Mixture, matmul_backend: MatmulBackend) -> Callable[[Tensor], Tensor] | None:
    """What gives the logits (B, T) float32 of a mixture by its inputs (B, W), with its weights as they are now: of
    experts on one level, where each gate mixes all experts that it may use.

    None where there are several levels, gates that choose some of the experts or may use none, experts that read raw
    inputs, or experts that are still being let in.
    """
    level, *others = mixture.expert_levels()
    gates, (experts, *groups) = level.gates, level.expert_groups()
    chooses = not isinstance(gates.rule, Soft) or gates.settings.serving_top_k is not None
    usable = gates.visible & gates.in_use
    if others or groups or chooses or mixture.raw_inputs or bool(gates.ramp.any()) or not bool(usable.any(1).all()):
        return None
    bottom, crosses = mixture.bottom, mixture.bottom.crosses
    pairs = [] if crosses is None else zip(crosses.down, crosses.up, strict=True)
    of_crosses = [(_weights(down), _weights(up)) for down, up in pairs]
    of_hidden = [_weights(layer) for layer in bottom.layers if isinstance(layer, Linear)]
    first, *deeper = experts.layers
    of_experts = [_together(first), *map(_apart, deeper)]  # all experts read the first layer together
    # (G * E, H), with a bias of minus infinity for experts that a gate may not use.
    of_gates, bias_of_gates = _together(gates.linear)
    assert bias_of_gates is not None
    bias_of_gates = bias_of_gates.masked_fill(~usable.flatten(), float("-inf"))
    of_towers = [_apart(layer) for layer in mixture.towers.layers]

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return onednn_linear(x, weight.t(), bias) if matmul_backend == "onednn" else functional.linear(x, weight, bias)

    def logits(inputs: Tensor) -> Tensor:
        """(B, W) float32 -> (B, T) float32, as `Mixture` gives them."""
        crossed = inputs
        for (down, _), (up, bias) in of_crosses:
            crossed = torch.addcmul(crossed, inputs, linear(linear(crossed, down, None), up, bias))
        if bottom.piecewise_linear is not None:
            crossed = torch.cat([crossed, bottom.piecewise_linear(inputs[:, -bottom.dense :])], dim=1)
        hidden = crossed  # (B, H)
        for weight, bias in of_hidden:
            hidden = functional.silu(linear(hidden, weight, bias), inplace=True)
        (weight, bias), *deeper = of_experts
        outputs = experts.activate(linear(hidden, weight, bias))
        outputs = outputs.view(len(inputs), experts.count, -1).transpose(0, 1)  # (E, B, U)
        for weights in deeper:
            outputs = experts.activate(_each(outputs, weights))
        if experts.normalize:
            outputs = functional.layer_norm(outputs, outputs.shape[-1:])
        shares = linear(hidden, of_gates, bias_of_gates).view(len(inputs), *usable.shape).softmax(2)
        of_tasks = (shares @ outputs.transpose(0, 1)).transpose(0, 1)  # (G, B, U)
        *layers, last = of_towers
        for weights in layers:
            of_tasks = functional.silu(_each(of_tasks, weights), inplace=True)
        return _each(of_tasks, last).squeeze(2).t()

    return logits


def check_fused_forward(model: RankingModel) -> None:
    """Raise UserError if the fused pass gives other logits than the model's own forward pass.

    An added type of expert, gate or tower may compute something that `build_fused_forward` does not know. Where float32
    differs, float64 decides, because a processor may round products of float32 to bf16.
    """
    inputs = torch.randn(_ROWS, model.width, generator=torch.Generator().manual_seed(0))
    off = _find_difference(model.mixture, inputs)
    if not off <= _TOLERANCE:
        with suppress(RuntimeError):  # an added part may take float32 alone
            off = _find_difference(deepcopy(model.mixture).double(), inputs.double())
    if not off <= _TOLERANCE:
        raise UserError(
            "mmoe_rec/model/fused.py: the fused pass gives other logits than the model's forward pass, off by "
            f"{off:.2g} of the largest. Make `build_fused_forward` return None for the part that it does not "
            "know, such as an "
            "expert."
        )


def _find_difference(mixture: Mixture, inputs: Tensor) -> float:
    """Return the largest difference between logits of both passes, as a fraction of the largest logit."""
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        plain, fused = mixture(inputs, None).logits, build_fused_forward(mixture, "blas")
        finite = plain.isfinite().all(1)  # scoring refuses other rows
        if fused is None or not finite.any():
            return 0.0
        off = (fused(inputs) - plain)[finite].abs().max() / plain[finite].abs().max().clamp(min=1e-6)
    return float(off)


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
