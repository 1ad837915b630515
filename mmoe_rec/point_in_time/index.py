"""Keys found among many at a cost that does not grow with their number."""

from __future__ import annotations

import numpy as np

_STEPS = 8  # from the first key of a bucket on; among hashes, hardly any bucket has more keys


class KeyIndex:
    """Finds keys among (G,) distinct rising uint64 ones.

    These are hashes, so their first bits spread them over as many buckets, of which few hold more than a few keys.
    spread: so many times twice as many buckets, of 4 bytes each, where few steps matter more than memory.
    """

    def __init__(self, keys: np.ndarray, spread: int = 0) -> None:
        self.keys = keys
        bits = max(1, (len(keys) - 1).bit_length() + spread)
        self._shift = np.uint64(64 - bits)
        counts = np.bincount((keys >> self._shift).view(np.int64), minlength=2**bits)
        # (2^bits + 1,) where each bucket begins, and the last one ends.
        self._starts = np.zeros(len(counts) + 1, np.int32 if len(keys) < 2**31 else np.int64)
        np.cumsum(counts, out=self._starts[1:])

    def find(self, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of (N,) uint64 asked keys are there, (K,) int64 rising places, and the number of each of these keys."""
        if not len(self.keys):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        number: np.ndarray = self._starts.take((asked >> self._shift).view(np.int64))
        there = self.keys.take(number, mode="clip")
        less = np.flatnonzero(there < asked)  # keys that come before in the bucket; of few, one step takes the next one
        for _ in range(_STEPS):
            if not len(less):
                break
            number[less] += 1
            there[less] = self.keys.take(number[less], mode="clip")
            less = less[(there[less] < asked[less]) & (number[less] < len(self.keys))]
        else:
            number[less] = np.searchsorted(self.keys, asked[less])
            there[less] = self.keys.take(number[less], mode="clip")
        found = np.flatnonzero(there == asked)
        return found, number[found].astype(np.int64, copy=False)


def bisected(values: np.ndarray, asked: np.ndarray, low: np.ndarray, high: np.ndarray, before: np.ufunc) -> np.ndarray:
    """(N,) int64 places of the first of the rising `values` from `low` to `high` (exclusive) that is not `before` what
    is asked, `high` for none."""
    found = low.copy()
    open_ = np.flatnonzero(low < high)
    low, high, asked = low[open_], high[open_], asked[open_]
    while len(open_):
        middle = (low + high) >> 1
        is_before = before(values[middle], asked)
        low, high = np.where(is_before, middle + 1, low), np.where(is_before, high, middle)
        found[open_] = low
        left = np.flatnonzero(low < high)
        open_, low, high, asked = open_[left], low[left], high[left], asked[left]
    return found
