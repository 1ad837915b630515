"""Which device and precision a machine offers, and what a GPU needs beyond a CPU.

On a GPU, products of fp32 matrices may be computed in TF32: fp32's range with 10 bits of mantissa, between bf16's 7 and
fp32's 23, at several times the speed. Training takes it for all products but those of gates (`fp32_products`), which
choose experts: an expert that training chose by a rounded number would not be the one that serving chooses.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from mmoe_rec.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn


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


@contextlib.contextmanager
def limit_threads(count: int) -> Iterator[None]:
    """Within it torch computes with so many threads; 0 leaves them as they are."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_of(model: nn.Module) -> torch.device:
    """Where a model that lies on one device is."""
    return next(model.parameters()).device


@contextlib.contextmanager
def fp32_products(precision: Literal["ieee", "tf32"], device: torch.device) -> Iterator[None]:
    """Products of fp32 matrices on a GPU are in this precision within the block; on a CPU they are fp32 anyway."""
    if device.type != "cuda":
        yield
        return
    import torch

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


@lru_cache(maxsize=256)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(n,) numbers that do not change, on a device where they stay: making a tensor of them anew at each step would
    copy them there, for which host and device wait for each other.
    """
    import torch

    with torch.inference_mode(False):  # a tensor made under it could not take part in training later
        return torch.tensor(values, dtype=dtype, device=device)
