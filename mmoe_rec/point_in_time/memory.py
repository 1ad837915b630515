"""What counters and histories remember of a log: tables of events that answer what was known at a moment.

A memory is data: it goes to columns and back, is cut down to what requests from some moment on can ask for
(`compacted`), and takes in further events (`extended`). So the state of one day and the next day's events give the
next day's state, and events that do not fit into memory are taken in one chunk of time after the other.

The lives of keys, where what is known of a key is forgotten once nothing new has become known of it for some time.

A gap of more than `forget_after` between two events of a key, in the order in which they became known, ends a life. A
look-up sees the life of the last event known at its time, and nothing once this event is more than `forget_after` past.
So what it sees depends on the events and its time alone, and not on what was dropped, or when.

Running totals go on through all lives of a key: a look-up subtracts those before the life that it sees. Lives that no
later look-up sees are dropped (`Lives.ended`), but some days later, since an event that comes late may still go on with
one of them, or join it to the next.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from mmoe_rec.point_in_time.exact import ExactSums
from mmoe_rec.point_in_time.join import Join, KeyGroups, KnownEvents, sorted_order
from mmoe_rec.point_in_time.search import AnyLookUps, Search, UnsortedLookUps


def running(values: np.ndarray | None, first: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """(K,) int64 sums of whole `values`, None where each is 1, from event `first` up to each of K `kept` ones."""
    if values is None:
        return kept + 1 - first
    total = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, dtype=np.int64, out=total[1:])
    return total[1:][kept] - total[first]


def running_labels(
    labels: np.ndarray | ExactSums | None, first: np.ndarray, kept: np.ndarray
) -> np.ndarray | ExactSums | None:
    """(K,) sums of labels as of `running`: float64 of whole numbers, or exact ones; None without labels."""
    if isinstance(labels, ExactSums):
        return labels.each(lambda limb: running(limb, first, kept))
    return None if labels is None else running(labels, first, kept).astype(np.float64, copy=False)


def at(values: np.ndarray, index: np.ndarray, nothing: int) -> np.ndarray:
    """(N,) values by their index, `nothing` for index -1; without a copy of all, as a request asks for few of many."""
    if not len(values):
        return np.full(len(index), nothing, values.dtype)
    found = values[np.maximum(index, 0)]
    if nothing:
        found[index < 0] = nothing
    else:
        found *= index >= 0  # no branches, which a processor would often guess wrongly
    return found


def appended(one: Any, other: Any) -> Any:
    """Arrays or exact sums, one behind the other; None where the first is missing."""
    if isinstance(one, ExactSums):
        return one.append(other)
    return None if one is None else np.append(one, other)


def taken(values: Any, index: np.ndarray) -> Any:
    """An array or exact sums by their index; None where they are missing."""
    if isinstance(values, ExactSums):
        return values.take(index)
    return None if values is None else values[index]


def running_latest(groups: KeyGroups, moments: np.ndarray) -> np.ndarray:
    """(E,) latest of the `moments` so far of each key: an event that came late may be earlier than what came before."""
    import pandas as pd

    return pd.Series(moments).groupby(groups.number).cummax().to_numpy()


LATE_DAYS = 7
"""Events that come at most this late, or `forget_after` where that is shorter, count as if they had come on time."""
_LATE = LATE_DAYS * 86_400_000_000


class Lives:
    """The lives of events. forget_after: microseconds."""

    def __init__(self, events: KnownEvents, forget_after: int) -> None:
        self.events, self.forget_after = events, forget_after

    @cached_property
    def _begins(self) -> np.ndarray:
        """(E,) bool: the first events of lives."""
        known = self.events.known
        begins = np.append(True, known[1:] - known[:-1] > self.forget_after)[: len(known)]
        begins[self.events.starts[:-1]] = True
        return begins

    @cached_property
    def ends(self) -> np.ndarray:
        """(E,) bool: the last events of lives."""
        return np.append(self._begins[1:], True)[: len(self.events)]

    @cached_property
    def before(self) -> np.ndarray:
        """(E,) int32, int64 of very many: of each event, the last one of its key in earlier lives, -1 for none."""
        small = len(self.events) < 2**31
        place: np.ndarray = np.arange(len(self.events), dtype=np.int32 if small else np.int64)
        place *= self._begins
        np.maximum.accumulate(place, out=place)  # the first event of each one's life
        of_key = np.zeros(len(place), bool)
        of_key[self.events.starts[:-1]] = True
        none = of_key.take(place)
        place -= 1
        place[none] = -1
        return place

    def forgotten(self, last: np.ndarray, times: np.ndarray) -> np.ndarray:
        """(N,) int64 index of the last event that look-ups no longer see, -1 for none.

        last: (N,) int64 the last events known at the look-ups' times, -1 for none; times: (N,) int64 microseconds.
        """
        if not len(self.events):
            return np.full(len(last), -1, np.int64)
        known = np.maximum(last, 0)
        over = times - self.events.known.take(known) > self.forget_after
        return np.where(over | (last < 0), last, self.before.take(known))

    def ended(self, moment: int) -> np.ndarray:
        """(E,) bool: events that no look-up at `moment` or later sees, even if others come late; of each key, all up to
        one of them."""
        over = self.events.known[self.ends] < moment - self.forget_after - min(self.forget_after, _LATE)
        return over[np.cumsum(self._begins) - 1]


# With this many times more events than look-ups, nothing is computed for all events.
_EVENTS_OF_A_SEARCH = 16
_LIMB = "label_sum."
NEVER = np.iinfo(np.int64).min


class Memory:
    """Events per key.

    floor: moment (microseconds) as of which they were compacted. What was known before it has been dropped, so a
    look-up at an earlier moment is answered as of `floor`. forget_after: microseconds after its last event that a key
    is forgotten (see `mmoe_rec.point_in_time.memory`), None for never.
    """

    def __init__(self, events: KnownEvents, floor: int | None, forget_after: int | None) -> None:
        self.events, self.floor, self.forget_after = events, floor, forget_after

    @cached_property
    def lives(self) -> Lives | None:
        """The lives of the keys, None where nothing is forgotten."""
        return None if self.forget_after is None else Lives(self.events, self.forget_after)

    def joined(self, asked: AnyLookUps) -> Join | Search:
        """The events beside look-ups of them, which are no earlier than what can be answered."""
        if isinstance(asked, UnsortedLookUps):
            return Search(self.events, asked.as_of(self.floor))
        asked = asked.as_of(self.floor)
        few = len(asked) * _EVENTS_OF_A_SEARCH < len(self.events)
        return Search(self.events, asked) if few else Join(self.events, asked)

    def to_columns(self) -> dict[str, np.ndarray]:
        """The events, sorted by key and time: key (uint64), known (int64), and what each kind holds."""
        return {"key": self.events.key, "known": self.events.known}

    def _later_floor(self, moment: int) -> int:
        return moment if self.floor is None else max(moment, self.floor)


class CounterMemory(Memory):
    """Running totals per key, one event for each moment at which a key's totals change.

    rows: (E,) int32, of all events of the key so far; label_sum: of their labels, (E,) float64 where these are whole
    numbers, `ExactSums` where they may be fractions; last_positive: (E,) int64 moment of its last positive one, `NEVER`
    without; None where nobody asks for it. Where each event counts 1, as in a log of events, rows and moments say it
    all, and both are None.
    """

    def __init__(
        self,
        events: KnownEvents,
        rows: np.ndarray,
        label_sum: np.ndarray | ExactSums | None,
        last_positive: np.ndarray | None,
        floor: int | None = None,
        forget_after: int | None = None,
    ) -> None:
        super().__init__(events, floor, forget_after)
        self.rows, self.label_sum, self.last_positive = rows, label_sum, last_positive

    @staticmethod
    def empty(
        labels: bool = True, recency: bool = True, fractions: bool = False, forget_after: int | None = None
    ) -> CounterMemory:
        """Nothing remembered. labels: whether events have labels; recency: whether the last positive is asked for;
        fractions: whether labels may be other than whole numbers."""
        none = np.empty(0, np.int64)
        events = KnownEvents(np.empty(0, np.uint64), none)
        last_positive = none if labels and recency else None
        sums = ExactSums.zeros(0) if fractions else np.empty(0)
        rows = none.astype(np.int32)
        return CounterMemory(events, rows, sums if labels else None, last_positive, forget_after=forget_after)

    def extended(
        self, key: np.ndarray, known: np.ndarray, label: np.ndarray | None, in_order: bool = False
    ) -> CounterMemory:
        """These events and further ones, (E,) uint64, int64 and numbers (None where each counts 1), in any order.

        in_order: whether the further events are sorted by key and known time.
        """
        if not len(key):
            return self
        rows = None  # each counts 1
        labels: np.ndarray | ExactSums | None = label
        if label is not None and isinstance(self.label_sum, ExactSums):
            labels = ExactSums.of(label).over(self.units)
        positive = None
        if label is not None and self.last_positive is not None:
            positive = np.where(label > 0, known, NEVER)
        if len(self.events):
            # The existing events as what each added to its key's totals.
            rows = np.append(self._steps(self.rows), np.ones(len(key), np.int32))
            labels = appended(self._label_steps(), labels)
            if positive is not None and self.last_positive is not None:
                positive = np.append(self.last_positive, positive)
            key, known = np.append(self.events.key, key), np.append(self.events.known, known)
        return self._of_steps(key, known, rows, labels, positive, in_order and not len(self.events))

    def merged(self, other: CounterMemory) -> CounterMemory:
        """The events of both, of the same kind; as of this one's `floor`."""
        if not len(other.events):
            return self
        mine, theirs = self.events, other.events
        return self._of_steps(
            np.append(mine.key, theirs.key),
            np.append(mine.known, theirs.known),
            np.append(self._steps(self.rows), other._steps(other.rows)),
            appended(self._label_steps(), other._label_steps()),
            appended(self.last_positive, other.last_positive),
            False,
        )

    def _of_steps(
        self,
        key: np.ndarray,
        known: np.ndarray,
        rows: np.ndarray | None,
        labels: np.ndarray | ExactSums | None,
        positive: np.ndarray | None,
        in_order: bool,
    ) -> CounterMemory:
        """The memory of (E,) events by what each adds: rows (None where each is 1), labels, and the last positive."""
        if not in_order:
            order = sorted_order(key, known)
            key, known = key[order], known[order]
            rows, labels, positive = (taken(each, order) for each in (rows, labels, positive))
        groups = KeyGroups(key)
        kept = np.flatnonzero(np.append((key[1:] != key[:-1]) | (known[1:] != known[:-1]), True))
        first = groups.starts[groups.number[kept]]
        return CounterMemory(
            KnownEvents(key[kept], known[kept]),
            running(rows, first, kept).astype(np.int32),
            running_labels(labels, first, kept),
            None if positive is None else running_latest(groups, positive)[kept],
            self.floor,
            self.forget_after,
        )

    def _steps(self, totals: np.ndarray) -> np.ndarray:
        """(E,) what each event added to the running totals of its key."""
        steps = np.append(totals[:1], totals[1:] - totals[:-1])
        first = self.events.starts[:-1]
        steps[first] = totals[first]
        return steps

    def _label_steps(self) -> np.ndarray | ExactSums | None:
        if isinstance(self.label_sum, ExactSums):
            return self.label_sum.each(self._steps)
        return None if self.label_sum is None else self._steps(self.label_sum)

    def found(self, asked: AnyLookUps) -> JoinFound:
        """What these look-ups find."""
        return JoinFound(self, self.joined(asked))

    def totals(self, index: np.ndarray, before: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(N,) numbers of rows and sums of labels as of events by their index, 0 for index -1.

        before: events, by their index, as of which totals are subtracted.
        """
        rows, labels = self.sums(index, before)
        return rows, labels.rounded() if isinstance(labels, ExactSums) else labels

    def sums(self, index: np.ndarray, before: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray | ExactSums]:
        """As `totals`, but sums of fractions are not rounded yet."""
        rows = self._difference(self.rows, index, before)
        if self.label_sum is None:
            return rows, rows
        if isinstance(self.label_sum, ExactSums):
            return rows, self.label_sum.each(lambda limb: self._difference(limb, index, before))
        return rows, self._difference(self.label_sum, index, before)

    def _difference(self, totals: np.ndarray, index: np.ndarray, before: np.ndarray | None) -> np.ndarray:
        found = at(totals, index, 0)
        return found if before is None else found - at(totals, before, 0)

    @property
    def units(self) -> tuple[int, ...]:
        """Of the exact sums of labels, where they may be other than whole numbers."""
        return self.label_sum.units if isinstance(self.label_sum, ExactSums) else ()

    def with_room(self, units: Collection[int]) -> CounterMemory:
        """The same memory, with further units for exact sums: what is written then has the same columns everywhere."""
        if not isinstance(self.label_sum, ExactSums):
            return self
        sums = self.label_sum.over(units)
        return CounterMemory(self.events, self.rows, sums, self.last_positive, self.floor, self.forget_after)

    def last_positive_at(self, index: np.ndarray, forgotten: np.ndarray | None = None) -> np.ndarray:
        """(N,) int64 moments of the last positive event as of events by their index, `NEVER` for none.

        forgotten: events, by their index, which and before which no positive one is seen.
        """
        last_positive = self.events.known if self.label_sum is None else self.last_positive
        assert last_positive is not None
        found = at(last_positive, index, NEVER)
        if forgotten is not None:
            found[found <= at(self.events.known, forgotten, NEVER)] = NEVER
        return found

    def compacted(self, moment: int, window: int) -> CounterMemory:
        """What requests at `moment` or later, which look back `window` microseconds, can ask for."""
        memory = self if self.lives is None else self._without(self.lives.ended(moment))
        needed = memory.events.needed_since(moment - window)
        if memory.lives is not None:
            needed |= memory.lives.ends  # whose totals are subtracted from those of the next life
        return memory._at_events(np.flatnonzero(needed), self._later_floor(moment))

    def _at_events(self, kept: np.ndarray, floor: int | None) -> CounterMemory:
        return CounterMemory(
            KnownEvents(self.events.key[kept], self.events.known[kept]),
            self.rows[kept],
            taken(self.label_sum, kept),
            taken(self.last_positive, kept),
            floor,
            self.forget_after,
        )

    def _without(self, ended: np.ndarray) -> CounterMemory:
        """The memory of the other events alone; of each key, (E,) bool `ended` are all up to one of them."""
        kept = np.flatnonzero(~ended)
        if len(kept) == len(ended):
            return self
        memory = self._at_events(kept, self.floor)
        firsts = kept[memory.events.starts[:-1]]
        of_key = np.where(np.isin(firsts, self.events.starts[:-1], assume_unique=True), -1, firsts - 1)
        dropped = of_key[memory.events.number]
        memory.rows = self._difference(self.rows, kept, dropped)
        if isinstance(self.label_sum, ExactSums):
            memory.label_sum = self.label_sum.each(lambda limb: self._difference(limb, kept, dropped))
        elif self.label_sum is not None:
            memory.label_sum = self._difference(self.label_sum, kept, dropped)
        if self.last_positive is not None:
            memory.last_positive = self.last_positive_at(kept, dropped)
        return memory

    def to_columns(self) -> dict[str, np.ndarray]:
        """The events, sorted by key and time."""
        columns = {"key": self.events.key, "known": self.events.known, "rows": self.rows}
        if isinstance(self.label_sum, ExactSums):
            limbs = zip(self.label_sum.units, self.label_sum.limbs, strict=True)
            columns |= {f"{_LIMB}{unit}": limb for unit, limb in limbs}
        elif self.label_sum is not None:
            columns["label_sum"] = self.label_sum
        return columns if self.last_positive is None else columns | {"last_positive": self.last_positive}

    @staticmethod
    def from_columns(
        columns: Mapping[str, np.ndarray], floor: int | None, fractions: bool = False, forget_after: int | None = None
    ) -> CounterMemory:
        """The memory that `to_columns` gave; `fractions`: whether labels may be other than whole numbers."""
        events = KnownEvents(columns["key"], columns["known"])
        label_sum: np.ndarray | ExactSums | None = columns.get("label_sum")
        if fractions:
            limbs = {int(name.removeprefix(_LIMB)): each for name, each in columns.items() if name.startswith(_LIMB)}
            label_sum = ExactSums.from_limbs(limbs, len(events))
        return CounterMemory(events, columns["rows"], label_sum, columns.get("last_positive"), floor, forget_after)


class CounterFound(Protocol):
    """What N look-ups find in a counter's memory. time: (N,) int64 microseconds as of which they do."""

    @property
    def time(self) -> np.ndarray: ...

    def totals(self, window: int | None) -> tuple[np.ndarray, np.ndarray]:
        """(N,) numbers of rows and sums of labels within so many microseconds, None for all of the past."""

    def last_positive(self) -> np.ndarray:
        """(N,) int64 moments of the last positive event, `NEVER` for none."""


class JoinFound:
    """A `CounterFound` that reads the memory when it is asked."""

    def __init__(self, memory: CounterMemory, join: Join | Search) -> None:
        self._memory, self._join, self._last = memory, join, join.last()

    @property
    def time(self) -> np.ndarray:
        """(N,) int64."""
        return self._join.asked.time

    @cached_property
    def _forgotten(self) -> np.ndarray | None:
        """(N,) int64 the last events that the look-ups no longer see, -1 for none; None where nothing is forgotten."""
        lives = self._memory.lives
        return None if lives is None else lives.forgotten(self._last, self.time)

    def totals(self, window: int | None) -> tuple[np.ndarray, np.ndarray]:
        """(N,) each."""
        # All of a window is seen, as none is longer than what is forgotten.
        before = self._forgotten if window is None else self._join.last(window)
        return self._memory.totals(self._last, before)

    def last_positive(self) -> np.ndarray:
        """(N,) int64."""
        return self._memory.last_positive_at(self._last, self._forgotten)
