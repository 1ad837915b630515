"""Events per key, ordered by the time at which they became available, and lookups of these events.

Counters and histories use this join. A row's label becomes available when it matures, and at least 1 microsecond after
the row's request. A lookup at time t finds only events that were available at t. A request therefore never sees the
labels of its own rows or of later requests.

An `EventStore` holds the events of one counter or history. Events can be added later, also by a running server.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self, TypeVar

import numpy as np

# Start (inclusive) and end (exclusive), in microseconds since 1970 UTC. None means no limit.
Window = tuple[int | None, int | None]


def in_window(times: np.ndarray, window: Window) -> np.ndarray:
    """Return whether each time is in a window, shape (N,), bool.

    Args:
        times: (N,) int64 microseconds.
        window: Window to check.
    """
    start, end = window
    inside = np.ones(len(times), bool)
    if start is not None:
        inside &= times >= start
    if end is not None:
        inside &= times < end
    return inside


def in_any_window(times: np.ndarray, windows: Iterable[Window]) -> np.ndarray:
    """Return whether each time is in at least one window, shape (N,), bool.

    Args:
        times: (N,) int64 microseconds.
        windows: Windows to check.
    """
    return np.any([np.zeros(len(times), bool), *(in_window(times, window) for window in windows)], axis=0)


def find_keys(keys: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find queries in sorted keys.

    Args:
        keys: (G,) distinct ascending uint64 keys.
        queries: (N,) uint64 queries.

    Returns:
        Ascending indices of the K queries that occur in `keys`, and the indices of these keys, both (K,) int64.
    """
    if not len(keys):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    positions = np.searchsorted(keys, queries)
    hits = (keys.take(positions, mode="clip") == queries).nonzero()[0]
    return hits, positions[hits]


@dataclass(frozen=True, eq=False)
class SortedEvents:
    """E events sorted by key, then by time. The events with the same key form a group.

    Attributes:
        key: (E,) uint64 keys.
        available_at: (E,) int64 microseconds at which the events become available.
    """

    key: np.ndarray
    available_at: np.ndarray

    def __len__(self) -> int:
        return len(self.key)

    @cached_property
    def starts(self) -> np.ndarray:
        """Index of the first event of each of the G groups, followed by the number E, shape (G + 1,), int64."""
        return np.append(np.flatnonzero(self._starts_group), len(self.key)).astype(np.int64)

    @cached_property
    def unique_keys(self) -> np.ndarray:
        """Distinct ascending keys, shape (G,), uint64."""
        return self.key[self.starts[:-1]]

    @cached_property
    def group_ids(self) -> np.ndarray:
        """Index of each event's key in `unique_keys`, shape (E,), int64."""
        # `np.repeat` would hold the interpreter lock and block other threads.
        return np.cumsum(self._starts_group) - 1

    @cached_property
    def _starts_group(self) -> np.ndarray:
        return np.append(True, self.key[1:] != self.key[:-1])[: len(self.key)]

    def take(self, kept: np.ndarray) -> "SortedEvents":
        """Return the events that `kept` selects, either by ascending indices or by a bool mask of shape (E,)."""
        return SortedEvents(self.key[kept], self.available_at[kept])


@dataclass(frozen=True)
class Lookups:
    """D lookups for N rows, either distinct and sorted by key and time, or one per row (D = N).

    Attributes:
        key: (D,) uint64 hashes of keys, such as a user.
        time: (D,) int64 microseconds. A lookup finds events that were available at this time.
        inverse: (N,) int64 index of each row's lookup.
        is_sorted: Whether the lookups are distinct and sorted.
    """

    key: np.ndarray
    time: np.ndarray
    inverse: np.ndarray
    is_sorted: bool = True

    def __len__(self) -> int:
        return len(self.time)

    @staticmethod
    def one_per_row(keys: np.ndarray, times: np.ndarray) -> "Lookups":
        """Return one lookup per row, which is fastest for few rows.

        Args:
            keys: (N,) uint64 keys.
            times: (N,) int64 microseconds.
        """
        return Lookups(keys, times, np.arange(len(keys)), is_sorted=False)

    @staticmethod
    def sort(keys: np.ndarray, times: np.ndarray) -> "Lookups":
        """Return distinct sorted lookups of rows in any order.

        Args:
            keys: (N,) uint64 keys.
            times: (N,) int64 microseconds.
        """
        order = np.lexsort((times, keys))
        return Lookups.from_sorted(keys[order], times[order], order)

    @staticmethod
    def from_sorted(keys: np.ndarray, times: np.ndarray, order: np.ndarray) -> "Lookups":
        """Return distinct lookups from rows that are already sorted by key and time.

        Args:
            keys: (N,) uint64 keys.
            times: (N,) int64 microseconds.
            order: (N,) int64 index of each sorted row in the original order, which `inverse` follows.
        """
        first = np.append(len(keys) > 0, (keys[1:] != keys[:-1]) | (times[1:] != times[:-1]))
        inverse = np.empty(len(keys), np.int64)
        inverse[order] = np.cumsum(first) - 1
        kept = np.flatnonzero(first)
        return Lookups(keys[kept], times[kept], inverse)

    def select_rows(self, selected: np.ndarray) -> "Lookups":
        """Return the lookups, which must be sorted, of only the rows where the (N,) bool mask `selected` is true."""
        inverse = self.inverse[selected]
        is_used = np.zeros(len(self), bool)
        is_used[inverse] = True
        kept = np.flatnonzero(is_used)
        return Lookups(self.key[kept], self.time[kept], (np.cumsum(is_used) - 1)[inverse])

    def clamp_times(self, min_time: int | None) -> "Lookups":
        """Return the lookups with times before `min_time` (microseconds, None for no change) raised to `min_time`."""
        if min_time is None or not len(self) or self.time.min() >= min_time:
            return self
        return replace(self, time=np.maximum(self.time, min_time))


@dataclass(frozen=True, eq=False)
class SearchJoin:
    """A join of E events with D lookups by binary search. It is fast for few lookups, such as one request."""

    events: SortedEvents
    lookups: Lookups

    @cached_property
    def _groups(self) -> tuple[np.ndarray, np.ndarray]:
        """Ascending indices of the lookups whose keys have events, and the index of each such key's group."""
        return find_keys(self.events.unique_keys, self.lookups.key)

    @cached_property
    def first(self) -> np.ndarray:
        """Index of the first event with each lookup's key, E if no event has this key, shape (D,), int64."""
        first = np.full(len(self.lookups), len(self.events))
        rows, group = self._groups
        first[rows] = self.events.starts[group]
        return first

    def last(self, lag_us: int = 0) -> np.ndarray:
        """Return the (D,) indices of the last event of each lookup's key, `lag_us` microseconds before it, or -1."""
        last = np.full(len(self.lookups), -1, np.int64)
        rows, group = self._groups
        if len(rows):
            last[rows] = self._last(group, self.lookups.time[rows] - lag_us)
        return last

    def _last(self, group: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Return the index of the last event of each `group` that was available at its time in `times`, or -1."""
        available_at, first = self.events.available_at, self.events.starts[group]
        last = self.events.starts[group + 1] - 1
        # Most requests are later than all events of their keys, so only the remaining requests need a search.
        active = (available_at.take(last) > times).nonzero()[0]
        low, high, limit, earliest = first[active], last[active], times[active], first[active]
        last[active] = -1
        while len(active):
            middle = (low + high) >> 1
            is_available = available_at[middle] <= limit
            low, high = np.where(is_available, middle + 1, low), np.where(is_available, high, middle)
            last[active] = np.where(low > earliest, low - 1, -1)
            left = (low < high).nonzero()[0]
            active, low, high, limit, earliest = (array[left] for array in (active, low, high, limit, earliest))
        return last


class MergeJoin(SearchJoin):
    """A join that sorts events and lookups together. It is fast for many sorted lookups, such as a whole log."""

    @cached_property
    def _span(self) -> tuple[int, int]:
        """Time 1 microsecond before the first event, and the microseconds from there to the last event, inclusive."""
        first, last = int(self.events.available_at.min()), int(self.events.available_at.max())
        return first - 1, last - first + 2

    @cached_property
    def _event_ranks(self) -> np.ndarray:
        """One integer for each event, ascending by key, then by time, to sort lookups among the events."""
        origin, span = self._span
        return self.events.available_at - origin + self.events.group_ids * span

    def _last(self, group: np.ndarray, times: np.ndarray) -> np.ndarray:
        origin, span = self._span
        if span * len(self.events.unique_keys) >= 2**63:
            return super()._last(group, times)
        lookup_ranks = np.clip(times - origin, 0, span - 1) + group * span
        # NumPy's stable sort merges two ascending runs faster than a search. Events come before equal lookups.
        order = np.argsort(np.concatenate([self._event_ranks, lookup_ranks]), kind="stable")
        before = np.flatnonzero(order >= len(self.events)) - np.arange(len(lookup_ranks))
        # A product avoids the branch mispredictions of `np.where`.
        return before * (before > self.events.starts[group]) - 1


def availability_times(times: np.ndarray, label_delay_us: int) -> np.ndarray:
    """Return the times at which labels of rows become available, shape (N,), int64 microseconds.

    Args:
        times: (N,) int64 request times in microseconds.
        label_delay_us: Microseconds from the request until a label is final.
    """
    return times + max(1, label_delay_us)


# With more events per lookup than this number, a search is faster than a merge.
_EVENTS_PER_SEARCH = 16
NEVER = np.iinfo(np.int64).min


@dataclass(eq=False)
class EventStore(ABC):
    """Events of a counter or history.

    Attributes:
        events: Sorted events.
        compacted_at: Time of the last compaction in microseconds, None without compaction. Compaction drops events that
            only earlier lookups need, so a lookup at an earlier time returns the results at `compacted_at`.
        levels: Stores of events that a server added later, largest first (see `add_level`).
    """

    events: SortedEvents
    compacted_at: int | None = field(default=None, kw_only=True)
    levels: tuple[Self, ...] = field(default=(), init=False)

    def __len__(self) -> int:
        return len(self.events)

    def join(self, lookups: Lookups) -> SearchJoin:
        """Join `events` (without `levels`) with `lookups` by the faster kind of join."""
        few = len(lookups) * _EVENTS_PER_SEARCH < len(self.events)
        return SearchJoin(self.events, lookups) if few or not lookups.is_sorted else MergeJoin(self.events, lookups)

    def with_levels(self, levels: Sequence[Self]) -> Self:
        """Return a copy with other `levels`. It shares the events with this store."""
        for level in (self, *levels):
            _ = level.events.unique_keys
        store = copy(self)
        store.levels = tuple(levels)
        return store

    @abstractmethod
    def merged(self, store: Self) -> Self:
        """Return a store with the events of both stores and the `compacted_at` of this store."""

    @abstractmethod
    def to_columns(self) -> dict[str, np.ndarray]:
        """Return the sorted events as columns: key (uint64), available_at (int64) and columns of the subclass."""

    @abstractmethod
    def with_columns(self, columns: Mapping[str, np.ndarray], compacted_at: int | None) -> Self:
        """Return a store with other events and the options of this store, without levels.

        Args:
            columns: Columns of the events, as from `to_columns`.
            compacted_at: Time of the last compaction in microseconds, None without compaction.
        """

    def _compaction_time(self, moment: int) -> int:
        return moment if self.compacted_at is None else max(moment, self.compacted_at)


def take_or_default(values: np.ndarray, index: np.ndarray, default: int) -> np.ndarray:
    """Return `values[index]` with a default for index -1, shape (N,).

    Args:
        values: (E,) values.
        index: (N,) indices from 0 to E - 1, or -1.
        default: Value for index -1.
    """
    if not len(values):
        return np.full(len(index), default, values.dtype)
    taken = values[np.maximum(index, 0)]
    if default:
        taken[index < 0] = default
    else:
        # A product avoids the branch mispredictions of a masked assignment.
        taken *= index >= 0
    return taken


# Maximum number of levels in a log-structured merge tree (see `add_level`). A level is a set of events.
MAX_LEVELS = 3
# A level with fewer events is merged only if the next larger level is no larger, or if there are too many levels.
MIN_LEVEL_SIZE = 32_768
_GROWTH = 16
# If the largest level has fewer events, only MAX_LEVELS - 1 levels are allowed.
_LARGE_LEVEL_SIZE = 32 * MIN_LEVEL_SIZE
_Level = TypeVar("_Level", bound=Sized)


def add_level(levels: Sequence[_Level], new: _Level, merged: Callable[[_Level, _Level], _Level]) -> tuple[_Level, ...]:
    """Add a level, and merge small levels into larger levels if necessary (log-structured merge tree).

    Args:
        levels: Levels, largest first.
        new: Level to add.
        merged: Function that merges a larger and a smaller level, given in this order.

    Returns:
        Levels, largest first.
    """
    result = [*levels, new]
    while len(result) > 1 and _must_merge(list(map(len, result))):
        small = result.pop()
        result[-1] = merged(result[-1], small)
    return tuple(result)


def _must_merge(sizes: Sequence[int]) -> bool:
    """Return whether the last level must be merged into the level before it, given all sizes, largest first."""
    largest, larger, small = sizes[0], *sizes[-2:]
    max_levels = MAX_LEVELS if largest >= _LARGE_LEVEL_SIZE else MAX_LEVELS - 1
    max_size = MIN_LEVEL_SIZE if len(sizes) == max_levels else MIN_LEVEL_SIZE * _GROWTH
    return len(sizes) > max_levels or small >= min(larger, max(max_size, larger // _GROWTH))
