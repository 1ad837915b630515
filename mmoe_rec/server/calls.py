"""`POST /invocations`: read within limits, parse, rank, write. A reply is rankings or one sentence."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import orjson
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from mmoe_rec.errors import RequestError, quoted
from mmoe_rec.inference.ranking import Ranking
from mmoe_rec.inference.request import Request
from mmoe_rec.inference.scorer import LostExpert
from mmoe_rec.live.request_log import RequestLog
from mmoe_rec.server.following import Following
from mmoe_rec.server.limits import INTERNAL, Limits, Places, Refused, shortened
from mmoe_rec.server.metrics import Metrics
from mmoe_rec.server.models import Models
from mmoe_rec.server.parsing import Call, parse
from mmoe_rec.server.ranking_queue import Answers, Passes, RankingQueue

PARSED_AT_ONCE = 256 * 2**10
"""Larger bodies are parsed in a thread, so that the event loop answers others in between."""
_NO_NUMBER = (b"[null", b",null", b":null")


class Calls:
    """Answers calls with the current model."""

    def __init__(
        self, models: Models, limits: Limits, metrics: Metrics, passes: Passes, log: RequestLog | None = None
    ) -> None:
        """passes: of this worker, and of others where there are some."""
        self.models, self.limits, self.metrics, self.passes, self._log = models, limits, metrics, passes, log
        self.queue = RankingQueue(models, limits, metrics, passes)
        self.following: Following | None = None
        if models.journal is not None:
            self.following = Following(models, self.queue, passes, limits, metrics)
            self.following.start()
        # One thread, as Python's own work would only slow that of others, and each body takes memory meanwhile.
        self._parsing = ThreadPoolExecutor(1, "parsing")
        self.places = Places(limits, "calls", metrics.calls.set)

    async def answer(self, request: HttpRequest) -> Response:
        """The reply to a call, whatever is wrong with it."""
        try:
            with self.metrics.timed("total"), self.places.take():
                response = Response(await self._answer(request), media_type="application/json")
        except Refused as refused:
            is_error = refused.reason in ("body", "element", "model")
            (self.metrics.errors if is_error else self.metrics.refusals).labels(refused.reason).inc()
            response = refusal(refused)
        except ClientDisconnect:
            self.metrics.refusals.labels("caller_gone").inc()
            response = Response(status_code=499)  # which nobody reads
        self.metrics.replies.labels(str(response.status_code)).inc()
        return response

    async def _answer(self, request: HttpRequest) -> bytes:
        if self.models.current is None:
            raise loading()
        partial, after = _query(request.query_params)
        if not is_json(type_of(request)):
            raise Refused(415, "the body must be JSON: send the header Content-Type: application/json", "no_json")
        with self.metrics.timed("read"):
            body = await read_body(request, self.limits)
        with self.metrics.timed("parse"):
            if len(body) <= PARSED_AT_ONCE:
                call = parse(body, self.limits)
            else:
                loop = asyncio.get_running_loop()
                call = await loop.run_in_executor(self._parsing, parse, body, self.limits)
        self.metrics.elements.inc(len(call.requests))
        self.metrics.candidates.inc(call.candidates)
        gone = asyncio.ensure_future(_gone(request))
        try:
            if after is not None:
                if self.following is None:
                    sentence = "this server takes no events, so there is nothing to wait for: leave 'after' out"
                    raise Refused(400, sentence, "body")
                await self.following.reach(after)
            answers = await self.queue.queue(call.requests, call.candidates, gone)
        finally:
            gone.cancel()
        self._count(answers)
        log, ignored = self._log, call.ignored
        if log is not None:
            answers = [
                replace(each, request_id=log.id_of(each.seen)) if isinstance(each, Ranking) else each
                for each in answers
            ]
        if self.following is not None and (gap := self.following.gap) is not None:
            ignored = (*ignored, f"some events are not counted: {gap}")
        with self.metrics.timed("write"):
            body = reply(answers, ignored, partial)
        if log is not None:
            self._offer(log, call, answers)
        return body

    def _offer(self, log: RequestLog, call: Call, answers: Answers) -> None:
        served = self.models.current
        assert served is not None
        model = served.about()
        for request, answer in zip(call.requests, answers, strict=True):
            if isinstance(answer, Ranking) and isinstance(request, Request):
                is_current = answer.model["version"] == model["artifact"]  # else another one has taken its place
                name, version = (model["model"], model["version"]) if is_current else (None, None)
                log.offer(answer, request.task_weights, name, version)

    def _count(self, answers: Answers) -> None:
        rankings = [each for each in answers if isinstance(each, Ranking)]
        lost = sum(isinstance(warning, LostExpert) for each in rankings for warning in each.warnings)
        self.metrics.warnings.inc(lost)
        for role in ("user", "candidate"):
            self.metrics.unknown.labels(role).inc(sum(each.unknown_ids.get(role, 0) for each in rankings))


def loading() -> Refused:
    """What a caller gets before there is a model."""
    return Refused(503, "the model is being loaded; come again", "loading", "TEMPORARILY_UNAVAILABLE", 5)


async def _gone(request: HttpRequest) -> None:
    """Ends once the caller of a request that was read has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def refusal(refused: Refused) -> Response:
    """A refusal as a reply."""
    headers = {} if refused.retry_after is None else {"Retry-After": str(refused.retry_after)}
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if refused.status == 408:
        headers["Connection"] = "close"
    return Response(orjson.dumps(refused.body()), refused.status, headers, "application/json")


def _query(query: Mapping[str, str]) -> tuple[bool, str | None]:
    """Whether an error may stand in the place of an element, and the position of the journal to wait for."""
    for name in query:
        if name not in ("partial", "after"):
            sentence = f"/invocations has no query parameter {quoted(name)}; there are 'partial' and 'after'"
            raise Refused(400, sentence, "body")
    partial = query.get("partial", "false")
    if partial not in ("true", "1", "false", "0"):
        raise Refused(400, "the query parameter 'partial' must be true or false", "body")
    return partial in ("true", "1"), query.get("after")


def is_json(kind: str) -> bool:
    """Whether a body of this type is JSON."""
    return kind == "application/json" or kind.endswith("+json")


def type_of(request: HttpRequest) -> str:
    """The type of a request's body."""
    return request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()


async def read_body(request: HttpRequest, limits: Limits) -> bytes:
    """The body of a call. Raises Refused for one that is too large, as soon as that is known, or too slow."""
    for name, plain in (("Content-Encoding", "identity"), ("Transfer-Encoding", "chunked")):
        if request.headers.get(name, plain).strip().lower() != plain:
            raise Refused(415, f"the body must not be compressed: leave the header {name} out", "no_json")
    if "upgrade" in request.headers:
        raise Refused(400, "this server speaks HTTP/1.1 alone: leave the header Upgrade out", "no_json")
    too_large = Refused(
        413,
        f"the body is larger than {limits.max_body_mib} MiB, which this server takes at most (setting "
        "`serving.max_body_mib`)",
        "too_large",
        "REQUEST_TOO_LARGE",
    )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limits.max_body_bytes:
        raise too_large
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.read_seconds):
            async for part in request.stream():
                size += len(part)
                if size > limits.max_body_bytes:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise Refused(
            408,
            f"the body did not arrive within {limits.read_seconds:g} seconds (setting `serving.read_seconds`)",
            "too_slow",
            "REQUEST_TIMEOUT",
        ) from None
    return b"".join(parts)


def reply(answers: Answers, ignored: Iterable[str], partial: bool) -> bytes:
    """The body of the reply. Raises Refused where an element is wrong, unless its error may stand in its place."""
    ignored = [shortened(each) for each in ignored]
    replies: list[dict[str, Any]] = []
    for index, answer in enumerate(answers):
        if isinstance(answer, Ranking):
            replies.append(answer.to_dict() | ({"warnings": [*answer.warnings, *ignored]} if ignored else {}))
        elif partial:
            replies.append({"error": shortened(str(answer))})
        else:
            raise Refused(400, f"inputs[{index}]: {answer}" if len(answers) > 1 else str(answer), "element")
    body = orjson.dumps({"predictions": replies})
    # orjson writes null for what is no number. A ranking holds none, and this says so before a caller finds out.
    if any(each in body for each in _NO_NUMBER) and not all(map(_is_finite, answers)):
        raise Refused(500, "the model gives scores that are not finite numbers", "model", INTERNAL)
    return body


def _is_finite(answer: Ranking | RequestError) -> bool:
    if not isinstance(answer, Ranking):
        return True
    return all(math.isfinite(each) for values in (answer.scores, *answer.predictions.values()) for each in values)
