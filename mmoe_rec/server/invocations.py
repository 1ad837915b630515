"""`POST /invocations`: read a call within limits, parse it, rank it, and reply with rankings or one error sentence.

A call contains one or more elements. Each element is a request: one user's list of candidates to rank. orjson parses
the JSON. It rejects NaN, numbers beyond a double, lone surrogates, invalid UTF-8 and nesting beyond 1,024 levels.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import orjson
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from mmoe_rec.errors import RequestError, quoted, suggest
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.ranking import Ranking
from mmoe_rec.inference.request_reader import (
    REQUEST_OPTIONS,
    Request,
    flatten_rankings,
    format_request_error,
    group_rows_by_request,
    read_requests,
)
from mmoe_rec.live.request_log import RequestLog
from mmoe_rec.server.models import ModelManager
from mmoe_rec.server.options import MEBIBYTE, CallLimiter, HttpError, RefusalReason, truncate
from mmoe_rec.server.ranking_queue import Answers, JournalFollower, RankingQueue
from mmoe_rec.server.server_metrics import Metrics
from mmoe_rec.settings.sections import Serving

# Larger bodies are parsed in a thread, so that the event loop can answer other calls in the meantime.
MAX_INLINE_PARSE_BYTES = 256 * 2**10
EXAMPLE_BODY = '{"inputs": [{"user": {...}, "context": {...}, "candidates": {...}}], "params": {...}}'
_KEYS = ("inputs", "params", "dataframe_split", "dataframe_records")
EXPLAIN_COST = 10
"""In limits, an explained candidate counts like this many candidates, because explanations make replies much longer."""
_ERROR_REASONS = (RefusalReason.BODY, RefusalReason.ELEMENT, RefusalReason.MODEL)


@dataclass(frozen=True)
class Call:
    """A parsed call.

    Attributes:
        requests: Requests of the call. An invalid request is replaced by its error.
        rows: Indices of each request's rows in the data frame, if the call has MLflow's data frame format. Else empty.
        candidates: Number of candidates of all valid requests. Explained candidates count `EXPLAIN_COST` times.
    """

    requests: list[Request | RequestError]
    rows: list[list[int]]
    candidates: int


class InvocationHandler:
    """Handler of `/invocations`, which ranks calls with the current model."""

    def __init__(self, models: ModelManager, metrics: Metrics, log: RequestLog | None = None) -> None:
        """Start the threads that parse, rank and, with a journal, ingest events.

        Args:
            models: The served model and the server's options.
            metrics: Metrics of the worker.
            log: Request log. None logs no requests.
        """
        self.models, self.limits, self.metrics, self._log = models, models.options.limits, metrics, log
        self.queue = RankingQueue(models, metrics)
        self.follower: JournalFollower | None = None
        if models.options.journal is not None:
            self.follower = JournalFollower(models, self.queue, metrics)
        # One thread is enough. Parsing holds the interpreter lock, so more threads would only take memory for bodies.
        self._parsing = ThreadPoolExecutor(1, "parsing")
        self.limiter = CallLimiter(self.limits, "calls", metrics.calls.set)
        self.is_draining = False  # Whether the server is about to end, which /health reports.

    async def answer(self, request: HttpRequest) -> Response:
        """Answer a call. Errors become error replies."""

        def count(reason: RefusalReason) -> None:
            (self.metrics.errors if reason in _ERROR_REASONS else self.metrics.refusals).labels(reason).inc()

        with self.metrics.timed("total"):
            response = await handle_call(lambda: self._answer(request), self.limiter, count)
        self.metrics.replies.labels(str(response.status_code)).inc()
        return response

    async def _answer(self, request: HttpRequest) -> bytes:
        partial, after = _parse_query(request.query_params)
        require_json(request)
        with self.metrics.timed("read"):
            body = await read_body(request, self.limits)
        ranker = self.models.current.ranker
        with self.metrics.timed("parse"):
            if len(body) <= MAX_INLINE_PARSE_BYTES:
                call = _parse_call(body, self.limits, ranker)
            else:
                loop = asyncio.get_running_loop()
                call = await loop.run_in_executor(self._parsing, _parse_call, body, self.limits, ranker)
        self.metrics.elements.inc(len(call.requests))
        self.metrics.candidates.inc(call.candidates)
        disconnected = asyncio.ensure_future(_wait_for_disconnect(request))
        try:
            if after is not None:
                if self.follower is None:
                    raise _invalid("this server accepts no events. Leave out 'after'.")
                await self.follower.wait_for_position(after)
            answers = await self.queue.rank(call.requests, call.candidates, disconnected)
        finally:
            disconnected.cancel()
        self._count_unknown_ids(answers)
        events_failure = None if self.follower is None else self.follower.events_failure
        with self.metrics.timed("write"):
            body = _encode_reply(answers, events_failure, partial, call.rows)
        if self._log is not None:
            self._log_replies(self._log, call, answers)
        return body

    def _log_replies(self, log: RequestLog, call: Call, answers: Answers) -> None:
        model = self.models.current.describe()
        for request, answer in zip(call.requests, answers, strict=True):
            if isinstance(answer, Ranking) and isinstance(request, Request):
                # A ranking doesn't contain the registered name and version of its model. If another model is served by
                # now, the request log leaves both empty.
                is_current = answer.model["version"] == model["artifact"]
                name, version = (model["model"], model["version"]) if is_current else (None, None)
                log.offer(answer, request.task_weights, name, version)

    def _count_unknown_ids(self, answers: Answers) -> None:
        rankings = [answer for answer in answers if isinstance(answer, Ranking)]
        for role in ("user", "candidate"):
            self.metrics.unknown_ids.labels(role).inc(sum(ranking.unknown_ids.get(role, 0) for ranking in rankings))


async def handle_call(
    answer: Callable[[], Awaitable[bytes]], limiter: CallLimiter, count: Callable[[RefusalReason], None]
) -> Response:
    """Answer a call within the limit on concurrent calls. Errors become error replies.

    Args:
        answer: Returns the body of the reply, or raises HttpError.
        limiter: Limit on the concurrent calls of the endpoint.
        count: Receives the reason if the call gets an error reply, or if its caller disconnects.

    Returns:
        The reply, as JSON.
    """
    try:
        with limiter.acquire():
            return Response(await answer(), media_type="application/json")
    except HttpError as refused:
        count(refused.reason)
        return error_response(refused)
    except ClientDisconnect:
        count(RefusalReason.CALLER_GONE)
        return Response(status_code=499)  # Nobody receives this reply.


async def _wait_for_disconnect(request: HttpRequest) -> None:
    """Wait until the caller disconnects. Call this only after the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def error_response(refused: HttpError) -> Response:
    """Return the error as an HTTP response."""
    headers = {} if refused.retry_after is None else {"Retry-After": str(refused.retry_after)}
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(orjson.dumps(refused.body()), refused.status, headers, "application/json")


def _parse_query(query: Mapping[str, str]) -> tuple[bool, str | None]:
    """Return `partial` (whether an error replaces each invalid element) and `after` (journal position to wait for)."""
    for name in query:
        if name not in ("partial", "after"):
            problem = f"/invocations has no query parameter {quoted(name)}"
            raise _invalid(f"{problem}. Valid parameters are 'partial' and 'after'.")
    partial = query.get("partial", "false")
    if partial not in ("true", "1", "false", "0"):
        raise _invalid("the query parameter 'partial' must be true or false")
    return partial in ("true", "1"), query.get("after")


def require_json(request: HttpRequest) -> None:
    """Raise HttpError unless the request declares its body as JSON.

    Browsers don't let web pages of other sites send JSON to this server, so such pages can't send calls.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        sentence = "the body must be JSON: send the header Content-Type: application/json"
        raise HttpError(415, sentence, RefusalReason.NO_JSON)


async def read_body(request: HttpRequest, limits: Serving) -> bytes:
    """Read the body of a call. Even a body that is too large is read to its end, so that the caller gets the error.

    Args:
        request: HTTP request.
        limits: Limits on the size and the time.

    Raises:
        HttpError: The body is too large, too slow or compressed, or the request asks for an upgrade.
    """
    for name, plain in (("Content-Encoding", "identity"), ("Transfer-Encoding", "chunked")):
        if request.headers.get(name, plain).strip().lower() != plain:
            sentence = f"the body must not be compressed: leave the header {name} out"
            raise HttpError(415, sentence, RefusalReason.NO_JSON)
    if "upgrade" in request.headers:
        sentence = "this server supports only HTTP/1.1: leave the header Upgrade out"
        raise HttpError(400, sentence, RefusalReason.NO_JSON)
    parts, size, max_bytes = list[bytes](), 0, limits.max_body_mib * MEBIBYTE
    try:
        async with asyncio.timeout(limits.read_timeout_seconds):
            async for part in request.stream():
                size += len(part)
                if size <= max_bytes:
                    parts.append(part)
    except TimeoutError:
        slow = f"did not arrive within {limits.read_timeout_seconds:g} seconds (setting `serving.read_timeout_seconds`)"
        raise HttpError(408, f"the body {slow}", RefusalReason.TOO_SLOW, "REQUEST_TIMEOUT") from None
    if size > max_bytes:
        limit = f"{limits.max_body_mib} MiB, the limit of this server (setting `serving.max_body_mib`)"
        raise HttpError(413, f"the body is larger than {limit}", RefusalReason.TOO_LARGE, "REQUEST_TOO_LARGE")
    return b"".join(parts)


def parse_json(body: bytes, limits: Serving) -> Any:
    """Parse a body.

    Args:
        body: Bytes of the body.
        limits: Limits of calls. Only `max_depth` is used.

    Raises:
        HttpError: The body is not valid JSON or too deeply nested.
    """
    try:
        tree = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise _invalid(f"the body is not valid JSON: {error}") from None
    _check_depth(tree, limits)
    return tree


def _parse_call(body: bytes, limits: Serving, ranker: Ranker) -> Call:
    """Parse the call in a body. The ranker's schema determines which rows of a data frame form a request."""
    tree = parse_json(body, limits)
    if not isinstance(tree, dict):
        raise _invalid(f"the body must be an object such as {EXAMPLE_BODY}")
    for name in tree:
        if name not in _KEYS:
            raise _invalid(f"a call has no key {quoted(name)}; {suggest(name, _KEYS)}")
    params = _parse_params(tree)
    elements, rows = _parse_elements(tree, params, limits, ranker)
    if not isinstance(elements, list):
        raise _invalid(f"a call needs the key 'inputs', a list of requests: {EXAMPLE_BODY}")
    if len(elements) > limits.max_elements:
        raise _invalid(
            f"the call has {len(elements):,} elements; this server takes at most {limits.max_elements:,} in a call "
            "(setting `serving.max_elements`)"
        )
    requests = read_requests(elements, params)
    valid = [request for request in requests if isinstance(request, Request)]
    candidates = sum(request.candidate_count * (EXPLAIN_COST if request.explain else 1) for request in valid)
    hint = f" (with explain, each counts as {EXPLAIN_COST})" if any(request.explain for request in valid) else ""
    _check_candidates(candidates, limits, hint)
    return Call(requests, rows, candidates)


def _check_candidates(count: int, limits: Serving, hint: str = "") -> None:
    if count > limits.max_total_candidates:
        raise _invalid(
            f"the call has {count:,} candidates in all{hint}; this server takes at most "
            f"{limits.max_total_candidates:,} in a call (setting `serving.max_total_candidates`)"
        )


def _parse_elements(
    tree: Mapping[str, Any], params: Mapping[str, Any], limits: Serving, ranker: Ranker
) -> tuple[Any, list[list[int]]]:
    """Return the elements of a call. For MLflow's data frames, also return the indices of each element's rows."""
    if len(forms := [name for name in _KEYS if name in tree and name != "params"]) > 1:
        raise _invalid(f"a call may contain only one of {' and '.join(map(repr, forms))}")
    if "dataframe_records" in tree:
        if not _is_list_of(rows := tree["dataframe_records"], dict):
            raise _invalid("'dataframe_records' must be a list of objects of columns and values")
        names = list(dict.fromkeys(chain.from_iterable(rows)))
        columns: Iterable[Any] = ([row.get(name) for row in rows] for name in names)
    elif "dataframe_split" in tree:
        split: Any = tree["dataframe_split"] if isinstance(tree["dataframe_split"], dict) else {}
        names, rows = split.get("columns"), split.get("data")
        if not _is_list_of(names, str) or not _is_list_of(rows, list) or {*map(len, rows)} - {len(names)}:
            form = '{"columns": [...], "data": [[...], ...]}'
            raise _invalid(f"'dataframe_split' must be {form} with rows of one length")
        columns = zip(*rows, strict=True) if rows else [()] * len(names)
    else:
        return tree.get("inputs"), []
    if rows and not names:
        raise _invalid("the data frame has rows but no columns")
    _check_candidates(len(rows), limits)
    try:
        return group_rows_by_request(ranker.reader, names, columns, params)
    except RequestError as error:
        raise _invalid(str(error)) from None


def _is_list_of(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _parse_params(tree: Mapping[str, Any]) -> dict[str, Any]:
    if (params := tree.get("params")) is None:
        return {}
    if not isinstance(params, dict):
        raise _invalid("'params' must be an object")
    for name in params:
        if name not in REQUEST_OPTIONS:
            raise _invalid(f"'params' has an unknown key {quoted(name)}; {suggest(name, REQUEST_OPTIONS)}")
    return params


def _check_depth(tree: Any, limits: Serving) -> None:
    """Raise HttpError if lists and objects are nested too deeply."""
    level: list[Any] = [[tree]]
    for _ in range(limits.max_depth + 1):
        values = chain.from_iterable(node.values() if isinstance(node, dict) else node for node in level)
        if not (level := [value for value in values if isinstance(value, dict | list)]):
            return
    raise _invalid(f"the body nests lists and objects more than {limits.max_depth} deep (setting `serving.max_depth`)")


def _invalid(sentence: str) -> HttpError:
    return HttpError(400, sentence, RefusalReason.BODY)


def _encode_reply(answers: Answers, events_failure: str | None, partial: bool, rows: list[list[int]]) -> bytes:
    """Encode the body of a reply. Raise HttpError if an element is invalid and `partial` is false.

    `events_failure`, the reason why the model lacks some events, becomes a warning. `rows` is `Call.rows`.
    """
    replies: list[dict[str, Any]] = []
    for index, answer in enumerate(answers):
        if isinstance(answer, Ranking):
            replies.append(answer.to_dict())
            if events_failure is not None:
                warning = truncate(f"the reply ignores some events: {events_failure}")
                replies[-1]["warnings"] = [*answer.warnings, warning]
        elif partial:
            replies.append({"error": truncate(str(answer))})
        else:
            sentence = format_request_error(answer, index, len(answers), rows)
            raise HttpError(400, sentence, RefusalReason.ELEMENT)
    return orjson.dumps({"predictions": flatten_rankings(replies, rows) if rows else replies})
