"""Events that came after a memory was made: running totals of several counters in one table, and how tables grow.

A memory of millions of events is neither changed nor copied for a few that come later, and processes may share it.
These lie in levels beside it: a small one that takes in what comes, a larger one that takes in the small one once that
has grown, and one more. So an event is copied a few times on its way, however many there are, and a look-up asks at
most `LEVELS` of them. (The idea is that of log-structured merge trees, O'Neil et al., 1996.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from mmoe_rec.point_in_time.exact import ExactSums
from mmoe_rec.point_in_time.join import KeyIndex, bisected, sorted_order
from mmoe_rec.point_in_time.memory import NEVER
from mmoe_rec.point_in_time.search import last_known

LEVELS = 3
SMALLEST = 32_768
"""Events up to which a level grows, whatever the size of the next larger one."""
_GROWTH = 16
_SPREAD = 2
_MANY = 32 * SMALLEST  # from which on a level takes in more than `SMALLEST` events at a time
_Level = TypeVar("_Level")


def grown(
    levels: Sequence[_Level],
    new: _Level,
    merged: Callable[[_Level, _Level], _Level],
    size: Callable[[Any], int] = len,
) -> tuple[_Level, ...]:
    """Levels, the largest first, after a further one was taken in; `merged` makes one of a larger and a smaller one."""
    after = [*levels, new]
    while len(after) > 1 and _has_outgrown([size(each) for each in after]):
        small = after.pop()
        after[-1] = merged(after[-1], small)
    return tuple(after)


def _has_outgrown(sizes: Sequence[int]) -> bool:
    """Whether the last level, of as many events, belongs into the one before it."""
    largest, larger, small = sizes[0], *sizes[-2:]
    levels = LEVELS if largest >= _MANY else LEVELS - 1
    most = SMALLEST if len(sizes) == levels else SMALLEST * _GROWTH
    return len(sizes) > levels or small >= min(larger, max(most, larger // _GROWTH))


class CounterLevel:
    """Running totals of events by key, as in `CounterMemory`, of any number of counters whose keys differ.

    key: (G,) uint64 distinct, rising; starts: (G + 1,) where the events of each begin, and the last ones end; known:
    (E,) int64, rising for each key; rows: (E,) int32 events of the key so far; labels: sums of theirs, (E,) int32 of
    whole numbers or `ExactSums`; positive: (E,) int64 moment of the last one with a positive label, `NEVER` for none;
    first: the earliest of all moments; now: (G, 5) int64 moments of each key's first and last event, and rows, labels
    and positive of the last one, side by side, as most look-ups see all events of a key or none; None where labels are
    fractions.
    """

    def __init__(
        self,
        key: np.ndarray,
        starts: np.ndarray,
        known: np.ndarray,
        rows: np.ndarray,
        labels: np.ndarray | ExactSums,
        positive: np.ndarray,
    ) -> None:
        self.key, self.starts, self.known = key, starts, known
        self.rows, self.labels, self.positive = rows, labels, positive
        self.first = int(known.min(initial=np.iinfo(np.int64).max))
        self.index = KeyIndex(key, _SPREAD)
        self.now: np.ndarray | None = None
        if isinstance(labels, np.ndarray):
            end = starts[1:] - 1
            totals = (each.take(end) for each in (known, rows, labels, positive))
            self.now = np.stack([known.take(starts[:-1]), *totals], axis=1)

    def __len__(self) -> int:
        return len(self.known)

    @staticmethod
    def of(key: np.ndarray, known: np.ndarray, labels: np.ndarray) -> CounterLevel:
        """Events in any order: (E,) uint64, int64 and labels, of which float64 ones may be fractions."""
        order = sorted_order(key, known)
        key, known, labels = key[order], known[order], labels[order]
        steps = ExactSums.of(labels) if labels.dtype == np.float64 else labels.astype(np.int32)
        return CounterLevel._running(key, known, np.ones(len(key), np.int32), steps, labels > 0)

    @staticmethod
    def _running(
        key: np.ndarray, known: np.ndarray, rows: np.ndarray, labels: np.ndarray | ExactSums, positive: np.ndarray
    ) -> CounterLevel:
        """Totals of sorted events, of what each adds: rows (E,) int32, labels, and whether one is positive, (E,).

        Of events of one key and moment the last one is kept, whose totals count all of them.
        """
        begins = np.append(len(key) > 0, key[1:] != key[:-1])[: len(key)]
        starts = np.flatnonzero(begins)
        key = key[starts]
        rows, latest = _sums(rows, starts), _latest(known, positive, starts)
        sums = labels.each(lambda each: _sums(each, starts)) if isinstance(labels, ExactSums) else _sums(labels, starts)
        again = np.flatnonzero(~begins[1:] & (known[1:] == known[:-1]))
        starts = np.append(starts, len(known)).astype(np.int32 if len(known) < 2**31 else np.int64)
        if len(again):
            kept = np.ones(len(known), bool)
            kept[again] = False
            starts = starts - np.searchsorted(again, starts).astype(starts.dtype)
            known, rows, latest = known[kept], rows[kept], latest[kept]
            sums = sums.take(kept) if isinstance(sums, ExactSums) else sums[kept]
        return CounterLevel(key, starts, known, rows, sums, latest)

    def merged(self, other: CounterLevel) -> CounterLevel:
        """The events of both. It costs least where the other one has fewer."""
        if not len(self) or not len(other):
            return self if len(self) else other
        place = self._place(other)
        theirs = place + np.arange(len(other))
        mine = np.ones(len(self) + len(other), bool)
        mine[theirs] = False

        def both(own: np.ndarray, others: np.ndarray) -> np.ndarray:
            every = np.empty(len(mine), own.dtype)
            every[mine], every[theirs] = own, others
            return every

        labels: np.ndarray | ExactSums
        one, two = self._steps_of_labels(), other._steps_of_labels()
        if isinstance(one, ExactSums) and isinstance(two, ExactSums):
            one, two = one.over(two.units), two.over(one.units)
            labels = ExactSums(one.units, np.stack([both(*each) for each in zip(one.limbs, two.limbs, strict=True)]))
        else:
            assert isinstance(one, np.ndarray)
            assert isinstance(two, np.ndarray)
            labels = both(one, two)
        return CounterLevel._running(
            both(self._keys(), other._keys()),
            both(self.known, other.known),
            both(self._steps(self.rows), other._steps(other.rows)),
            labels,
            both(self.positive == self.known, other.positive == other.known),
        )

    def _place(self, other: CounterLevel) -> np.ndarray:
        """(E of the other,) rising int64: before which of these events each of the other's belongs."""
        group = np.searchsorted(self.key, other.key)
        same = self.key.take(group, mode="clip") == other.key
        number = np.repeat(np.arange(len(other.key)), np.diff(other.starts))
        place = self.starts[group].astype(np.int64)[number]
        shared = np.flatnonzero(same[number])
        end = self.starts[group[number[shared]] + 1].astype(np.int64)
        place[shared] = bisected(self.known, other.known[shared], place[shared], end, np.less_equal)
        return place

    def _keys(self) -> np.ndarray:
        """(E,) uint64 the key of each event."""
        return np.repeat(self.key, np.diff(self.starts))

    def _steps(self, totals: np.ndarray) -> np.ndarray:
        """(E,) what each event added to the totals of its key."""
        steps = np.diff(totals, prepend=totals.dtype.type(0))
        first = self.starts[:-1]
        steps[first] = totals[first]
        return steps

    def _steps_of_labels(self) -> np.ndarray | ExactSums:
        return self.labels.each(self._steps) if isinstance(self.labels, ExactSums) else self._steps(self.labels)

    def last(self, group: np.ndarray, times: np.ndarray) -> np.ndarray:
        """(K,) int64 index of the last event of each of K keys, by their numbers, known at (K,) times; -1 for none."""
        return last_known(
            self.known, self.starts[group].astype(np.int64), self.starts[group + 1].astype(np.int64), times
        )


class CounterLevels:
    """Levels of counters' events, the largest first; never changed, but made anew with further events.

    Most keys that are asked for are in none of them, which a look at one small table tells: `_some`, bool, says of the
    first bits of keys whether there may be such a one.
    """

    def __init__(self, levels: Sequence[CounterLevel] = (), some: np.ndarray | None = None) -> None:
        self.levels = tuple(levels)
        self._some = np.zeros(2, bool) if some is None else some

    def extended(self, new: CounterLevel) -> CounterLevels:
        """With further events."""
        if not len(new):
            return self
        levels = grown(self.levels, new, CounterLevel.merged)
        keys = sum(len(level.key) for level in levels)
        if len(self._some) < 4 * keys:
            some, marked = np.zeros(1 << (8 * keys).bit_length(), bool), levels
        else:
            some, marked = self._some.copy(), (new,)
        for level in marked:
            some[_first_bits(level.key, len(some))] = True
        return CounterLevels(levels, some)

    def likely(self, keys: np.ndarray) -> np.ndarray:
        """(K,) int64 rising places of those of (N,) uint64 keys that may be in a level; the others are in none."""
        return np.flatnonzero(self._some.take(_first_bits(keys, len(self._some))))


def _first_bits(keys: np.ndarray, many: int) -> np.ndarray:
    """(N,) int64 from 0 to `many`, a power of 2, exclusive."""
    return (keys >> np.uint64(65 - many.bit_length())).view(np.int64)


def _sums(steps: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(E,) running sums of integers that begin anew at each of the starts, the first of which is 0."""
    steps = steps.copy()
    before = np.cumsum(steps, dtype=steps.dtype)[starts[1:] - 1]
    steps[starts[1:]] -= np.diff(before, prepend=steps.dtype.type(0))
    return np.cumsum(steps, dtype=steps.dtype, out=steps)


def _latest(known: np.ndarray, positive: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(E,) int64 moment of the last positive event so far of each key, whose events are sorted by moment."""
    # Twice each one's place, and one more for positive ones: what follows such a one is known by an odd number.
    small = len(known) < 2**30
    places: np.ndarray = np.arange(0, 2 * len(known), 2, dtype=np.int32 if small else np.int64)
    marks = (places + 1) * positive
    marks[starts] = np.maximum(marks[starts], places[starts])
    marks = np.maximum.accumulate(marks)
    return np.where(marks & 1, known.take(marks >> 1), NEVER)
