"""What counters remember of a log: running totals per key (see `mmoe_rec.point_in_time.memory`).

A window's count is the total at the request's time less the total at the window's start: `SeenTotals.totals`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from mmoe_rec.point_in_time.exact_sums import ExactSums, append, each_of
from mmoe_rec.point_in_time.gaps import Gaps, SeenGaps, seen_gaps
from mmoe_rec.point_in_time.join import KeyGroups, KnownEvents, LookUps, last_known, sorted_order
from mmoe_rec.point_in_time.memory import NEVER, Memory, SeenEvents, at, grown

_LIMB = "label_sum."


@dataclass(eq=False)
class CounterMemory(Memory):
    """Running totals per key, one event for each moment at which a key's totals change.

    rows: (E,) int32, of all events of the key so far; label_sum: of their labels, (E,) float64 where these are whole
    numbers, `ExactSums` where they may be fractions; last_positive: (E,) int64 moment of its last positive one, `NEVER`
    without; None where nobody asks for it. Where each event counts 1, as in a log of events, rows and moments say it
    all, and both are None. gaps: between positive events, None where nobody asks for them. shared: further levels,
    which other counters share.
    """

    rows: np.ndarray
    label_sum: np.ndarray | ExactSums | None
    last_positive: np.ndarray | None
    gaps: Gaps | None = field(default=None, kw_only=True)
    shared: SharedLevels | None = field(default=None, init=False)

    @staticmethod
    def empty(
        labels: bool = True,
        recency: bool = True,
        fractions: bool = False,
        forget_after: int | None = None,
        gaps: bool = False,
    ) -> CounterMemory:
        """Nothing remembered. labels: whether events have labels; recency, gaps: whether the last positive and the gaps
        between positives are asked for; fractions: whether labels may be other than whole numbers."""
        none = np.empty(0, np.int64)
        sums = ExactSums.zeros(0) if fractions else np.empty(0)
        last_positive = none if labels and recency else None
        events, rows = KnownEvents(np.empty(0, np.uint64), none), none.astype(np.int32)
        label_sum, own = sums if labels else None, Gaps.empty() if gaps else None
        return CounterMemory(events, rows, label_sum, last_positive, forget_after=forget_after, gaps=own)

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
        gaps = None
        if self.gaps is not None:
            counts = np.ones(len(known), bool) if label is None else label > 0
            if self.floor is not None:
                counts &= known > self.floor - self.late
            gaps = Gaps.steps_of(known, counts)
        return self._with_steps(key, known, np.ones(len(key), np.int32), labels, positive, gaps, in_order)

    def merged(self, other: CounterMemory) -> CounterMemory:
        """The events of both, of the same kind; as of this one's `floor`."""
        if not len(other):
            return self
        rows, labels = other._steps(other.rows), each_of(other._steps, other.label_sum)
        gaps = None if other.gaps is None else other.gaps.steps(other.events, other._steps)
        return self._with_steps(other.events.key, other.events.known, rows, labels, other.last_positive, gaps, True)

    def _with_steps(
        self,
        key: np.ndarray,
        known: np.ndarray,
        rows: np.ndarray,
        labels: np.ndarray | ExactSums | None,
        positive: np.ndarray | None,
        gaps: Gaps | None,
        in_order: bool,
    ) -> CounterMemory:
        """These events and (E,) further ones by what each adds: rows, labels, the last positive, and gaps."""
        if len(self):
            key, known = np.append(self.events.key, key), np.append(self.events.known, known)
            rows, labels = (
                np.append(self._steps(self.rows), rows),
                append(each_of(self._steps, self.label_sum), labels),
            )
            positive, in_order = append(self.last_positive, positive), False
            gaps = append(None if self.gaps is None else self.gaps.steps(self.events, self._steps), gaps)
        if not in_order:
            order = sorted_order(key, known)
            key, known = key[order], known[order]
            steps = rows, labels, positive, gaps
            rows, labels, positive, gaps = (each_of(lambda column: column[order], each) for each in steps)
        groups = KeyGroups(key)
        kept = np.flatnonzero(np.append((key[1:] != key[:-1]) | (known[1:] != known[:-1]), True))
        first = groups.starts[groups.number[kept]]

        def running(steps: np.ndarray) -> np.ndarray:
            total = np.zeros(len(steps) + 1, np.int64)
            np.cumsum(steps, dtype=np.int64, out=total[1:])
            return total[1:][kept] - total[first]

        sums = each_of(running, labels)
        return replace(
            self,
            events=KnownEvents(key[kept], known[kept]),
            rows=running(rows).astype(np.int32),
            label_sum=sums.astype(np.float64) if isinstance(sums, np.ndarray) else sums,
            last_positive=None if positive is None else _running_latest(groups, positive)[kept],
            gaps=None if gaps is None else gaps.totals(groups, known, kept, running),
        )

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

        rows, labels = difference(self.rows), each_of(difference, self.label_sum)
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
        memory.shared = SharedLevels(levels, salt, windows)
        return memory

    def compacted(self, moment: int, window: int) -> CounterMemory:
        """What requests at `moment` or later, which look back `window` microseconds, can ask for."""
        memory = self if self.lives is None else self._without(self.lives.ended(moment))
        if self.gaps is not None:
            window = max(window, self.late)
        later = memory.events.known > moment - window
        # And the last one before of each key, which carries its totals.
        needed = later | np.append(later[1:], False)
        needed[memory.events.starts[1:] - 1] = True
        if memory.lives is not None:
            needed |= memory.lives.ends  # whose totals are subtracted from those of the next life
        return memory._at_events(np.flatnonzero(needed), self._later_floor(moment))

    def _at_events(self, kept: np.ndarray, floor: int | None) -> CounterMemory:
        totals = self.rows, self.label_sum, self.last_positive, self.gaps
        rows, labels, positive, gaps = (each_of(lambda column: column[kept], each) for each in totals)
        events = self.events.take(kept)
        return replace(self, events=events, rows=rows, label_sum=labels, last_positive=positive, gaps=gaps, floor=floor)

    def _without(self, ended: np.ndarray) -> CounterMemory:
        """The memory of the other events alone; of each key, (E,) bool `ended` are all up to one of them."""
        kept = np.flatnonzero(~ended)
        if len(kept) == len(ended):
            return self
        memory = self._at_events(kept, self.floor)
        firsts = kept[memory.events.starts[:-1]]
        of_key = np.where(np.isin(firsts, self.events.starts[:-1], assume_unique=True), -1, firsts - 1)
        dropped = of_key[memory.events.number]
        memory.rows, labels = self.sums(kept, dropped)
        memory.label_sum = None if self.label_sum is None else labels
        if self.last_positive is not None:
            memory.last_positive = _after(self.last_positive_at(kept), at(self.events.known, dropped, NEVER))
        return memory

    def to_columns(self) -> dict[str, np.ndarray]:
        columns = {"key": self.events.key, "known": self.events.known, "rows": self.rows}
        if isinstance(self.label_sum, ExactSums):
            limbs = zip(self.label_sum.units, self.label_sum.limbs, strict=True)
            columns |= {f"{_LIMB}{unit}": limb for unit, limb in limbs if unit == 0 or limb.any()}
        elif self.label_sum is not None:
            columns["label_sum"] = self.label_sum
        if self.last_positive is not None:
            columns["last_positive"] = self.last_positive
        if self.gaps is not None:
            columns |= self.gaps.columns
        return columns

    def with_columns(self, columns: Mapping[str, np.ndarray], floor: int | None) -> CounterMemory:
        events, positive = KnownEvents(columns["key"], columns["known"]), columns.get("last_positive")
        labels: np.ndarray | ExactSums | None = columns.get("label_sum")
        if isinstance(self.label_sum, ExactSums):
            limbs = {int(name.removeprefix(_LIMB)): each for name, each in columns.items() if name.startswith(_LIMB)}
            labels = ExactSums.from_limbs(limbs, len(events))
        gaps = None if self.gaps is None else Gaps(*(columns[name] for name in self.gaps.columns))
        rows = columns["rows"]
        return replace(self, events=events, rows=rows, label_sum=labels, last_positive=positive, gaps=gaps, floor=floor)


class SeenTotals(SeenEvents[CounterMemory]):
    """What N look-ups see of a counter's memory and its levels. time: (N,) int64 microseconds as of which they do."""

    def __init__(self, memory: CounterMemory, asked: LookUps) -> None:
        super().__init__(memory, asked)
        self.time = self.asked.time
        self._later: LaterTotals | None = asked.later.get(memory)
        if self._later is None and memory.shared is not None:
            (self._later,) = memory.shared.levels.find([(memory, asked)])

    def totals(self, window: int | None) -> tuple[np.ndarray, np.ndarray]:
        """(N,) numbers of rows and sums of labels within so many microseconds, None for all of the past."""
        # All of a window is seen, as none is longer than what is forgotten.
        before = self.forgotten if window is None else self.last(window)
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
        if self.forgotten_until is not None:
            moments = _after(moments, self.forgotten_until)
        return moments if self._later is None else np.maximum(moments, self._later[1])

    def gaps(self) -> SeenGaps:
        """What is seen of the gaps between positive events; of memories that have them, which forget nothing."""
        parts = [(memory.events.known, memory.gaps) for memory in self.memories if memory.gaps is not None]
        return seen_gaps(parts, [join.first for join in self._joins], self.last())


LaterTotals = tuple[Mapping[int | None, tuple[np.ndarray, np.ndarray]], np.ndarray]
"""What N look-ups find in levels: by window (microseconds, None for all of the past) numbers of rows and sums of
labels, (N,) int32 each, and (N,) int64 moments of the last positive event, `NEVER` for none."""


@dataclass(frozen=True)
class SharedLevels:
    """Levels that several counters share, as one of them sees them: see `CounterMemory.with_shared`."""

    levels: CounterLevels
    salt: np.uint64
    windows: Sequence[int]


@dataclass(frozen=True)
class CounterLevels:
    """Levels of the events of several counters, none of which forgets or has fractional labels, the largest first.

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

    def find(self, asked: Sequence[tuple[CounterMemory, LookUps]]) -> list[LaterTotals]:
        """What look-ups of counters, which share these levels, find in them; in one pass, as a request asks many."""
        keys, times = [], []
        for memory, each in asked:
            assert memory.shared is not None
            earlier = np.array([0, *memory.shared.windows])
            keys.append(np.tile(each.key ^ memory.shared.salt, len(earlier)))
            times.append((each.as_of(memory.floor).time - earlier[:, None]).ravel())
        key, time = np.concatenate(keys), np.concatenate(times)
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
        result, ends = list[LaterTotals](), np.cumsum([0, *map(len, keys)])
        for (memory, each), start, end in zip(asked, ends[:-1], ends[1:], strict=True):
            assert memory.shared is not None
            windows = memory.shared.windows
            shape = 1 + len(windows), len(each)
            counted, summed, latest = (values[start:end].reshape(shape) for values in (rows, labels, positive))
            totals: dict[int | None, tuple[np.ndarray, np.ndarray]] = {None: (counted[0], summed[0])}
            for place, window in enumerate(windows, 1):
                totals[window] = counted[0] - counted[place], summed[0] - summed[place]
            result.append((totals, latest[0]))
        return result


def salt_of(place: int) -> np.uint64:
    """What, combined by XOR, tells the keys of a memory from equal ones of another; keys are hashes, and stay so."""
    return np.uint64((place + 1) * 0x9E3779B97F4A7C15 % 2**64)  # 2^64 over the golden ratio: unlike in many bits


def _first_bits(keys: np.ndarray, many: int) -> np.ndarray:
    """(N,) int64 from 0 to `many`, a power of 2, exclusive."""
    return (keys >> np.uint64(65 - many.bit_length())).view(np.int64)


def _after(moments: np.ndarray, forgotten: np.ndarray) -> np.ndarray:
    """(N,) moments, `NEVER` for those up to what is `forgotten`."""
    return np.where(moments > forgotten, moments, NEVER)


def _running_latest(groups: KeyGroups, moments: np.ndarray) -> np.ndarray:
    """(E,) latest of the `moments` so far of each key: an event that came late may be earlier than what came before."""
    import pandas as pd

    return pd.Series(moments).groupby(groups.number).cummax().to_numpy()
