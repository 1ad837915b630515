"""The events of few keys among many: what a request asks for, at a cost that does not grow with what is remembered.

`Join` sorts look-ups beside all events; here each look-up is found on its own, in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mmoe_rec.point_in_time.join import KnownEvents, LookUps


@dataclass(frozen=True)
class UnsortedLookUps:
    """What N rows ask, each for itself. key: (N,) uint64; time: (N,) int64 microseconds."""

    key: np.ndarray
    time: np.ndarray

    def __len__(self) -> int:
        return len(self.key)

    @cached_property
    def number(self) -> np.ndarray:
        """(N,) int64 the look-up of each row, which is its own."""
        return np.arange(len(self.key))

    def as_of(self, floor: int | None) -> UnsortedLookUps:
        """The same look-ups, but none of an earlier time than `floor`."""
        if floor is None or not len(self) or self.time.min() >= floor:
            return self
        return UnsortedLookUps(self.key, np.maximum(self.time, floor))


class KeyIndex:
    """Finds keys among (G,) distinct rising uint64 ones.

    These are hashes, so their first bits spread them over as many buckets, of which few hold more than a few keys.
    """

    def __init__(self, keys: np.ndarray) -> None:
        self.keys = keys
        bits = max(1, (len(keys) - 1).bit_length())
        self._shift = np.uint64(64 - bits)
        counts = np.bincount((keys >> self._shift).view(np.int64), minlength=2**bits)
        # (2^bits + 1,) where each bucket begins, and the last one ends.
        self._starts = np.zeros(len(counts) + 1, np.int32 if len(keys) < 2**31 else np.int64)
        np.cumsum(counts, out=self._starts[1:])

    def find(self, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) int64 number of the first key that is not less than each of (N,) uint64 asked ones, and whether it is
        that key."""
        bucket = (asked >> self._shift).view(np.int64)
        low, high = self._starts[bucket].astype(np.int64), self._starts[bucket + 1].astype(np.int64)
        while (searching := low < high).any():
            middle = (low + high) >> 1
            less = searching & (self.keys.take(middle, mode="clip") < asked)
            low = np.where(less, middle + 1, low)
            high = np.where(less, high, np.where(searching, middle, high))
        if not len(self.keys):
            return low, np.zeros(len(asked), bool)
        return low, self.keys.take(low, mode="clip") == asked


class Search:
    """Events and look-ups of them in any order, of which each is searched by its key, then by its time."""

    def __init__(self, events: KnownEvents, asked: UnsortedLookUps | LookUps) -> None:
        self.events, self.asked = events, asked

    @cached_property
    def _ends(self) -> np.ndarray:
        group, found = self._found
        return np.where(found, self.events.starts.take(group + 1, mode="clip"), 0)

    @cached_property
    def _found(self) -> tuple[np.ndarray, np.ndarray]:
        return self.events.index.find(self.asked.key)

    @cached_property
    def first(self) -> np.ndarray:
        """(N,) int64 first event of each look-up's key, the number of all events where it has none."""
        group, found = self._found
        return np.where(found, self.events.starts[group], len(self.events))

    def last(self, earlier: int = 0) -> np.ndarray:
        """(N,) int64 index of the last event of each look-up's key that was known `earlier` microseconds before its
        time; -1 for none."""
        if not len(self.events):
            return np.full(len(self.asked), -1, np.int64)
        known, times = self.events.known, self.asked.time - earlier
        first, low, high = self.first, self.first, self._ends
        # Most requests are later than all that is remembered of their keys.
        low = np.where((low < high) & (known.take(high - 1, mode="clip") <= times), high, low)
        # The first event after `times` lies between low and high.
        while (searching := low < high).any():
            middle = (low + high) >> 1
            before = searching & (known.take(middle, mode="clip") <= times)
            low = np.where(before, middle + 1, low)
            high = np.where(before, high, np.where(searching, middle, high))
        return np.where(low > first, low - 1, -1)
