"""Whether a worker ranks at this moment: work on events lets passes end first.

Beside a pass, such work makes its caller wait longer: in the same process it shares the interpreter's lock, and in
another one the machine's caches and memory. All workers of a server see of each other whether they rank.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import MutableSequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import RawArray

LONGEST_WAIT_SECONDS = 0.03
"""Where one pass follows the other, work on events has its turn in between."""
SHARE = 6
"""After a wait, calls do not wait for so many times as long: a caller that sends one call after another loses a seventh
of the time at most, and so does one beside passes that follow each other without a pause."""
_LOOK_SECONDS = 0.002


@dataclass(frozen=True)
class Place:
    """A worker's place among those of a server. under_way: a byte a worker, not 0 while it ranks."""

    under_way: MutableSequence[int]
    number: int = 0

    def leave(self) -> None:
        """For a worker that has ended, whatever it was at."""
        self.under_way[self.number] = 0


def places(count: int) -> list[Place]:
    """Places for so many workers, in memory that they share."""
    under_way = RawArray("b", count)
    return [Place(under_way, number) for number in range(count)]


class Passes:
    """The passes of a worker and of the others. place: None for a server of one process."""

    def __init__(self, place: Place | None = None) -> None:
        self._place = place or Place(bytearray(1))
        self._none_here = threading.Event()
        self._none_here.set()
        self._waiting: list[asyncio.Future[None]] = []
        self._next_wait = 0.0

    def begin(self) -> None:
        """A pass of this worker begins."""
        self._none_here.clear()
        self._place.under_way[self._place.number] = 1

    def end(self) -> None:
        """It has ended, and its replies are written. Called in the event loop."""
        self._place.under_way[self._place.number] = 0
        self._none_here.set()
        for each in self._waiting:
            if not each.done():
                each.set_result(None)
        self._waiting.clear()

    def wait(self) -> None:
        """Ends once no worker ranks, or after `LONGEST_WAIT_SECONDS`; for threads of this worker."""
        until = time.monotonic() + LONGEST_WAIT_SECONDS
        while any(self._place.under_way) and (left := until - time.monotonic()) > 0:
            if self._none_here.wait(left):
                time.sleep(min(left, _LOOK_SECONDS))

    async def ended(self) -> None:
        """As `wait`, in the event loop, but not soon after another wait (see `SHARE`)."""
        started = time.monotonic()
        if not any(self._place.under_way) or started < self._next_wait:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(LONGEST_WAIT_SECONDS):
                while any(self._place.under_way):
                    await self._look_again()
        ended = time.monotonic()
        self._next_wait = ended + SHARE * (ended - started)

    async def _look_again(self) -> None:
        """Ends once it is worth another look: of this worker's own pass its end is told."""
        if self._none_here.is_set():
            await asyncio.sleep(_LOOK_SECONDS)
        else:
            own: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(own)
            await own
