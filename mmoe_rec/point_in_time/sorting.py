"""The order of rows by key and time."""

from __future__ import annotations

import numpy as np


def sorted_order(key: np.ndarray, time: np.ndarray, value: np.ndarray | None = None) -> np.ndarray:
    """(N,) int64 order by key, then time, then value where one is given; of equals, the first comes first.

    Keys are (N,) uint64, times and values int64. Rows from a log are mostly in the order of time already, or nearly,
    which NumPy's stable sort recognises.
    """
    if value is not None:
        order = _stable_order(value)
        order = order[_stable_order(time[order])]
    elif (time[1:] >= time[:-1]).all():
        return _stable_order(key)
    else:
        order = np.argsort(time, kind="stable")
    return order[_stable_order(key[order])]


def _stable_order(key: np.ndarray) -> np.ndarray:
    """(N,) int64 order by key, (N,) 64-bit integers; of equals, the first comes first.

    Keys are sorted as numbers that end in each one's place, since NumPy sorts numbers several times as fast as it finds
    their order. These have room for the first bits of the keys, which are hashes, so seldom do other bits matter.
    """
    if not len(key):
        return np.empty(0, np.int64)
    key = (key - key.min()).view(np.uint64)
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
