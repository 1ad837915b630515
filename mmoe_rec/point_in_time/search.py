"""The events of few keys among many: what a request asks for, at a cost that does not grow with what is remembered.

`Join` sorts look-ups beside all events; here each look-up is found on its own, in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from mmoe_rec.point_in_time.index import KeyIndex, bisected
from mmoe_rec.point_in_time.join import KnownEvents, LookUps
from mmoe_rec.point_in_time.sorting import sorted_order


@dataclass(frozen=True)
class UnsortedLookUps:
    """What N rows ask, each for itself. key: (N,) uint64; time: (N,) int64 microseconds.

    found: what `find_together` found, by the id of the events: the (K,) int64 rows whose key has events, and the number
    of each one's key among the distinct ones of the events.
    """

    key: np.ndarray
    time: np.ndarray
    found: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

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


AnyLookUps = LookUps | UnsortedLookUps


class Search:
    """Events and look-ups of them in any order, of which each is searched by its key, then by its time."""

    def __init__(self, events: KnownEvents, asked: AnyLookUps) -> None:
        self.events, self.asked = events, asked

    @cached_property
    def _remembered(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The look-ups whose keys have events: (K,) int64 their numbers, the first events, and where the last end."""
        known = self.asked.found.get(id(self.events)) if isinstance(self.asked, UnsortedLookUps) else None
        rows, group = known or self.events.index.find(self.asked.key)
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
        last = np.full(len(self.asked), -1, np.int64)
        # Most requests are later than all that is remembered of their keys.
        last[rows] = end - 1
        if len(open_ := np.flatnonzero(self._latest > times)):
            first = first[open_]
            later = bisected(self.events.known, times[open_], first, end[open_] - 1, np.less_equal)
            last[rows[open_]] = np.where(later > first, later - 1, -1)
        return last

    @cached_property
    def _latest(self) -> np.ndarray:
        """(K,) int64 when the last event of each remembered key became known."""
        return self.events.known[self._remembered[2] - 1]


class TogetherIndex:
    """The keys of several memories' events in one index, so that what rows ask of all of them is found in one pass."""

    def __init__(self, memories: Sequence[KnownEvents]) -> None:
        self.memories = tuple(memories)
        self._place = {id(events): place for place, events in enumerate(memories)}
        keys = [events.distinct ^ _salt(place) for place, events in enumerate(memories)]
        every = np.concatenate(keys) if keys else np.empty(0, np.uint64)
        order = sorted_order(every, np.zeros(len(every), np.int64))
        self._index = KeyIndex(every[order])
        starts = np.cumsum([0, *map(len, keys)])
        numbers = order - np.repeat(starts[:-1], [len(each) for each in keys])[order]
        self._numbers = numbers.astype(np.int32 if len(every) < 2**31 else np.int64)

    def find(self, asked: Sequence[tuple[KnownEvents, UnsortedLookUps]]) -> None:
        """Notes in look-ups what they find among the events, which are those of the index."""
        if not asked:
            return
        keys = np.concatenate([each.key ^ _salt(self._place[id(events)]) for events, each in asked])
        found, group = self._index.find(keys)
        numbers = self._numbers[group]
        starts = np.cumsum([0, *(len(each) for _, each in asked)])
        ends = np.searchsorted(found, starts)
        for (events, each), start, low, high in zip(asked, starts[:-1], ends[:-1], ends[1:], strict=True):
            each.found[id(events)] = found[low:high] - start, numbers[low:high]


def _salt(place: int) -> np.uint64:
    """What tells the keys of a memory from equal ones of another; keys are hashes, and stay so."""
    return np.uint64((place + 1) * 0x9E3779B97F4A7C15 % 2**64)  # 2^64 over the golden ratio: unlike in many bits
