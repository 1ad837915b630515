"""The lives of keys whose events lie in several memories: as if one memory had them all.

A memory's own lives are not those of all events: an event of another one may go on with a life that ended here, or
join it to the next. The life that a look-up sees is found from its last event on, back from memory to memory: whatever
life of a memory ends no longer than `forget_after` before what is seen so far is seen too, and so begins earlier.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from mmoe_rec.point_in_time.histories import last_of_each
from mmoe_rec.point_in_time.memory import NEVER, Memory
from mmoe_rec.point_in_time.search import AnyLookUps, last_known


class LivesTogether:
    """What N look-ups see of the events of several memories that forget after the same time.

    asked: no earlier than what the memories can answer.
    """

    def __init__(self, memories: Sequence[Memory], asked: AnyLookUps) -> None:
        self.time = asked.time
        self._parts = [_Part(memory, asked) for memory in memories]

    def last(self, earlier: int = 0) -> list[np.ndarray]:
        """Of each memory, (N,) int64 index of the last event that was known `earlier` microseconds before, -1 for none;
        whether it is seen or not."""
        return [part.last if earlier == 0 else part.earlier(earlier) for part in self._parts]

    def last_events(self, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each memory, the last `length` events that are seen, as of `HistoryMemory.last_events`."""
        every = zip(self._parts, self.forgotten, strict=True)
        return [last_of_each(np.maximum(part.first, forgotten + 1), part.last, length) for part, forgotten in every]

    @cached_property
    def forgotten(self) -> list[np.ndarray]:
        """Of each memory, (N,) int64 index of the last event that is no longer seen, -1 for none."""
        forget_after = self._parts[0].forget_after
        begin = np.max([part.known_at(part.last) for part in self._parts], axis=0)
        forgotten = [part.last.copy() for part in self._parts]
        open_ = np.flatnonzero(begin != NEVER)
        open_ = open_[self.time[open_] - begin[open_] <= forget_after]
        while len(open_):
            before = begin[open_]
            for part, unseen in zip(self._parts, forgotten, strict=True):
                # Where all parts agree, nothing changes any more, and what was found stays.
                rows = open_[part.last[open_] >= 0]
                if not len(rows):
                    continue
                index = part.last_before(rows, begin[rows])
                unseen[rows] = index
                goes_on = np.flatnonzero(index >= 0)
                goes_on = goes_on[begin[rows[goes_on]] - part.known[index[goes_on]] <= forget_after]
                begin[rows[goes_on]] = part.begin_of_life(rows[goes_on], index[goes_on])
            open_ = open_[begin[open_] < before]
        return forgotten

    @cached_property
    def forgotten_until(self) -> np.ndarray:
        """(N,) int64 moment of the last event of all that is no longer seen, `NEVER` for none."""
        every = zip(self._parts, self.forgotten, strict=True)
        return np.max([part.known_at(forgotten) for part, forgotten in every], axis=0)


class _Part:
    """What N look-ups find in one of the memories. first, last: (N,) int64 index of the first event of each one's key,
    and of the last one that was known at its time, -1 for none."""

    def __init__(self, memory: Memory, asked: AnyLookUps) -> None:
        assert memory.lives is not None
        self._lives, self.known, self.forget_after = memory.lives, memory.events.known, memory.lives.forget_after
        self._join = memory.joined(asked) if len(memory.events) else None
        none = np.full(len(asked), -1, np.int64)
        self.first: np.ndarray = none if self._join is None else self._join.first
        self.last: np.ndarray = none if self._join is None else self._join.last()

    def earlier(self, microseconds: int) -> np.ndarray:
        """(N,) int64, as `last`, so much earlier."""
        return self.last if self._join is None else self._join.last(microseconds)

    def known_at(self, index: np.ndarray) -> np.ndarray:
        """(N,) int64 moments of events by their index, `NEVER` for -1."""
        if not len(self.known):
            return np.full(len(index), NEVER)
        return np.where(index >= 0, self.known.take(np.maximum(index, 0)), NEVER)

    def last_before(self, rows: np.ndarray, moments: np.ndarray) -> np.ndarray:
        """(K,) int64 index of the last event known before (K,) `moments`, of K look-ups, by their numbers, each of
        which finds some; -1 for none."""
        return last_known(self.known, self.first[rows], self.last[rows] + 1, moments - 1)

    def begin_of_life(self, rows: np.ndarray, index: np.ndarray) -> np.ndarray:
        """(K,) int64 moment at which the lives of events that K look-ups found begin in this memory."""
        before: np.ndarray = self._lives.before.take(index)
        return self.known[np.where(before >= 0, before + 1, self.first[rows])]
