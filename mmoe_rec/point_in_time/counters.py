"""What counters remember of a log: running totals per key (see `mmoe_rec.point_in_time.memory`).

A window's count is the total at the request's time less the total at the window's start: `SeenTotals.totals`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from mmoe_rec.point_in_time.join import KeyGroups, KnownEvents, LookUps, key_at, last_known
from mmoe_rec.point_in_time.memory import NEVER, Memory, at, grown

UNITS = 2.0**20
"""Units of a label of 1. Labels are whole numbers of units, so their int64 sums depend on no order."""
_MOST_UNITS = 2.0**62
MOST = _MOST_UNITS / UNITS
"""Labels and sums of labels lie between this and its negative, so the difference of two sums fits into 64 bits."""


def round_labels(labels: np.ndarray) -> np.ndarray:
    """Round (N,) numbers to float64 multiples of a unit. NaN stays."""
    return np.rint(labels * UNITS) / UNITS


def to_units(labels: np.ndarray) -> np.ndarray:
    """Round (N,) numbers to int64 units. Raises OverflowError for one out of range."""
    units = np.rint(labels * UNITS)
    _check_range(units)
    return units.astype(np.int64)


def _check_range(units: np.ndarray) -> None:
    if len(units) and np.abs(units).max() >= _MOST_UNITS:
        raise OverflowError


@dataclass(eq=False)
class CounterMemory(Memory):
    """Running totals per key, one event for each moment at which a key's totals change.

    rows: (E,) int32, of all events of the key so far; label_sum: (E,) int64 units, of their labels; last_positive: (E,)
    int64 moment of its last positive one, `NEVER` without; None where nobody asks for it. Where each event counts 1, as
    in a log of events, rows and moments say it all, and both are None. levels: of later events, which all counters
    share; salt: what its keys are combined with there.
    """

    rows: np.ndarray
    label_sum: np.ndarray | None
    last_positive: np.ndarray | None
    levels: CounterLevels | None = field(default=None, init=False)
    salt: np.uint64 = field(default=np.uint64(0), init=False)

    @staticmethod
    def empty(labels: bool = True, recency: bool = True) -> CounterMemory:
        """Nothing remembered. labels: whether events have labels; recency: whether the last positive is asked for."""
        none = np.empty(0, np.int64)
        events, rows = KnownEvents(np.empty(0, np.uint64), none), none.astype(np.int32)
        return CounterMemory(events, rows, none if labels else None, none if labels and recency else None)

    def extended(
        self, key: np.ndarray, known: np.ndarray, label: np.ndarray | None, in_order: bool = False
    ) -> CounterMemory:
        """Add (E,) events in any order.

        Args:
            key: (E,) uint64.
            known: (E,) int64 moments.
            label: (E,) numbers, None where each event counts 1.
            in_order: Whether the events are sorted by key and known time.

        Raises:
            OverflowError: A label, or a sum of labels, is out of range.
        """
        if not len(key):
            return self
        labels, positive = None, None
        if label is not None:
            labels = to_units(label)
            if self.last_positive is not None:
                positive = np.where(labels > 0, known, NEVER)
        return self._with_steps(key, known, np.ones(len(key), np.int32), labels, positive, in_order)

    def merged(self, other: CounterMemory) -> CounterMemory:
        """The events of both, of the same kind; as of this one's `floor`. Raises OverflowError as `extended`."""
        if not len(other):
            return self
        key, known, rows = other.events.key, other.events.known, other._steps(other.rows)
        labels, positive = _map(other._steps, other.label_sum), other.last_positive
        return self._with_steps(key, known, rows, labels, positive, in_order=True)

    def _with_steps(
        self,
        key: np.ndarray,
        known: np.ndarray,
        rows: np.ndarray,
        labels: np.ndarray | None,
        positive: np.ndarray | None,
        in_order: bool,
    ) -> CounterMemory:
        """These events and (E,) further ones by what each adds: rows, labels, and the last positive."""
        if len(self):
            key, known = np.append(self.events.key, key), np.append(self.events.known, known)
            rows = np.append(self._steps(self.rows), rows)
            labels = _map(np.append, _map(self._steps, self.label_sum), labels)
            positive, in_order = _map(np.append, self.last_positive, positive), False
        if not in_order:
            order = np.lexsort((known, key))
            key, known = key[order], known[order]
            rows, labels, positive = (_map(lambda steps: steps[order], each) for each in (rows, labels, positive))
        groups = KeyGroups(key)
        kept = np.flatnonzero(np.append((key[1:] != key[:-1]) | (known[1:] != known[:-1]), True))
        first = groups.starts[groups.number[kept]]

        def running(steps: np.ndarray, dtype: type) -> np.ndarray:
            total: np.ndarray = np.zeros(len(steps) + 1, dtype)
            np.cumsum(steps, dtype=dtype, out=total[1:])
            return total[1:][kept] - total[first]

        if labels is not None:
            _check_range(running(labels, np.float64))  # Sums of integers would wrap around.
        sums = _map(partial(running, dtype=np.int64), labels)
        if positive is not None:
            import pandas as pd

            # An event that came late may be earlier than what came before.
            positive = pd.Series(positive).groupby(groups.number).cummax().to_numpy()[kept]
        events, totals = KnownEvents(key[kept], known[kept]), running(rows, np.int64).astype(np.int32)
        return replace(self, events=events, rows=totals, label_sum=sums, last_positive=positive)

    def _steps(self, totals: np.ndarray) -> np.ndarray:
        """(E,) what each event added to the running totals of its key."""
        steps = np.append(totals[:1], totals[1:] - totals[:-1])
        first = self.events.starts[:-1]
        steps[first] = totals[first]
        return steps

    def sums(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) int64 numbers of rows and units of labels as of events by their index, 0 for index -1."""
        rows = at(self.rows, index, 0).astype(np.int64)
        return rows, rows * int(UNITS) if self.label_sum is None else at(self.label_sum, index, 0)

    def last_positive_at(self, index: np.ndarray) -> np.ndarray:
        """(N,) int64 moments of the last positive event as of events by their index, `NEVER` for none."""
        last_positive = self.events.known if self.label_sum is None else self.last_positive
        assert last_positive is not None
        return at(last_positive, index, NEVER)

    def with_levels(self, levels: CounterLevels, salt: np.uint64) -> CounterMemory:
        """The same memory beside levels, in which its keys are combined with `salt`."""
        _ = self.events.index  # for which no request has to wait
        memory = copy(self)
        memory.levels, memory.salt = levels, salt
        return memory

    def compacted(self, moment: int, window: int, forever: bool) -> CounterMemory:
        """What requests at `moment` or later, which look back `window` microseconds, can ask for.

        forever: whether they also ask for all of the past, or for the last positive event.
        """
        later, floor = self.events.known > moment - window, self._later_floor(moment)
        if not forever:  # Totals begin with the window, so they don't depend on the keys that earlier calls dropped.
            starts = self.events.starts
            kept = np.diff(np.append(0, np.cumsum(later))[starts])
            first = starts[1:] - kept  # Each key's events are in order of time, so it keeps its last ones.

            def since_window(totals: np.ndarray) -> np.ndarray:
                dropped = np.where(first > starts[:-1], totals[first - 1], 0).astype(totals.dtype)
                return totals[later] - np.repeat(dropped, kept)

            labels = _map(since_window, self.label_sum)
            events, rows = self.events.take(later), since_window(self.rows)
            return replace(self, events=events, rows=rows, label_sum=labels, floor=floor)
        # And the last one before of each key, which carries its totals.
        needed = later | np.append(later[1:], False)
        needed[self.events.starts[1:] - 1] = True
        labels, positive = (_map(lambda totals: totals[needed], each) for each in (self.label_sum, self.last_positive))
        events, rows = self.events.take(needed), self.rows[needed]
        return replace(self, events=events, rows=rows, label_sum=labels, last_positive=positive, floor=floor)

    def to_columns(self) -> dict[str, np.ndarray]:
        columns = {"key": self.events.key, "known": self.events.known, "rows": self.rows}
        optional = {"label_sum": self.label_sum, "last_positive": self.last_positive}
        return columns | {name: column for name, column in optional.items() if column is not None}

    def with_columns(self, columns: Mapping[str, np.ndarray], floor: int | None) -> CounterMemory:
        events, labels = KnownEvents(columns["key"], columns["known"]), columns.get("label_sum")
        positive = columns.get("last_positive")
        return replace(self, events=events, rows=columns["rows"], label_sum=labels, last_positive=positive, floor=floor)


class SeenTotals:
    """What N look-ups see of a counter's memory and its levels. time: (N,) int64 microseconds as of which they do."""

    def __init__(self, memory: CounterMemory, asked: LookUps) -> None:
        asked = asked.as_of(memory.floor)
        self.time, self._memory, self._join = asked.time, memory, memory.join(asked)
        self._key = asked.key ^ memory.salt

    def totals(self, window: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Return (N,) int64 numbers of rows and (N,) float64 sums of labels.

        Args:
            window: Microseconds to look back, None for all of the past.
        """
        rows, labels = self._totals(0)
        if window is not None:
            rows_before, labels_before = self._totals(window)
            rows, labels = rows - rows_before, labels - labels_before
        return rows, labels / UNITS

    def _totals(self, earlier: int) -> tuple[np.ndarray, np.ndarray]:
        """(N,) int64 numbers of rows and units of labels, `earlier` microseconds before the look-ups."""
        rows, labels = self._memory.sums(self._join.last(earlier))
        if self._memory.levels is not None:
            later_rows, later_labels, _ = self._memory.levels.totals(self._key, self.time - earlier)
            rows, labels = rows + later_rows, labels + later_labels
        return rows, labels

    def last_positive(self) -> np.ndarray:
        """(N,) int64 moments of the last positive event, `NEVER` for none."""
        moments = self._memory.last_positive_at(self._join.last())
        if self._memory.levels is not None:
            moments = np.maximum(moments, self._memory.levels.totals(self._key, self.time)[2])
        return moments


@dataclass(frozen=True)
class CounterLevels:
    """Levels of the events of several counters, the largest first.

    One table holds the running totals of all these counters, so that a look-up in a level costs little more than one of
    a single counter. Most keys that are asked for are in none of them, which a look at one small table tells: `some`,
    bool, says of the first bits of keys whether there may be such a one.
    """

    levels: tuple[CounterMemory, ...] = ()
    some: np.ndarray = field(default_factory=lambda: np.zeros(2, bool))

    def extended(self, key: np.ndarray, known: np.ndarray, labels: np.ndarray) -> CounterLevels:
        """These levels and further events, (E,) uint64 salted keys, int64 moments and labels."""
        new = CounterMemory.empty().extended(key, known, labels)
        levels = grown(self.levels, new, CounterMemory.merged)
        keys = sum(len(level.events.distinct) for level in levels)
        some, marked = self.some.copy(), [new]
        if len(some) < 4 * keys:
            some, marked = np.zeros(1 << (8 * keys).bit_length(), bool), [*levels]
        for level in marked:
            some[_first_bits(level.events.distinct, len(some))] = True
        _ = [level.events.index for level in levels]  # for which no request has to wait
        return CounterLevels(levels, some)

    def totals(self, key: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of (N,) uint64 salted keys and (N,) int64 moments, what is known then: (N,) int32 numbers of rows, (N,) int64
        units of labels, and (N,) int64 moments of the last positive event, `NEVER` for none."""
        rows, labels, positive = np.zeros(len(key), np.int32), np.zeros(len(key), np.int64), np.full(len(key), NEVER)
        likely = np.flatnonzero(self.some.take(_first_bits(key, len(self.some))))
        for level in self.levels:
            found, group = level.events.index.find(key[likely])
            place, starts = likely[found], level.events.starts
            last = last_known(level.events.known, starts[group], starts[group + 1], time[place])
            place, last = place[last >= 0], last[last >= 0]
            assert level.label_sum is not None
            assert level.last_positive is not None
            rows[place] += level.rows[last]
            labels[place] += level.label_sum[last]
            positive[place] = np.maximum(positive[place], level.last_positive[last])
        return rows, labels, positive


class CounterTable:
    """What C counters remember as one table: a request asks many counters about few keys, so one pass through all of
    them costs little more than one of a single counter.

    Keys and events of a counter follow those of the one before. memories: the same memories, whose arrays are views of
    the table, so that little is kept twice.
    """

    def __init__(self, memories: Sequence[CounterMemory]) -> None:
        events = [each.events for each in memories]
        keys, first = _offsets([each.distinct for each in events]), _offsets([each.known for each in events])
        self._floors = np.array([[NEVER if each.floor is None else each.floor] for each in memories])
        self._shifts = np.array([[each.index.shift] for each in events])
        self._bucket = _offsets([each.index.starts for each in events])[:-1, None]
        self._ends = keys[1:, None]
        self._buckets = np.concatenate([each.index.starts + keys[place] for place, each in enumerate(events)])
        starts = [each.starts[:-1] + first[place] for place, each in enumerate(events)]
        self._starts = np.concatenate([*starts, first[-1:]])
        self._distinct = _joined([each.distinct for each in events], np.uint64)
        self._known = _joined([each.known for each in events], np.int64)
        self._rows = _joined([each.rows for each in memories], np.int32)
        self._labels = _Column([each.label_sum for each in memories], first)
        self._positive = _Column([each.last_positive for each in memories], first)
        self.memories = [copy(each) for each in memories]
        for place, memory in enumerate(self.memories):
            own, own_keys = slice(first[place], first[place + 1]), slice(keys[place], keys[place + 1])
            memory.events, index = copy(memory.events), copy(memory.events.index)
            memory.events.known, memory.events.distinct = self._known[own], self._distinct[own_keys]
            memory.events.index, index.keys = index, memory.events.distinct
            memory.rows, memory.label_sum = self._rows[own], self._labels.of(place)
            memory.last_positive = self._positive.of(place)

    def find(self, asked: Asked, levels: CounterLevels) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What counters and levels that they share know: numbers of rows, (L, M) int32, and units of labels, (L, M)
        int64; of the C counters, moments of the last positive event, `NEVER` for none, and the moments as of which they
        say so, (C, M) int64."""
        counters, number = asked.counters, asked.keys >> self._shifts[asked.counters]
        key, rows = asked.keys.ravel(), asked.keys.shape[1]
        number = self._buckets.take((number.view(np.int64) + self._bucket[counters]).ravel())
        ends = self._ends[counters].repeat(rows)
        there = key_at(self._distinct, key, number, ends)
        has = ((there == key) & (number < ends)).reshape(asked.keys.shape)[asked.of].ravel()
        times = np.maximum(asked.times, self._floors[counters])
        moments = (times[asked.of] - asked.earlier[:, None]).ravel()
        places, group = has.nonzero()[0], number.reshape(asked.keys.shape)[asked.of].ravel()[has]
        event = np.full(len(has), -1)
        event[places] = last_known(self._known, self._starts[group], self._starts[group + 1], moments[places])
        shape, of = (len(asked.of), rows), counters[asked.of]
        known, event = (event >= 0).reshape(shape), np.maximum(event, 0).reshape(shape)
        counted = self._rows.take(event) * known
        labels = self._labels.take(event, of, counted.astype(np.int64) * int(UNITS)) * known
        latest = slice(len(counters))
        positive = self._positive.take(event[latest], counters, self._known.take(event[latest]))
        positive = np.where(known[latest], positive, NEVER)
        if levels.levels:
            later = levels.totals((asked.keys ^ asked.salts)[asked.of].ravel(), moments)
            counted, labels = (each + more.reshape(shape) for each, more in zip((counted, labels), later, strict=False))
            positive = np.maximum(positive, later[2].reshape(shape)[latest])
        return counted, labels, positive, times


@dataclass(frozen=True)
class Asked:
    """What M rows ask of C counters of a table, L times.

    counters: (C,) int64 their places in the table; keys: (C, M) uint64; salts: (C, 1) uint64 of `salt_of`; times: (M,)
    int64 microseconds; of, earlier: (L,) int64 which of the C counters, and how many microseconds before the times; all
    counters at the times come first.
    """

    counters: np.ndarray
    keys: np.ndarray
    salts: np.ndarray
    times: np.ndarray
    of: np.ndarray
    earlier: np.ndarray


def _offsets(parts: Sequence[Sized]) -> np.ndarray:
    """(C + 1,) int64: where each of C parts begins when they follow each other, and where the last one ends."""
    return np.cumsum([0, *map(len, parts)])


def _joined(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """All parts, and one number more, as nothing can be taken from an empty array."""
    return np.concatenate([*parts, np.zeros(1, dtype)])


class _Column:
    """An int64 column of C memories as one array, where some memories have none."""

    def __init__(self, parts: Sequence[np.ndarray | None], first: np.ndarray) -> None:
        """first: (C + 1,) places of the memories' first events among all events."""
        there = [np.empty(0, np.int64) if part is None else part for part in parts]
        self._has, self._first = np.array([[part is not None] for part in parts]), _offsets(there)
        self._values, self._to = _joined(there, np.int64), (self._first - first)[:-1, None]

    def of(self, place: int) -> np.ndarray | None:
        """The column of a memory, None where it has none."""
        return self._values[self._first[place] : self._first[place + 1]] if self._has[place] else None

    def take(self, event: np.ndarray, memories: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
        """(L, M) values at (L, M) places among all events, of (L,) memories; `otherwise` where a memory has none."""
        found = self._values.take(event + self._to[memories], mode="clip")
        return np.where(self._has[memories], found, otherwise)


def salt_of(place: int) -> np.uint64:
    """What, combined by XOR, tells the keys of a memory from equal ones of another; keys are hashes, and stay so."""
    return np.uint64((place + 1) * 0x9E3779B97F4A7C15 % 2**64)  # 2^64 over the golden ratio: unlike in many bits


def _first_bits(keys: np.ndarray, many: int) -> np.ndarray:
    """(N,) int64 from 0 to `many`, a power of 2, exclusive."""
    return (keys >> np.uint64(65 - many.bit_length())).view(np.int64)


def _map(function: Any, *values: Any) -> Any:
    """What a function makes of arrays, None where they are missing."""
    return None if values[0] is None else function(*values)
