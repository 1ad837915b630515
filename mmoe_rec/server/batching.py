"""Calls wait in a queue for one thread that ranks; those that wait while a pass is under way share the next one.

One thread, as torch has one thread and Python's own work holds the interpreter's lock: a second pass at the same time
would only slow the first. A pass of several calls that fails is done again call by call, so that each caller gets an
answer to what they sent and never another one's error.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect

from mmoe_rec.inference.errors import RequestError
from mmoe_rec.inference.ranking import Ranking
from mmoe_rec.inference.requests.envelope import ranked_calls
from mmoe_rec.server.limits import INTERNAL, Limits, Refused
from mmoe_rec.server.metrics import Metrics
from mmoe_rec.server.models import Models
from mmoe_rec.server.passes import Passes

if TYPE_CHECKING:
    from mmoe_rec.inference.loaded import LoadedRanker

Answers = list[Ranking | RequestError]
JOINT_CANDIDATES = 4_096
"""Calls share a pass up to so many candidates: beyond, a call would wait longer for the others than it saves."""

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Waiting:
    """A call in the queue."""

    elements: Sequence[Mapping[str, Any]]
    params: Mapping[str, Any]
    candidates: int
    found: asyncio.Future[Answers]
    since: float = field(default_factory=perf_counter)

    def leave(self) -> None:
        """Nobody waits for the answer any more."""
        if not self.found.done():
            self.found.set_exception(ClientDisconnect())


class Batcher:
    """Ranks calls with the current model. Used from one event loop alone. passes: are told when one is under way."""

    def __init__(self, models: Models, limits: Limits, metrics: Metrics, passes: Passes) -> None:
        self._models, self._limits, self._metrics, self._passes = models, limits, metrics, passes
        self._queue: deque[_Waiting] = deque()
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._busy_since: float | None = None
        # A daemon: a pass that hangs must not keep the process from ending. It ends once nobody holds the batcher.
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

    async def answers(
        self,
        elements: Sequence[Mapping[str, Any]],
        params: Mapping[str, Any],
        candidates: int,
        gone: asyncio.Future[None] | None = None,
    ) -> Answers:
        """One answer an element, as `ranked` gives them.

        candidates: of all elements, at least; gone: ends once the caller has left. Raises Refused where the time is
        over, or the model fails, and ClientDisconnect for a caller who has left: nothing is ranked for them, unless the
        pass is under way.
        """
        call = _Waiting(elements, params, candidates, asyncio.get_running_loop().create_future())
        if gone is not None:
            gone.add_done_callback(lambda _: call.leave())
        self._queue.append(call)
        self._metrics.waiting.set(len(self._queue))
        self._start_pass()
        try:
            async with asyncio.timeout(self._limits.answer_seconds):
                return await call.found
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
        calls: list[_Waiting] = []
        candidates = 0
        while self._queue and (not calls or candidates + self._queue[0].candidates <= JOINT_CANDIDATES):
            call = self._queue.popleft()
            if not call.found.done():  # else its time is over, or its caller has gone
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
                found = rank_together(ranker, [(call.elements, call.params) for call in calls])
            if position is not None:
                found = [each if isinstance(each, Refused) else _at(position, each) for each in found]
            loop.call_soon_threadsafe(self._end_pass, calls, found)

        self._tasks.put(work)

    def _end_pass(self, calls: Sequence[_Waiting], found: Sequence[Answers | Refused]) -> None:
        self._busy_since = None
        for call, answers in zip(calls, found, strict=True):
            if call.found.done():
                continue
            if isinstance(answers, Refused):
                call.found.set_exception(answers)
            else:
                call.found.set_result(answers)
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


def rank_together(
    ranker: LoadedRanker, calls: Sequence[tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]]
) -> list[Answers | Refused]:
    """The answers of each call, from one pass where that succeeds; of each alone where it does not."""
    try:
        return list(ranked_calls(ranker, calls))
    except Exception as error:
        if len(calls) > 1:
            return [rank_together(ranker, [call])[0] for call in calls]
        _log.exception("the model failed")
        # What MLflow's server says of a RuntimeError. Other errors may hold anything of this machine.
        told = " ".join(str(error).split()) if type(error) is RuntimeError else "the model failed; the log says why"
        return [Refused(500, told, "model", INTERNAL)]
