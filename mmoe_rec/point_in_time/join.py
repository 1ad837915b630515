"""What had happened and was known before a moment: events per key, ordered by the time at which they became known.

This is the one mechanism behind counters and histories. A label of a row requested at time r that matures after m
becomes known at max(r + 1 microsecond, r + m); a request at time t sees the events known at t or before. So a request
sees rows of strictly earlier requests whose label had matured, never itself and never the future.

A memory holds such events. It goes to columns and back, is cut down to what requests from some moment on can ask for
(`compacted`), and takes in further events (`extended`). So the state of one day and the next day's events give the next
day's state, and events that do not fit into memory are taken in one chunk of time after the other. Processes may share
a memory. Events that a server learns lie in levels beside it (log-structured merge trees, O'Neil et al., 1996).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self, TypeVar

import numpy as np

Window = tuple[int | None, int | None]  # start <= time < end, microseconds since 1970 UTC; either may be open


def in_window(times: np.ndarray, window: Window) -> np.ndarray:
    """(N,) bool: start <= time < end, either open."""
    start, end = window
    inside = np.ones(len(times), bool)
    if start is not None:
        inside &= times >= start
    if end is not None:
        inside &= times < end
    return inside


def in_any_window(times: np.ndarray, windows: Iterable[Window]) -> np.ndarray:
    """(N,) bool: whether a time lies in one of several windows."""
    return np.any([np.zeros(len(times), bool), *(in_window(times, window) for window in windows)], axis=0)


def find_keys(keys: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find (N,) uint64 keys among (G,) distinct rising ones.

    Returns:
        Rising places of the K asked keys that are there, and the number of each such key, both (K,) int64.
    """
    if not len(keys):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    number = np.searchsorted(keys, queries)
    found = (keys.take(number, mode="clip") == queries).nonzero()[0]
    return found, number[found]


class SortedEvents:
    """Events sorted by (key, known time); events of one key make a group. key: (E,) uint64; known: (E,) int64
    microseconds."""

    def __init__(self, key: np.ndarray, available_at: np.ndarray) -> None:
        self.key, self.available_at = key, available_at

    def __len__(self) -> int:
        return len(self.key)

    @cached_property
    def starts(self) -> np.ndarray:
        """(G + 1,) int64 index of the first event of each of G groups, then E."""
        return np.append(np.flatnonzero(self._begins), len(self.key)).astype(np.int64)

    @cached_property
    def unique_keys(self) -> np.ndarray:
        """(G,) uint64 the distinct keys, rising."""
        return self.key[self.starts[:-1]]

    @cached_property
    def group_ids(self) -> np.ndarray:
        """(E,) int64 group of each event."""
        return np.cumsum(self._begins) - 1  # `np.repeat` would keep other threads waiting

    @cached_property
    def _begins(self) -> np.ndarray:
        return np.append(True, self.key[1:] != self.key[:-1])[: len(self.key)]

    def take(self, kept: np.ndarray) -> "SortedEvents":
        """The events at (K,) rising indices, or where (E,) bool is true."""
        return SortedEvents(self.key[kept], self.available_at[kept])


@dataclass(frozen=True)
class Lookups:
    """What N rows ask: D look-ups, distinct and sorted by key, then time, or one for each row.

    key: (D,) uint64; time: (D,) int64 microseconds; number: (N,) int64 the look-up of each row.
    """

    key: np.ndarray
    time: np.ndarray
    inverse: np.ndarray
    is_sorted: bool = True

    def __len__(self) -> int:
        return len(self.time)

    @staticmethod
    def one_per_row(keys: np.ndarray, times: np.ndarray) -> "Lookups":
        """One for each of N rows, which is cheapest for few."""
        return Lookups(keys, times, np.arange(len(keys)), is_sorted=False)

    @staticmethod
    def sort(keys: np.ndarray, times: np.ndarray) -> "Lookups":
        """Look-ups of (N,) uint64 keys at (N,) int64 times, in any order."""
        order = np.lexsort((times, keys))
        return Lookups.from_sorted(keys[order], times[order], order)

    @staticmethod
    def from_sorted(keys: np.ndarray, times: np.ndarray, order: np.ndarray) -> "Lookups":
        """Look-ups that are sorted by key and time already; `order`: (N,) int64 the row of each."""
        first = np.append(len(keys) > 0, (keys[1:] != keys[:-1]) | (times[1:] != times[:-1]))
        inverse = np.empty(len(keys), np.int64)
        inverse[order] = np.cumsum(first) - 1
        kept = np.flatnonzero(first)
        return Lookups(keys[kept], times[kept], inverse)

    def select_rows(self, wanted: np.ndarray) -> "Lookups":
        """The sorted look-ups of those of the rows, (N,) bool."""
        inverse = self.inverse[wanted]
        asked = np.zeros(len(self), bool)
        asked[inverse] = True
        kept = np.flatnonzero(asked)
        return Lookups(self.key[kept], self.time[kept], (np.cumsum(asked) - 1)[inverse])

    def clamp_times(self, min_time: int | None) -> "Lookups":
        """The same look-ups, but none of an earlier time than `min_time`."""
        if min_time is None or not len(self) or self.time.min() >= min_time:
            return self
        return replace(self, time=np.maximum(self.time, min_time))


class SearchJoin:
    """Events and look-ups, each of which is searched by its key, then by its time: a request's few, at a cost that does
    not grow with what is remembered."""

    def __init__(self, events: SortedEvents, lookups: Lookups) -> None:
        self.events, self.lookups = events, lookups

    @cached_property
    def _remembered(self) -> tuple[np.ndarray, np.ndarray]:
        """The look-ups whose keys have events: (K,) int64 their numbers, rising, and the groups of these events."""
        return find_keys(self.events.unique_keys, self.lookups.key)

    @cached_property
    def first(self) -> np.ndarray:
        """(D,) int64 first event of each look-up's key, the number of all events where it has none."""
        first = np.full(len(self.lookups), len(self.events))
        rows, group = self._remembered
        first[rows] = self.events.starts[group]
        return first

    def last(self, lag_us: int = 0) -> np.ndarray:
        """(D,) int64 index of the last event of each look-up's key that was known `lag_us` microseconds before its
        time; -1 for none."""
        last = np.full(len(self.lookups), -1, np.int64)
        rows, group = self._remembered
        if len(rows):
            last[rows] = self._last(group, self.lookups.time[rows] - lag_us)
        return last

    def _last(self, group: np.ndarray, times: np.ndarray) -> np.ndarray:
        starts = self.events.starts
        return last_available(self.events.available_at, starts[group], starts[group + 1], times)


class MergeJoin(SearchJoin):
    """Events and a log's sorted look-ups, which are merged as single numbers that rise with key, then time."""

    @cached_property
    def _span(self) -> tuple[int, int]:
        """A moment before all events, and the moments from it to the last one."""
        first, last = int(self.events.available_at.min()), int(self.events.available_at.max())
        return first - 1, last - first + 2

    @cached_property
    def _known(self) -> np.ndarray:
        origin, moments = self._span
        return self.events.available_at - origin + self.events.group_ids * moments

    def _last(self, group: np.ndarray, times: np.ndarray) -> np.ndarray:
        origin, moments = self._span
        if moments * len(self.events.unique_keys) >= 2**63:
            return super()._last(group, times)
        asked = np.clip(times - origin, 0, moments - 1) + group * moments
        # NumPy's stable sort merges two rising runs, faster than it would search; of equals, events come first.
        order = np.argsort(np.concatenate([self._known, asked]), kind="stable")
        before = np.flatnonzero(order >= len(self.events)) - np.arange(len(asked))
        # `np.where` would guess, often wrongly, which way each one goes.
        return before * (before > self.events.starts[group]) - 1


def last_available(available_at: np.ndarray, first: np.ndarray, end: np.ndarray, times: np.ndarray) -> np.ndarray:
    """(K,) int64 index of the last of the events from `first` to `end` (exclusive, at least one) that was known at
    each of the `times`; -1 for none. known: (E,) int64, rising from each `first` to its `end`."""
    last = end - 1
    # Most requests are later than all that is remembered of their keys.
    open_ = (available_at.take(last) > times).nonzero()[0]
    low, high, asked, earliest = first[open_], last[open_], times[open_], first[open_]
    last[open_] = -1
    while len(open_):
        middle = (low + high) >> 1
        is_known = available_at[middle] <= asked
        low, high = np.where(is_known, middle + 1, low), np.where(is_known, high, middle)
        last[open_] = np.where(low > earliest, low - 1, -1)
        left = (low < high).nonzero()[0]
        open_, low, high, asked, earliest = (each[left] for each in (open_, low, high, asked, earliest))
    return last


def availability_times(times: np.ndarray, label_delay_us: int) -> np.ndarray:
    """(N,) int64 microseconds at which the labels of rows requested at `times` become known."""
    return times + max(1, label_delay_us)


# With this many times more events than look-ups, nothing is computed for all events.
_EVENTS_OF_A_SEARCH = 16
NEVER = np.iinfo(np.int64).min


@dataclass(eq=False)
class EventStore(ABC):
    """Events per key.

    compacted_at: moment (microseconds) as of which they were compacted. What was known before it has been dropped, so a
    look-up at an earlier moment is answered as of `compacted_at`. levels: memories of events that came later, the
    largest first.
    """

    events: SortedEvents
    compacted_at: int | None = field(default=None, kw_only=True)
    levels: tuple[Self, ...] = field(default=(), init=False)

    def __len__(self) -> int:
        return len(self.events)

    def join(self, lookups: Lookups) -> SearchJoin:
        """The events beside look-ups of them."""
        few = len(lookups) * _EVENTS_OF_A_SEARCH < len(self.events)
        return SearchJoin(self.events, lookups) if few or not lookups.is_sorted else MergeJoin(self.events, lookups)

    def with_levels(self, levels: Sequence[Self]) -> Self:
        """Return the same memory with other levels, all of which share the arrays that look-ups search."""
        for each in (self, *levels):
            _ = each.events.unique_keys
        store = copy(self)
        store.levels = tuple(levels)
        return store

    @abstractmethod
    def merged(self, other: Self) -> Self:
        """The events of both, of the same kind; as of this one's `compacted_at`."""

    @abstractmethod
    def to_columns(self) -> dict[str, np.ndarray]:
        """The events, sorted by key and time: key (uint64), known (int64), and what each kind holds."""

    @abstractmethod
    def with_columns(self, columns: Mapping[str, np.ndarray], compacted_at: int | None) -> Self:
        """A memory of this one's kind, which `to_columns` gave."""

    def _compaction_time(self, moment: int) -> int:
        return moment if self.compacted_at is None else max(moment, self.compacted_at)


def take_or_default(values: np.ndarray, index: np.ndarray, nothing: int) -> np.ndarray:
    """(N,) values by their index, `nothing` for index -1; without a copy of all, as a request asks for few of many."""
    if not len(values):
        return np.full(len(index), nothing, values.dtype)
    found = values[np.maximum(index, 0)]
    if nothing:
        found[index < 0] = nothing
    else:
        found *= index >= 0  # no branches, which a processor would often guess wrongly
    return found


MAX_LEVELS = 3
MIN_LEVEL_SIZE = 32_768  # events up to which a level grows, whatever the size of the next larger one
_GROWTH = 16
_MANY = 32 * MIN_LEVEL_SIZE  # from which on a level takes in more than `MIN_LEVEL_SIZE` events at a time
_Level = TypeVar("_Level", bound=Sized)


def add_level(levels: Sequence[_Level], new: _Level, merged: Callable[[_Level, _Level], _Level]) -> tuple[_Level, ...]:
    """Levels, the largest first, after a further one was taken in; `merged` makes one of a larger and a smaller one."""
    after = [*levels, new]
    while len(after) > 1 and _has_outgrown(list(map(len, after))):
        small = after.pop()
        after[-1] = merged(after[-1], small)
    return tuple(after)


def _has_outgrown(sizes: Sequence[int]) -> bool:
    """True if the last level, of as many events, belongs into the one before it."""
    largest, larger, small = sizes[0], *sizes[-2:]
    levels = MAX_LEVELS if largest >= _MANY else MAX_LEVELS - 1
    most = MIN_LEVEL_SIZE if len(sizes) == levels else MIN_LEVEL_SIZE * _GROWTH
    return len(sizes) > levels or small >= min(larger, max(most, larger // _GROWTH))
