"""What had happened and was known before a moment: events per key, ordered by the time at which they became known.

This is the one mechanism behind counters and histories. A label of a row requested at time r that matures after m
becomes known at max(r + 1 microsecond, r + m); a request at time t sees the events known at t or before. So a request
sees rows of strictly earlier requests whose label had matured, never itself and never the future.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

# Where there are so many times more events than rows, rows are searched for one by one.
_ROWS_OF_A_SEARCH = 16


@dataclass(frozen=True)
class Arrival:
    """The order in which events became known.

    number: (E,) int64 of each event, rising with its known time; known: (A,) int64 rising known times by that number,
    which may count further events.
    """

    number: np.ndarray
    known: np.ndarray

    def of(self, events: np.ndarray) -> Arrival:
        """The arrival of some of the events, (E,) bool."""
        return Arrival(self.number[events], self.known)


class KnownEvents:
    """Events sorted by (key, known time), and the last one known at a given time.

    key: (E,) uint64; known: (E,) int64 microseconds; arrival: of these events, where it is at hand.
    """

    def __init__(self, key: np.ndarray, known: np.ndarray, arrival: Arrival | None = None) -> None:
        self.key = key
        self.known = known
        self._given = arrival

    def __len__(self) -> int:
        return len(self.key)

    @cached_property
    def starts(self) -> np.ndarray:
        """(G + 1,) int64 index of the first event of each of G keys, then E."""
        changes = np.append(len(self.key) > 0, self.key[1:] != self.key[:-1])
        return np.append(np.flatnonzero(changes), len(self.key)).astype(np.int64)

    @cached_property
    def keys(self) -> np.ndarray:
        """(G,) uint64 distinct keys, rising."""
        return self.key[self.starts[:-1]]

    @cached_property
    def _arrival(self) -> Arrival:
        if self._given is not None:
            return self._given
        order = np.argsort(self.known)
        number = np.empty(len(order), np.int64)
        number[order] = np.arange(len(order))
        return Arrival(number, self.known[order])

    def last(self, keys: np.ndarray, times: np.ndarray) -> np.ndarray:
        """(N,) int64 index of the last event of each key, (N,) uint64, known at `times`, (N,) int64; -1 for none."""
        if not len(self) or not len(keys):
            return np.full(len(keys), -1, np.int64)
        joined = None if len(keys) * _ROWS_OF_A_SEARCH < len(self) else self._joined(keys, times)
        return self.last_of_groups(self.groups(keys), times) if joined is None else joined

    def groups(self, keys: np.ndarray) -> np.ndarray:
        """(N,) int64 number of each key among `self.keys`, -1 for a key without events."""
        if not len(self.keys):
            return np.full(len(keys), -1, np.int64)
        found = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[found] == keys, found, -1)

    def last_of_groups(self, groups: np.ndarray, times: np.ndarray) -> np.ndarray:
        """`last` for keys by their number: a binary search within each key's events, of all rows at once."""
        known_groups = np.maximum(groups, 0)
        first = low = self.starts[known_groups]
        high = np.where(groups >= 0, self.starts[known_groups + 1], low)
        # The first event after `times` lies between low and high.
        while (searching := low < high).any():
            middle = (low + high) >> 1
            earlier = self.known[np.minimum(middle, len(self) - 1)] <= times
            low = np.where(searching & earlier, middle + 1, low)
            high = np.where(searching & ~earlier, middle, high)
        return np.where(low > first, low - 1, -1)

    def _joined(self, keys: np.ndarray, times: np.ndarray) -> np.ndarray | None:
        """`last` by one sort of events and rows together by key and time, much faster for many rows.

        None where two keys are alike in as many bits as there is room for.
        """
        number, known = self._arrival.number, self._arrival.known
        arrived = np.searchsorted(known, times, side="right")
        order = np.argsort(arrived) if (arrived[1:] < arrived[:-1]).any() else None
        if order is not None:
            keys, arrived = keys[order], arrived[order]
        # Places in time of events and rows together: a row comes after the events that had arrived, before the next.
        rows = np.arange(len(keys))
        row_place = rows + arrived
        rows_before = np.cumsum(np.bincount(arrived, minlength=len(known) + 1))
        event_place = number + rows_before[number]
        who = np.full(len(known) + len(keys), -1)
        who[row_place] = rows

        bits = len(who).bit_length()
        codes = _codes(np.append(self.key, keys), 64 - bits)
        if (codes[self.starts[1:-1]] == codes[self.starts[1:-1] - 1]).any():
            return None
        ordered = np.sort((codes << np.uint64(bits)) | np.append(event_place, row_place).view(np.uint64))
        who = who[(ordered & np.uint64(2**bits - 1)).view(np.int64)]
        is_row = who >= 0
        index = (np.cumsum(~is_row) - 1)[is_row]
        who = who[is_row]
        # What stands before a row may be an event of another key.
        found = (index >= 0) & (self.key[np.maximum(index, 0)] == keys[who])
        result = np.empty(len(keys), np.int64)
        result[who if order is None else order[who]] = np.where(found, index, -1)
        return result

    def needed_since(self, moment: int) -> np.ndarray:
        """(E,) bool: events known after `moment`, and the last one before it of each key, which carries its totals."""
        later = self.known > moment
        last_of_key = np.append(self.key[1:] != self.key[:-1], True) if len(self.key) else np.empty(0, bool)
        return later | last_of_key | np.append(later[1:], False)


def known_at(times: np.ndarray, matures_after: int) -> np.ndarray:
    """(N,) int64 microseconds at which the labels of rows requested at `times` become known."""
    return times + max(1, matures_after)


def sort_events(key: np.ndarray, known: np.ndarray, value: np.ndarray | None) -> tuple[np.ndarray, Arrival]:
    """(E,) int64 order by key, then known time, then value (where it matters), and the arrival of the sorted events.

    Events may come in any order; in time order, as they do from a log, it is many times faster than `np.lexsort`.
    """
    by_time = np.argsort(known) if (known[1:] < known[:-1]).any() else None
    in_time = key if by_time is None else key[by_time]
    bits = len(key).bit_length()
    codes = _codes(in_time, 64 - bits)
    ordered = np.sort((codes << np.uint64(bits)) | np.arange(len(key), dtype=np.uint64))
    number = (ordered & np.uint64(2**bits - 1)).view(np.int64)
    order = number if by_time is None else by_time[number]
    code, sorted_key = ordered >> np.uint64(bits), key[order]
    if ((code[1:] == code[:-1]) & (sorted_key[1:] != sorted_key[:-1])).any():
        # Two keys are alike in as many bits as there is room for.
        number = np.lexsort((np.arange(len(key)), in_time))
        order = number if by_time is None else by_time[number]
        sorted_key = key[order]
    if value is not None:
        moment = known[order]
        same = (sorted_key[1:] == sorted_key[:-1]) & (moment[1:] == moment[:-1])
        if same.any():
            tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
            group = np.cumsum(np.append(True, ~same))[tied]
            order[tied] = order[tied][np.lexsort((value[order[tied]], group))]
    return order, Arrival(number, known if by_time is None else known[by_time])


def _codes(keys: np.ndarray, bits: int) -> np.ndarray:
    """(N,) uint64 below 2^bits in the order of the keys; equal for keys that differ in their last bits only."""
    if not len(keys):
        return keys
    least = keys.min()
    width = int(keys.max() - least).bit_length()
    return (keys - least) >> np.uint64(max(0, width - bits))
