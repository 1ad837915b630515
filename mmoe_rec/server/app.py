"""The application: its pages, who may see them, and replies of one form to whatever goes wrong."""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import re
import weakref
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import orjson
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.openapi.utils import get_openapi
from fastapi.responses import PlainTextResponse, Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from mmoe_rec.errors import UserError, quoted
from mmoe_rec.inference.request_reader import Request
from mmoe_rec.live.request_log import RequestLog
from mmoe_rec.server.calls import Calls, refusal, require_json
from mmoe_rec.server.measurements import CONTENT_TYPE, Metrics
from mmoe_rec.server.models import Models, ServedModel
from mmoe_rec.server.options import INTERNAL, MOST_HEADER_BYTES, Refused, large_headers
from mmoe_rec.settings.sections import Serving

if TYPE_CHECKING:
    from mmoe_rec.server.events import Accepting

Reload = Callable[[], Awaitable[dict[str, str | None]]]
"""Takes up the model that the server's address names now, and gives what it is. Raises UserError for one that can't."""

ALIVE = "/ping"  # Stays 200 while the server drains, so that no liveness probe ends it early.
OPEN_PATHS = ("/health", ALIVE)
PAGE = "/"  # which asks a person for the token

VERSION = version("mmoe-rec")
_log = logging.getLogger(__name__)


class Application:
    """The ASGI application of a worker, and the parts that others ask about it."""

    def __init__(self, models: Models, metrics: Metrics | None = None, reload: Reload | None = None) -> None:
        options = models.options
        self.models, self.token = models, options.token
        self.metrics = metrics or Metrics()
        count = self.metrics.logged.labels
        self._log = None
        if options.log is not None:
            self._log = RequestLog(options.log, lambda outcome, many: count(outcome).inc(many))
        self.calls = Calls(models, self.metrics, self._log)
        self.events: Accepting | None = None
        if options.journal is not None and (following := self.calls.following) is not None:
            from mmoe_rec.server.events import Accepting

            self.events = Accepting(options.limits, options.journal, self.metrics, following)
        # FastAPI's caches keep pages for ever, and what these hold: each application, and its threads, without `proxy`.
        self._pages: ASGIApp = _pages(weakref.proxy(self.calls), self.events, reload)

    def close(self) -> None:
        """Writes what is still to be logged, once the last call is answered."""
        if self._log is not None:
            self._log.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, as ASGI has it. Without the token nothing of it is read."""
        page = self._pages
        if scope["type"] == "http" and (refused := self._refuse(scope)) is not None:
            self.metrics.refusals.labels(refused.reason).inc()
            page = refusal(refused)
        await page(scope, receive, send)

    def _refuse(self, scope: Scope) -> Refused | None:
        is_open = scope["path"] in (*OPEN_PATHS, PAGE)
        if self.token is None and not is_open and (foreign := _find_foreign(scope, self.models.options.hosts)):
            return Refused(403, foreign, "foreign", "PERMISSION_DENIED")
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if self.token is not None and not is_open:
            scheme, _, token = given.partition(b" ")
            # Takes the same time whatever is given, so that the token can't be found letter by letter.
            if not hmac.compare_digest(token.strip(), self.token.encode()) or scheme.lower() != b"bearer":
                sentence = "this server asks for a token: send the header Authorization: Bearer TOKEN"
                return Refused(401, sentence, "unauthorised", "UNAUTHENTICATED")
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MOST_HEADER_BYTES:
            return large_headers()
        return None


def _find_foreign(scope: Scope, hosts: frozenset[str] | None) -> str | None:
    """Return why a request may come from a web page of another origin, or None if it does not.

    Browsers say where a request comes from, and other programs send no such headers. By DNS rebinding a page gives this
    server a name of its own, so that only the name in the header Host is foreign.
    """
    headers, is_read = Headers(scope=scope), scope["method"] in ("GET", "HEAD")
    for host in headers.getlist("host"):
        if hosts is not None and re.sub(r":\d*$", "", host).strip("[]").lower() not in hosts:
            return f"header Host: {quoted(host)} is no name of this server. Start it with --allow-host NAME."
    fix = "Call this server from its own page, or give it a token (MMOE_REC_TOKEN)."
    for origin in headers.getlist("origin"):
        if origin.partition("://")[2].lower() != headers.get("host", "").lower():
            return f"header Origin: {quoted(origin)} is another origin. {fix}"
    # The reply to a link is shown to the person, and no page can read it.
    is_link = is_read and headers.get("sec-fetch-mode") == "navigate"
    for site in headers.getlist("sec-fetch-site"):
        if site not in ("same-origin", "none") and not is_link:
            return f"header Sec-Fetch-Site: the request comes from another origin ({quoted(site)}). {fix}"
    return None


def _pages(calls: Calls, events: Accepting | None, reload: Reload | None) -> FastAPI:
    # Without redirects, as those have the caller's own header Host for an address.
    app = FastAPI(title="mmoe-rec serve", version=VERSION, redoc_url=None, redirect_slashes=False)

    async def health(request: HttpRequest) -> Response:
        """200 once the model has answered its own example. 503 if it does not answer; /health also while it drains."""
        if calls.queue.is_stuck:
            return _json({"status": "stuck"}, 503)
        is_draining = calls.is_draining and request.scope["path"] != ALIVE
        return _json({"status": "draining"}, 503) if is_draining else _json({"status": "ok"})

    for path in OPEN_PATHS:
        app.get(path, response_model=None)(health)
        app.head(path, response_model=None, include_in_schema=False)(health)

    @app.get("/version", response_model=None)
    async def show_version() -> Response:
        """The model that is served, the version of this package, and why a newer model is not served, if so."""
        return versions(calls.models.current.about())

    def versions(about: dict[str, str | None]) -> Response:
        tree: dict[str, Any] = {**about, "mmoe_rec": VERSION, "reload_failure": calls.models.failure}
        if calls.following is not None:
            position = str(calls.following.learning.position)
            tree |= {"position": position, "events_failure": calls.following.gap}
        return _json(tree)

    @app.get("/model", response_model=None)
    async def model() -> Response:
        """The model that is served, its tasks with their weights in the score, and a request that it can answer."""
        served, names = calls.models.current, ("name", "kind", "objective", "score_weight")
        tasks = [{name: getattr(task, name) for name in names} for task in served.ranker.about.tasks]
        return _json({**served.about(), "tasks": tasks, "example": served.example})

    app.get(PAGE, response_model=None, include_in_schema=False)(page)

    @app.get("/metrics", response_model=None, response_class=PlainTextResponse)
    async def metrics() -> Response:
        """What the server counts, in Prometheus' text format."""
        return Response(calls.metrics.text(), media_type=CONTENT_TYPE)

    async def invocations(request: HttpRequest) -> Response:
        return await calls.answer(request)

    # As Starlette has it: FastAPI would look for parameters in each of many calls, and `_describe` tells of them.
    app.add_route("/invocations", invocations, methods=["POST"], include_in_schema=False)

    async def take(request: HttpRequest) -> Response:
        if events is None:
            sentence = "this server takes no events: start it with --journal ADDRESS"
            return refusal(Refused(404, sentence, "no_journal", "NOT_FOUND"))
        return await events.answer(request)

    app.add_route("/events", take, methods=["POST"], include_in_schema=False)

    if reload is not None:

        @app.post("/reload", response_model=None)
        async def take_up(request: HttpRequest) -> Response:
            """Load the model that the server's address names now, if it is another one, and serve it."""
            try:
                require_json(request)
                return versions(await reload())
            except Refused as refused:
                return refusal(refused)
            except UserError as error:
                return refusal(Refused(503, f"the previous model goes on serving: {error}", "reload", INTERNAL))

    app.exception_handler(HTTPException)(_no_page)
    app.exception_handler(Exception)(_failed)

    def schema() -> dict[str, Any]:
        return _describe(app.routes, calls.models.current, calls.limits, events)

    app.openapi = schema  # type: ignore[method-assign]
    return app


def _json(tree: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(tree), status, media_type="application/json")


async def _no_page(request: HttpRequest, error: HTTPException) -> Response:
    sentences = {404: "there is no such page; POST /invocations ranks", 405: "this page has another method"}
    sentence = sentences.get(error.status_code, "this request can't be answered")
    code = "RESOURCE_DOES_NOT_EXIST" if error.status_code == 404 else "BAD_REQUEST"
    response = refusal(Refused(error.status_code, sentence, "page", code))
    response.headers.update(error.headers or {})
    return response


async def _failed(request: HttpRequest, error: Exception) -> Response:
    _log.error("a request failed", exc_info=error)
    return refusal(Refused(500, "the server failed; the log says why", "internal", INTERNAL))


@cache
def page() -> Response:
    """The page, which holds nothing of the model, so that everybody may see it.

    A browser runs nothing but the script and style in it, which it knows by their checksums, and lets them ask nobody
    but this server.
    """
    text = files("mmoe_rec.server").joinpath("page.html").read_text(encoding="utf-8")
    sources = []
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        checksum = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        sources.append(f"{tag}-src 'sha256-{checksum}'")
    others = "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    headers = {
        "Content-Security-Policy": "; ".join(["default-src 'none'", *sources, others]),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(text, headers=headers, media_type="text/html")


def _describe(routes: Sequence[Any], served: ServedModel, limits: Serving, events: Accepting | None) -> dict[str, Any]:
    """Return the OpenAPI description of all pages, with the columns and the example of the served model."""
    request = Request.model_json_schema()
    for part, columns in served.ranker.reader.describe_parts().items():
        fields = {name: {"description": kind} for name, kind in columns.items()}
        request["properties"][part] = {"type": "object", "properties": fields}
    inputs = {"type": "array", "items": request, "maxItems": limits.max_elements}
    call = {
        "type": "object",
        "properties": {"inputs": inputs, "params": {"type": "object", "description": "options for all elements"}},
        "description": "Instead of inputs, dataframe_records or dataframe_split may hold a row for each candidate.",
    }
    example = {"inputs": [served.example], "params": {"top_k": 5}}
    queries = {"partial": "true: an element that is wrong gets an error in its place"}
    if events is not None:
        queries["after"] = "position of the journal: answer once all events up to it are known"
    replies = {"200": {"description": "a ranking for each element, in order"}, "default": {"description": "a refusal"}}
    tree = get_openapi(title="mmoe-rec serve", version=VERSION, routes=routes)
    tree["paths"]["/invocations"] = {
        "post": {
            "summary": "Rank the candidates of each element",
            "parameters": [{"name": name, "in": "query", "description": text} for name, text in queries.items()],
            "requestBody": {"content": {"application/json": {"schema": call, "example": example}}},
            "responses": replies,
        }
    }
    if events is not None:
        tree["paths"]["/events"] = {
            "post": {
                "summary": "Take events, all rows or none",
                "requestBody": {"content": {"application/json": {"schema": {}}}},
                "responses": {"200": {"description": "accepted"}},
            }
        }
    return tree
