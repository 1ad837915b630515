"""Up to which message a replica has come, and up to where its topic goes, for threads that wait for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

BEHIND_SECONDS = 1.0
"""A replica is behind where it lacks messages for longer: a second's messages may be on their way."""


@dataclass(frozen=True)
class Status:
    """next: offset of the next message to take in; lag: messages that the topic held beyond when a broker has last told
    up to where it goes; heard: when that was, seconds since 1970 UTC; age: seconds since then; is_current: whether that
    is so short a time that the lag may be taken for that of now; behind: for how many seconds it has lacked messages
    that a broker had told of, 0 where it is not behind; failure: why no more is taken in, None where it is."""

    next: int
    lag: int
    heard: float
    age: float
    is_current: bool
    behind: float
    failure: str | None


class Reached:
    """Threads share it. next: offset of the message that comes next; high: of the topic's next one, as it was last
    told; heard: when that was, seconds since 1970 UTC. clock: seconds, monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.next = self.high = 0
        self.heard = time.time()
        self._clock, self._moved = clock, threading.Condition()
        self._answered = self._told = clock()
        """When a broker has last answered anything, and up to where the topic goes; `_since` when something has been
        lacking, None where nothing is."""
        self._since: float | None = None

    def hear(self) -> None:
        """A broker has answered."""
        self._answered = self._clock()

    @property
    def silence(self) -> float:
        """Seconds since a broker has last answered."""
        return self._clock() - self._answered

    @property
    def age(self) -> float:
        """Seconds since a broker has last told up to where the topic goes."""
        return self._clock() - self._told

    def tell(self, high: int) -> None:
        """A broker has told up to where the topic goes."""
        with self._moved:
            self._answered = self._clock()
            self.high, self._told, self.heard = max(high, self.next), self._clock(), time.time()
            if self.high == self.next:
                self._since = None
            elif self._since is None:
                self._since = self._told

    def advance(self, following: int) -> None:
        """All messages before an offset are taken in."""
        with self._moved:
            self.next = max(self.next, following)
            self.high = max(self.high, self.next)
            if self.next == self.high and self.age <= BEHIND_SECONDS:
                self._since = None  # else the topic may have grown as much meanwhile
            self._moved.notify_all()

    @property
    def behind(self) -> float:
        """For how many seconds it has lacked messages; 0 where that is less than `BEHIND_SECONDS`."""
        since = self._since
        seconds = 0.0 if since is None else self._clock() - since
        return seconds if seconds > BEHIND_SECONDS else 0.0

    def wait(self, offset: int, seconds: float) -> bool:
        """Waits until all before an offset is taken in, or so many seconds; gives whether it is."""
        with self._moved:
            return self._moved.wait_for(lambda: self.next >= offset, max(seconds, 0.0))
