"""`POST /invocations`: read within limits, parse, rank, write. A reply is rankings or one sentence.

orjson refuses what JSON does not have (NaN, numbers beyond a double, half of a surrogate pair, UTF-8 that is none) and
nesting beyond 1,024.
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
from mmoe_rec.server.options import MEBIBYTE, CallLimiter, HttpError, truncate
from mmoe_rec.server.ranking_queue import Answers, JournalFollower, RankingQueue
from mmoe_rec.server.server_metrics import Metrics
from mmoe_rec.settings.sections import Serving

MAX_INLINE_PARSE_BYTES = (
    256 * 2**10
)  # larger bodies are parsed in a thread, so that the event loop answers others in between
EXAMPLE_BODY = '{"inputs": [{"user": {...}, "context": {...}, "candidates": {...}}], "params": {...}}'
_KEYS = ("inputs", "params", "dataframe_split", "dataframe_records")
EXPLAIN_COST = 10
"""A candidate that is explained counts as so many: with 45 counters, its part of the reply is 35 times as long."""


@dataclass(frozen=True)
class Call:
    """A call that may be ranked.

    requests: and in the place of one that is wrong, the sentence about it; rows: of each, in a table with a row for
    each candidate; candidates: of all requests together, at least.
    """

    requests: list[Request | RequestError]
    rows: list[list[int]]
    candidates: int


class InvocationHandler:
    """Answers calls with the current model."""

    def __init__(self, models: ModelManager, metrics: Metrics, log: RequestLog | None = None) -> None:
        self.models, self.limits, self.metrics = models, models.options.limits, metrics
        self._log = log
        self.queue = RankingQueue(models, metrics)
        self.follower: JournalFollower | None = None
        if models.options.journal is not None:
            self.follower = JournalFollower(models, self.queue, metrics)
        # One thread, as Python's own work would only slow that of others, and each body takes memory meanwhile.
        self._parsing = ThreadPoolExecutor(1, "parsing")
        self.limiter = CallLimiter(self.limits, "calls", metrics.calls.set)
        self.is_draining = False  # Whether the server is about to end, which /health reports.

    async def answer(self, request: HttpRequest) -> Response:
        """The reply to a call, whatever is wrong with it."""

        def count(reason: str) -> None:
            is_error = reason in ("body", "element", "model")
            (self.metrics.errors if is_error else self.metrics.refusals).labels(reason).inc()

        with self.metrics.timed("total"):
            response = await handle_call(lambda: self._answer(request), self.limiter, count)
        self.metrics.replies.labels(str(response.status_code)).inc()
        return response

    async def _answer(self, request: HttpRequest) -> bytes:
        partial, after = _query(request.query_params)
        require_json(request)
        with self.metrics.timed("read"):
            body = await read_body(request, self.limits)
        ranker = self.models.current.ranker
        with self.metrics.timed("parse"):
            if len(body) <= MAX_INLINE_PARSE_BYTES:
                call = parse_call(body, self.limits, ranker)
            else:
                loop = asyncio.get_running_loop()
                call = await loop.run_in_executor(self._parsing, parse_call, body, self.limits, ranker)
        self.metrics.elements.inc(len(call.requests))
        self.metrics.candidates.inc(call.candidates)
        disconnected = asyncio.ensure_future(wait_for_disconnect(request))
        try:
            if after is not None:
                if self.follower is None:
                    sentence = "this server takes no events, so there is nothing to wait for: leave 'after' out"
                    raise HttpError(400, sentence, "body")
                await self.follower.wait_for_position(after)
            answers = await self.queue.queue(call.requests, call.candidates, disconnected)
        finally:
            disconnected.cancel()
        self._count(answers)
        events_failure = None if self.follower is None else self.follower.events_failure
        with self.metrics.timed("write"):
            body = encode_reply(answers, events_failure, partial, call.rows)
        if self._log is not None:
            self._offer(self._log, call, answers)
        return body

    def _offer(self, log: RequestLog, call: Call, answers: Answers) -> None:
        model = self.models.current.describe()
        for request, answer in zip(call.requests, answers, strict=True):
            if isinstance(answer, Ranking) and isinstance(request, Request):
                is_current = answer.model["version"] == model["artifact"]  # else another one has taken its place
                name, version = (model["model"], model["version"]) if is_current else (None, None)
                log.offer(answer, request.task_weights, name, version)

    def _count(self, answers: Answers) -> None:
        rankings = [each for each in answers if isinstance(each, Ranking)]
        for role in ("user", "candidate"):
            self.metrics.unknown_ids.labels(role).inc(sum(each.unknown_ids.get(role, 0) for each in rankings))


async def handle_call(
    answer: Callable[[], Awaitable[bytes]], limiter: CallLimiter, count: Callable[[str], None]
) -> Response:
    """The reply to a call of a page, whatever is wrong with it. count: is told the reason of a refusal."""
    try:
        with limiter.acquire():
            return Response(await answer(), media_type="application/json")
    except HttpError as refused:
        count(refused.reason)
        return error_response(refused)
    except ClientDisconnect:
        count("caller_gone")
        return Response(status_code=499)  # which nobody reads


async def wait_for_disconnect(request: HttpRequest) -> None:
    """Wait until the caller of a request that was read has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def error_response(refused: HttpError) -> Response:
    headers = {} if refused.retry_after is None else {"Retry-After": str(refused.retry_after)}
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(orjson.dumps(refused.body()), refused.status, headers, "application/json")


def _query(query: Mapping[str, str]) -> tuple[bool, str | None]:
    """Whether an error may stand in the place of an element, and the position of the journal to wait for."""
    for name in query:
        if name not in ("partial", "after"):
            sentence = f"/invocations has no query parameter {quoted(name)}; there are 'partial' and 'after'"
            raise HttpError(400, sentence, "body")
    partial = query.get("partial", "false")
    if partial not in ("true", "1", "false", "0"):
        raise HttpError(400, "the query parameter 'partial' must be true or false", "body")
    return partial in ("true", "1"), query.get("after")


def is_json_type(kind: str) -> bool:
    return kind == "application/json" or kind.endswith("+json")


def content_type(request: HttpRequest) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def require_json(request: HttpRequest) -> None:
    """Raise Refused unless the request says that its body is JSON, which a page of another origin can't say unasked."""
    if not is_json_type(content_type(request)):
        raise HttpError(415, "the body must be JSON: send the header Content-Type: application/json", "no_json")


async def read_body(request: HttpRequest, limits: Serving) -> bytes:
    """The body of a call. Raises Refused for one that is too large, once it was read and dropped, or too slow."""
    for name, plain in (("Content-Encoding", "identity"), ("Transfer-Encoding", "chunked")):
        if request.headers.get(name, plain).strip().lower() != plain:
            raise HttpError(415, f"the body must not be compressed: leave the header {name} out", "no_json")
    if "upgrade" in request.headers:
        raise HttpError(400, "this server speaks HTTP/1.1 alone: leave the header Upgrade out", "no_json")
    parts: list[bytes] = []
    size, most = 0, limits.max_body_mib * MEBIBYTE
    try:
        async with asyncio.timeout(limits.read_timeout_seconds):
            async for part in request.stream():
                size += len(part)
                if size <= most:
                    parts.append(part)
    except TimeoutError:
        slow = f"did not arrive within {limits.read_timeout_seconds:g} seconds (setting `serving.read_timeout_seconds`)"
        raise HttpError(408, f"the body {slow}", "too_slow", "REQUEST_TIMEOUT") from None
    if size > most:
        sentence = f"the body is larger than {limits.max_body_mib} MiB, which this server takes at most"
        raise HttpError(413, f"{sentence} (setting `serving.max_body_mib`)", "too_large", "REQUEST_TOO_LARGE")
    return b"".join(parts)


def parse_json(body: bytes, limits: Serving) -> Any:
    """The JSON values of a body. Raises Refused where they are none by the standard, or too deep."""
    try:
        tree = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise _wrong(f"the body is not valid JSON: {error}") from None
    _check_depth(tree, limits)
    return tree


def parse_call(body: bytes, limits: Serving, ranker: Ranker) -> Call:
    """The call in a body. Raises Refused for one of another shape, or beyond the limits."""
    tree = parse_json(body, limits)
    if not isinstance(tree, dict):
        raise _wrong(f"the body must be an object such as {EXAMPLE_BODY}")
    for name in tree:
        if name not in _KEYS:
            raise _wrong(f"a call has no key {quoted(name)}; {suggest(name, _KEYS)}")
    params = _params(tree)
    elements, rows = _elements_in(tree, params, limits, ranker)
    if not isinstance(elements, list):
        raise _wrong(f"a call needs the key 'inputs', a list of requests: {EXAMPLE_BODY}")
    if len(elements) > limits.max_elements:
        raise _wrong(
            f"the call has {len(elements):,} elements; this server takes at most {limits.max_elements:,} in a call "
            "(setting `serving.max_elements`)"
        )
    requests = read_requests(elements, params)
    right = [each for each in requests if isinstance(each, Request)]
    candidates = sum(each.candidate_count * (EXPLAIN_COST if each.explain else 1) for each in right)
    explained = f" (with explain, each counts as {EXPLAIN_COST})" if any(each.explain for each in right) else ""
    _check_candidates(candidates, limits, explained)
    return Call(requests, rows, candidates)


def _check_candidates(count: int, limits: Serving, hint: str = "") -> None:
    if count > limits.max_total_candidates:
        raise _wrong(
            f"the call has {count:,} candidates in all{hint}; this server takes at most "
            f"{limits.max_total_candidates:,} in a call (setting `serving.max_total_candidates`)"
        )


def _elements_in(
    tree: Mapping[str, Any], params: Mapping[str, Any], limits: Serving, ranker: Ranker
) -> tuple[Any, list[list[int]]]:
    """The elements of a call, which may come in one of MLflow's forms of a data frame: then also the rows of each."""
    if len(forms := [name for name in _KEYS if name in tree and name != "params"]) > 1:
        raise _wrong(f"a call has either {' or '.join(map(repr, forms))}, not both")
    if "dataframe_records" in tree:
        if not _are(rows := tree["dataframe_records"], dict):
            raise _wrong("'dataframe_records' must be a list of objects of columns and values")
        names = list(dict.fromkeys(chain.from_iterable(rows)))
        columns: Iterable[Any] = ([row.get(name) for row in rows] for name in names)
    elif "dataframe_split" in tree:
        split: Any = tree["dataframe_split"] if isinstance(tree["dataframe_split"], dict) else {}
        names, rows = split.get("columns"), split.get("data")
        if not _are(names, str) or not _are(rows, list) or {*map(len, rows)} - {len(names)}:
            raise _wrong(
                """'dataframe_split' must be {"columns": [...], "data": [[...], ...]} with rows of one length"""
            )
        columns = zip(*rows, strict=True) if rows else [()] * len(names)
    else:
        return tree.get("inputs"), []
    if rows and not names:
        raise _wrong("the data frame has rows, and no columns")
    _check_candidates(len(rows), limits)
    try:
        return group_rows_by_request(ranker.reader, names, columns, params)
    except RequestError as error:
        raise _wrong(str(error)) from None


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(each, kind) for each in values)


def _params(tree: Mapping[str, Any]) -> dict[str, Any]:
    given = tree.get("params")
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise _wrong("'params' must be an object")
    for name in given:
        if name not in REQUEST_OPTIONS:
            raise _wrong(f"'params' has an unknown key {quoted(name)}; {suggest(name, REQUEST_OPTIONS)}")
    return given


def _check_depth(tree: Any, limits: Serving) -> None:
    """Raise Refused for values that nest too many lists and objects."""
    level: list[Any] = [[tree]]
    for _ in range(limits.max_depth + 1):
        values = chain.from_iterable(each.values() if isinstance(each, dict) else each for each in level)
        if not (level := [value for value in values if isinstance(value, dict | list)]):
            return
    raise _wrong(f"the body nests lists and objects more than {limits.max_depth} deep (setting `serving.max_depth`)")


def _wrong(sentence: str) -> HttpError:
    return HttpError(400, sentence, "body")


def encode_reply(answers: Answers, events_failure: str | None, partial: bool, rows: list[list[int]]) -> bytes:
    """The body of the reply. Raises Refused where an element is wrong, unless its error may stand in its place.

    events_failure: why the model does not know some events.
    """
    replies: list[dict[str, Any]] = []
    for index, answer in enumerate(answers):
        if isinstance(answer, Ranking):
            replies.append(answer.to_dict())
            if events_failure is not None:
                told = truncate(f"some events are not counted: {events_failure}")
                replies[-1]["warnings"] = [*answer.warnings, told]
        elif partial:
            replies.append({"error": truncate(str(answer))})
        else:
            raise HttpError(400, format_request_error(answer, index, len(answers), rows), "element")
    if rows:
        replies = flatten_rankings(replies, rows)
    return orjson.dumps({"predictions": replies})
