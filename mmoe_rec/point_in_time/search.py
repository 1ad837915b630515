"""The events of few keys among many: what a request asks for, at a cost that does not grow with what is remembered.

`Join` sorts look-ups beside all events; here each look-up is found on its own, in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mmoe_rec.point_in_time.index import bisected
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


AnyLookUps = LookUps | UnsortedLookUps


class Search:
    """Events and look-ups of them in any order, of which each is searched by its key, then by its time."""

    def __init__(self, events: KnownEvents, asked: AnyLookUps) -> None:
        self.events, self.asked = events, asked

    @cached_property
    def _remembered(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The look-ups whose keys have events: (K,) int64 their numbers, the first events, and where the last end."""
        group, found = self.events.index.find(self.asked.key)
        rows = np.flatnonzero(found)
        group = group[rows]
        return rows, self.events.starts[group], self.events.starts[group + 1]

    @cached_property
    def first(self) -> np.ndarray:
        """(N,) int64 first event of each look-up's key, the number of all events where it has none."""
        first = np.full(len(self.asked), len(self.events))
        rows, starts, _ = self._remembered
        first[rows] = starts
        return first

    def last(self, earlier: int = 0) -> np.ndarray:
        """(N,) int64 index of the last event of each look-up's key that was known `earlier` microseconds before its
        time; -1 for none."""
        if not len(self.events):
            return np.full(len(self.asked), -1, np.int64)
        rows, first, end = self._remembered
        times = self.asked.time[rows] - earlier
        # Most requests are later than all that is remembered of their keys.
        low = np.where(self.events.known[end - 1] <= times, end, first)
        later = bisected(self.events.known, times, low, end, np.less_equal)
        last = np.full(len(self.asked), -1, np.int64)
        last[rows] = np.where(later > first, later - 1, -1)
        return last
