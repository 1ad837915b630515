"""A worker's model learns what comes into the journal, whichever worker has accepted it.

A thread of its own reads the journal and prepares what the model is to know next. The model takes it between two
passes, so that a pass sees one state of all counters, histories and latest values.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

from mmoe_rec.errors import RequestError, UserError
from mmoe_rec.live.journal import parse_position
from mmoe_rec.server.limits import INTERNAL, Limits, Refused
from mmoe_rec.server.metrics import Metrics
from mmoe_rec.server.models import Models, sentence_of
from mmoe_rec.server.ranking_queue import Passes, RankingQueue

if TYPE_CHECKING:
    from mmoe_rec.live.learning import Learning

PAUSE_SECONDS = 0.05
"""Between looks at a journal in which other processes write; what this process has accepted is looked for at once."""
_REST_SECONDS = 0.3
"""After it has prepared something, the thread leaves the processor to requests, unless a caller waits: a step costs
nearly the same for few rows as for many."""
_PAUSE_AFTER_FAILURE_SECONDS = 5.0
_NICER = 10

_log = logging.getLogger(__name__)


class Following:
    """Keeps the current model at the journal's end. failure: why it has not been able to since, None if it has."""

    def __init__(self, models: Models, queue: RankingQueue, passes: Passes, limits: Limits, metrics: Metrics) -> None:
        self._models, self._queue, self._passes = models, queue, passes
        self._limits, self._metrics = limits, metrics
        self.failure: str | None = None
        self._look, self._asked = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = []

    def start(self) -> None:
        """Follows from now on, in a thread of its own, until nobody holds it any more."""
        signals = self._asked, self._look
        threading.Thread(target=_follow, args=(weakref.ref(self), *signals), name="following", daemon=True).start()

    def look_at_once(self) -> None:
        """Ends a pause, as this process has appended something."""
        self._look.set()

    @property
    def gap(self) -> str | None:
        """Why the current model does not know all of the journal, as a sentence; None where it does."""
        learning = self._learning()
        reasons = [self.failure, None if learning is None else learning.gap]
        return "; ".join(filter(None, reasons)) or None

    @property
    def position(self) -> str | None:
        """Up to where the current model knows the journal, as text."""
        learning = self._learning()
        return None if learning is None else str(learning.position)

    async def reach(self, text: str) -> None:
        """Ends once the current model knows all up to a position, as text.

        Raises Refused for a text that is no position, or lies beyond the journal's end, and after too long a time.
        """
        until, learning = time.monotonic() + self._limits.answer_seconds, self._learning()
        try:
            position = parse_position(text)
            if learning is not None and position > learning.position:
                await asyncio.get_running_loop().run_in_executor(None, learning.journal.check, position)
        except RequestError as error:
            raise Refused(400, f"the query parameter 'after': {error}", "body") from None
        except UserError as error:
            _log.error("position %s can't be looked up: %s", text, error)
            sentence = f"position {text} can't be looked up in the journal; the log says why"
            raise Refused(503, sentence, "disk", INTERNAL, 5) from None
        await self._reach(position, until)

    async def reach_end(self) -> None:
        """Ends once the current model knows all that the journal holds now. Raises Refused after too long a time."""
        until = time.monotonic() + self._limits.answer_seconds
        if (learning := self._learning()) is not None:
            await self._reach(await asyncio.get_running_loop().run_in_executor(None, learning.journal.end), until)

    async def _reach(self, position: int, until: float) -> None:
        reached = asyncio.Event()
        waiting = (position, asyncio.get_running_loop(), reached)
        with self._lock:
            if self._has_reached(position):
                return
            self._waiting.append(waiting)
        self._asked.set()  # a caller waits, and so the thread does not rest
        self._look.set()
        try:
            async with asyncio.timeout(max(until - time.monotonic(), 0.0)):
                await reached.wait()
        except TimeoutError:
            why = self.failure or "setting `serving.answer_seconds`"
            sentence = f"the model has not learnt all events up to {position} in time ({why}); come again"
            raise Refused(503, sentence, "behind", "TEMPORARILY_UNAVAILABLE", 1) from None
        finally:
            with self._lock:
                self._waiting.remove(waiting)

    def _has_reached(self, position: int) -> bool:
        learning = self._learning()
        return learning is not None and learning.position >= position

    def _learning(self) -> Learning | None:
        served = self._models.current
        return None if served is None else served.learning

    def look(self) -> float:
        """Learns what is new; gives the seconds to rest."""
        try:
            rest = _REST_SECONDS if self._step() and not self._waiting else 0.0
            if self.failure is not None:
                _log.info("events are learnt again")
            self.failure = None
        except Exception as error:  # whatever it is, the model goes on with what it knows, and says so
            if (failure := sentence_of(error)) != self.failure:
                is_bug = not isinstance(error, UserError)
                _log.error("the model learns no further events: %s", failure, exc_info=is_bug)
            self.failure, rest = failure, _PAUSE_AFTER_FAILURE_SECONDS
        if (learning := self._learning()) is not None:  # also of one that has learnt before it served
            self._metrics.live_rows.set(learning.ranker.live_rows)
        self._tell()  # also of what a model knows that has just taken the place of another one
        return rest

    def _step(self) -> bool:
        """Learns what is new, if there is something."""
        if not self._waiting:  # a caller would wait, too
            self._passes.wait()
        learning = self._learning()
        if learning is None or (learnt := learning.read()) is None:
            return False
        self._queue.between_passes(lambda: learning.take(learnt)).result()
        now = time.time_ns() // 1_000
        for accepted in learnt.accepted_at:
            self._metrics.visible.observe(max(now - accepted, 0) / 1e6)
        for outcome, rows in learnt.counts.items():
            self._metrics.learnt.labels(outcome).inc(rows)
        return True

    def _tell(self) -> None:
        with self._lock:
            for position, loop, reached in self._waiting:
                if self._has_reached(position):
                    with suppress(RuntimeError):  # the loop has ended
                        loop.call_soon_threadsafe(reached.set)


def _follow(following: weakref.ref[Following], asked: threading.Event, look: threading.Event) -> None:
    """What the thread does: it holds what it follows for only while it works. asked, look: end its pauses."""
    step_back()
    while (it := following()) is not None:
        rest = it.look()
        del it
        asked.wait(rest)
        asked.clear()
        look.wait(PAUSE_SECONDS)
        look.clear()


def step_back() -> None:
    """The calling thread gets less of a processor than those that answer requests, while more want one than there are.

    On Linux alone, where threads have priorities of their own.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, min(os.getpriority(os.PRIO_PROCESS, thread) + _NICER, 19))
