"""Queue of calls for one thread that ranks. Calls that arrive while a batch is ranked form the next batch.

There is only one ranking thread. A second thread would not be faster, because torch computes with one thread here and
Python's interpreter lock admits one thread at a time.

A worker's model ingests all events of the journal, whichever worker accepted them. `JournalFollower` reads the journal
in its own thread and prepares the model's next state. The model switches to the next state only between two batches.
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
from mmoe_rec.server.options import INTERNAL_ERROR, HttpError, RefusalReason, error_message
from mmoe_rec.server.server_metrics import Metrics

Answers = list[Ranking | RequestError]
MAX_BATCH_CANDIDATES = 4_096
"""Limit on the candidates in a batch of several calls. In larger batches, calls wait for each other too long."""

POLL_SECONDS = 0.05
"""Seconds between reads of the journal."""
_REST_SECONDS = 0.3
"""Seconds between two updates with new events, so that requests get the processor. Few updates with many rows take
less time than many updates with few. If a caller waits for a position of the journal, the next update starts now."""
_PAUSE_AFTER_FAILURE_SECONDS = 5.0
_POSITION_POLL_SECONDS = 0.001  # Seconds between two checks whether the model has reached a caller's position.

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Queued:
    requests: Sequence[Request | RequestError]
    candidates: int
    answers: asyncio.Future[Answers]
    since: float = field(default_factory=perf_counter)

    def leave(self) -> None:
        """Drop this call from the queue, because its caller has disconnected."""
        if not self.answers.done():
            self.answers.set_exception(ClientDisconnect())


class RankingQueue:
    """Ranks calls with the current model. Use a queue from one event loop only."""

    def __init__(self, models: ModelManager, metrics: Metrics) -> None:
        """Start the thread that ranks.

        Args:
            models: The served model and the server's options.
            metrics: Metrics of the worker.
        """
        self._models, self._limits, self._metrics = models, models.options.limits, metrics
        self._queue: deque[_Queued] = deque()
        self._busy_since: float | None = None
        self.executor = ThreadPoolExecutor(1, "ranking")
        """Thread that runs batches, and work that must not overlap with a batch."""
        # Start the thread now. If the first batch could not start the thread, the queue would stay busy forever.
        self.executor.submit(use_one_thread)

    @property
    def is_stuck(self) -> bool:
        """Whether the current batch has run for over 3 times a call's timeout, so it will probably never finish."""
        since = self._busy_since
        return since is not None and monotonic() - since > 3 * self._limits.call_timeout_seconds

    @property
    def is_busy(self) -> bool:
        """Whether a batch is being ranked."""
        return self._busy_since is not None

    async def rank(
        self, requests: Sequence[Request | RequestError], candidates: int, disconnected: asyncio.Future[None]
    ) -> Answers:
        """Rank a call's requests in the next batch.

        Args:
            requests: Requests of the call. An invalid request is replaced by its error.
            candidates: Number of candidates in all requests. Explained candidates count `EXPLAIN_COST` times.
            disconnected: Future that finishes once the caller has disconnected.

        Returns:
            One answer for each request, as `Ranker.rank_many` returns them.

        Raises:
            HttpError: The call timed out, or the model failed.
            ClientDisconnect: The caller has disconnected. The call is not ranked unless its batch has started.
        """
        if not any(isinstance(request, Request) for request in requests):
            return [request for request in requests if isinstance(request, RequestError)]
        call = _Queued(requests, candidates, asyncio.get_running_loop().create_future())
        disconnected.add_done_callback(lambda _: call.leave())
        self._queue.append(call)
        self._metrics.waiting.set(len(self._queue))
        self._start_batch()
        try:
            async with asyncio.timeout(self._limits.call_timeout_seconds):
                return await call.answers
        except TimeoutError:
            limit = f"{self._limits.call_timeout_seconds:g} seconds (setting `serving.call_timeout_seconds`)"
            raise HttpError(504, f"no answer within {limit}", RefusalReason.TOO_LONG, "DEADLINE_EXCEEDED") from None

    def _start_batch(self) -> None:
        """Rank the waiting calls as a batch, unless a batch is being ranked."""
        if self._busy_since is not None:
            return
        calls, candidates = list[_Queued](), 0
        while self._queue and (not calls or candidates + self._queue[0].candidates <= MAX_BATCH_CANDIDATES):
            call = self._queue.popleft()
            if not call.answers.done():  # The future is done if the call timed out or its caller disconnected.
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
                answers = _rank_batch(ranker, [call.requests for call in calls])
            with suppress(RuntimeError):  # If the event loop has ended, nobody waits for the answers.
                loop.call_soon_threadsafe(self._end_batch, calls, answers)

        self.executor.submit(work)

    def _end_batch(self, calls: Sequence[_Queued], answers: Sequence[Answers | HttpError]) -> None:
        self._busy_since = None
        for call, call_answers in zip(calls, answers, strict=True):
            if call.answers.done():
                continue
            if isinstance(call_answers, HttpError):
                call.answers.set_exception(call_answers)
            else:
                call.answers.set_result(call_answers)
        self._start_batch()


def use_one_thread() -> None:
    """Make torch compute with one thread in the calling thread. `mmoe_rec.inference.mlflow_model` gives the reason."""
    torch.set_num_threads(1)


def _rank_batch(ranker: Ranker, calls: Sequence[Sequence[Request | RequestError]]) -> list[Answers | HttpError]:
    """Rank calls in one batch. If that fails, rank each call on its own, so that no call fails because of another."""
    try:
        answers = iter(ranker.rank_many([request for call in calls for request in call]))
        return [list(islice(answers, len(call))) for call in calls]
    except Exception as error:
        if len(calls) > 1:
            return [_rank_batch(ranker, [call])[0] for call in calls]
        _log.exception("the model failed")
        # Like MLflow's server, reply with the text of a RuntimeError. Other texts may reveal details of this machine.
        sentence = "the model failed; the server's log has the reason"
        if type(error) is RuntimeError:
            sentence = " ".join(str(error).split())
        return [HttpError(500, sentence, RefusalReason.MODEL, INTERNAL_ERROR)]


class JournalFollower:
    """Updates the current model with the journal's new events, in its own thread, until the follower is freed.

    Attributes:
        failure: Why the last update failed, None if it succeeded.
    """

    def __init__(self, models: ModelManager, queue: RankingQueue, metrics: Metrics) -> None:
        """Start the thread.

        Args:
            models: The served model and the server's options.
            queue: Queue whose thread applies the updates.
            metrics: Metrics of the worker.
        """
        self._models, self._queue, self._limits, self._metrics = models, queue, models.options.limits, metrics
        self.failure: str | None = None
        self._wake = threading.Event()
        threading.Thread(target=_follow, args=(weakref.ref(self), self._wake), name="follower", daemon=True).start()

    @property
    def events_failure(self) -> str | None:
        """Why the current model lacks some events of the journal, as a sentence. None if no events are missing."""
        return "; ".join(filter(None, [self.failure, self.ingester.events_failure])) or None

    @property
    def ingester(self) -> EventIngester:
        """The current model's `EventIngester`."""
        ingester = self._models.current.ingester
        assert ingester is not None, "there is a journal"
        return ingester

    async def wait_for_position(self, text: str) -> None:
        """Wait until the current model includes the journal up to a position. Raise HttpError for an invalid position.

        Also raises HttpError after `call_timeout_seconds`.
        """
        until = time.monotonic() + self._limits.call_timeout_seconds
        try:
            position = parse_position(text)
        except RequestError as error:
            raise HttpError(400, f"the query parameter 'after': {error}", RefusalReason.BODY) from None
        await self._wait_until(position, until)

    async def wait_for_end(self) -> None:
        """Wait until the model includes all events that are now in the journal. Raise HttpError after a timeout."""
        until = time.monotonic() + self._limits.call_timeout_seconds
        read_position = self.ingester.journal.last_position
        await self._wait_until(await asyncio.get_running_loop().run_in_executor(None, read_position), until)

    async def _wait_until(self, position: int, until: float) -> None:
        while self.ingester.position < position:
            if self.failure is None:
                self._wake.set()
            if time.monotonic() > until:
                reason = self.failure or "setting `serving.call_timeout_seconds`"
                sentence = f"the model has not ingested all events up to {position} in time ({reason}). Try again."
                raise HttpError(503, sentence, RefusalReason.BEHIND, "TEMPORARILY_UNAVAILABLE", 1)
            await asyncio.sleep(_POSITION_POLL_SECONDS)

    def poll(self) -> float:
        """Ingest new events and return the seconds to wait until the next update."""
        try:
            rest = _REST_SECONDS if self._update_model() else POLL_SECONDS
            if self.failure is not None:
                _log.info("events are ingested again")
            self.failure = None
        except Exception as error:  # After any error, the model keeps serving its last state, and replies warn of it.
            if (failure := error_message(error)) != self.failure:
                _log.error("the model can't ingest more events: %s", failure, exc_info=not isinstance(error, UserError))
            self.failure, rest = failure, _PAUSE_AFTER_FAILURE_SECONDS
        live = self.ingester.ranker.pipeline.live  # Has the rows ingested before serving, too.
        self._metrics.live_rows.set(live.rows)
        return rest

    def _update_model(self) -> bool:
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


def _follow(follower: "weakref.ref[JournalFollower]", wake: threading.Event) -> None:
    """Poll until the follower is freed, which holding a strong reference would prevent. `wake` ends a pause early."""
    while (alive := follower()) is not None:
        rest = alive.poll()
        del alive
        wake.wait(rest)
        wake.clear()
