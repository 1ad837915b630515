"""G independent layers of one shape, stored as one weight.

Measured on CPU: inputs that all groups share go through one large product; groups with inputs of their own go through a
loop of products over slices, which beats a strided batched product because nothing is copied.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class StackedLinear(nn.Module):
    """G independent linear layers from `inputs` to `outputs`, each initialised as `nn.Linear` would be.

    State: weight (G, outputs, inputs), bias (G, outputs).
    """

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(groups, outputs))
        bound = 1 / math.sqrt(inputs) if inputs else 0.0
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """An input for each group: G tensors (B, inputs) -> G tensors (B, outputs)."""
        # One cast and one gradient of the whole: each slice would be cast, and give a gradient as large as all.
        weights, biases = for_products(self.weight).unbind(), for_products(self.bias).unbind()
        return [functional.linear(*each) for each in zip(inputs, weights, biases, strict=True)]

    def shared(self, x: Tensor) -> Tensor:
        """One input for all groups: (B, inputs) -> (B, G * outputs), group-major."""
        return functional.linear(x, self.weight.flatten(0, 1), self.bias.flatten())

    def extra_repr(self) -> str:
        """Shape for printing."""
        groups, outputs, inputs = self.weight.shape
        return f"groups={groups}, inputs={inputs}, outputs={outputs}"


# The precision that products are computed in.


def for_products(tensor: Tensor) -> Tensor:
    """The tensor in autocast's precision, if that is on: for what several products would each cast."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor
