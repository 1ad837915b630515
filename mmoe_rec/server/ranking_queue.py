"""Calls wait in a queue for one thread that ranks; those that wait while a pass is under way share the next one.

One thread, as torch has one thread and Python's own work holds the interpreter's lock: a second pass at the same time
would only slow the first. A pass of several calls that fails is done again call by call, so that each caller gets an
answer to what they sent and never another one's error.

Work on events lets passes end first (`Passes`). Done beside a pass, it makes the requests in it wait longer: in one
process it shares the interpreter's lock with it, and in another one the machine's caches and memory.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import islice
from time import monotonic, perf_counter
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect

from mmoe_rec.errors import RequestError
from mmoe_rec.inference.ranking import Ranking
from mmoe_rec.inference.request import Request
from mmoe_rec.server.limits import INTERNAL, Limits, Refused
from mmoe_rec.server.metrics import Metrics
from mmoe_rec.server.models import Models

if TYPE_CHECKING:
    from mmoe_rec.inference.ranker import Ranker

Answers = list[Ranking | RequestError]
JOINT_CANDIDATES = 4_096
"""Calls share a pass up to so many candidates: beyond, a call would wait longer for the others than it saves."""

LONGEST_WAIT_SECONDS = 0.03
"""Where one pass follows the other, work on events waits no longer than this."""
_LOOK_SECONDS = 0.003
"""Between looks at whether passes have ended; a pass takes several times as long."""

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Queued:
    """A call in the queue."""

    requests: Sequence[Request | RequestError]
    candidates: int
    answers: asyncio.Future[Answers]
    since: float = field(default_factory=perf_counter)

    def leave(self) -> None:
        """Nobody waits for the answer any more."""
        if not self.answers.done():
            self.answers.set_exception(ClientDisconnect())


class RankingQueue:
    """Ranks calls with the current model. Used from one event loop alone. passes: are told when one is under way."""

    def __init__(self, models: Models, limits: Limits, metrics: Metrics, passes: Passes) -> None:
        self._models, self._limits, self._metrics, self._passes = models, limits, metrics, passes
        self._queue: deque[_Queued] = deque()
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._busy_since: float | None = None
        # A daemon: a pass that hangs must not keep the process from ending. It ends once nobody holds the queue.
        threading.Thread(target=_work, args=(self._tasks,), name="ranking", daemon=True).start()
        weakref.finalize(self, self._tasks.put, None)

    @property
    def is_stuck(self) -> bool:
        """Whether a pass has taken so long that it will hardly end."""
        since = self._busy_since
        return since is not None and monotonic() - since > 3 * self._limits.answer_seconds

    @property
    def is_busy(self) -> bool:
        """Whether a pass is under way."""
        return self._busy_since is not None

    def between_passes(self, function: Callable[[], None]) -> Future[None]:
        """Has the thread of the passes call a function once none is under way; from any thread."""
        done: Future[None] = Future()

        def work() -> None:
            try:
                function()
            except BaseException as error:  # whoever waits is told, and the thread goes on
                done.set_exception(error)
            else:
                done.set_result(None)

        self._tasks.put(work)
        return done

    async def queue(
        self, requests: Sequence[Request | RequestError], candidates: int, gone: asyncio.Future[None]
    ) -> Answers:
        """One answer a request, as `Ranker.rank_many` gives them.

        candidates: of all requests, at least; gone: ends once the caller has left. Raises Refused where the time is
        over, or the model fails, and ClientDisconnect for a caller who has left: nothing is ranked for them, unless the
        pass is under way.
        """
        if not any(isinstance(each, Request) for each in requests):
            return [each for each in requests if isinstance(each, RequestError)]
        call = _Queued(requests, candidates, asyncio.get_running_loop().create_future())
        gone.add_done_callback(lambda _: call.leave())
        self._queue.append(call)
        self._metrics.waiting.set(len(self._queue))
        self._start_pass()
        try:
            async with asyncio.timeout(self._limits.answer_seconds):
                return await call.answers
        except TimeoutError:
            raise Refused(
                504,
                f"no answer within {self._limits.answer_seconds:g} seconds (setting `serving.answer_seconds`)",
                "too_long",
                "DEADLINE_EXCEEDED",
            ) from None

    def _start_pass(self) -> None:
        """Gives the thread the calls that wait, unless it has some."""
        if self._busy_since is not None:
            return
        calls: list[_Queued] = []
        candidates = 0
        while self._queue and (not calls or candidates + self._queue[0].candidates <= JOINT_CANDIDATES):
            call = self._queue.popleft()
            if not call.answers.done():  # else its time is over, or its caller has gone
                calls.append(call)
                candidates += call.candidates
        self._metrics.waiting.set(len(self._queue))
        if not calls:
            return
        served = self._models.current
        assert served is not None, "a call was let in before there was a model"
        self._busy_since = monotonic()
        self._passes.begin()
        self._metrics.passes.observe(len(calls))
        for call in calls:
            self._metrics.stages.labels("wait").observe(perf_counter() - call.since)
        loop, ranker, learning = asyncio.get_running_loop(), served.ranker, served.learning

        def work() -> None:
            position = None if learning is None else str(learning.position)  # events are taken between passes alone
            with self._metrics.timed("score"):
                answers = rank_together(ranker, [call.requests for call in calls])
            if position is not None:
                answers = [each if isinstance(each, Refused) else _at(position, each) for each in answers]
            loop.call_soon_threadsafe(self._end_pass, calls, answers)

        self._tasks.put(work)

    def _end_pass(self, calls: Sequence[_Queued], answers: Sequence[Answers | Refused]) -> None:
        self._busy_since = None
        for call, each in zip(calls, answers, strict=True):
            if call.answers.done():
                continue
            if isinstance(each, Refused):
                call.answers.set_exception(each)
            else:
                call.answers.set_result(each)
        self._start_pass()
        asyncio.get_running_loop().call_soon(self._let_others_work)  # after the replies of these calls are written

    def _let_others_work(self) -> None:
        if self._busy_since is None:
            self._passes.end()


def _work(tasks: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    """What the thread does, until there is no task but None."""
    import torch

    # In this thread, as OpenMP counts for each thread. Why one: see `mmoe_rec.inference.mlflow_model`.
    torch.set_num_threads(1)
    while (task := tasks.get()) is not None:
        try:
            task()
        except RuntimeError:  # the event loop has ended, and nobody waits
            _log.debug("a pass ended after the server", exc_info=True)
        del task  # by which the last pass would hold its model until the next one


def _at(position: str, answers: Answers) -> Answers:
    """Answers that say, for the log of requests, up to where of the journal the model knew events."""
    return [
        replace(each, journal_position=position) if isinstance(each, Ranking) and each.seen is not None else each
        for each in answers
    ]


def rank_together(ranker: Ranker, calls: Sequence[Sequence[Request | RequestError]]) -> list[Answers | Refused]:
    """The answers of each call, from one pass where that succeeds; of each alone where it does not."""
    try:
        answers = iter(ranker.rank_many([request for call in calls for request in call]))
        return [list(islice(answers, len(call))) for call in calls]
    except Exception as error:
        if len(calls) > 1:
            return [rank_together(ranker, [call])[0] for call in calls]
        _log.exception("the model failed")
        # What MLflow's server says of a RuntimeError. Other errors may hold anything of this machine.
        sentence = " ".join(str(error).split()) if type(error) is RuntimeError else "the model failed; the log says why"
        return [Refused(500, sentence, "model", INTERNAL)]


class Passes:
    """Which workers of a server rank now, as work on events sees them.

    marks: of each worker, 0 or 1, in memory that they share; number: which is this worker's.
    """

    def __init__(self, marks: bytearray | memoryview | None = None, number: int = 0) -> None:
        self._marks, self._number = bytearray(1) if marks is None else marks, number

    def begin(self) -> None:
        """A pass of this worker begins."""
        self._marks[self._number] = 1

    def end(self) -> None:
        """It has ended, and its replies are written."""
        self._marks[self._number] = 0

    def wait(self) -> None:
        """Ends once no worker ranks, or after `LONGEST_WAIT_SECONDS`; for threads."""
        until = time.monotonic() + LONGEST_WAIT_SECONDS
        while any(self._marks) and time.monotonic() < until:
            time.sleep(_LOOK_SECONDS)
