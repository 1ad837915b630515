"""What levels know of many counters, added to what their memories answer in as few steps as of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from mmoe_rec.point_in_time.lists import consecutive
from mmoe_rec.point_in_time.live.levels import CounterLevel, CounterLevels
from mmoe_rec.point_in_time.memory import NEVER
from mmoe_rec.point_in_time.together import CounterQuestion, TogetherFound


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
