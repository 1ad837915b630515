"""What counters and histories remember of a log: tables of events that answer what was known at a moment.

A memory is data: it goes to columns and back, is cut down to what requests from some moment on can ask for
(`compacted`), and takes in further events (`extended`). So the state of one day and the next day's events give the
next day's state, and events that do not fit into memory are taken in one chunk of time after the other.

A memory of millions of events is neither changed nor copied for a few that a server learns, and processes may share it.
These lie in levels beside it (the idea is that of log-structured merge trees, O'Neil et al., 1996). What look-ups see
of all of them is, to the bit, what they would see of a memory that was extended by these events. The README says how.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Sized
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, Self, TypeVar

import numpy as np

from mmoe_rec.point_in_time.arrays import consecutive
from mmoe_rec.point_in_time.join import Join, KnownEvents, LookUps, Search, last_known

LATE_DAYS = 7
"""Events that come at most this late, or `forget_after` where that is shorter, count as if they had come on time."""
_LATE = LATE_DAYS * 86_400_000_000


class Lives:
    """The lives of events, which gaps of more than `forget_after` microseconds between two events of a key end.

    What a look-up sees depends on the events and its time alone, not on what was dropped, or when.
    """

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
        is_first = np.zeros(len(place), bool)  # of its key
        is_first[self.events.starts[:-1]] = True
        return np.where(is_first[place], -1, place - 1)

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
NEVER = np.iinfo(np.int64).min


@dataclass(eq=False)
class Memory(ABC):
    """Events per key.

    floor: moment (microseconds) as of which they were compacted. What was known before it has been dropped, so a
    look-up at an earlier moment is answered as of `floor`. forget_after: microseconds after its last event that a key
    is forgotten, None for never. levels: memories of events that came later, the largest first.
    """

    events: KnownEvents
    floor: int | None = field(default=None, kw_only=True)
    forget_after: int | None = field(default=None, kw_only=True)
    levels: tuple[Self, ...] = field(default=(), init=False)

    def __len__(self) -> int:
        return len(self.events)

    @cached_property
    def lives(self) -> Lives | None:
        """The lives of the keys, None where nothing is forgotten."""
        return None if self.forget_after is None else Lives(self.events, self.forget_after)

    def join(self, asked: LookUps) -> Search:
        """The events beside look-ups of them."""
        few = len(asked) * _EVENTS_OF_A_SEARCH < len(self.events)
        return Search(self.events, asked) if few or not asked.is_sorted else Join(self.events, asked)

    def with_levels(self, levels: Sequence[Self]) -> Self:
        """The same memory with other levels. No request has to wait for their indexes, nor for this one's, which all
        memories with other levels share."""
        for each in (self, *levels):
            _ = each.events.index, each.lives and each.lives.before
        memory = copy(self)
        memory.levels = tuple(levels)
        return memory

    @abstractmethod
    def merged(self, other: Self) -> Self:
        """The events of both, of the same kind; as of this one's `floor`."""

    @abstractmethod
    def to_columns(self) -> dict[str, np.ndarray]:
        """The events, sorted by key and time: key (uint64), known (int64), and what each kind holds."""

    @abstractmethod
    def with_columns(self, columns: Mapping[str, np.ndarray], floor: int | None) -> Self:
        """A memory of this one's kind, which `to_columns` gave."""

    def _later_floor(self, moment: int) -> int:
        return moment if self.floor is None else max(moment, self.floor)


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


_Memory = TypeVar("_Memory", bound=Memory)


class SeenEvents(Generic[_Memory]):
    """What N look-ups see of the events of a memory and its levels. memories: that one, then these.

    A memory's own lives are not those of all events: an event of a level may go on with a life that ended in the
    memory, or join it to the next. The life that a look-up sees is found from its last event on, back from memory to
    memory: whatever life of a memory ends no longer than `forget_after` before what is seen so far is seen too, and so
    begins earlier.
    """

    def __init__(self, memory: _Memory, asked: LookUps) -> None:
        self.memories: tuple[_Memory, ...] = (memory, *memory.levels)
        self.asked = asked.as_of(memory.floor)
        self._joins = [each.join(self.asked) for each in self.memories]
        self._last = [join.last() for join in self._joins]

    def last(self, earlier: int = 0) -> list[np.ndarray]:
        """(N,) int64 index of the last event of each memory that was known `earlier` microseconds before, -1 for none,
        whether it is seen or not."""
        return [join.last(earlier) for join in self._joins] if earlier else self._last

    def last_events(self, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The last `length` events of each memory that are seen: their indexes, one look-up's after the other's, the
        oldest first, and (N,) int64 how many these are."""
        found = []
        for join, last, forgotten in zip(self._joins, self._last, self.forgotten or self._last, strict=True):
            first = join.first if self.forgotten is None else np.maximum(join.first, forgotten + 1)
            lengths = np.clip(last + 1 - first, 0, length)
            found.append((consecutive(last + 1 - lengths, lengths), lengths))
        return found

    @cached_property
    def forgotten(self) -> list[np.ndarray] | None:
        """(N,) int64 index of the last event of each memory that is no longer seen, -1 for none; None where nothing is
        forgotten."""
        lives, times, last = [memory.lives for memory in self.memories], self.asked.time, self._last
        if lives[0] is None:
            return None
        if len(lives) == 1:
            return [lives[0].forgotten(last[0], times)]
        forget_after = lives[0].forget_after
        begin = self._latest(last)  # of the life that is seen, as far as it is known by now
        forgotten = [each.copy() for each in last]
        open_ = np.flatnonzero(begin != NEVER)
        open_ = open_[times[open_] - begin[open_] <= forget_after]
        while len(open_):
            before = begin[open_]
            for memory, join, newest, unseen in zip(self.memories, self._joins, last, forgotten, strict=True):
                # Where all memories agree, nothing changes any more, and what was found stays.
                rows = open_[newest[open_] >= 0]
                if not len(rows):
                    continue
                known, first = memory.events.known, join.first[rows]
                unseen[rows] = index = last_known(known, first, newest[rows] + 1, begin[rows] - 1)
                goes_on = np.flatnonzero(index >= 0)
                goes_on = goes_on[begin[rows[goes_on]] - known[index[goes_on]] <= forget_after]
                assert memory.lives is not None
                ended: np.ndarray = memory.lives.before.take(index[goes_on])
                begin[rows[goes_on]] = known[np.where(ended >= 0, ended + 1, first[goes_on])]
            open_ = open_[begin[open_] < before]
        return forgotten

    @cached_property
    def forgotten_until(self) -> np.ndarray | None:
        """(N,) int64 moment of the last event of all that is no longer seen, `NEVER` for none; None as above."""
        return None if self.forgotten is None else self._latest(self.forgotten)

    def _latest(self, index: Sequence[np.ndarray]) -> np.ndarray:
        moments = [at(memory.events.known, each, NEVER) for memory, each in zip(self.memories, index, strict=True)]
        return np.max(moments, axis=0)


LEVELS = 3
SMALLEST = 32_768  # events up to which a level grows, whatever the size of the next larger one
_GROWTH = 16
_MANY = 32 * SMALLEST  # from which on a level takes in more than `SMALLEST` events at a time
_Level = TypeVar("_Level", bound=Sized)


def grown(levels: Sequence[_Level], new: _Level, merged: Callable[[_Level, _Level], _Level]) -> tuple[_Level, ...]:
    """Levels, the largest first, after a further one was taken in; `merged` makes one of a larger and a smaller one."""
    after = [*levels, new]
    while len(after) > 1 and _has_outgrown(list(map(len, after))):
        small = after.pop()
        after[-1] = merged(after[-1], small)
    return tuple(after)


def _has_outgrown(sizes: Sequence[int]) -> bool:
    """True if the last level, of as many events, belongs into the one before it."""
    largest, larger, small = sizes[0], *sizes[-2:]
    levels = LEVELS if largest >= _MANY else LEVELS - 1
    most = SMALLEST if len(sizes) == levels else SMALLEST * _GROWTH
    return len(sizes) > levels or small >= min(larger, max(most, larger // _GROWTH))
