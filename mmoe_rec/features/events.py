"""What had happened and was known before a moment: events per key, ordered by the time at which they became known.

This is the one mechanism behind counters and histories. A label of a row requested at time r that matures after m
becomes known at max(r + 1 microsecond, r + m); a request at time t sees the events known at t or before. So a request
sees rows of strictly earlier requests whose label had matured, never itself and never the future.
"""

from __future__ import annotations

import numpy as np

_TIME_BITS = np.int64(32)


class KnownEvents:
    """Events sorted by (key, known time), with a binary search for the last one known at a given time.

    key: (E,) uint64; known: (E,) int64 microseconds. `floor` is the time as of which the events were compacted: an
    earlier moment is answered as of `floor`, since what was known before it has been dropped.
    """

    def __init__(self, key: np.ndarray, known: np.ndarray, floor: int | None = None) -> None:
        self.key = key
        self.known = known
        self.floor = floor
        changes = np.flatnonzero(np.append(True, key[1:] != key[:-1])) if len(key) else np.empty(0, np.int64)
        self.keys = key[changes]
        self.starts = np.append(changes, len(key)).astype(np.int64)
        self.moments = np.unique(known)
        assert max(len(self.keys), len(self.moments)) < 2**31
        group = np.repeat(np.arange(len(self.keys)), np.diff(self.starts))
        # One sortable number for (key, time), so that a single searchsorted answers all rows at once.
        self._position = (group << _TIME_BITS) | np.searchsorted(self.moments, known)

    def __len__(self) -> int:
        return len(self.key)

    def groups(self, keys: np.ndarray) -> np.ndarray:
        """(N,) int64 group of each key, -1 for a key without events."""
        if not len(self.keys):
            return np.full(len(keys), -1, np.int64)
        found = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[found] == keys, found, -1)

    def as_of(self, times: np.ndarray) -> np.ndarray:
        """(N,) int64 moments that can be answered: `times`, but no earlier than `floor`."""
        return times if self.floor is None else np.maximum(times, self.floor)

    def later_floor(self, moment: int) -> int:
        """The floor of these events when they are compacted as of `moment`."""
        return moment if self.floor is None else max(moment, self.floor)

    def last(self, groups: np.ndarray, times: np.ndarray) -> np.ndarray:
        """(N,) int64 index of the last event of each group known at `times` (N,), -1 where there is none."""
        moment = np.searchsorted(self.moments, times, side="right") - 1
        wanted = (np.maximum(groups, 0) << _TIME_BITS) | np.maximum(moment, 0)
        index = np.searchsorted(self._position, wanted, side="right") - 1
        starts = self.starts[np.maximum(groups, 0)] if len(self.keys) else np.zeros(len(groups), np.int64)
        return np.where((groups >= 0) & (moment >= 0) & (index >= starts), index, -1)

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


class EventParts:
    """Events collected batch by batch; a mergeable partial fit. `value` is a label or an item, (E,)."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, key: np.ndarray, known: np.ndarray, value: np.ndarray) -> None:
        """Adds events in any order."""
        self._parts.append((key, known, value))

    def sorted(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """key, known, value sorted by all three, so that the order in which they were added does not matter."""
        if not self._parts:
            return np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0)
        key, known, value = (np.concatenate(columns) for columns in zip(*self._parts, strict=True))
        order = np.lexsort((value, known, key))
        return key[order], known[order], value[order]
