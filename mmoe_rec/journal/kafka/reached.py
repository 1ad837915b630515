"""Up to which message a replica has come, and up to where its topic goes, for threads that wait for it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

BEHIND_SECONDS = 1.0
"""A replica is behind where it lacks messages for longer: a second's messages may be on their way."""


@dataclass(frozen=True)
class Status:
    """next: offset of the next message to take in; lag: messages that the topic holds beyond; heard: seconds since
    1970 UTC when a broker has last answered; behind: for how many seconds it has lacked messages that a broker had
    told of, 0 where it is not behind; failure: why no more is taken in, None where it is."""

    next: int
    lag: int
    heard: float
    behind: float
    failure: str | None


class Reached:
    """Threads share it. next: offset of the message that comes next; high: of the topic's next one, as far as it is
    known; heard: seconds since 1970 UTC when a broker has last answered."""

    def __init__(self) -> None:
        self.next = self.high = 0
        self.heard = time.time()
        self._moved = threading.Condition()
        self._told: float | None = None
        """When `high` was asked for, and `_since` when, since which something has been lacking: monotonic."""
        self._since: float | None = None

    def hear(self) -> None:
        """A broker has answered."""
        self.heard = time.time()

    def tell(self, high: int) -> None:
        """A broker has told up to where the topic goes."""
        self.hear()
        with self._moved:
            self.high, self._told = max(high, self.next), time.monotonic()
            if self.high == self.next:
                self._since = None
            elif self._since is None:
                self._since = self._told

    def advance(self, following: int) -> None:
        """All messages before an offset are taken in."""
        with self._moved:
            self.next = max(self.next, following)
            self.high = max(self.high, self.next)
            if self.next == self.high and not self.is_old(BEHIND_SECONDS):
                self._since = None  # else the topic may have grown as much meanwhile
            self._moved.notify_all()

    def is_old(self, seconds: float) -> bool:
        """Whether a broker was last asked longer ago than so many seconds."""
        return self._told is None or time.monotonic() - self._told > seconds

    @property
    def behind(self) -> float:
        """For how many seconds it has lacked messages; 0 where that is less than `BEHIND_SECONDS`."""
        since = self._since
        age = 0.0 if since is None else time.monotonic() - since
        return age if age > BEHIND_SECONDS else 0.0

    def wait(self, offset: int, seconds: float) -> bool:
        """Waits until all before an offset is taken in, or so many seconds; gives whether it is."""
        with self._moved:
            return self._moved.wait_for(lambda: self.next >= offset, max(seconds, 0.0))
