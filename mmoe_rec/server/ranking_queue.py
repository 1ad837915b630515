"""Calls wait in a queue for one thread that ranks; those that wait while a pass is under way share the next one.

One thread, as torch has one thread and Python's own work holds the interpreter's lock: a second pass at the same time
would only slow the first. A pass of several calls that fails is done again call by call, so that each caller gets an
answer to what they sent and never another one's error.

A worker's model learns what comes into the journal, whichever worker has accepted it. A thread of its own
(`JournalFollower`) reads the journal and prepares what the model is to know next; the model takes it between two
passes, so that a pass sees one state of all counters, histories and latest values.
"""

import asyncio
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from time import monotonic, perf_counter

import torch
from starlette.requests import ClientDisconnect

from mmoe_rec.errors import RequestError, UserError
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.ranking import Ranking
from mmoe_rec.inference.request_reader import Request
from mmoe_rec.live.journal import parse_position
from mmoe_rec.server.models import EventIngester, ModelManager
from mmoe_rec.server.options import INTERNAL_ERROR, HttpError, error_message
from mmoe_rec.server.server_metrics import Metrics

Answers = list[Ranking | RequestError]
MAX_BATCH_CANDIDATES = 4_096
"""Calls share a pass up to so many candidates: beyond, a call would wait longer for the others than it saves."""

POLL_SECONDS = 0.05
"""Between looks at a journal."""
_REST_SECONDS = 0.3
"""After it has prepared something, the thread leaves the processor to requests, unless a caller waits: a step costs
nearly the same for few rows as for many."""
_PAUSE_AFTER_FAILURE_SECONDS = 5.0
_SECONDS_BETWEEN_LOOKS = 0.001  # of a caller who waits for a position

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Queued:
    requests: Sequence[Request | RequestError]
    candidates: int
    answers: asyncio.Future[Answers]
    since: float = field(default_factory=perf_counter)

    def leave(self) -> None:
        """Nobody waits for the answer any more."""
        if not self.answers.done():
            self.answers.set_exception(ClientDisconnect())


class RankingQueue:
    """Ranks calls with the current model. Used from one event loop alone."""

    def __init__(self, models: ModelManager, metrics: Metrics) -> None:
        self._models, self._limits, self._metrics = models, models.options.limits, metrics
        self._queue: deque[_Queued] = deque()
        self._busy_since: float | None = None
        self.executor = ThreadPoolExecutor(1, "ranking")
        """Of passes, and of what is to be done between them."""
        self.executor.submit(use_one_thread)  # now, as a first pass without a thread would count as under way for ever

    @property
    def is_stuck(self) -> bool:
        """Whether a pass has taken so long that it will hardly end."""
        since = self._busy_since
        return since is not None and monotonic() - since > 3 * self._limits.call_timeout_seconds

    @property
    def is_busy(self) -> bool:
        return self._busy_since is not None

    async def queue(
        self, requests: Sequence[Request | RequestError], candidates: int, disconnected: asyncio.Future[None]
    ) -> Answers:
        """One answer a request, as `Ranker.rank_many` gives them.

        candidates: of all requests, at least; gone: ends once the caller has left. Raises Refused where the time is
        over, or the model fails, and ClientDisconnect for a caller who has left: nothing is ranked for them, unless the
        pass is under way.
        """
        if not any(isinstance(each, Request) for each in requests):
            return [each for each in requests if isinstance(each, RequestError)]
        call = _Queued(requests, candidates, asyncio.get_running_loop().create_future())
        disconnected.add_done_callback(lambda _: call.leave())
        self._queue.append(call)
        self._metrics.waiting.set(len(self._queue))
        self._start_batch()
        try:
            async with asyncio.timeout(self._limits.call_timeout_seconds):
                return await call.answers
        except TimeoutError:
            sentence = (
                f"no answer within {self._limits.call_timeout_seconds:g} seconds (setting "
                "`serving.call_timeout_seconds`)"
            )
            raise HttpError(504, sentence, "too_long", "DEADLINE_EXCEEDED") from None

    def _start_batch(self) -> None:
        """Gives the thread the calls that wait, unless it has some."""
        if self._busy_since is not None:
            return
        calls: list[_Queued] = []
        candidates = 0
        while self._queue and (not calls or candidates + self._queue[0].candidates <= MAX_BATCH_CANDIDATES):
            call = self._queue.popleft()
            if not call.answers.done():  # else its time is over, or its caller has gone
                calls.append(call)
                candidates += call.candidates
        self._metrics.waiting.set(len(self._queue))
        if not calls:
            return
        self._busy_since = monotonic()
        self._metrics.calls_per_batch.observe(len(calls))
        for call in calls:
            self._metrics.stages.labels("wait").observe(perf_counter() - call.since)
        loop, ranker = asyncio.get_running_loop(), self._models.current.ranker

        def work() -> None:
            with self._metrics.timed("score"):
                answers = rank_batch(ranker, [call.requests for call in calls])
            with suppress(RuntimeError):  # the event loop has ended, and nobody waits
                loop.call_soon_threadsafe(self._end_batch, calls, answers)

        self.executor.submit(work)

    def _end_batch(self, calls: Sequence[_Queued], answers: Sequence[Answers | HttpError]) -> None:
        self._busy_since = None
        for call, each in zip(calls, answers, strict=True):
            if call.answers.done():
                continue
            if isinstance(each, HttpError):
                call.answers.set_exception(each)
            else:
                call.answers.set_result(each)
        self._start_batch()


def use_one_thread() -> None:
    """Have torch compute with one thread."""
    torch.set_num_threads(1)  # of each thread that calls it. Why one: see `mmoe_rec.inference.mlflow_model`


def rank_batch(ranker: Ranker, calls: Sequence[Sequence[Request | RequestError]]) -> list[Answers | HttpError]:
    """The answers of each call, from one pass where that succeeds; of each alone where it does not."""
    try:
        answers = iter(ranker.rank_many([request for call in calls for request in call]))
        return [list(islice(answers, len(call))) for call in calls]
    except Exception as error:
        if len(calls) > 1:
            return [rank_batch(ranker, [call])[0] for call in calls]
        _log.exception("the model failed")
        # What MLflow's server says of a RuntimeError. Other errors may hold anything of this machine.
        sentence = " ".join(str(error).split()) if type(error) is RuntimeError else "the model failed; the log says why"
        return [HttpError(500, sentence, "model", INTERNAL_ERROR)]


class JournalFollower:
    """Keeps the current model at the journal's end, in a thread of its own, until nobody holds it any more.

    failure: why it has not been able to since, None if it has.
    """

    def __init__(self, models: ModelManager, queue: RankingQueue, metrics: Metrics) -> None:
        self._models, self._queue, self._limits, self._metrics = models, queue, models.options.limits, metrics
        self.failure: str | None = None
        self._asked = threading.Event()
        threading.Thread(target=_follow, args=(weakref.ref(self), self._asked), name="follower", daemon=True).start()

    @property
    def events_failure(self) -> str | None:
        """Why the current model does not know all of the journal, as a sentence; None where it does."""
        return "; ".join(filter(None, [self.failure, self.ingester.events_failure])) or None

    @property
    def ingester(self) -> EventIngester:
        """What the current model has learnt."""
        ingester = self._models.current.ingester
        assert ingester is not None, "there is a journal"
        return ingester

    async def wait_for_position(self, text: str) -> None:
        """Ends once the current model knows all up to a position, as text.

        Raises Refused for a text that is no position, and after too long a time.
        """
        until = time.monotonic() + self._limits.call_timeout_seconds
        try:
            position = parse_position(text)
        except RequestError as error:
            raise HttpError(400, f"the query parameter 'after': {error}", "body") from None
        await self._reach(position, until)

    async def wait_for_end(self) -> None:
        """Ends once the current model knows all that the journal holds now. Raises Refused after too long a time."""
        until = time.monotonic() + self._limits.call_timeout_seconds
        await self._reach(
            await asyncio.get_running_loop().run_in_executor(None, self.ingester.journal.last_position), until
        )

    async def _reach(self, position: int, until: float) -> None:
        while self.ingester.position < position:
            if self.failure is None:
                self._asked.set()  # so that the thread does not rest
            if time.monotonic() > until:
                why = self.failure or "setting `serving.call_timeout_seconds`"
                sentence = f"the model has not learnt all events up to {position} in time ({why}); come again"
                raise HttpError(503, sentence, "behind", "TEMPORARILY_UNAVAILABLE", 1)
            await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)

    def poll(self) -> float:
        """Learns what is new; gives the seconds to rest."""
        try:
            rest = _REST_SECONDS if self._step() else POLL_SECONDS
            if self.failure is not None:
                _log.info("events are learnt again")
            self.failure = None
        except Exception as error:  # whatever it is, the model goes on with what it knows, and says so
            if (failure := error_message(error)) != self.failure:
                is_bug = not isinstance(error, UserError)
                _log.error("the model learns no further events: %s", failure, exc_info=is_bug)
            self.failure, rest = failure, _PAUSE_AFTER_FAILURE_SECONDS
        live = self.ingester.ranker.pipeline.live  # also of one that has learnt before it served
        self._metrics.live_rows.set(live.rows)
        return rest

    def _step(self) -> bool:
        ingester = self.ingester
        if (update := ingester.read()) is None:
            return False
        self._queue.executor.submit(ingester.apply, update).result()
        now = time.time_ns() // 1_000
        for accepted in update.accepted_at:
            self._metrics.event_visible_seconds.observe(max(now - accepted, 0) / 1e6)
        for outcome, rows in update.counts.items():
            self._metrics.events_ingested.labels(outcome).inc(rows)
        return True


def _follow(follower: "weakref.ref[JournalFollower]", asked: threading.Event) -> None:
    """What the thread does: it holds what it follows for only while it works. asked: ends its pauses."""
    while (it := follower()) is not None:
        rest = it.poll()
        del it
        asked.wait(rest)
        asked.clear()
