"""Whether a worker ranks at this moment: work on events lets passes end first.

Done beside a pass, such work makes the requests in it wait longer: in the same process it shares the interpreter's
lock with it, and in another one the machine's caches and memory. So all workers of a server see of each other whether
they rank. Many workers leave no moment in which none ranks; where that was waited for in vain, each looks for its own
passes alone, until there is such a moment.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import MutableSequence
from dataclasses import dataclass
from multiprocessing import RawArray

LONGEST_WAIT_SECONDS = 0.03
"""Where one pass follows the other, work on events waits no longer than this."""
PAUSE_PER_WAIT = 6
"""After they have waited, a worker's calls do not wait for so many times as long: a caller that sends one call after
another loses a seventh of the time at most."""
_LOOK_SECONDS = 0.005
"""Between looks at other workers, which tell nobody when their passes end; a pass takes several times as long."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mark:
    """By which a worker says whether it ranks. all: of each worker of the server, 0 or 1; number: which is its own."""

    all: MutableSequence[int]
    number: int = 0

    def set(self, is_ranking: bool) -> None:
        """Says so."""
        self.all[self.number] = is_ranking


def marks(count: int) -> list[Mark]:
    """Of so many workers, in memory that they share; each for itself on a machine that has none."""
    try:
        shared = RawArray("b", count)
    except OSError as error:
        _log.warning("workers can't see of each other whether they rank: %s", error.strerror or error)
        return [Mark(bytearray(1)) for _ in range(count)]
    return [Mark(shared, number) for number in range(count)]


class Passes:
    """A worker's own passes, and those of others. mark: None for a server of one process."""

    def __init__(self, mark: Mark | None = None) -> None:
        self._mark = mark or Mark(bytearray(1))
        self._none_here = threading.Event()
        self._none_here.set()
        self._is_in_vain = False  # to wait for others
        self._own_end: asyncio.Future[None] | None = None
        self._wait: asyncio.Task[None] | None = None
        self._next_wait = 0.0

    def begin(self) -> None:
        """A pass of this worker begins."""
        self._none_here.clear()
        self._mark.set(True)

    def end(self) -> None:
        """It has ended, and its replies are written. Called in the event loop."""
        self._mark.set(False)
        self._none_here.set()
        if self._own_end is not None and not self._own_end.done():
            self._own_end.set_result(None)

    def wait(self) -> None:
        """Ends once passes have ended, or after `LONGEST_WAIT_SECONDS`; for threads."""
        until = time.monotonic() + LONGEST_WAIT_SECONDS
        while not self._have_ended():
            if (left := until - time.monotonic()) <= 0:
                self._give_up()
                return
            if self._none_here.is_set():
                time.sleep(min(left, _LOOK_SECONDS))
            else:
                self._none_here.wait(left)

    async def let_end(self) -> None:
        """As `wait`, for calls. All that wait do so together, and soon after that none does (see `PAUSE_PER_WAIT`)."""
        if self._wait is None or self._wait.done():
            if time.monotonic() < self._next_wait or self._have_ended():
                return
            self._wait = asyncio.create_task(self._until_ended())
        await asyncio.shield(self._wait)

    async def _until_ended(self) -> None:
        started = time.monotonic()
        try:
            async with asyncio.timeout(LONGEST_WAIT_SECONDS):
                while not self._have_ended():
                    await self._look_again()
        except TimeoutError:
            self._give_up()
        ended = time.monotonic()
        self._next_wait = ended + PAUSE_PER_WAIT * (ended - started)

    async def _look_again(self) -> None:
        """Ends once it is worth another look."""
        if self._none_here.is_set():
            await asyncio.sleep(_LOOK_SECONDS)
        else:
            self._own_end = asyncio.get_running_loop().create_future()
            await self._own_end

    def _have_ended(self) -> bool:
        """Whether there is no pass to wait for."""
        if not any(self._mark.all):
            self._is_in_vain = False
            return True
        return self._is_in_vain and self._none_here.is_set()

    def _give_up(self) -> None:
        self._is_in_vain = self._none_here.is_set()
