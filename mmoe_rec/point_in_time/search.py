"""The events of few keys among many: what a request asks for, at a cost that does not grow with what is remembered.

`Join` sorts look-ups beside all events; here each look-up is found on its own, in any order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from mmoe_rec.point_in_time.join import KnownEvents, LookUps, bisected


@dataclass(frozen=True)
class UnsortedLookUps:
    """What N rows ask, each for itself. key: (N,) uint64; time: (N,) int64 microseconds.

    found: what `TogetherIndex.find` found, by the events: the (K,) int64 rows whose key has events, and the
    number of each one's key among the distinct ones of the events.
    """

    key: np.ndarray
    time: np.ndarray
    found: dict[KnownEvents, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

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
        return UnsortedLookUps(self.key, np.maximum(self.time, floor), self.found)

    def found_in(self, events: KnownEvents) -> tuple[np.ndarray, np.ndarray]:
        """The rows whose key has events, and the number of each one's key, as in `found`."""
        known = self.found.get(events)
        return events.index.find(self.key) if known is None else known


AnyLookUps = LookUps | UnsortedLookUps


class Search:
    """Events and look-ups of them in any order, of which each is searched by its key, then by its time."""

    def __init__(self, events: KnownEvents, asked: AnyLookUps) -> None:
        self.events, self.asked = events, asked

    @cached_property
    def _remembered(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The look-ups whose keys have events: (K,) int64 their numbers, the first events, and where the last end."""
        if isinstance(self.asked, UnsortedLookUps):
            rows, group = self.asked.found_in(self.events)
        else:
            rows, group = self.events.index.find(self.asked.key)
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
        last = np.full(len(self.asked), -1, np.int64)
        if len(self.events):
            rows, first, end = self._remembered
            last[rows] = last_known(self.events.known, first, end, self.asked.time[rows] - earlier)
        return last


def last_known(known: np.ndarray, first: np.ndarray, end: np.ndarray, times: np.ndarray) -> np.ndarray:
    """(K,) int64 index of the last of the events from `first` to `end` (exclusive, at least one) that was known at
    each of the `times`; -1 for none. known: (E,) int64, rising from each `first` to its `end`."""
    last = end - 1
    # Most requests are later than all that is remembered of their keys.
    if len(open_ := np.flatnonzero(known.take(last) > times)):
        first = first[open_]
        later = bisected(known, times[open_], first, last[open_], np.less_equal)
        last[open_] = np.where(later > first, later - 1, -1)
    return last
