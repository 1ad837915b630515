"""What histories remember of a log: the last items of each key (see `mmoe_rec.point_in_time.memory`)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mmoe_rec.point_in_time.arrays import Ragged, consecutive
from mmoe_rec.point_in_time.join import AnyLookUps, KnownEvents, sorted_order
from mmoe_rec.point_in_time.memory import Memory, SeenEvents


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

    def merged(self, other: HistoryMemory) -> HistoryMemory:
        """The events of both; as of this one's `floor`."""
        return self.extended(other.events.key, other.events.known, other.items)

    def last(self, asked: AnyLookUps, length: int) -> Ragged:
        """The last `length` items that were known at N look-ups, oldest first; of one moment, in the items' order."""
        seen = SeenEvents(self, asked)
        parts = list(zip(seen.memories, seen.last_events(length), strict=True))
        items = np.concatenate([memory.items[index] for memory, (index, _) in parts])
        together = np.sum([lengths for _, (_, lengths) in parts], axis=0)
        if len(parts) == 1 or not len(items):
            return Ragged(items, together.astype(np.int32))
        number = np.concatenate([np.arange(len(asked)).repeat(lengths) for _, (_, lengths) in parts])
        known = np.concatenate([memory.events.known[index] for memory, (index, _) in parts])
        lengths = np.minimum(together, length)
        last = consecutive(np.cumsum(together) - lengths, lengths)
        return Ragged(items[np.lexsort((items, known, number))[last]], lengths.astype(np.int32))

    def compacted(self, moment: int, length: int) -> HistoryMemory:
        """What requests at `moment` or later, which ask for `length` items, can ask for."""
        # The last `length` that are known by then; later events keep these in reach until they become known themselves.
        events = self.events
        known_by_then = np.add.reduceat(np.append(events.known <= moment, 0), events.starts[:-1])
        within_key = np.arange(len(events)) - events.starts[events.number]
        needed = within_key >= (known_by_then - length)[events.number]
        if self.lives is not None:
            needed &= ~self.lives.ended(moment)
        left = KnownEvents(events.key[needed], events.known[needed])
        return HistoryMemory(left, self.items[needed], self._later_floor(moment), self.forget_after)

    def to_columns(self) -> dict[str, np.ndarray]:
        """The events, sorted by key and time."""
        return {"key": self.events.key, "known": self.events.known, "item": self.items}

    @staticmethod
    def from_columns(
        columns: Mapping[str, np.ndarray], floor: int | None, forget_after: int | None = None
    ) -> HistoryMemory:
        """The memory that `to_columns` gave."""
        return HistoryMemory(KnownEvents(columns["key"], columns["known"]), columns["item"], floor, forget_after)
