"""The lives of keys, where what is known of a key is forgotten once nothing new has become known of it for some time.

A gap of more than `forget_after` between two events of a key, in the order in which they became known, ends a life. A
look-up sees the life of the last event known at its time, and nothing once this event is more than `forget_after` past.
So what it sees depends on the events and its time alone, and not on what was dropped, or when.

Running totals go on through all lives of a key: a look-up subtracts those before the life that it sees. Lives that no
later look-up sees are dropped (`Lives.ended`), but some days later, since an event that comes late may still go on with
one of them, or join it to the next.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from mmoe_rec.point_in_time.join import KnownEvents

LATE_DAYS = 7
"""Events that come at most this late, or `forget_after` where that is shorter, count as if they had come on time."""
_LATE = LATE_DAYS * 86_400_000_000


class Lives:
    """The lives of events. forget_after: microseconds."""

    def __init__(self, events: KnownEvents, forget_after: int) -> None:
        self.events, self.forget_after = events, forget_after

    @cached_property
    def _begins(self) -> np.ndarray:
        """(E,) bool: the first events of lives."""
        known = self.events.known
        begins = np.append(True, known[1:] - known[:-1] > self.forget_after)[: len(known)]
        begins[self.events.starts[:-1]] = True
        return begins

    @cached_property
    def ends(self) -> np.ndarray:
        """(E,) bool: the last events of lives."""
        return np.append(self._begins[1:], True)[: len(self.events)]

    @cached_property
    def before(self) -> np.ndarray:
        """(E,) int32, int64 of very many: of each event, the last one of its key in earlier lives, -1 for none."""
        small = len(self.events) < 2**31
        place: np.ndarray = np.arange(len(self.events), dtype=np.int32 if small else np.int64)
        place *= self._begins
        np.maximum.accumulate(place, out=place)  # the first event of each one's life
        of_key = np.zeros(len(place), bool)
        of_key[self.events.starts[:-1]] = True
        none = of_key.take(place)
        place -= 1
        place[none] = -1
        return place

    def forgotten(self, last: np.ndarray, times: np.ndarray) -> np.ndarray:
        """(N,) int64 index of the last event that look-ups no longer see, -1 for none.

        last: (N,) int64 the last events known at the look-ups' times, -1 for none; times: (N,) int64 microseconds.
        """
        if not len(self.events):
            return np.full(len(last), -1, np.int64)
        known = np.maximum(last, 0)
        over = times - self.events.known.take(known) > self.forget_after
        return np.where(over | (last < 0), last, self.before.take(known))

    def ended(self, moment: int) -> np.ndarray:
        """(E,) bool: events that no look-up at `moment` or later sees, even if others come late; of each key, all up to
        one of them."""
        over = self.events.known[self.ends] < moment - self.forget_after - min(self.forget_after, _LATE)
        return over[np.cumsum(self._begins) - 1]
