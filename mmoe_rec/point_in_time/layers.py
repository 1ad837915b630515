"""What is known of a memory's events and of those in levels beside it: as if the memory had been extended by them.

Totals of all parts add up, and the latest of their last positive events is the last one. Sums of fractions are added
limb by limb, and rounded once. Of histories, the last events of each part are put in order, and the last of these are
the last of all. A memory that was compacted answers look-ups at an earlier moment than its `floor` as of then, and so
do the levels. Where keys are forgotten, the levels are memories too, and what is seen follows from the events of all.

The lives of keys whose events lie in several memories: as if one memory had them all.

A memory's own lives are not those of all events: an event of another one may go on with a life that ended here, or
join it to the next. The life that a look-up sees is found from its last event on, back from memory to memory: whatever
life of a memory ends no longer than `forget_after` before what is seen so far is seen too, and so begins earlier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mmoe_rec.point_in_time.arrays import Ragged, consecutive
from mmoe_rec.point_in_time.exact import ExactSums
from mmoe_rec.point_in_time.histories import HistoryMemory, last_of_each
from mmoe_rec.point_in_time.levels import CounterLevel
from mmoe_rec.point_in_time.memory import NEVER, CounterMemory, Memory
from mmoe_rec.point_in_time.search import AnyLookUps, UnsortedLookUps, last_known


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


class LayeredCounter:
    """A counter's memory, and levels in which its keys are combined with `salt`."""

    def __init__(self, memory: CounterMemory, levels: Sequence[CounterLevel], salt: np.uint64) -> None:
        self.memory, self._levels, self._salt = memory, levels, salt

    def found(self, asked: AnyLookUps) -> LayeredFound:
        """What these look-ups find."""
        asked = asked.as_of(self.memory.floor)
        keys = asked.key ^ self._salt
        return LayeredFound(self.memory, asked, [_OfLevel(level, keys, asked.time) for level in self._levels])


class LayeredFound:
    """A `CounterFound` of a memory and levels."""

    def __init__(self, memory: CounterMemory, asked: AnyLookUps, levels: Sequence[_OfLevel]) -> None:
        self._memory, self._levels = memory, levels
        self._join = memory.joined(asked)
        self._last = self._join.last()
        self.time = asked.time

    def totals(self, window: int | None) -> tuple[np.ndarray, np.ndarray]:
        """(N,) each."""
        rows, labels = self._memory.sums(self._last, None if window is None else self._join.last(window))
        for level in self._levels:
            more_rows, more = level.sums(window)
            rows = rows + more_rows
            labels = _both(labels, more)
        return rows, labels.rounded() if isinstance(labels, ExactSums) else labels

    def last_positive(self) -> np.ndarray:
        """(N,) int64."""
        moments = self._memory.last_positive_at(self._last)
        for level in self._levels:
            moments = np.maximum(moments, level.last_positive())
        return moments


def _both(one: np.ndarray | ExactSums, other: np.ndarray | ExactSums) -> np.ndarray | ExactSums:
    if isinstance(one, ExactSums):
        assert isinstance(other, ExactSums)
        return one.plus(other)
    assert isinstance(other, np.ndarray)
    return one + other


class ForgetfulCounter:
    """A counter's memory that forgets, and levels, which are such memories too."""

    def __init__(self, memory: CounterMemory, levels: Sequence[CounterMemory]) -> None:
        self.memory, self._levels = memory, levels

    def found(self, asked: AnyLookUps) -> ForgetfulFound:
        """What these look-ups find."""
        memories = [self.memory, *self._levels]
        return ForgetfulFound(memories, LivesTogether(memories, asked.as_of(self.memory.floor)))


class ForgetfulFound:
    """A `CounterFound` of memories that forget."""

    def __init__(self, memories: Sequence[CounterMemory], lives: LivesTogether) -> None:
        self._memories, self._lives = memories, lives
        self.time = lives.time

    def totals(self, window: int | None) -> tuple[np.ndarray, np.ndarray]:
        """(N,) each."""
        # All of a window is seen, as none is longer than what is forgotten.
        before = self._lives.forgotten if window is None else self._lives.last(window)
        every = zip(self._memories, self._lives.last(), before, strict=True)
        (rows, labels), *others = [memory.sums(last, earlier) for memory, last, earlier in every]
        for more_rows, more in others:
            rows = rows + more_rows
            labels = _both(labels, more)
        return rows, labels.rounded() if isinstance(labels, ExactSums) else labels

    def last_positive(self) -> np.ndarray:
        """(N,) int64."""
        every = zip(self._memories, self._lives.last(), strict=True)
        moments = np.max([memory.last_positive_at(last) for memory, last in every], axis=0)
        return np.where(moments > self._lives.forgotten_until, moments, NEVER)


AnyCounter = CounterMemory | LayeredCounter | ForgetfulCounter


class _OfLevel:
    """What N look-ups find in a level, by their (N,) keys and times."""

    def __init__(self, level: CounterLevel, keys: np.ndarray, times: np.ndarray) -> None:
        self._level, self._size = level, len(keys)
        self._rows, self._group = level.index.find(keys)
        self._times = times[self._rows]
        self._last = level.last(self._group, self._times)

    def sums(self, window: int | None) -> tuple[np.ndarray, np.ndarray | ExactSums]:
        """(N,) numbers of rows and sums of labels within so many microseconds, None for all of the past."""
        before = None if window is None else self._level.last(self._group, self._times - window)

        def spread(totals: np.ndarray) -> np.ndarray:
            every = np.zeros(self._size, totals.dtype)
            every[self._rows] = _difference(totals, self._last, before)
            return every

        labels = self._level.labels
        return spread(self._level.rows), labels.each(spread) if isinstance(labels, ExactSums) else spread(labels)

    def last_positive(self) -> np.ndarray:
        """(N,) int64 moments of the last positive event, `NEVER` for none."""
        every = np.full(self._size, NEVER)
        every[self._rows] = _positive(self._level, self._last)
        return every


def _difference(totals: np.ndarray, last: np.ndarray, before: np.ndarray | None) -> np.ndarray:
    """(K,) totals as of events by their index, less those as of others; 0 for index -1."""
    found = totals.take(last, mode="clip") * (last >= 0).astype(totals.dtype)
    return found if before is None else found - totals.take(before, mode="clip") * (before >= 0).astype(totals.dtype)


def _positive(level: CounterLevel, last: np.ndarray) -> np.ndarray:
    return np.where(last >= 0, level.positive.take(last, mode="clip"), NEVER)


class LayeredHistory:
    """A history's memory and levels, which are memories too."""

    def __init__(self, memory: HistoryMemory, levels: Sequence[HistoryMemory]) -> None:
        self.memory, self._levels = memory, levels

    def last(self, asked: AnyLookUps, length: int) -> Ragged:
        """The last `length` items that were known at N look-ups, oldest first; of one moment, in the items' order."""
        asked = asked.as_of(self.memory.floor)
        some = [part for part in self._parts(asked, length) if len(part.index)]
        if not some:
            return Ragged(self.memory.items[:0], np.zeros(len(asked), np.int32))
        number, items = np.concatenate([each.number for each in some]), np.concatenate([each.items for each in some])
        together = np.bincount(number, minlength=len(asked))
        lengths = np.minimum(together, length)
        if len(some) > 1:
            known = np.concatenate([each.memory.events.known.take(each.index) for each in some])
            items = items.take(np.lexsort((items, known, number)))
            if len(items) > lengths.sum():
                items = items.take(consecutive(np.cumsum(together) - lengths, lengths))
        return Ragged(items, lengths.astype(np.int32))

    def _parts(self, asked: AnyLookUps, length: int) -> list[_LastEvents]:
        memories = [self.memory, *self._levels]
        if self.memory.lives is None:
            return [_LastEvents.of(memory, asked, length) for memory in memories]
        events = LivesTogether(memories, asked).last_events(length)
        numbers = [np.repeat(np.arange(len(asked)), lengths) for _, lengths in events]
        return [_LastEvents(*each) for each in zip(memories, (index for index, _ in events), numbers, strict=True)]


@dataclass(frozen=True)
class _LastEvents:
    """The last events of a memory at look-ups, oldest first: (K,) int64 by their index, and the look-up of each."""

    memory: HistoryMemory
    index: np.ndarray
    number: np.ndarray

    @staticmethod
    def of(memory: HistoryMemory, asked: AnyLookUps, length: int) -> _LastEvents:
        """At most `length` for each look-up, of a memory that forgets nothing."""
        events = memory.events
        rows, group = asked.found_in(events) if isinstance(asked, UnsortedLookUps) else events.index.find(asked.key)
        if not len(rows):
            return _LastEvents(memory, rows, rows)
        first = events.starts.take(group)
        end = last_known(events.known, first, events.starts.take(group + 1), asked.time.take(rows)) + 1
        lengths = np.clip(end - first, 0, length)
        return _LastEvents(memory, consecutive(end - lengths, lengths), rows.repeat(lengths))

    @property
    def items(self) -> np.ndarray:
        """(K,) int64 items of the events."""
        return self.memory.items.take(self.index)
