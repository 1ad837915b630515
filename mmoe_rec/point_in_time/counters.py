"""What counters remember of a log: running totals per key (see `mmoe_rec.point_in_time.memory`).

A window's count is the total at the request's time less the total at the window's start: `SeenTotals.totals`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence, Sized
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import add
from typing import Any

import numpy as np

from mmoe_rec.point_in_time.join import KeyGroups, KnownEvents, LookUps, key_at, last_known, sorted_order
from mmoe_rec.point_in_time.memory import NEVER, Memory, SeenEvents, at, grown

_LIMB = "label_sum."
_BITS = 32
_MASK = np.uint64(2**_BITS - 1)
_AT_A_TIME = 8192  # this many numbers stay in the processor's cache


@dataclass(eq=False)
class CounterMemory(Memory):
    """Running totals per key, one event for each moment at which a key's totals change.

    rows: (E,) int32, of all events of the key so far; label_sum: of their labels, (E,) float64 where these are whole
    numbers, `ExactSums` where they may be fractions; last_positive: (E,) int64 moment of its last positive one, `NEVER`
    without; None where nobody asks for it. Where each event counts 1, as in a log of events, rows and moments say it
    all, and both are None. shared: what look-ups find in further levels, which other counters share.
    """

    rows: np.ndarray
    label_sum: np.ndarray | ExactSums | None
    last_positive: np.ndarray | None
    shared: Callable[[LookUps], LaterTotals] | None = field(default=None, init=False)

    @staticmethod
    def empty(labels: bool = True, recency: bool = True, fractions: bool = False) -> CounterMemory:
        """Nothing remembered. labels: whether events have labels; recency: whether the last positive is asked for;
        fractions: whether labels may be other than whole numbers."""
        none = np.empty(0, np.int64)
        sums = ExactSums.zeros(0) if fractions else np.empty(0)
        last_positive = none if labels and recency else None
        events, rows = KnownEvents(np.empty(0, np.uint64), none), none.astype(np.int32)
        return CounterMemory(events, rows, sums if labels else None, last_positive)

    def extended(
        self, key: np.ndarray, known: np.ndarray, label: np.ndarray | None, in_order: bool = False
    ) -> CounterMemory:
        """These events and further ones, (E,) uint64, int64 and numbers (None where each counts 1), in any order.

        in_order: whether the further events are sorted by key and known time.
        """
        if not len(key):
            return self
        labels: np.ndarray | ExactSums | None = label
        if label is not None and isinstance(self.label_sum, ExactSums):
            labels = ExactSums.of(label)
        positive = None
        if label is not None and self.last_positive is not None:
            positive = np.where(label > 0, known, NEVER)
        return self._with_steps(key, known, np.ones(len(key), np.int32), labels, positive, in_order)

    def merged(self, other: CounterMemory) -> CounterMemory:
        """The events of both, of the same kind; as of this one's `floor`."""
        if not len(other):
            return self
        rows, labels = other._steps(other.rows), _map(other._steps, other.label_sum)
        return self._with_steps(other.events.key, other.events.known, rows, labels, other.last_positive, in_order=True)

    def _with_steps(
        self,
        key: np.ndarray,
        known: np.ndarray,
        rows: np.ndarray,
        labels: np.ndarray | ExactSums | None,
        positive: np.ndarray | None,
        in_order: bool,
    ) -> CounterMemory:
        """These events and (E,) further ones by what each adds: rows, labels, and the last positive."""
        if len(self):
            key, known = np.append(self.events.key, key), np.append(self.events.known, known)
            rows, labels = np.append(self._steps(self.rows), rows), _append(_map(self._steps, self.label_sum), labels)
            positive, in_order = _append(self.last_positive, positive), False
        if not in_order:
            order = sorted_order(key, known)
            key, known = key[order], known[order]
            rows, labels, positive = (_map(lambda steps: steps[order], each) for each in (rows, labels, positive))
        groups = KeyGroups(key)
        kept = np.flatnonzero(np.append((key[1:] != key[:-1]) | (known[1:] != known[:-1]), True))
        first = groups.starts[groups.number[kept]]

        def running(steps: np.ndarray) -> np.ndarray:
            total = np.zeros(len(steps) + 1, np.int64)
            np.cumsum(steps, dtype=np.int64, out=total[1:])
            return total[1:][kept] - total[first]

        if positive is not None:
            import pandas as pd

            # An event that came late may be earlier than what came before.
            positive = pd.Series(positive).groupby(groups.number).cummax().to_numpy()[kept]
        sums = _map(running, labels)
        sums = sums.astype(np.float64) if isinstance(sums, np.ndarray) else sums
        events, totals = KnownEvents(key[kept], known[kept]), running(rows).astype(np.int32)
        return replace(self, events=events, rows=totals, label_sum=sums, last_positive=positive)

    def _steps(self, totals: np.ndarray) -> np.ndarray:
        """(E,) what each event added to the running totals of its key."""
        steps = np.append(totals[:1], totals[1:] - totals[:-1])
        first = self.events.starts[:-1]
        steps[first] = totals[first]
        return steps

    def sums(self, index: np.ndarray, before: np.ndarray | None = None) -> tuple[np.ndarray, Any]:
        """(N,) numbers of rows and sums of labels as of events by their index, 0 for index -1.

        before: indices of the events whose totals are subtracted, -1 for none.
        """

        def difference(totals: np.ndarray) -> np.ndarray:
            found = at(totals, index, 0)
            return found if before is None else found - at(totals, before, 0)

        rows, labels = difference(self.rows), _map(difference, self.label_sum)
        return rows, rows if labels is None else labels

    def last_positive_at(self, index: np.ndarray) -> np.ndarray:
        """(N,) int64 moments of the last positive event as of events by their index, `NEVER` for none."""
        last_positive = self.events.known if self.label_sum is None else self.last_positive
        assert last_positive is not None
        return at(last_positive, index, NEVER)

    def with_shared(self, levels: CounterLevels, salt: np.uint64, windows: Sequence[int]) -> CounterMemory:
        """The same memory beside levels, in which its keys are combined with `salt`. windows: microseconds to look back
        that are asked for."""
        _ = self.events.index  # for which no request has to wait
        memory = copy(self)
        memory.shared = partial(levels.find, salt, windows)
        return memory

    def compacted(self, moment: int, window: int, forever: bool) -> CounterMemory:
        """What requests at `moment` or later, which look back `window` microseconds, can ask for.

        forever: whether they also ask for all of the past, or for the last positive event.
        """
        later = self.events.known > moment - window
        # And the last one before of each key, which carries its totals.
        needed = later | np.append(later[1:], False)
        last = self.events.starts[1:] - 1
        needed[last] = later[last] | forever
        labels, positive = (_map(lambda totals: totals[needed], each) for each in (self.label_sum, self.last_positive))
        events, rows, floor = self.events.take(needed), self.rows[needed], self._later_floor(moment)
        return replace(self, events=events, rows=rows, label_sum=labels, last_positive=positive, floor=floor)

    def to_columns(self) -> dict[str, np.ndarray]:
        columns = {"key": self.events.key, "known": self.events.known, "rows": self.rows}
        if isinstance(self.label_sum, ExactSums):
            limbs = zip(self.label_sum.units, self.label_sum.limbs, strict=True)
            columns |= {f"{_LIMB}{unit}": limb for unit, limb in limbs if unit == 0 or limb.any()}
        elif self.label_sum is not None:
            columns["label_sum"] = self.label_sum
        return columns if self.last_positive is None else columns | {"last_positive": self.last_positive}

    def with_columns(self, columns: Mapping[str, np.ndarray], floor: int | None) -> CounterMemory:
        events, positive = KnownEvents(columns["key"], columns["known"]), columns.get("last_positive")
        labels: np.ndarray | ExactSums | None = columns.get("label_sum")
        if isinstance(self.label_sum, ExactSums):
            limbs = {int(name.removeprefix(_LIMB)): each for name, each in columns.items() if name.startswith(_LIMB)}
            labels = ExactSums.from_limbs(limbs, len(events))
        rows = columns["rows"]
        return replace(self, events=events, rows=rows, label_sum=labels, last_positive=positive, floor=floor)


class SeenTotals(SeenEvents[CounterMemory]):
    """What N look-ups see of a counter's memory and its levels. time: (N,) int64 microseconds as of which they do."""

    def __init__(self, memory: CounterMemory, asked: LookUps) -> None:
        super().__init__(memory, asked)
        self.time = self.asked.time
        self._later = None if memory.shared is None else memory.shared(self.asked)

    def totals(self, window: int | None) -> tuple[np.ndarray, np.ndarray]:
        """(N,) numbers of rows and sums of labels within so many microseconds, None for all of the past."""
        before = None if window is None else self.last(window)
        every = [
            memory.sums(now, None if before is None else before[place])
            for place, (memory, now) in enumerate(zip(self.memories, self.last(), strict=True))
        ]
        if self._later is not None:
            every.append(self._later[0][window])
        rows, labels = (reduce(add, each) for each in zip(*every, strict=True))
        return rows, labels.rounded() if isinstance(labels, ExactSums) else labels

    def last_positive(self) -> np.ndarray:
        """(N,) int64 moments of the last positive event, `NEVER` for none."""
        every = zip(self.memories, self.last(), strict=True)
        moments = np.max([memory.last_positive_at(last) for memory, last in every], axis=0)
        return moments if self._later is None else np.maximum(moments, self._later[1])


LaterTotals = tuple[Mapping[int | None, tuple[np.ndarray, np.ndarray]], np.ndarray]
"""What N look-ups find in levels: by window (microseconds, None for all of the past) numbers of rows and sums of
labels, (N,) int32 each, and (N,) int64 moments of the last positive event, `NEVER` for none."""


@dataclass(frozen=True)
class CounterLevels:
    """Levels of the events of several counters, none of which has fractional labels, the largest first.

    One table holds the running totals of all these counters, so that a look-up in a level costs little more than one of
    a single counter. Most keys that are asked for are in none of them, which a look at one small table tells: `some`,
    bool, says of the first bits of keys whether there may be such a one.
    """

    levels: tuple[CounterMemory, ...] = ()
    some: np.ndarray = field(default_factory=lambda: np.zeros(2, bool))

    def extended(self, key: np.ndarray, known: np.ndarray, labels: np.ndarray) -> CounterLevels:
        """These levels and further events, (E,) uint64 salted keys, int64 moments and int8 labels."""
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

    def find(self, salt: np.uint64, windows: Sequence[int], asked: LookUps) -> LaterTotals:
        """What look-ups of one of the counters find: see `CounterMemory.with_shared`."""
        earlier = np.array([0, *windows])
        found = self.totals(np.tile(asked.key ^ salt, len(earlier)), (asked.time - earlier[:, None]).ravel())
        rows, labels, positive = (each.reshape(len(earlier), -1) for each in found)
        totals: dict[int | None, tuple[np.ndarray, np.ndarray]] = {None: (rows[0], labels[0])}
        for place, window in enumerate(windows, 1):
            totals[window] = rows[0] - rows[place], labels[0] - labels[place]
        return totals, positive[0]

    def totals(self, key: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of (N,) uint64 salted keys and (N,) int64 moments, what is known then: numbers of rows and sums of labels,
        (N,) int32, and (N,) int64 moments of the last positive event, `NEVER` for none."""
        rows, labels, positive = np.zeros(len(key), np.int32), np.zeros(len(key), np.int32), np.full(len(key), NEVER)
        likely = np.flatnonzero(self.some.take(_first_bits(key, len(self.some))))
        for level in self.levels:
            found, group = level.events.index.find(key[likely])
            place, starts = likely[found], level.events.starts
            last = last_known(level.events.known, starts[group], starts[group + 1], time[place])
            place, last = place[last >= 0], last[last >= 0]
            assert isinstance(level.label_sum, np.ndarray)
            assert level.last_positive is not None
            rows[place] += level.rows[last]
            labels[place] += level.label_sum[last].astype(np.int32)
            positive[place] = np.maximum(positive[place], level.last_positive[last])
        return rows, labels, positive


class CounterTable:
    """What C counters remember, none of which has fractional labels, as one table: a request asks many counters about
    few keys, so one pass through all of them costs little more than one of a single counter.

    Keys and events of a counter follow those of the one before. Where each event counts 1, its labels are its rows, and
    its last positive moment is its own. Arrays of the memories become views, so that little is kept twice.
    """

    def __init__(self, memories: Sequence[CounterMemory]) -> None:
        events = [each.events for each in memories]
        indexes = [each.index for each in events]
        keys, first = _offsets([each.distinct for each in events]), _offsets([each.known for each in events])
        self._floors = np.array([[NEVER if each.floor is None else each.floor] for each in memories])
        self._shifts = np.array([[each.shift] for each in indexes])
        self._bucket, self._ends = _offsets([each.starts for each in indexes])[:-1, None], keys[1:, None]
        self._buckets = np.concatenate([each.starts + keys[place] for place, each in enumerate(indexes)])
        # Nothing is taken from an empty array, hence one more.
        self._distinct = np.concatenate([*(each.distinct for each in events), np.zeros(1, np.uint64)])
        starts = [each.starts[:-1] + first[place] for place, each in enumerate(events)]
        self._starts = np.concatenate([*starts, first[-1:]])
        labels = [np.empty(0) if each.label_sum is None else each.label_sum for each in memories]
        positive = [np.empty(0, np.int64) if each.last_positive is None else each.last_positive for each in memories]
        more = [each.astype(np.int32) for each in labels if isinstance(each, np.ndarray)]
        self._counts = np.concatenate([*(each.rows for each in memories), *more, np.zeros(1, np.int32)])
        self._moments = np.concatenate([*(each.known for each in events), *positive, np.zeros(1, np.int64)])
        # What leads from an event's place to those of its labels and of its last positive moment.
        self._to_labels, self._to_positive = (
            np.where([[len(each)] for each in parts], (first[-1] + _offsets(parts) - first)[:-1, None], 0)
            for parts in (more, positive)
        )
        for place, each in enumerate(memories):
            own = slice(first[place], first[place + 1])
            each.rows, each.events.known = self._counts[own], self._moments[own]
            each.events.distinct = each.events.index.keys = self._distinct[keys[place] : keys[place + 1]]
            if each.last_positive is not None:
                to = int(self._to_positive[place, 0])
                each.last_positive = self._moments[own.start + to : own.stop + to]

    def find(self, asked: Asked, levels: CounterLevels) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What counters and levels that they share know: numbers of rows and sums of labels, (L, M) int32; of the C
        counters, moments of the last positive event, `NEVER` for none, and the moments as of which they say so, (C, M)
        int64."""
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
        event[places] = last_known(self._moments, self._starts[group], self._starts[group + 1], moments[places])
        shape = len(asked.of), rows
        known, event = (event >= 0).reshape(shape), np.maximum(event, 0).reshape(shape)
        counted = self._counts.take(event) * known
        labels = self._counts.take(event + self._to_labels[counters][asked.of]) * known
        latest = slice(len(counters))
        positive = self._moments.take(event[latest] + self._to_positive[counters])
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


def salt_of(place: int) -> np.uint64:
    """What, combined by XOR, tells the keys of a memory from equal ones of another; keys are hashes, and stay so."""
    return np.uint64((place + 1) * 0x9E3779B97F4A7C15 % 2**64)  # 2^64 over the golden ratio: unlike in many bits


def _first_bits(keys: np.ndarray, many: int) -> np.ndarray:
    """(N,) int64 from 0 to `many`, a power of 2, exclusive."""
    return (keys >> np.uint64(65 - many.bit_length())).view(np.int64)


# Of arrays or exact sums, None where they are missing.


def _map(function: Any, values: Any) -> Any:
    return values.each(function) if isinstance(values, ExactSums) else None if values is None else function(values)


def _append(one: Any, other: Any) -> Any:
    return one.append(other) if isinstance(one, ExactSums) else None if one is None else np.append(one, other)


class ExactSums:
    """N sums of float64 numbers without rounding, so that no order of adding and no difference of two loses anything.

    A number is a whole multiple of 2^-1074, cut into limbs: whole numbers of 2^(32 j), each below 2^32. Limbs are added
    up as int64, which is exact for 2^31 numbers; a sum is rounded once, when it is asked for, to the nearest float64.
    (The idea is Kulisch's long accumulator; carries wait until the rounding, as in Neal, "Fast exact summation using
    small and large superaccumulators", 2015.)

    units: the j of each of L limbs, rising, 0 among them; others are zero. limbs: (L, N) int64.
    """

    def __init__(self, units: Sequence[int], limbs: np.ndarray) -> None:
        self.units, self.limbs = tuple(units), limbs

    def __len__(self) -> int:
        return self.limbs.shape[1]

    @staticmethod
    def zeros(size: int, units: Collection[int] = ()) -> ExactSums:
        """Sums of nothing, with room for these units."""
        units = sorted({0, *units})
        return ExactSums(units, np.zeros((len(units), size), np.int64))

    @staticmethod
    def of(values: np.ndarray) -> ExactSums:
        """(N,) finite float64 numbers."""
        parts = [_split(values[start : start + _AT_A_TIME]) for start in range(0, len(values), _AT_A_TIME)]
        sums = ExactSums.zeros(len(values), set().union(*parts))
        for number, part in enumerate(parts):
            start = number * _AT_A_TIME
            for unit, limb in part.items():
                sums.limbs[sums.units.index(unit), start : start + _AT_A_TIME] = limb
        return sums

    @staticmethod
    def from_limbs(limbs: Mapping[int, np.ndarray], size: int) -> ExactSums:
        """unit -> (N,) int64."""
        sums = ExactSums.zeros(size, limbs)
        for unit, limb in zip(sums.units, sums.limbs, strict=True):
            if unit in limbs:
                limb[:] = limbs[unit]
        return sums

    def over(self, units: Collection[int]) -> ExactSums:
        """The same sums, with limbs for further units."""
        missing = set(units) - set(self.units)
        if not missing:
            return self
        wider = ExactSums.zeros(len(self), missing | set(self.units))
        wider.limbs[np.searchsorted(wider.units, self.units)] = self.limbs
        return wider

    def each(self, of: Callable[[np.ndarray], np.ndarray]) -> ExactSums:
        """What a linear function, of (N,) int64 to (K,) int64, makes of the sums."""
        return ExactSums(self.units, np.stack([of(limb) for limb in self.limbs]))

    def append(self, other: ExactSums) -> ExactSums:
        one, two = self.over(other.units), other.over(self.units)
        return ExactSums(one.units, np.concatenate([one.limbs, two.limbs], axis=1))

    def __add__(self, other: ExactSums) -> ExactSums:
        one, two = self.over(other.units), other.over(self.units)
        return ExactSums(one.units, one.limbs + two.limbs)

    def rounded(self) -> np.ndarray:
        """(N,) float64: the nearest to each sum, of two equally near, the even one; infinite beyond the largest."""
        limbs = [self.limbs[:, start : start + _AT_A_TIME] for start in range(0, len(self), _AT_A_TIME)]
        return np.concatenate([self._rounded(each) for each in limbs]) if limbs else np.empty(0)

    def _rounded(self, limbs: np.ndarray) -> np.ndarray:
        negative = self._digits(limbs)[-1] < 0
        sizes = _nearest(self._digits(np.where(negative, -limbs, limbs)), self.units[0])
        return np.where(negative, -sizes, sizes)

    def _digits(self, limbs: np.ndarray) -> np.ndarray:
        """(P, N) int64 whole numbers of 2^(32 j) from the first unit on, all from 0 to 2^32 - 1 but the last."""
        digits = np.zeros((self.units[-1] - self.units[0] + 2, limbs.shape[1]), np.int64)
        digits[np.array(self.units) - self.units[0]] = limbs
        for place in range(len(digits) - 1):
            digits[place + 1] += digits[place] >> _BITS
            digits[place] &= np.int64(_MASK)
        return digits


def _split(values: np.ndarray) -> dict[int, np.ndarray]:
    """Limbs, (N,) int64 by unit, of finite numbers."""
    fraction, exponent = np.frexp(values)
    whole, exponent = (fraction * 2.0**53).astype(np.int64), exponent.astype(np.int64) - 53
    size = np.abs(whole).view(np.uint64)
    unit, shift = exponent // _BITS, (exponent & (_BITS - 1)).view(np.uint64)
    low, high = (size & _MASK) << shift, (size >> np.uint64(_BITS)) << shift
    middle = (low >> np.uint64(_BITS)) + (high & _MASK)
    digits = (low & _MASK, middle & _MASK, (high >> np.uint64(_BITS)) + (middle >> np.uint64(_BITS)))
    signed = [np.where(whole < 0, -digit.view(np.int64), digit.view(np.int64)) for digit in digits]
    limbs: dict[int, np.ndarray] = {}
    least = unit.min()
    firsts = np.flatnonzero(np.bincount(unit - least)) + least
    for first in firsts.tolist():
        here = unit == first
        for j, digit in enumerate(signed, first):
            limb = digit if len(firsts) == 1 else np.where(here, digit, 0)
            if limb.any():
                limbs[j] = limbs[j] + limb if j in limbs else limb
    return limbs


def _nearest(digits: np.ndarray, unit: int) -> np.ndarray:
    """(N,) float64 nearest to numbers from 0 on, of (P, N) int64 digits, of which the first stand for 2^(32 unit)."""
    digits = np.concatenate([np.zeros((2, digits.shape[1]), np.int64), digits]).view(np.uint64)
    leading = len(digits) - 1 - np.argmax(digits[::-1] != 0, axis=0)
    leading = np.maximum(leading, 2)
    first, second, third = (np.take_along_axis(digits, (leading - back)[None], 0)[0] for back in range(3))
    below = np.logical_or.accumulate(digits != 0, axis=0)
    more = np.take_along_axis(below, np.maximum(leading - 3, 0)[None], 0)[0]
    # The first 64 bits, and whether there is anything below them, which decides ties when rounding to 53.
    empty = _BITS - np.frexp(first.astype(np.float64))[1].astype(np.uint64)
    head = (((first << np.uint64(_BITS)) | second) << empty) | (third >> (np.uint64(_BITS) - empty))
    more |= (third << empty) & _MASK != 0
    head = (head >> np.uint64(1)) | (head & np.uint64(1)) | more
    exponent = 1 - empty.astype(np.int64) + _BITS * (leading - 3 + unit)
    with np.errstate(over="ignore"):
        return np.ldexp(head.astype(np.int64).astype(np.float64), exponent)
