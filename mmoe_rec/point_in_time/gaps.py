"""Gaps between the moments at which a key had a positive event: their mean and deviation, without a list of them.

The mean gap of n moments is (last - first) / (n - 1), and the deviation of the gaps follows from the sum of their
squares. Events of one moment, such as the lines of a receipt, are one. What a server learns lies in levels, and an
event of a level may fall between two of the memory: only then are moments listed, from the level's first one on.

An event that comes late divides a gap, so the moments beside it must be there: they are kept for `LATE_DAYS` (see
`mmoe_rec.point_in_time.memory`), and gaps leave out an event that comes later than that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmoe_rec.point_in_time.arrays import consecutive
from mmoe_rec.point_in_time.join import KeyGroups, KnownEvents, last_known, sorted_order
from mmoe_rec.point_in_time.memory import NEVER, at

_SECOND = 1_000_000
_LONGEST = 2**30  # seconds, 34 years, as which longer gaps count: squares of a log's gaps add up within int64


@dataclass(frozen=True, eq=False)
class Gaps:
    """Moments with positive events of each key up to each of E events, or (`steps`) what each event adds to them.

    moments: (E,) int32 how many; first, last: (E,) int64 of these, `NEVER` without; squares: (E,) int64 sum of squares
    of the gaps between them, whole seconds.
    """

    moments: np.ndarray
    first: np.ndarray
    last: np.ndarray
    squares: np.ndarray

    @staticmethod
    def empty() -> Gaps:
        """Of no events."""
        none = np.empty(0, np.int64)
        return Gaps(none.astype(np.int32), none, none, none)

    @staticmethod
    def steps_of(known: np.ndarray, positive: np.ndarray) -> Gaps:
        """What (E,) events that are `known` then add, which are `positive` or not."""
        return Gaps(positive.astype(np.int32), known, known, np.zeros(len(known), np.int64))

    def steps(self, events: KnownEvents, steps: Callable[[np.ndarray], np.ndarray]) -> Gaps:
        """What each event adds; `steps` makes them of running totals. A key's first one has what came before it."""
        starts = events.starts[:-1]
        first, last, squares = events.known.copy(), events.known.copy(), np.zeros(len(events), np.int64)
        first[starts], last[starts], squares[starts] = self.first[starts], self.last[starts], self.squares[starts]
        return Gaps(steps(self.moments), first, last, squares)

    def append(self, other: Gaps) -> Gaps:
        """These and further ones."""
        return Gaps(*map(np.append, self.columns.values(), other.columns.values()))

    def each(self, function: Callable[[np.ndarray], np.ndarray]) -> Gaps:
        """What a function makes of each array."""
        return Gaps(*map(function, self.columns.values()))

    def at(self, index: np.ndarray) -> SeenGaps:
        """What is known as of events by their index, nothing for index -1."""
        first, last = (at(each, index, NEVER) for each in (self.first, self.last))
        return SeenGaps(at(self.moments, index, 0), first, last, at(self.squares, index, 0))

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """The arrays by their names."""
        return {"moments": self.moments, "first": self.first, "last": self.last, "squares": self.squares}

    def totals(
        self, groups: KeyGroups, known: np.ndarray, kept: np.ndarray, running: Callable[[np.ndarray], np.ndarray]
    ) -> Gaps:
        """Running totals, as of (K,) `kept` events, of steps that are sorted by key and (E,) `known` time; `running`
        makes such totals of numbers."""
        counted = np.flatnonzero(self.moments)
        counted = counted[_is_another(groups.number[counted], known[counted])]
        key = groups.number[counted]
        moments, squares, place = (np.zeros(len(known), np.int64) for _ in range(3))
        moments[counted], squares[counted], place[counted] = self.moments[counted], self.squares[counted], counted
        same = key[1:] == key[:-1]
        squares[counted[1:]] += np.where(same, _squared(self.last[counted[:-1]], self.last[counted[1:]]), 0)
        begin = np.full(len(groups.starts) - 1, NEVER)
        is_first = np.append(True, ~same)[: len(key)]
        begin[key[is_first]] = self.first[counted[is_first]]
        number = running(moments)
        last = self.last[np.maximum.accumulate(place)[kept]]
        first, last = (np.where(number > 0, each, NEVER) for each in (begin[groups.number[kept]], last))
        return Gaps(number.astype(np.int32), first, last, running(squares))


@dataclass(frozen=True, eq=False)
class SeenGaps:
    """What N look-ups see of the moments of their keys: moments, (N,) how many; first, last: (N,) int64, `NEVER`
    without; squares: (N,) int64 sum of squares of the gaps, whole seconds."""

    moments: np.ndarray
    first: np.ndarray
    last: np.ndarray
    squares: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """(N,) float64 mean gap in microseconds, NaN of fewer than two moments."""
        return np.where(self.moments > 1, (self.last - self.first) / np.maximum(self.moments - 1, 1), np.nan)

    @property
    def deviation(self) -> np.ndarray:
        """(N,) float64 standard deviation of the gaps in microseconds, by whole seconds, NaN of fewer than two."""
        gaps = np.maximum(self.moments - 1, 1)
        mean = (self.last // _SECOND - self.first // _SECOND) / gaps
        variance = np.maximum(self.squares / gaps - np.square(mean), 0.0)
        return np.where(self.moments > 2, np.sqrt(variance) * _SECOND, np.nan)

    def then(self, later: SeenGaps) -> SeenGaps:
        """Those of moments that are all later too."""
        none, no_more = self.moments == 0, later.moments == 0
        between = np.where(none | no_more, 0, _squared(self.last, later.first))
        return SeenGaps(
            self.moments + later.moments,
            np.where(none, later.first, self.first),
            np.where(no_more, self.last, later.last),
            self.squares + later.squares + between,
        )

    def take(self, rows: np.ndarray) -> SeenGaps:
        """Those of the given look-ups."""
        return SeenGaps(self.moments[rows], self.first[rows], self.last[rows], self.squares[rows])

    def put(self, rows: np.ndarray, other: SeenGaps) -> None:
        """Others for the given look-ups."""
        for name in ("moments", "first", "last", "squares"):
            getattr(self, name)[rows] = getattr(other, name)


Part = tuple[np.ndarray, Gaps]
"""Of a memory or a level: (E,) int64 when each event was known, and what is remembered of gaps up to it."""


def seen_gaps(parts: Sequence[Part], first: Sequence[np.ndarray], last: Sequence[np.ndarray]) -> SeenGaps:
    """What look-ups see of a memory and its levels. first, last: (N,) int64 index of the first and last event of each
    part that each of them sees, the last -1 for none."""
    *earlier, newest = parts
    own = newest[1].at(last[-1])
    if not earlier:
        return own
    # What the others knew before this level's first moment, and what falls between its moments.
    before, between = [], np.zeros(len(own.moments), bool)
    rows = np.flatnonzero(own.moments)
    for (known, gaps), begin, end in zip(earlier, first, last, strict=False):
        index, some = end.copy(), rows[end[rows] >= 0]
        index[some] = last_known(known, begin[some], end[some] + 1, own.first[some] - 1)
        before.append(index)
        between |= gaps.at(index).moments < gaps.at(end).moments
    seen = seen_gaps(earlier, first[:-1], before)
    result = seen.then(own)
    if len(rows := np.flatnonzero(between)):
        starts = [
            np.where(index[rows] < 0, begin[rows], index[rows] + 1) for index, begin in zip(before, first, strict=False)
        ]
        starts.append(first[-1][rows])
        result.put(rows, seen.take(rows).then(_listed(parts, starts, [each[rows] for each in last])))
    return result


def _listed(parts: Sequence[Part], starts: Sequence[np.ndarray], last: Sequence[np.ndarray]) -> SeenGaps:
    """What M look-ups see from (M,) starts to last events of each part, none of which stands for earlier ones."""
    rows, moments = [], []
    for (known, gaps), start, end in zip(parts, starts, last, strict=True):
        lengths = np.maximum(end + 1 - start, 0)
        index = consecutive(start, lengths)
        counted = gaps.last[index] == known[index]
        rows.append(np.repeat(np.arange(len(start)), lengths)[counted])
        moments.append(known[index[counted]])
    row, moment = np.concatenate(rows), np.concatenate(moments)
    order = sorted_order(row.view(np.uint64), moment)
    order = order[_is_another(row[order], moment[order])]
    row, moment = row[order], moment[order]
    begin = np.flatnonzero(np.append(True, row[1:] != row[:-1]))
    squares = np.append(0, _squared(moment[:-1], moment[1:]))
    squares[begin] = 0
    end = np.append(begin[1:], len(row)) - 1
    return SeenGaps(end - begin + 1, moment[begin], moment[end], np.add.reduceat(squares, begin))


def _is_another(key: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """(N,) bool: whether sorted moments of keys are not the same as the ones before."""
    return np.append(True, (key[1:] != key[:-1]) | (moment[1:] != moment[:-1]))[: len(key)]


def _squared(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """(N,) int64 squares of gaps between moments, in whole seconds."""
    return np.square(np.minimum(end // _SECOND - start // _SECOND, _LONGEST))
