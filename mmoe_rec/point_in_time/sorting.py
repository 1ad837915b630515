"""The order of rows by key and time."""

from __future__ import annotations

import numpy as np


def sorted_order(key: np.ndarray, time: np.ndarray, value: np.ndarray | None = None) -> np.ndarray:
    """(N,) int64 order by key, then time, then value where one is given; of equals, the first comes first.

    Keys are (N,) uint64. Rows from a log are nearly in the order of time already, which NumPy's stable sort recognises.
    """
    order = np.argsort(time, kind="stable") if value is None else np.lexsort((value, time))
    return order[_stable_order(key[order])] if len(key) else order


def _stable_order(key: np.ndarray) -> np.ndarray:
    """(N,) int64 order by key, (N,) uint64; of equals, the first comes first.

    Keys are sorted as numbers that end in each one's place, since NumPy sorts numbers several times as fast as it finds
    their order. These have room for the first bits of the keys, which are hashes, so seldom do other bits matter.
    """
    key = key - key.min()
    room = 64 - len(key).bit_length()
    low = max(0, int(key.max()).bit_length() - room)
    order = _order_by_bits(key >> np.uint64(low), room)
    found = key[order]
    if low and (found[1:] < found[:-1]).any():
        order = _order_by_bits(key & np.uint64(2**low - 1), room)
        order = order[_order_by_bits(key[order] >> np.uint64(low), room)]
    return order


def _order_by_bits(bits: np.ndarray, room: int) -> np.ndarray:
    """(N,) int64 stable order of (N,) uint64 numbers of at most `room` bits, which leave enough for their places."""
    shift = np.uint64(64 - room)
    numbers = (bits << shift) | np.arange(len(bits), dtype=np.uint64)
    numbers.sort()
    return (numbers & np.uint64(2 ** (64 - room) - 1)).view(np.int64)
