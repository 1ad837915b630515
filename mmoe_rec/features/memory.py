"""What counters and histories remember of a log: tables of events that answer what was known at a moment.

A memory is data: it goes to columns and back, is cut down to what requests from some moment on can ask for
(`compacted`), and takes in further events (`extended`). So the state of one day and the next day's events give the
next day's state, and events that do not fit into memory are taken in one stretch of time after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import pandas as pd

from mmoe_rec.features.encoded import Ragged
from mmoe_rec.features.events import KnownEvents, sort_events

NEVER = np.iinfo(np.int64).min


class Memory:
    """Events per key.

    floor: moment (microseconds) as of which they were compacted. What was known before it has been dropped, so an
    earlier moment is answered as of `floor`.
    """

    def __init__(self, events: KnownEvents, floor: int | None) -> None:
        self.events, self.floor = events, floor

    def to_columns(self) -> dict[str, np.ndarray]:
        """The events, sorted by key and time: key (uint64), known (int64), and what each kind holds."""
        return {"key": self.events.key, "known": self.events.known}

    def as_of(self, times: np.ndarray) -> np.ndarray:
        """(N,) int64 moments that can be answered: `times`, but no earlier than `floor`."""
        return times if self.floor is None else np.maximum(times, self.floor)

    def _later_floor(self, moment: int) -> int:
        return moment if self.floor is None else max(moment, self.floor)


class CounterMemory(Memory):
    """Running totals per key, one event for each moment at which a key's totals change.

    rows, label_sum: (E,) int32 and float64, of all events of the key so far; last_positive: (E,) int64 moment of its
    last positive one, `NEVER` without; None where nobody asks for it.
    """

    def __init__(
        self,
        events: KnownEvents,
        rows: np.ndarray,
        label_sum: np.ndarray,
        last_positive: np.ndarray | None,
        floor: int | None = None,
    ) -> None:
        super().__init__(events, floor)
        self.rows, self.label_sum, self.last_positive = rows, label_sum, last_positive

    @staticmethod
    def empty(recency: bool = True) -> CounterMemory:
        """Nothing remembered. recency: whether the last positive event will be asked for."""
        none = np.empty(0, np.int64)
        events = KnownEvents(np.empty(0, np.uint64), none)
        return CounterMemory(events, none.astype(np.int32), np.empty(0), none if recency else None)

    def extended(self, key: np.ndarray, known: np.ndarray, label: np.ndarray, *, fractions: bool) -> CounterMemory:
        """These events and further ones, (E,) uint64, int64 and float64, in any order.

        fractions: whether labels may be other than whole numbers, so that sums depend on the order of adding.
        """
        if not len(key):
            return self
        # The events at hand as what each added to its key's totals.
        first = np.append(True, self.events.key[1:] != self.events.key[:-1]) if len(self.events) else np.empty(0, bool)
        rows = np.append(_steps(self.rows, first), np.ones(len(key), np.int32))
        label_sum = np.append(_steps(self.label_sum, first), label)
        positive = None
        if self.last_positive is not None:
            positive = np.append(self.last_positive, np.where(label > 0, known, NEVER))
        key, known = np.append(self.events.key, key), np.append(self.events.known, known)

        order, arrival = sort_events(key, known, label_sum if fractions else None)
        key, known = key[order], known[order]
        end_of_moment = np.append((key[1:] != key[:-1]) | (known[1:] != known[:-1]), True)
        return CounterMemory(
            KnownEvents(key[end_of_moment], known[end_of_moment], arrival.of(end_of_moment)),
            _running(key, rows[order])[end_of_moment].astype(np.int32),
            (_running_fractions if fractions else _running)(key, label_sum[order])[end_of_moment],
            None if positive is None else _running_last(key, positive[order])[end_of_moment],
            self.floor,
        )

    def totals(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) rows and label sums as of events by their index, 0 for index -1."""
        if not len(self.events):
            return np.zeros(len(index)), np.zeros(len(index))
        found = index >= 0
        return np.where(found, self.rows[index], 0), np.where(found, self.label_sum[index], 0.0)

    def compacted(self, moment: int, window: int) -> CounterMemory:
        """What requests at `moment` or later, which look back `window` microseconds, can ask for."""
        needed = self.events.needed_since(moment - window)
        return CounterMemory(
            KnownEvents(self.events.key[needed], self.events.known[needed]),
            self.rows[needed],
            self.label_sum[needed],
            None if self.last_positive is None else self.last_positive[needed],
            self._later_floor(moment),
        )

    def to_columns(self) -> dict[str, np.ndarray]:
        """The events, sorted by key and time."""
        totals = {"rows": self.rows, "label_sum": self.label_sum}
        recency = {} if self.last_positive is None else {"last_positive": self.last_positive}
        return {"key": self.events.key, "known": self.events.known, **totals, **recency}

    @staticmethod
    def from_columns(columns: Mapping[str, np.ndarray], floor: int | None) -> CounterMemory:
        """The memory that `to_columns` gave."""
        events = KnownEvents(columns["key"], columns["known"])
        return CounterMemory(events, columns["rows"], columns["label_sum"], columns.get("last_positive"), floor)


class HistoryMemory(Memory):
    """Candidates per user. items: (E,) int64 rows of the candidates' table."""

    def __init__(self, events: KnownEvents, items: np.ndarray, floor: int | None = None) -> None:
        super().__init__(events, floor)
        self.items = items

    @staticmethod
    def empty() -> HistoryMemory:
        """Nothing remembered."""
        none = np.empty(0, np.int64)
        return HistoryMemory(KnownEvents(np.empty(0, np.uint64), none), none)

    def extended(self, key: np.ndarray, known: np.ndarray, items: np.ndarray) -> HistoryMemory:
        """These events and further ones, (E,) uint64, int64 and int64, in any order."""
        if not len(key):
            return self
        key, known = np.append(self.events.key, key), np.append(self.events.known, known)
        items = np.append(self.items, items)
        order, arrival = sort_events(key, known, items)
        return HistoryMemory(KnownEvents(key[order], known[order], arrival), items[order], self.floor)

    def last(self, keys: np.ndarray, times: np.ndarray, length: int) -> Ragged:
        """The last `length` items of each of N keys known at `times`, oldest first."""
        last = self.events.last(keys, times)
        within_key = self._within_key
        lengths = np.where(last >= 0, np.minimum(within_key[last] + 1, length), 0) if len(within_key) else last * 0
        ends = np.cumsum(lengths)
        index = np.arange(ends[-1] if len(ends) else 0) + np.repeat(last + 1 - ends, lengths)
        return Ragged(self.items[index], lengths.astype(np.int32))

    @cached_property
    def _within_key(self) -> np.ndarray:
        """(E,) int64 number of events of the same key before each event."""
        counts = np.diff(self.events.starts)
        return np.arange(len(self.events)) - np.repeat(self.events.starts[:-1], counts)

    def compacted(self, moment: int, length: int) -> HistoryMemory:
        """What requests at `moment` or later, which ask for `length` items, can ask for."""
        # The last `length` that are known by then; later events keep these in reach until they become known themselves.
        known_by_then = np.add.reduceat(np.append(self.events.known <= moment, 0), self.events.starts[:-1])
        needed = self._within_key >= np.repeat(known_by_then - length, np.diff(self.events.starts))
        events = KnownEvents(self.events.key[needed], self.events.known[needed])
        return HistoryMemory(events, self.items[needed], self._later_floor(moment))

    def to_columns(self) -> dict[str, np.ndarray]:
        """The events, sorted by key and time."""
        return {"key": self.events.key, "known": self.events.known, "item": self.items}

    @staticmethod
    def from_columns(columns: Mapping[str, np.ndarray], floor: int | None) -> HistoryMemory:
        """The memory that `to_columns` gave."""
        return HistoryMemory(KnownEvents(columns["key"], columns["known"]), columns["item"], floor)


def _steps(totals: np.ndarray, first: np.ndarray) -> np.ndarray:
    """(E,) what each event added to the running totals of its key; `first` marks a key's first event."""
    return np.where(first, totals, totals - np.roll(totals, 1))


def _running(key: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(E,) sum of whole `values` so far within each run of equal keys."""
    total = np.cumsum(values)
    starts = np.flatnonzero(np.append(True, key[1:] != key[:-1]))
    before = np.repeat(total[starts] - values[starts], np.diff(np.append(starts, len(key))))
    return total - before


def _running_fractions(key: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The same of any `values`: fractions are rounded as they are added, so each run is summed by itself."""
    runs = np.cumsum(np.append(False, key[1:] != key[:-1]))
    return pd.Series(values).groupby(runs).cumsum().to_numpy()


def _running_last(key: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """(E,) latest of the `moments` so far within each run of equal keys, `NEVER` where there is none."""
    positive = moments != NEVER
    changes = np.append(True, key[1:] != key[:-1])
    starts = np.flatnonzero(changes)
    start = np.repeat(starts, np.diff(np.append(starts, len(key))))
    index = np.maximum.accumulate(np.where(positive, np.arange(len(key)), -1))
    last = np.where(index >= start, moments[index], NEVER)
    if (last[1:] < last[:-1])[~changes[1:]].any():  # an event that came late is earlier than what was compacted
        return pd.Series(moments).groupby(np.cumsum(changes)).cummax().to_numpy()
    return last
