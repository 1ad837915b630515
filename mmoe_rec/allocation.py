"""Keeps freed memory, for work in which arrays of megabytes come and go all the time.

By default glibc gives each such array back to the system, which then clears and maps its pages anew: a tenth of the
time of building features, a quarter of a training step's. Another C library is left as it is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

# Of mallopt. Once set, glibc no longer adjusts the thresholds itself; left alone they end at 64 and 32 MiB.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEEP, _TRIM_BY_DEFAULT, _MMAP_BY_DEFAULT = 2**30, 64 * 2**20, 32 * 2**20
# Threads other than the first take memory in heaps of 64 MiB, which go back one by one unless this much is to be spare.
_SPARE, _SPARE_BY_DEFAULT = 64 * 2**20, 128 * 2**10
_ARROW_POOL = pa.default_memory_pool()


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keeps what is freed until the block ends, when all of it goes back."""
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
        pa.set_memory_pool(_ARROW_POOL)
        libc.malloc_trim(0)


def keep_freed_memory() -> bool:
    """From now on keeps what is freed, up to a GiB at the end of the heap; gives whether the C library can."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    libc.mallopt(_TRIM_THRESHOLD, _KEEP)
    libc.mallopt(_MMAP_THRESHOLD, _KEEP)
    libc.mallopt(_TOP_PAD, _SPARE)
    pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own pools give it back too
    return True
