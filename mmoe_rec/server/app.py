"""The ASGI application: its endpoints, the access checks, and error replies in one format."""

import base64
import hashlib
import hmac
import logging
import re
from collections.abc import Awaitable, Callable
from enum import StrEnum
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mmoe_rec.errors import UserError, quoted
from mmoe_rec.inference.request_reader import Request
from mmoe_rec.live.request_log import RequestLog
from mmoe_rec.server.events import EventHandler
from mmoe_rec.server.invocations import InvocationHandler, error_response, require_json
from mmoe_rec.server.models import ModelManager
from mmoe_rec.server.options import INTERNAL_ERROR, HttpError, RefusalReason
from mmoe_rec.server.server_metrics import CONTENT_TYPE, Metrics

Reload = Callable[[], Awaitable[None]]
"""Function that loads and serves the model that the server's URI names now. Raises UserError if that fails."""
Handler = Callable[[HttpRequest], Awaitable[Response]]

LIVENESS_PATH = "/ping"  # Returns 200 while the server drains, so that a liveness probe doesn't kill it early.
PUBLIC_PATHS = ("/health", LIVENESS_PATH)
PAGE_PATH = "/"  # Needs no token, because the page itself asks a person for the token.

VERSION = version("mmoe-rec")
_log = logging.getLogger(__name__)


class HealthStatus(StrEnum):
    """Status in the reply to a health check."""

    OK = "ok"
    STUCK = "stuck"
    DRAINING = "draining"


class Application:
    """The ASGI application of a worker."""

    def __init__(self, models: ModelManager, metrics: Metrics | None = None, reload: Reload | None = None) -> None:
        """Set up the endpoints.

        Args:
            models: The served model and the server's options.
            metrics: Metrics of the worker. None creates new metrics in memory.
            reload: Function that `/reload` calls. None omits this endpoint.
        """
        options = models.options
        self.models, self.metrics, self.token, self._reload = models, metrics or Metrics(), options.token, reload
        count = self.metrics.logged_replies.labels
        self._log = None
        if options.request_log is not None:
            self._log = RequestLog(options.request_log, lambda outcome, replies: count(outcome).inc(replies))
        self.invocations = InvocationHandler(models, self.metrics, self._log)
        self.events: EventHandler | None = None
        if options.journal is not None and (follower := self.invocations.follower) is not None:
            self.events = EventHandler(options.limits, options.journal, self.metrics, follower)
        self._pages: list[tuple[str, str, Handler]] = [
            *(("GET", path, self._health) for path in PUBLIC_PATHS),
            ("GET", PAGE_PATH, self._page),
            ("GET", "/version", self._version),
            ("GET", "/model", self._model),
            ("GET", "/metrics", self._metrics),
            ("GET", "/openapi.json", self._describe),
            ("POST", "/invocations", self._rank),
            ("POST", "/events", self._accept_events),
            *([] if reload is None else [("POST", "/reload", self._reload_model)]),
        ]
        routes = [Route(path, handler, methods=[method]) for method, path, handler in self._pages]
        self._app = Starlette(routes=routes, exception_handlers={HTTPException: _no_page, Exception: _failed})
        self._app.router.redirect_slashes = False  # The URL of a redirect would contain the caller's own Host header.

    def close(self) -> None:
        """Write the rest of the request log. Call this only after all calls were answered."""
        if self._log is not None:
            self._log.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI request. If access is refused, the body is not read."""
        page: ASGIApp = self._app
        if scope["type"] == "http" and (refused := self._check_access(scope)) is not None:
            self.metrics.refusals.labels(refused.reason).inc()
            page = error_response(refused)
        await page(scope, receive, send)

    def _check_access(self, scope: Scope) -> HttpError | None:
        """Return an error if the host or the token isn't allowed."""
        is_open = scope["path"] in (*PUBLIC_PATHS, PAGE_PATH)
        if self.token is None and not is_open and (allowed_hosts := self.models.options.allowed_hosts) is not None:
            # In a DNS rebinding attack, a web page of another site makes its own host name point to this server.
            for host in Headers(scope=scope).getlist("host"):
                if re.sub(r":\d*$", "", host).strip("[]").lower() not in allowed_hosts:
                    problem = f"header Host: {quoted(host)} is not a name of this server"
                    sentence = f"{problem}. Start it with --allow-host NAME."
                    return HttpError(403, sentence, RefusalReason.FOREIGN, "PERMISSION_DENIED")
        authorization = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if self.token is not None and not is_open:
            scheme, _, token = authorization.partition(b" ")
            # Compare in constant time, so that nobody can guess the token letter by letter from the time of replies.
            if not hmac.compare_digest(token.strip(), self.token.encode()) or scheme.lower() != b"bearer":
                sentence = "this server requires a token: send the header Authorization: Bearer TOKEN"
                return HttpError(401, sentence, RefusalReason.UNAUTHORIZED, "UNAUTHENTICATED")
        return None

    async def _health(self, request: HttpRequest) -> Response:
        """Return 200 once the model has ranked its example, 503 if it is stuck. /health is also 503 while draining."""
        status = HealthStatus.OK
        if self.invocations.queue.is_stuck:
            status = HealthStatus.STUCK
        elif self.invocations.is_draining and request.scope["path"] != LIVENESS_PATH:
            status = HealthStatus.DRAINING
        return _json({"status": status}, 200 if status == HealthStatus.OK else 503)

    async def _page(self, request: HttpRequest) -> Response:
        """Return the page on which a person can try the model."""
        return _page_response()

    async def _version(self, request: HttpRequest) -> Response:
        """Return the served model, the version of this package, and why a newer model isn't served, if so."""
        tree: dict[str, Any] = {**self.models.current.describe(), "mmoe_rec": VERSION}
        tree["reload_failure"] = self.models.reload_failure
        if (follower := self.invocations.follower) is not None:
            tree |= {"position": str(follower.ingester.position), "events_failure": follower.events_failure}
        return _json(tree)

    async def _model(self, request: HttpRequest) -> Response:
        """Return the served model, its tasks with their score weights, and an example request."""
        served, names = self.models.current, ("name", "kind", "objective", "score_weight")
        tasks = [{name: getattr(task, name) for name in names} for task in served.ranker.info.tasks]
        return _json({**served.describe(), "tasks": tasks, "example": served.example})

    async def _metrics(self, request: HttpRequest) -> Response:
        """Return the server's metrics in Prometheus' text format."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def _rank(self, request: HttpRequest) -> Response:
        """Rank the candidates of each element."""
        return await self.invocations.answer(request)

    async def _accept_events(self, request: HttpRequest) -> Response:
        """Add the rows of a call to the journal, all or none."""
        if self.events is None:
            sentence = "this server accepts no events: start it with --journal URL"
            return error_response(HttpError(404, sentence, RefusalReason.NO_JOURNAL, "NOT_FOUND"))
        return await self.events.answer(request)

    async def _reload_model(self, request: HttpRequest) -> Response:
        """Load and serve the model that the server's URI names now, if it has changed."""
        assert self._reload is not None, "the page exists only with a backend"
        try:
            require_json(request)
            await self._reload()
            return await self._version(request)
        except HttpError as refused:
            return error_response(refused)
        except UserError as error:
            sentence = f"the previous model is still served: {error}"
            return error_response(HttpError(503, sentence, RefusalReason.RELOAD, INTERNAL_ERROR))

    async def _describe(self, request: HttpRequest) -> Response:
        """Return the OpenAPI description of all pages, with the columns and the example of the served model."""
        served, limits, paths = self.models.current, self.models.options.limits, dict[str, Any]()
        for method, path, handler in self._pages:
            paths[path] = {method.lower(): {"summary": handler.__doc__, "responses": {"default": {"description": ""}}}}
        if self.events is None:
            del paths["/events"]
        element = Request.model_json_schema()
        for part, columns in served.ranker.reader.describe_parts().items():
            fields = {name: {"description": kind} for name, kind in columns.items()}
            element["properties"][part] = {"type": "object", "properties": fields}
        inputs = {"type": "array", "items": element, "maxItems": limits.max_elements}
        call = {
            "type": "object",
            "properties": {"inputs": inputs, "params": {"type": "object", "description": "options for all elements"}},
            "description": "Instead of inputs, dataframe_records or dataframe_split can have a row for each candidate.",
        }
        queries = {"partial": "true: an invalid element gets an error instead of rejecting the call"}
        if self.events is not None:
            queries["after"] = "position of the journal: answer once all events up to it are ingested"
        example = {"inputs": [served.example], "params": {"top_k": 5}}
        paths["/invocations"]["post"] |= {
            "parameters": [{"name": name, "in": "query", "description": text} for name, text in queries.items()],
            "requestBody": {"content": {"application/json": {"schema": call, "example": example}}},
        }
        return _json({"openapi": "3.1.0", "info": {"title": "mmoe-rec serve", "version": VERSION}, "paths": paths})


def _json(tree: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(tree), status, media_type="application/json")


async def _no_page(request: HttpRequest, error: Any) -> Response:
    sentences = {
        404: "this path doesn't exist; rank candidates with POST /invocations",
        405: "this path doesn't support the method",
    }
    sentence = sentences.get(error.status_code, "this request can't be answered")
    code = "RESOURCE_DOES_NOT_EXIST" if error.status_code == 404 else "BAD_REQUEST"
    response = error_response(HttpError(error.status_code, sentence, RefusalReason.PAGE, code))
    response.headers.update(error.headers or {})
    return response


async def _failed(request: HttpRequest, error: Exception) -> Response:
    _log.error("a request failed", exc_info=error)
    sentence = "the server failed; its log has the reason"
    return error_response(HttpError(500, sentence, RefusalReason.INTERNAL, INTERNAL_ERROR))


@cache
def _page_response() -> Response:
    """Return the web page. Its headers let it run only its own script and style, and contact only this server."""
    text = files("mmoe_rec.server").joinpath("page.html").read_text(encoding="utf-8")
    sources = []
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        checksum = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        sources.append(f"{tag}-src 'sha256-{checksum}'")
    fixed_directives = "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    headers = {
        "Content-Security-Policy": "; ".join(["default-src 'none'", *sources, fixed_directives]),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(text, headers=headers, media_type="text/html")
