"""The precision that products are computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def for_products(tensor: Tensor) -> Tensor:
    """The tensor in autocast's precision, if that is on: for what several products would each cast."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor
