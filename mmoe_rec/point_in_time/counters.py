"""What counters remember of a log: running totals per key (see `mmoe_rec.point_in_time.join`).

A window's count is the total at the request's time less the total at the window's start: `SeenTotals.totals`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from mmoe_rec.point_in_time.join import NEVER, KeyGroups, KnownEvents, LookUps, Memory, at

UNITS = 2.0**20
"""Units of a label of 1. Labels are whole numbers of units, so their int64 sums depend on no order."""
_MOST_UNITS = 2.0**62
MOST = _MOST_UNITS / UNITS
"""Labels and sums of labels lie between this and its negative, so the difference of two sums fits into 64 bits."""


def round_labels(labels: np.ndarray) -> np.ndarray:
    """Round (N,) numbers to float64 multiples of a unit. NaN stays."""
    return np.rint(labels * UNITS) / UNITS


def to_units(labels: np.ndarray) -> np.ndarray:
    """Round (N,) numbers to int64 units. Raises OverflowError for one out of range."""
    units = np.rint(labels * UNITS)
    _check_range(units)
    return units.astype(np.int64)


def _check_range(units: np.ndarray) -> None:
    if len(units) and np.abs(units).max() >= _MOST_UNITS:
        raise OverflowError


@dataclass(eq=False)
class CounterMemory(Memory):
    """Running totals per key, one event for each moment at which a key's totals change.

    rows: (E,) int32, of all events of the key so far; label_sum: (E,) int64 units, of their labels; last_positive: (E,)
    int64 moment of its last positive one, `NEVER` without; None where nobody asks for it. Where each event counts 1, as
    in a log of events, rows and moments say it all, and both are None.
    """

    rows: np.ndarray
    label_sum: np.ndarray | None
    last_positive: np.ndarray | None

    @staticmethod
    def empty(labels: bool = True, recency: bool = True) -> "CounterMemory":
        """Nothing remembered. labels: whether events have labels; recency: whether the last positive is asked for."""
        none = np.empty(0, np.int64)
        events, rows = KnownEvents(np.empty(0, np.uint64), none), none.astype(np.int32)
        return CounterMemory(events, rows, none if labels else None, none if labels and recency else None)

    def extended(
        self, key: np.ndarray, known: np.ndarray, label: np.ndarray | None, in_order: bool = False
    ) -> "CounterMemory":
        """Add (E,) events in any order.

        Args:
            key: (E,) uint64.
            known: (E,) int64 moments.
            label: (E,) numbers, None where each event counts 1.
            in_order: Whether the events are sorted by key and known time.

        Raises:
            OverflowError: A label, or a sum of labels, is out of range.
        """
        if not len(key):
            return self
        labels, positive = None, None
        if label is not None:
            labels = to_units(label)
            if self.last_positive is not None:
                positive = np.where(labels > 0, known, NEVER)
        return self._with_steps(key, known, np.ones(len(key), np.int32), labels, positive, in_order)

    def merged(self, other: "CounterMemory") -> "CounterMemory":
        """The events of both, of the same kind; as of this one's `floor`. Raises OverflowError as `extended`."""
        if not len(other):
            return self
        key, known, rows = other.events.key, other.events.known, other._steps(other.rows)
        labels, positive = _map(other._steps, other.label_sum), other.last_positive
        return self._with_steps(key, known, rows, labels, positive, in_order=True)

    def _with_steps(
        self,
        key: np.ndarray,
        known: np.ndarray,
        rows: np.ndarray,
        labels: np.ndarray | None,
        positive: np.ndarray | None,
        in_order: bool,
    ) -> "CounterMemory":
        """These events and (E,) further ones by what each adds: rows, labels, and the last positive."""
        if len(self):
            key, known = np.append(self.events.key, key), np.append(self.events.known, known)
            rows = np.append(self._steps(self.rows), rows)
            labels = _map(np.append, _map(self._steps, self.label_sum), labels)
            positive, in_order = _map(np.append, self.last_positive, positive), False
        if not in_order:
            order = np.lexsort((known, key))
            key, known = key[order], known[order]
            rows, labels, positive = (_map(lambda steps: steps[order], each) for each in (rows, labels, positive))
        groups = KeyGroups(key)
        kept = np.flatnonzero(np.append((key[1:] != key[:-1]) | (known[1:] != known[:-1]), True))
        first = groups.starts[groups.number[kept]]

        def running(steps: np.ndarray, dtype: type) -> np.ndarray:
            total: np.ndarray = np.zeros(len(steps) + 1, dtype)
            np.cumsum(steps, dtype=dtype, out=total[1:])
            return total[1:][kept] - total[first]

        if labels is not None:
            _check_range(running(labels, np.float64))  # Sums of integers would wrap around.
        sums = _map(partial(running, dtype=np.int64), labels)
        if positive is not None:
            import pandas as pd

            # An event that came late may be earlier than what came before.
            positive = pd.Series(positive).groupby(groups.number).cummax().to_numpy()[kept]
        events, totals = KnownEvents(key[kept], known[kept]), running(rows, np.int64).astype(np.int32)
        return replace(self, events=events, rows=totals, label_sum=sums, last_positive=positive)

    def _steps(self, totals: np.ndarray) -> np.ndarray:
        """(E,) what each event added to the running totals of its key."""
        steps = np.append(totals[:1], totals[1:] - totals[:-1])
        first = self.events.starts[:-1]
        steps[first] = totals[first]
        return steps

    def sums(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) int64 numbers of rows and units of labels as of events by their index, 0 for index -1."""
        rows = at(self.rows, index, 0).astype(np.int64)
        return rows, rows * int(UNITS) if self.label_sum is None else at(self.label_sum, index, 0)

    def last_positive_at(self, index: np.ndarray) -> np.ndarray:
        """(N,) int64 moments of the last positive event as of events by their index, `NEVER` for none."""
        last_positive = self.events.known if self.label_sum is None else self.last_positive
        assert last_positive is not None
        return at(last_positive, index, NEVER)

    def compacted(self, moment: int, window: int, forever: bool) -> "CounterMemory":
        """What requests at `moment` or later, which look back `window` microseconds, can ask for.

        forever: whether they also ask for all of the past, or for the last positive event.
        """
        later, floor = self.events.known > moment - window, self._later_floor(moment)
        if not forever:  # Totals begin with the window, so they don't depend on the keys that earlier calls dropped.
            starts = self.events.starts
            kept = np.diff(np.append(0, np.cumsum(later))[starts])
            first = starts[1:] - kept  # Each key's events are in order of time, so it keeps its last ones.

            def since_window(totals: np.ndarray) -> np.ndarray:
                dropped = np.where(first > starts[:-1], totals[first - 1], 0).astype(totals.dtype)
                return totals[later] - np.repeat(dropped, kept)

            labels = _map(since_window, self.label_sum)
            events, rows = self.events.take(later), since_window(self.rows)
            return replace(self, events=events, rows=rows, label_sum=labels, floor=floor)
        # And the last one before of each key, which carries its totals.
        needed = later | np.append(later[1:], False)
        needed[self.events.starts[1:] - 1] = True
        labels, positive = (_map(lambda totals: totals[needed], each) for each in (self.label_sum, self.last_positive))
        events, rows = self.events.take(needed), self.rows[needed]
        return replace(self, events=events, rows=rows, label_sum=labels, last_positive=positive, floor=floor)

    def to_columns(self) -> dict[str, np.ndarray]:
        columns = {"key": self.events.key, "known": self.events.known, "rows": self.rows}
        optional = {"label_sum": self.label_sum, "last_positive": self.last_positive}
        return columns | {name: column for name, column in optional.items() if column is not None}

    def with_columns(self, columns: Mapping[str, np.ndarray], floor: int | None) -> "CounterMemory":
        events, labels = KnownEvents(columns["key"], columns["known"]), columns.get("label_sum")
        positive = columns.get("last_positive")
        return replace(self, events=events, rows=columns["rows"], label_sum=labels, last_positive=positive, floor=floor)


class SeenTotals:
    """Totals that N look-ups see in a counter's memory and its levels.

    Attributes:
        time: Microseconds as of which they see them, shape (N,), int64.
    """

    def __init__(self, memory: CounterMemory, asked: LookUps) -> None:
        asked = asked.as_of(memory.floor)
        self.time = asked.time
        self._joins = [(each, each.join(asked)) for each in (memory, *memory.levels)]

    def totals(self, window: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Return (N,) int64 numbers of rows and (N,) float64 sums of labels.

        Args:
            window: Microseconds to look back, None for all of the past.
        """
        rows, labels = self._totals(0)
        if window is not None:
            rows_before, labels_before = self._totals(window)
            rows, labels = rows - rows_before, labels - labels_before
        return rows, labels / UNITS

    def _totals(self, earlier: int) -> tuple[Any, Any]:
        """(N,) int64 numbers of rows and units of labels, `earlier` microseconds before the look-ups."""
        rows, labels = zip(*(memory.sums(join.last(earlier)) for memory, join in self._joins), strict=True)
        return sum(rows), sum(labels)

    def last_positive(self) -> np.ndarray:
        """(N,) int64 moments of the last positive event, `NEVER` for none."""
        return np.max([memory.last_positive_at(join.last()) for memory, join in self._joins], axis=0)


def _map(function: Any, *values: Any) -> Any:
    """What a function makes of arrays, None where they are missing."""
    return None if values[0] is None else function(*values)
