"""What rows ask of several memories, found in as few steps as what they ask of one.

A request asks some twenty memories for some hundred keys each: a step of NumPy takes about as long for all of these as
for those of one memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, starmap

import numpy as np

from mmoe_rec.point_in_time.arrays import consecutive
from mmoe_rec.point_in_time.join import KeyIndex, KnownEvents, sorted_order
from mmoe_rec.point_in_time.levels import CounterLevel, CounterLevels
from mmoe_rec.point_in_time.memory import NEVER, CounterMemory
from mmoe_rec.point_in_time.search import UnsortedLookUps, last_known


class TogetherIndex:
    """The keys of several memories' events in one index, so that what rows ask of all of them is found in one pass."""

    def __init__(self, memories: Sequence[KnownEvents]) -> None:
        self.memories = tuple(memories)
        self._place = {events: place for place, events in enumerate(memories)}
        keys = [events.distinct ^ salt_of(place) for place, events in enumerate(memories)]
        every = np.concatenate(keys) if keys else np.empty(0, np.uint64)
        order = sorted_order(every, np.zeros(len(every), np.int64))
        self._index = KeyIndex(every[order])
        starts = np.cumsum([0, *map(len, keys)])
        numbers = order - np.repeat(starts[:-1], [len(each) for each in keys])[order]
        self._numbers = numbers.astype(np.int32 if len(every) < 2**31 else np.int64)

    def find(self, asked: Sequence[tuple[KnownEvents, UnsortedLookUps]]) -> None:
        """Notes in look-ups what they find among the events, which are those of the index."""
        if not asked:
            return
        keys = np.concatenate([each.key ^ salt_of(self._place[events]) for events, each in asked])
        found, group = self._index.find(keys)
        numbers = self._numbers[group]
        starts = np.cumsum([0, *(len(each) for _, each in asked)])
        ends = np.searchsorted(found, starts)
        for (events, each), start, low, high in zip(asked, starts[:-1], ends[:-1], ends[1:], strict=True):
            each.found[events] = found[low:high] - start, numbers[low:high]


def salt_of(place: int) -> np.uint64:
    """What, combined by XOR, tells the keys of a memory from equal ones of another; keys are hashes, and stay so."""
    return np.uint64((place + 1) * 0x9E3779B97F4A7C15 % 2**64)  # 2^64 over the golden ratio: unlike in many bits


@dataclass(frozen=True)
class CounterQuestion:
    """Look-ups of a counter's memory. windows: microseconds to look back, None for all of the past; recency: whether
    the last positive event is asked for."""

    memory: CounterMemory
    asked: UnsortedLookUps
    windows: Sequence[int | None]
    recency: bool


@dataclass(frozen=True)
class TogetherFound:
    """A `CounterFound` whose answers are computed already. by_window: totals; moments: None unless asked for."""

    time: np.ndarray
    by_window: Mapping[int | None, tuple[np.ndarray, np.ndarray]]
    moments: np.ndarray | None

    def totals(self, window: int | None) -> tuple[np.ndarray, np.ndarray]:
        """(N,) numbers of rows and sums of labels within one of the windows."""
        return self.by_window[window]

    def last_positive(self) -> np.ndarray:
        """(N,) int64 moments of the last positive event, `NEVER` for none."""
        assert self.moments is not None
        return self.moments


class CountersTogether:
    """Answers what is asked of several counters' memories, none of which has fractional labels.

    Their events lie one after the other in one array of known times, of which the memories' own become parts.
    """

    def __init__(self, memories: Sequence[CounterMemory]) -> None:
        self.memories = tuple(memories)
        self._place = {memory: place for place, memory in enumerate(memories)}
        events = [memory.events for memory in memories]
        # Of each memory, where its events begin, and its groups of keys, which have one more start than there are.
        self._event = np.cumsum([0, *map(len, events)])
        self._group = np.cumsum([0, *(len(each.starts) for each in events)])
        starts = [each.starts + start for each, start in zip(events, self._event[:-1], strict=True)]
        self._starts = np.concatenate(starts) if starts else np.empty(0, np.int64)
        self._known = np.concatenate([each.known for each in events]) if events else np.empty(0, np.int64)
        for each, start, end in zip(events, self._event[:-1], self._event[1:], strict=True):
            each.known = self._known[start:end]
        # Of the memories that forget, where their events begin among those of all of these.
        forgetful = [lives for memory in memories if (lives := memory.lives) is not None]
        self._lived = np.cumsum([0, *(0 if each.lives is None else len(each.events) for each in memories)])
        self._forget_after = np.array([each.forget_after or 0 for each in memories], np.int64)
        self._before = np.concatenate([each.before for each in forgetful]) if forgetful else np.empty(0, np.int32)
        for lives, end in zip(forgetful, accumulate(len(each.events) for each in forgetful), strict=True):
            lives.before = self._before[end - len(lives.events) : end]

    def answer(self, questions: Sequence[CounterQuestion]) -> list[TogetherFound]:
        """One answer a question. Keys that were found before (`TogetherIndex.find`) are not looked for again."""
        if not questions:
            return []
        memories = [each.memory for each in questions]
        asked = [each.asked.as_of(each.memory.floor) for each in questions]
        found = [each.found_in(memory.events) for each, memory in zip(asked, memories, strict=True)]
        parts = _Parts.of([self._place[memory] for memory in memories], [len(rows) for rows, _ in found])
        group = np.concatenate([each for _, each in found]) + parts.spread(self._group)
        first, end = self._starts.take(group), self._starts.take(group + 1)
        times = np.concatenate([each.time.take(rows) for each, (rows, _) in zip(asked, found, strict=True)])
        last = last_known(self._known, first, end, times)
        now = self._totals(memories, parts, last)

        # Once more for each window that ends somewhere in the past, and where the seen life of a key ends.
        limited = [(n, window) for n, each in enumerate(questions) for window in each.windows if window is not None]
        lived = [(n, None) for n, memory in enumerate(memories) if memory.lives is not None]
        earlier: list[np.ndarray] = []
        if limited:
            rows = parts.rows([n for n, _ in limited])
            back = np.repeat([window for _, window in limited], [parts.sizes[n] for n, _ in limited])
            earlier.append(last_known(self._known, first[rows], end[rows], times[rows] - back))
        if lived:
            earlier.append(self._forgotten(parts, [n for n, _ in lived], last, times))
        both = [*limited, *lived]
        picked = _Parts.of([parts.places[n] for n, _ in both], [parts.sizes[n] for n, _ in both])
        at = dict(zip(both, picked.slices(), strict=True))
        index = np.concatenate(earlier) if both else last[:0]
        before = self._totals([memories[n] for n, _ in both], picked, index)
        answers = []
        for number, (question, each, part) in enumerate(zip(questions, asked, parts.slices(), strict=True)):
            rows, _ = found[number]
            own = self._event[parts.places[number]]
            by_window = {}
            for window in question.windows:
                totals = [every[part] for every in now]
                if (number, window) in at:
                    totals = [a - b[at[number, window]] for a, b in zip(totals, before, strict=True)]
                count, labels = (_of_all(every, rows, len(each), 0) for every in totals)
                by_window[window] = count, labels
            moments = None
            if question.recency:
                forgotten = np.maximum(index[at[number, None]] - own, -1) if (number, None) in at else None
                moments = question.memory.last_positive_at(np.maximum(last[part] - own, -1), forgotten)
                moments = _of_all(moments, rows, len(each), NEVER)
            answers.append(TogetherFound(each.time, by_window, moments))
        return answers

    def _forgotten(self, parts: _Parts, numbers: list[int], last: np.ndarray, times: np.ndarray) -> np.ndarray:
        """(K,) int64 index, as of `Lives.forgotten` but among all events, of look-ups of some of the parts."""
        places, rows = [parts.places[number] for number in numbers], parts.rows(numbers)
        picked = _Parts.of(places, [parts.sizes[number] for number in numbers])
        last, start = last[rows], picked.spread(self._event)
        known = np.maximum(last, start)
        before = self._before.take(known - start + picked.spread(self._lived)).astype(np.int64)
        before += start * (before >= 0)
        over = times[rows] - self._known.take(known) > picked.spread(self._forget_after)
        return np.where(over | (last < 0), last, before)

    def _totals(
        self, memories: Sequence[CounterMemory], parts: _Parts, last: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(K,) int32 rows and (K,) float64 sums of labels as of events by their index among all, 0 for -1."""
        some = last >= 0
        index = np.maximum(last - parts.spread(self._event), 0)
        rows, labels = np.empty(len(last), np.int32), np.empty(len(last))
        for memory, part in zip(memories, parts.slices(), strict=True):
            if not len(memory.rows):  # of which NumPy takes not even nothing
                continue
            memory.rows.take(index[part], out=rows[part], mode="clip")
            if memory.label_sum is None:
                labels[part] = rows[part]
            else:
                assert isinstance(memory.label_sum, np.ndarray)
                memory.label_sum.take(index[part], out=labels[part], mode="clip")
        rows *= some
        labels *= some
        return rows, labels


@dataclass(frozen=True)
class _Parts:
    """Parts that lie one after the other. places: numbers of their memories; sizes; starts: of each, and the end."""

    places: list[int]
    sizes: list[int]
    starts: list[int]

    @staticmethod
    def of(places: list[int], sizes: list[int]) -> _Parts:
        return _Parts(places, sizes, [0, *accumulate(sizes)])

    def slices(self) -> list[slice]:
        return list(starmap(slice, pairwise(self.starts)))

    def rows(self, numbers: list[int]) -> np.ndarray:
        """The members of some of the parts, one part after the other."""
        return np.concatenate([np.arange(self.starts[number], self.starts[number + 1]) for number in numbers])

    def spread(self, of_memories: np.ndarray) -> np.ndarray:
        """What belongs to each one's memory, for each of its members."""
        return np.repeat(of_memories[self.places], self.sizes)


def _of_all(values: np.ndarray, rows: np.ndarray, size: int, nothing: int) -> np.ndarray:
    """(N,) values, given those of (K,) rising rows; `nothing` for the others."""
    if len(rows) == size:
        return values
    every = np.full(size, nothing, values.dtype)
    every[rows] = values
    return every


def add_levels(
    levels: CounterLevels,
    questions: Sequence[CounterQuestion],
    salts: Sequence[np.uint64],
    answers: Sequence[TogetherFound],
) -> None:
    """Adds what levels know to the answers of memories, one a question.

    salts: what keys of each question are combined with in the levels. No counter has fractional labels.
    """
    if not questions:
        return
    keys = np.concatenate([each.asked.key ^ salt for each, salt in zip(questions, salts, strict=True)])
    times = np.concatenate([each.time for each in answers])
    if not len(keys):
        return
    starts = [0, *accumulate(len(each.time) for each in answers)]
    rows, labels = np.zeros(len(times), np.int32), np.zeros(len(times), np.int32)
    moments = np.full(len(times), NEVER)
    earlier = _Earlier(questions, starts, int(times.max()))
    likely = levels.likely(keys)
    keys = keys.take(likely)
    for level in levels.levels:
        found = _Found.of(level, likely, keys, times)
        if len(found.rows):
            rows[found.rows] += found.counts
            labels[found.rows] += found.sums
            moments[found.rows] = np.maximum(moments.take(found.rows), found.positive)
            earlier.add(found, times)
    some = np.searchsorted(np.flatnonzero(rows), starts).tolist()
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        if some[number] == some[number + 1]:
            continue
        part = slice(starts[number], starts[number + 1])
        for window, totals in answer.by_window.items():
            before = earlier.totals(number, window)
            for place, (own, more) in enumerate(zip(totals, (rows, labels), strict=True)):
                np.add(own, more[part], out=own)
                if before is not None:
                    np.subtract(own, before[place], out=own)
        if question.recency:
            assert answer.moments is not None
            np.maximum(answer.moments, moments[part], out=answer.moments)


@dataclass(frozen=True)
class _Found:
    """What a level knows. rows: (K,) int64 rising, the look-ups whose keys it has events of that were known; group:
    (K,) the keys' numbers; counts, sums, positive: (K,) int64 events, their labels, and moment of the last positive."""

    level: CounterLevel
    rows: np.ndarray
    group: np.ndarray
    counts: np.ndarray
    sums: np.ndarray
    positive: np.ndarray

    @staticmethod
    def of(level: CounterLevel, asking: np.ndarray, keys: np.ndarray, times: np.ndarray) -> _Found:
        """What (K,) of (N,) look-ups find, by their (K,) numbers and keys and the (N,) times of all."""
        assert level.now is not None
        rows, group = level.index.find(keys)
        rows = asking.take(rows)
        now, at = level.now.take(group, axis=0), times.take(rows)
        if len(some := np.flatnonzero(now[:, 0] <= at)) < len(rows):
            now, rows, group, at = (each.take(some, axis=0) for each in (now, rows, group, at))
        if len(part := np.flatnonzero(now[:, 1] > at)):  # some of the key's events are known, and some are not yet
            last = level.last(group[part], at[part])
            now[part, 2:] = np.stack([level.rows[last], _labels(level)[last], level.positive[last]], axis=1)
        return _Found(level, rows, group, *now[:, 2:].T)


def _labels(level: CounterLevel) -> np.ndarray:
    """(E,) int32 sums of a level's labels."""
    assert isinstance(level.labels, np.ndarray)
    return level.labels


class _Earlier:
    """Totals at the beginnings of windows, which are subtracted. Most levels hold nothing as old as these.

    starts: of each question's look-ups among all, and the end; latest: time of any of these.
    """

    def __init__(self, questions: Sequence[CounterQuestion], starts: Sequence[int], latest: int) -> None:
        self._starts, self._latest = starts, latest
        self._windows = [
            (n, each) for n, question in enumerate(questions) for each in question.windows if each is not None
        ]
        self._totals: dict[tuple[int, int | None], tuple[np.ndarray, np.ndarray]] = {}

    def totals(self, number: int, window: int | None) -> tuple[np.ndarray, np.ndarray] | None:
        """Of a question's window, None where they are zeros."""
        return self._totals.get((number, window))

    def add(self, found: _Found, times: np.ndarray) -> None:
        """Adds what a level found."""
        windows = [each for each in self._windows if self._latest - each[1] >= found.level.first]
        if not windows:
            return
        numbers = np.array([number for number, _ in windows])
        edges = np.searchsorted(found.rows, self._starts)
        sizes = (edges[1:] - edges[:-1])[numbers]
        chosen = consecutive(edges[numbers], sizes)  # of what was found, once for each window
        rows = found.rows.take(chosen)
        back = np.repeat(np.array([window for _, window in windows]), sizes)
        last = found.level.last(found.group.take(chosen), times.take(rows) - back)
        ends = np.cumsum(sizes).tolist()
        for (number, window), start, end in zip(windows, [0, *ends[:-1]], ends, strict=True):
            part = last[start:end]
            known = np.flatnonzero(part >= 0)
            if not len(known):
                continue
            size = self._starts[number + 1] - self._starts[number]
            if (number, window) not in self._totals:
                self._totals[number, window] = np.zeros(size, np.int32), np.zeros(size, np.int32)
            place, at = rows[start:end][known] - self._starts[number], part[known]
            for totals, every in zip(
                self._totals[number, window], (found.level.rows, _labels(found.level)), strict=True
            ):
                totals[place] += every.take(at)
