"""Which device and precision a machine offers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mmoe_rec.errors import UserError

if TYPE_CHECKING:
    import torch


def pick_device(wanted: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`; under torchrun, the rank's own card. Raises UserError without a GPU."""
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("training.device is cuda, but torch sees no CUDA device; set it to cpu or auto")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def usable_cores() -> int:
    """Cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # which Linux alone has
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and torch.cpu._is_avx512_bf16_supported()
    except (AttributeError, RuntimeError):
        return False


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to train under bf16 autocast for a precision of `auto`, `bf16` or `fp32`."""
    return precision == "bf16" or (precision == "auto" and has_fast_bf16(device))
