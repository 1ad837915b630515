"""The application: its pages, who may see them, and replies of one form to whatever goes wrong."""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import re
import weakref
from collections.abc import Awaitable, Callable
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import orjson
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from mmoe_rec.errors import UserError
from mmoe_rec.live.request_log import LogOptions, RequestLog
from mmoe_rec.server.calls import Calls, loading, refusal
from mmoe_rec.server.limits import INTERNAL, MOST_HEADER_BYTES, Limits, Refused, large_headers
from mmoe_rec.server.metrics import CONTENT_TYPE, Metrics
from mmoe_rec.server.models import Models
from mmoe_rec.server.ranking_queue import Passes

if TYPE_CHECKING:
    from mmoe_rec.server.events import Accepting

Reload = Callable[[], Awaitable[dict[str, str | None]]]
"""Takes up the model that the server's address names now, and gives what it is. Raises UserError for one that can't."""

OPEN_PATHS = ("/health", "/ping")
PAGE = "/"  # which asks a person for the token

VERSION = version("mmoe-rec")
_log = logging.getLogger(__name__)


class Application:
    """The ASGI application of a worker, and the parts that others ask about it."""

    def __init__(
        self,
        models: Models,
        limits: Limits,
        metrics: Metrics | None = None,
        reload: Reload | None = None,
        token: str | None = None,
        log: LogOptions | None = None,
        passes: Passes | None = None,
    ) -> None:
        """passes: of all workers, None where it is the only one."""
        self.models, self.token = models, token
        self.metrics = metrics or Metrics()
        self._log = None if log is None else RequestLog(log, self.metrics.count_logged)
        self.calls = Calls(models, limits, self.metrics, passes or Passes(), self._log)
        self.events: Accepting | None = None
        if models.journal is not None:
            from mmoe_rec.server.events import Accepting

            assert self.calls.following is not None
            following, passes = self.calls.following, self.calls.passes
            self.events = Accepting(models, models.journal, limits, self.metrics, following, passes)
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
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if self.token is not None and scope["path"] not in (*OPEN_PATHS, PAGE):
            scheme, _, token = given.partition(b" ")
            # Takes the same time whatever is given, so that the token can't be found letter by letter.
            if not hmac.compare_digest(token.strip(), self.token.encode()) or scheme.lower() != b"bearer":
                sentence = "this server asks for a token: send the header Authorization: Bearer TOKEN"
                return Refused(401, sentence, "unauthorised", "UNAUTHENTICATED")
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MOST_HEADER_BYTES:
            return large_headers()
        return None


def _pages(calls: Calls, events: Accepting | None, reload: Reload | None) -> FastAPI:
    # Without redirects, as those have the caller's own header Host for an address.
    app = FastAPI(title="mmoe-rec serve", version=VERSION, redoc_url=None, redirect_slashes=False)

    async def health() -> Response:
        """200 once the model has answered its own example, and as long as it answers at all."""
        if calls.models.current is None:
            return _json({"status": "loading"}, 503)
        if calls.queue.is_stuck:
            return _json({"status": "stuck"}, 503)
        return _json({"status": "ok"})

    for path in OPEN_PATHS:
        app.get(path, response_model=None)(health)
        app.head(path, response_model=None, include_in_schema=False)(health)

    @app.get("/version", response_model=None)
    async def show_version() -> Response:
        """The model that is served, the version of this package, and why a newer model is not served, if so."""
        return versions(calls.models.current.about() if calls.models.current else {})

    def versions(about: dict[str, str | None]) -> Response:
        tree: dict[str, Any] = {**about, "mmoe_rec": VERSION, "reload_failure": calls.models.failure}
        if calls.following is not None:
            tree |= {"position": calls.following.position, "events_failure": calls.following.gap}
        return _json(tree)

    @app.get("/model", response_model=None)
    async def model() -> Response:
        """The model that is served, its tasks with their weights in the score, and a request that it can answer."""
        if (served := calls.models.current) is None:
            return refusal(loading())
        return _json({**served.about(), "tasks": served.tasks(), "example": served.example})

    app.get(PAGE, response_model=None, include_in_schema=False)(page)

    @app.get("/metrics", response_model=None, response_class=PlainTextResponse)
    async def metrics() -> Response:
        """What the server counts, in Prometheus' text format."""
        return Response(calls.metrics.text(), media_type=CONTENT_TYPE)

    async def invocations(request: Request) -> Response:
        """Ranks the candidates of each element."""
        return await calls.answer(request)

    # As Starlette has it: FastAPI would look for parameters in each of many calls, and `openapi.py` describes them.
    app.add_route("/invocations", invocations, methods=["POST"], include_in_schema=False)

    async def take(request: Request) -> Response:
        """Takes events into the journal."""
        if events is None:
            sentence = "this server takes no events: start it with --journal ADDRESS"
            return refusal(Refused(404, sentence, "no_journal", "NOT_FOUND"))
        return await events.answer(request)

    app.add_route("/events", take, methods=["POST"], include_in_schema=False)

    if reload is not None:

        @app.post("/reload", response_model=None)
        async def take_up() -> Response:
            """Loads the model that the server's address names now, and serves it once it answers its own example."""
            try:
                return versions(await reload())
            except UserError as error:
                return refusal(Refused(503, f"the previous model goes on serving: {error}", "reload", INTERNAL))

    app.exception_handler(HTTPException)(_no_page)
    app.exception_handler(Exception)(_failed)
    described = app.openapi

    def schema() -> dict[str, Any]:
        from mmoe_rec.server import openapi

        tree = described()  # made once, without a model
        served = calls.models.current
        openapi.describe(tree, None if served is None else served.example, events is not None)
        return tree

    app.openapi = schema  # type: ignore[method-assign]
    return app


def _json(tree: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(tree), status, media_type="application/json")


async def _no_page(request: Request, error: HTTPException) -> Response:
    sentences = {404: "there is no such page; POST /invocations ranks", 405: "this page has another method"}
    sentence = sentences.get(error.status_code, "this request can't be answered")
    code = "RESOURCE_DOES_NOT_EXIST" if error.status_code == 404 else "BAD_REQUEST"
    response = refusal(Refused(error.status_code, sentence, "page", code))
    response.headers.update(error.headers or {})
    return response


async def _failed(request: Request, error: Exception) -> Response:
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
