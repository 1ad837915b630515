"""Which row an event belongs to, and what its events make of a row's label.

An event belongs to the last row of its key at or before its time. Where events carry the request's id, a key is a
request's candidate, and there is one row; else it is a user's candidate, and of several requests that could claim the
event the last one before it does. Then the window decides whether it counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmoe_rec.point_in_time.join import Join, KnownEvents, LookUps
from mmoe_rec.point_in_time.sorting import sorted_order
from mmoe_rec.settings.outcomes import LabelSource


@dataclass(frozen=True)
class Owned:
    """Events and the rows that they belong to. owner: (E,) int64 row of each event, -1 for none; time: (E,) int64."""

    owner: np.ndarray
    time: np.ndarray

    def within(self, row_time: np.ndarray, window: int) -> np.ndarray:
        """(E,) bool whether an event belongs to a row and lies within its window, the end included."""
        mine = self.owner >= 0
        return mine & (self.time - row_time[np.where(mine, self.owner, 0)] <= window if len(row_time) else mine)


def attribute(key: np.ndarray, time: np.ndarray, event_key: np.ndarray, event_time: np.ndarray) -> Owned:
    """Gives each of E events the last of N rows of its key at or before its time.

    key, event_key: (N,) and (E,) uint64; time, event_time: int64 microseconds. Of rows of one key and time the last one
    in the given order counts.
    """
    order = sorted_order(key, time)
    asked = LookUps.sort(event_key, event_time)
    last = Join(KnownEvents(key[order], time[order]), asked).last()[asked.number]
    owner = np.where(last >= 0, order[last], -1) if len(order) else np.full(len(event_key), -1)
    return Owned(owner, event_time)


def first_of_each(owned: Owned, counted: np.ndarray, rows: int) -> np.ndarray:
    """(rows,) int64 each row's first event of those that count, (E,) bool; -1 for none. Of equals, the first given."""
    events = np.flatnonzero(counted)
    events = events[np.argsort(owned.time[events], kind="stable")][::-1]
    first = np.full(rows, -1)
    first[owned.owner[events]] = events  # of several the last one written counts, which is the first in time
    return first


def labels_of(
    source: LabelSource, owned: Owned, counted: np.ndarray, values: np.ndarray | None, rows: int
) -> np.ndarray:
    """(rows,) float64 labels, NaN where nothing is known.

    counted: (E,) bool; values: (E,) float64 of the events, NaN where one says nothing; None: each says 1.
    """
    labels = np.full(rows, np.nan if source.otherwise is None else source.otherwise, np.float64)
    said = np.ones(len(counted)) if values is None else values
    events = np.flatnonzero(counted & ~np.isnan(said))
    events = events[np.lexsort((said[events], owned.time[events], owned.owner[events]))]
    owner, said = owned.owner[events], said[events]
    if not len(events):
        return labels
    begins = np.flatnonzero(np.append(True, owner[1:] != owner[:-1]))
    match source.combine:
        case "first":
            found = said[begins]
        case "last":
            found = said[np.append(begins[1:], len(owner)) - 1]
        case "sum":
            found = np.add.reduceat(said, begins)
        case "max":
            found = np.maximum.reduceat(said, begins)
    labels[owner[begins]] = found
    return labels
