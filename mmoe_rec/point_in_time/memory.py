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
from typing import Self, TypeVar

import numpy as np

from mmoe_rec.point_in_time.join import Join, KnownEvents, LookUps, Search

# With this many times more events than look-ups, nothing is computed for all events.
_EVENTS_OF_A_SEARCH = 16
NEVER = np.iinfo(np.int64).min


@dataclass(eq=False)
class Memory(ABC):
    """Events per key.

    floor: moment (microseconds) as of which they were compacted. What was known before it has been dropped, so a
    look-up at an earlier moment is answered as of `floor`. levels: memories of events that came later, the largest
    first.
    """

    events: KnownEvents
    floor: int | None = field(default=None, kw_only=True)
    levels: tuple[Self, ...] = field(default=(), init=False)

    def __len__(self) -> int:
        return len(self.events)

    def join(self, asked: LookUps) -> Search:
        """The events beside look-ups of them."""
        few = len(asked) * _EVENTS_OF_A_SEARCH < len(self.events)
        return Search(self.events, asked) if few or not asked.is_sorted else Join(self.events, asked)

    def with_levels(self, levels: Sequence[Self]) -> Self:
        """Return the same memory with other levels, all of which share the arrays that look-ups search."""
        for each in (self, *levels):
            _ = each.events.distinct
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
