"""What histories remember of a log: the last items of each key (see `mmoe_rec.point_in_time.memory`)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np

from mmoe_rec.point_in_time.arrays import Ragged, consecutive
from mmoe_rec.point_in_time.join import KnownEvents, sorted_order
from mmoe_rec.point_in_time.memory import Memory
from mmoe_rec.point_in_time.search import AnyLookUps


class HistoryMemory(Memory):
    """Candidates per user. items: (E,) int64 rows of the candidates' table."""

    def __init__(
        self, events: KnownEvents, items: np.ndarray, floor: int | None = None, forget_after: int | None = None
    ) -> None:
        super().__init__(events, floor, forget_after)
        self.items = items

    @staticmethod
    def empty(forget_after: int | None = None) -> HistoryMemory:
        """Nothing remembered."""
        none = np.empty(0, np.int64)
        return HistoryMemory(KnownEvents(np.empty(0, np.uint64), none), none, forget_after=forget_after)

    def extended(self, key: np.ndarray, known: np.ndarray, items: np.ndarray) -> HistoryMemory:
        """These events and further ones, (E,) uint64, int64 and int64, in any order."""
        if not len(key):
            return self
        key, known = np.append(self.events.key, key), np.append(self.events.known, known)
        items = np.append(self.items, items)
        order = sorted_order(key, known, items)
        return HistoryMemory(KnownEvents(key[order], known[order]), items[order], self.floor, self.forget_after)

    def last(self, asked: AnyLookUps, length: int) -> Ragged:
        """The last `length` items that were known at N look-ups, oldest first."""
        index, lengths = self.last_events(asked, length)
        return Ragged(self.items[index], lengths.astype(np.int32))

    def last_events(self, asked: AnyLookUps, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The last `length` events that were known at N look-ups, by their index, oldest first, and (N,) int64 how
        many these are."""
        join = self.joined(asked)
        if not len(self.events):
            return np.empty(0, np.int64), np.zeros(len(asked), np.int64)
        last, first = join.last(), join.first
        if self.lives is not None:
            first = np.maximum(first, self.lives.forgotten(last, join.asked.time) + 1)
        return last_of_each(first, last, length)

    @cached_property
    def _within_key(self) -> np.ndarray:
        """(E,) int64 number of events of the same key before each event."""
        return np.arange(len(self.events)) - self.events.starts[self.events.number]

    def compacted(self, moment: int, length: int) -> HistoryMemory:
        """What requests at `moment` or later, which ask for `length` items, can ask for."""
        # The last `length` that are known by then; later events keep these in reach until they become known themselves.
        known_by_then = np.add.reduceat(np.append(self.events.known <= moment, 0), self.events.starts[:-1])
        needed = self._within_key >= (known_by_then - length)[self.events.number]
        if self.lives is not None:
            needed &= ~self.lives.ended(moment)
        events = KnownEvents(self.events.key[needed], self.events.known[needed])
        return HistoryMemory(events, self.items[needed], self._later_floor(moment), self.forget_after)

    def to_columns(self) -> dict[str, np.ndarray]:
        """The events, sorted by key and time."""
        return {"key": self.events.key, "known": self.events.known, "item": self.items}

    @staticmethod
    def from_columns(
        columns: Mapping[str, np.ndarray], floor: int | None, forget_after: int | None = None
    ) -> HistoryMemory:
        """The memory that `to_columns` gave."""
        return HistoryMemory(KnownEvents(columns["key"], columns["known"]), columns["item"], floor, forget_after)


def last_of_each(first: np.ndarray, last: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The last `length` of the events from (N,) `first` to `last`, inclusive, by their index, one look-up's after the
    other's, and (N,) int64 how many these are."""
    lengths = np.clip(last + 1 - first, 0, length)
    return consecutive(last + 1 - lengths, lengths), lengths
