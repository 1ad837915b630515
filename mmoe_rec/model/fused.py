"""Dense part for inference, with fixed weights and all experts on all rows, in a few large operators.

The modules of `mmoe_rec.model.mmoe` compute the same with a hundred operators, which take most of the time of a small
request. The fused function takes a third of the modules' time for five rows, and 90% for five hundred rows.
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
"""Weight (outputs, inputs) and bias (outputs,) of a layer, or (G, inputs, outputs) and (G, 1, outputs) of G layers."""
# Number of random rows that `check_fused_forward` compares, and accepted difference as a fraction of the largest logit.
_ROWS, _TOLERANCE = 16, 1e-4


def build_fused_forward(mixture: Mixture, matmul_backend: MatmulBackend) -> Callable[[Tensor], Tensor] | None:
    """Return a function from inputs (B, W) to logits (B, T) float32, with the model's current weights.

    The result is None for models that the function doesn't support: with several levels of experts, gates that choose
    experts, a gate without experts in use, experts that read the bottom's inputs besides its output
    (`Mixture.raw_inputs`), or an added expert that isn't in full use yet (`Gates.ramp`).

    Args:
        mixture: Dense part of a model.
        matmul_backend: Library of the matrix products.
    """
    level, *further_levels = mixture.expert_levels()
    gates, (experts, *groups) = level.gates, level.expert_groups()
    selects = not isinstance(gates.rule, Soft) or gates.settings.serving_top_k is not None
    usable = gates.visible & gates.in_use
    incomplete = bool(gates.ramp.any()) or not bool(usable.any(1).all())
    if further_levels or groups or selects or mixture.raw_inputs or incomplete:
        return None
    bottom, crosses = mixture.bottom, mixture.bottom.crosses
    pairs = [] if crosses is None else zip(crosses.down, crosses.up, strict=True)
    cross_weights = [(_weights(down), _weights(up)) for down, up in pairs]
    hidden_weights = [_weights(layer) for layer in bottom.layers if isinstance(layer, Linear)]
    first, *deeper = experts.layers
    expert_weights = [_concatenated(first), *map(_transposed, deeper)]  # One product for all experts.
    # Weights (G * E, H). Experts that a gate can't use get a bias of minus infinity.
    gate_weight, gate_bias = _concatenated(gates.linear)
    assert gate_bias is not None
    gate_bias = gate_bias.masked_fill(~usable.flatten(), float("-inf"))
    tower_weights = [_transposed(layer) for layer in mixture.towers.layers]

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return onednn_linear(x, weight.t(), bias) if matmul_backend == "onednn" else functional.linear(x, weight, bias)

    def logits(inputs: Tensor) -> Tensor:
        """Return the logits (B, T) of inputs (B, W), as `Mixture` does, up to rounding."""
        crossed = inputs
        for (down, _), (up, bias) in cross_weights:
            crossed = torch.addcmul(crossed, inputs, linear(linear(crossed, down, None), up, bias))
        if bottom.piecewise_linear is not None:
            crossed = torch.cat([crossed, bottom.piecewise_linear(inputs[:, -bottom.dense :])], dim=1)
        hidden = crossed  # (B, H)
        for weight, bias in hidden_weights:
            hidden = functional.silu(linear(hidden, weight, bias), inplace=True)
        (weight, bias), *deeper = expert_weights
        outputs = experts.activate(linear(hidden, weight, bias))
        outputs = outputs.view(len(inputs), experts.count, -1).transpose(0, 1)  # (E, B, U)
        for weights in deeper:
            outputs = experts.activate(_batched_linear(outputs, weights))
        if experts.normalize:
            outputs = functional.layer_norm(outputs, outputs.shape[-1:])
        gate_weights = linear(hidden, gate_weight, gate_bias).view(len(inputs), *usable.shape).softmax(2)
        mixed = (gate_weights @ outputs.transpose(0, 1)).transpose(0, 1)  # (G, B, U)
        *layers, last = tower_weights
        for weights in layers:
            mixed = functional.silu(_batched_linear(mixed, weights), inplace=True)
        return _batched_linear(mixed, last).squeeze(2).t()

    return logits


def check_fused_forward(model: RankingModel) -> None:
    """Raise UserError if the fused function returns other logits than the model's own forward pass.

    This finds a new type of expert, gate or tower that `build_fused_forward` doesn't support. If logits differ in
    float32, they are compared again in float64, because a processor may round float32 products to bf16.
    """
    inputs = torch.randn(_ROWS, model.width, generator=torch.Generator().manual_seed(0))
    difference = _find_difference(model.mixture, inputs)
    if not difference <= _TOLERANCE:
        with suppress(RuntimeError):  # A new expert type may support only float32.
            difference = _find_difference(deepcopy(model.mixture).double(), inputs.double())
    if not difference <= _TOLERANCE:
        raise UserError(
            "mmoe_rec/model/fused.py: the fused pass returns other logits than the model's forward pass. The "
            f"difference is {difference:.2g} of the largest logit. Return None from `build_fused_forward` for the part "
            "that it doesn't support, such as an expert."
        )


def _find_difference(mixture: Mixture, inputs: Tensor) -> float:
    """Return the largest difference between fused and plain logits, as a fraction of the largest plain logit."""
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        plain, fused = mixture(inputs, None).logits, build_fused_forward(mixture, "blas")
        finite = plain.isfinite().all(1)  # Rows without finite logits needn't agree, since scoring rejects them.
        if fused is None or not finite.any():
            return 0.0
        difference = (fused(inputs) - plain)[finite].abs().max() / plain[finite].abs().max().clamp(min=1e-6)
    return float(difference)


def _batched_linear(x: Tensor, weights: Weights) -> Tensor:
    """Apply G layers with I inputs and O outputs, (G, B, I) -> (G, B, O). All layers can share one input (1, B, I)."""
    weight, bias = weights
    assert bias is not None
    return torch.baddbmm(bias, x.expand(len(weight), -1, -1), weight)


def _weights(layer: nn.Module) -> Weights:
    assert isinstance(layer, Linear)
    return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()


def _concatenated(layer: nn.Module) -> Weights:
    """Return the weights of one layer whose outputs are the outputs of G layers on the same input."""
    assert isinstance(layer, StackedLinear)
    return layer.weight.detach().flatten(0, 1), layer.bias.detach().flatten()


def _transposed(layer: nn.Module) -> Weights:
    assert isinstance(layer, StackedLinear)
    return layer.weight.detach().transpose(1, 2).contiguous(), layer.bias.detach().unsqueeze(1)
