"""Which device and precision a machine offers, what a GPU needs beyond a CPU, and how freed memory is kept.

On a GPU, products of fp32 matrices may be computed in TF32: fp32's range with 10 bits of mantissa, between bf16's 7 and
fp32's 23, at several times the speed. Training takes it for all products but those of gates (`fp32_matmul_precision`),
which choose experts: an expert that training chose by a rounded number would not be the one that serving chooses.

By default glibc gives each freed array of megabytes back to the system, which then clears and maps its pages anew: a
tenth of the time of building features, a quarter of a training step's. Another C library is left as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from mmoe_rec.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

# Of mallopt. Once set, glibc no longer adjusts the thresholds itself; left alone they end at 64 and 32 MiB.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEEP, _TRIM_BY_DEFAULT, _MMAP_BY_DEFAULT = 2**30, 64 * 2**20, 32 * 2**20
# Threads other than the first take memory in heaps of 64 MiB, which go back one by one unless this much is to be spare.
_SPARE, _SPARE_BY_DEFAULT = 64 * 2**20, 128 * 2**10


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
def fp32_matmul_precision(precision: Literal["ieee", "tf32"], device: torch.device) -> Iterator[None]:
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
def cached_constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(n,) numbers that do not change, on a device where they stay: making a tensor of them anew at each step would
    copy them there, for which host and device wait for each other.
    """
    import torch

    with torch.inference_mode(False):  # a tensor made under it could not take part in training later
        return torch.tensor(values, dtype=dtype, device=device)


@contextlib.contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Keeps what is freed until the block ends, when all of it goes back."""
    import pyarrow as pa

    pool = pa.default_memory_pool()
    if not keep_freed_memory():
        yield
        return
    try:
        yield
    finally:
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, _TRIM_BY_DEFAULT)
        libc.mallopt(_MMAP_THRESHOLD, _MMAP_BY_DEFAULT)
        libc.mallopt(_TOP_PAD, _SPARE_BY_DEFAULT)
        pa.set_memory_pool(pool)
        libc.malloc_trim(0)


def keep_freed_memory() -> bool:
    """From now on keeps what is freed, up to a GiB at the end of the heap; gives whether the C library can."""
    import pyarrow as pa

    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    libc.mallopt(_TRIM_THRESHOLD, _KEEP)
    libc.mallopt(_MMAP_THRESHOLD, _KEEP)
    libc.mallopt(_TOP_PAD, _SPARE)
    pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own pools give it back too
    return True
