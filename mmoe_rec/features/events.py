"""What had happened and was known before a moment: events per key, ordered by the time at which they became known.

This is the one mechanism behind counters and histories. A label of a row requested at time r that matures after m
becomes known at max(r + 1 microsecond, r + m); a request at time t sees the events known at t or before. So a request
sees rows of strictly earlier requests whose label had matured, never itself and never the future.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

_TIME_BITS = np.int64(32)


@dataclass(frozen=True)
class Places:
    """One sortable number for each event's (key, known time), so that a single search answers many rows at once.

    sorted: (E,) int64, number of the key and of the moment; moments: (M,) int64 distinct known times, rising.
    """

    sorted: np.ndarray
    moments: np.ndarray

    def keep(self, events: np.ndarray) -> Places:
        """The places of some events, (E,) bool; every moment keeps one."""
        return Places(self.sorted[events], self.moments)


class KnownEvents:
    """Events sorted by (key, known time), with a binary search for the last one known at a given time.

    key: (E,) uint64; known: (E,) int64 microseconds; places: what `sort_events` gave with them.
    """

    def __init__(self, key: np.ndarray, known: np.ndarray, places: Places | None = None) -> None:
        self.key = key
        self.known = known
        self._given = places

    @cached_property
    def starts(self) -> np.ndarray:
        """(G + 1,) int64 index of the first event of each of G keys, then E."""
        changes = np.append(len(self.key) > 0, self.key[1:] != self.key[:-1])
        return np.append(np.flatnonzero(changes), len(self.key)).astype(np.int64)

    @cached_property
    def keys(self) -> np.ndarray:
        """(G,) uint64 distinct keys, rising."""
        return self.key[self.starts[:-1]]

    @cached_property
    def _places(self) -> Places:
        if self._given is not None:
            return self._given
        moments = _distinct(self.known)
        group = np.repeat(np.arange(len(self.keys)), np.diff(self.starts))
        return Places(_place(group, np.searchsorted(moments, self.known)), moments)

    def __len__(self) -> int:
        return len(self.key)

    def groups(self, keys: np.ndarray) -> np.ndarray:
        """(N,) int64 group of each key, -1 for a key without events; much faster where keys are sorted."""
        if not len(self.keys):
            return np.full(len(keys), -1, np.int64)
        found = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[found] == keys, found, -1)

    def last(self, groups: np.ndarray, times: np.ndarray) -> np.ndarray:
        """(N,) int64 index of the last event of each group known at `times` (N,), -1 where there is none."""
        return self.last_at(groups, self.ranks(times))

    def ranks(self, times: np.ndarray) -> np.ndarray:
        """(N,) int64 number of the last moment at which anything became known by `times`, -1 before the first one."""
        return np.searchsorted(self._places.moments, times, side="right") - 1

    def last_at(self, groups: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """`last`, for moments by their number."""
        wanted = _place(np.maximum(groups, 0), np.maximum(ranks, 0))
        index = np.searchsorted(self._places.sorted, wanted, side="right") - 1
        return np.where((groups >= 0) & (ranks >= 0) & (index >= self.group_starts(groups)), index, -1)

    def group_starts(self, groups: np.ndarray) -> np.ndarray:
        """(N,) int64 index of the first event of each group (0 for group -1)."""
        return self.starts[np.maximum(groups, 0)] if len(self.keys) else np.zeros(len(groups), np.int64)

    def needed_since(self, moment: int) -> np.ndarray:
        """(E,) bool: events known after `moment`, and the last one before it of each key, which carries its totals."""
        later = self.known > moment
        last_of_key = np.append(self.key[1:] != self.key[:-1], True) if len(self.key) else np.empty(0, bool)
        return later | last_of_key | np.append(later[1:], False)


def known_at(times: np.ndarray, matures_after: int) -> np.ndarray:
    """(N,) int64 microseconds at which the labels of rows requested at `times` become known."""
    return times + max(1, matures_after)


def sort_events(key: np.ndarray, known: np.ndarray, value: np.ndarray | None) -> tuple[np.ndarray, Places]:
    """(E,) int64 order by key, then known time, then value (where it matters), so events may come in any order.

    Several times faster than `np.lexsort` where events come roughly in time order, as they do from a log.
    """
    _, group = np.unique(key, return_inverse=True)
    moments = _distinct(known)
    place = _place(group, np.searchsorted(moments, known))
    order = np.argsort(place)
    place = place[order]
    same = place[1:] == place[:-1]
    if value is not None and same.any():
        tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
        order[tied] = order[tied][np.lexsort((value[order[tied]], place[tied]))]
    return order, Places(place, moments)


def _place(group: np.ndarray, moment: np.ndarray) -> np.ndarray:
    return (group << _TIME_BITS) | moment


def _distinct(values: np.ndarray) -> np.ndarray:
    """Sorted distinct values. `np.unique` is a hash table without need, many times slower than a sort of integers."""
    ordered = np.sort(values)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])] if len(ordered) else ordered
