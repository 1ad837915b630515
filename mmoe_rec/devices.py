"""Devices, threads, matmul precision and memory of a process.

A GPU can compute matrix products of fp32 numbers several times as fast in the format TF32. TF32 has the range of fp32
and 10 bits of mantissa (bf16 has 7, fp32 has 23). Training uses TF32 except in gates (`fp32_matmul_precision`). Gates
select experts, and with rounding, training and serving could select different experts.

By default, the C library glibc returns the memory of large freed arrays to the system. For the next array, the system
must clear and map the memory again. This takes a tenth of the time of a feature build, and a quarter of a training
step. `keep_freed_memory` avoids it with glibc, and does nothing with other C libraries.
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

# Parameters of mallopt. By default, glibc adapts two thresholds, up to 64 MiB (trim) and 32 MiB (mmap). Setting one of
# them turns the adaptation off.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEPT_BYTES, _DEFAULT_TRIM, _DEFAULT_MMAP = 2**30, 64 * 2**20, 32 * 2**20
# Threads other than the first have heaps of 64 MiB. glibc returns a free heap to the system, unless the padding
# (M_TOP_PAD) is as large as a heap.
_PADDING, _DEFAULT_PADDING = 64 * 2**20, 128 * 2**10


def pick_device(wanted: str) -> torch.device:
    """Return the device for the setting `auto`, `cpu` or `cuda`. Under torchrun, each rank gets its own GPU.

    Raises:
        UserError: The setting is `cuda`, and torch finds no GPU.
    """
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("training.device is cuda, but torch sees no CUDA device. Set it to cpu or auto")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    get_affinity = getattr(os, "sched_getaffinity", None)  # This function exists only on Linux.
    return len(get_affinity(0)) if get_affinity else os.cpu_count() or 1


@contextlib.contextmanager
def limit_threads(count: int) -> Iterator[None]:
    """Set the number of torch's threads within the context. A count of 0 doesn't change it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model that is on one device."""
    return next(model.parameters()).device


@contextlib.contextmanager
def fp32_matmul_precision(precision: Literal["ieee", "tf32"], device: torch.device) -> Iterator[None]:
    """Set the precision of fp32 matmuls on a GPU within the context. A CPU always computes them in fp32.

    Args:
        precision: "ieee" for fp32, or "tf32".
        device: Device of the matmuls.
    """
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
    """Return constants as a tensor of shape (n,). Later calls with the same arguments return the same tensor.

    A new tensor at each step would have to be copied to the device, and the host would wait for the copy.

    Args:
        values: The n numbers.
        dtype: Type of the tensor.
        device: Device of the tensor.
    """
    import torch

    with torch.inference_mode(False):  # Training couldn't use a tensor that was created in inference mode.
        return torch.tensor(values, dtype=dtype, device=device)


@contextlib.contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Keep freed memory in the process within the context, and return it to the system at the end."""
    import pyarrow as pa

    pool = pa.default_memory_pool()
    if not keep_freed_memory():
        yield
        return
    try:
        yield
    finally:
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, _DEFAULT_TRIM)
        libc.mallopt(_MMAP_THRESHOLD, _DEFAULT_MMAP)
        libc.mallopt(_TOP_PAD, _DEFAULT_PADDING)
        pa.set_memory_pool(pool)
        libc.malloc_trim(0)


def keep_freed_memory() -> bool:
    """Keep up to 1 GiB of freed memory in the process. Return whether the C library supports this."""
    import pyarrow as pa

    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    libc.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
    libc.mallopt(_MMAP_THRESHOLD, _KEPT_BYTES)
    libc.mallopt(_TOP_PAD, _PADDING)
    pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own memory pools would return freed memory to the system.
    return True
