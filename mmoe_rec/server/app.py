"""The application: its pages, who may see them, and replies of one form to whatever goes wrong."""

import base64
import hashlib
import hmac
import logging
import re
from collections.abc import Awaitable, Callable
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
from mmoe_rec.server.options import INTERNAL_ERROR, HttpError
from mmoe_rec.server.server_metrics import CONTENT_TYPE, Metrics

Reload = Callable[[], Awaitable[None]]
"""Takes up the model that the server's address names now. Raises UserError for one that can't be loaded."""
Handler = Callable[[HttpRequest], Awaitable[Response]]

LIVENESS_PATH = "/ping"  # Stays 200 while the server drains, so that no liveness probe ends it early.
PUBLIC_PATHS = ("/health", LIVENESS_PATH)
PAGE_PATH = "/"  # which asks a person for the token

VERSION = version("mmoe-rec")
_log = logging.getLogger(__name__)


class Application:
    """The ASGI application of a worker, and the parts that others ask about it."""

    def __init__(self, models: ModelManager, metrics: Metrics | None = None, reload: Reload | None = None) -> None:
        options = models.options
        self.models, self.token, self._reload = models, options.token, reload
        self.metrics = metrics or Metrics()
        count = self.metrics.logged_replies.labels
        self._log = None
        if options.request_log is not None:
            self._log = RequestLog(options.request_log, lambda outcome, many: count(outcome).inc(many))
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
            ("POST", "/events", self._take),
            *([] if reload is None else [("POST", "/reload", self._take_up)]),
        ]
        routes = [Route(path, answer, methods=[method]) for method, path, answer in self._pages]
        self._app = Starlette(routes=routes, exception_handlers={HTTPException: _no_page, Exception: _failed})
        self._app.router.redirect_slashes = False  # Redirects have the caller's own header Host for an address.

    def close(self) -> None:
        """Writes what is still to be logged, once the last call is answered."""
        if self._log is not None:
            self._log.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, as ASGI has it. Without the token nothing of it is read."""
        page: ASGIApp = self._app
        if scope["type"] == "http" and (refused := self._refuse(scope)) is not None:
            self.metrics.refusals.labels(refused.reason).inc()
            page = error_response(refused)
        await page(scope, receive, send)

    def _refuse(self, scope: Scope) -> HttpError | None:
        is_open = scope["path"] in (*PUBLIC_PATHS, PAGE_PATH)
        if self.token is None and not is_open and (allowed_hosts := self.models.options.allowed_hosts) is not None:
            # By DNS rebinding a web page gives this server a name of the page's own.
            for host in Headers(scope=scope).getlist("host"):
                if re.sub(r":\d*$", "", host).strip("[]").lower() not in allowed_hosts:
                    told = f"header Host: {quoted(host)} is no name of this server. Start it with --allow-host NAME."
                    return HttpError(403, told, "foreign", "PERMISSION_DENIED")
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if self.token is not None and not is_open:
            scheme, _, token = given.partition(b" ")
            # Takes the same time whatever is given, so that the token can't be found letter by letter.
            if not hmac.compare_digest(token.strip(), self.token.encode()) or scheme.lower() != b"bearer":
                sentence = "this server asks for a token: send the header Authorization: Bearer TOKEN"
                return HttpError(401, sentence, "unauthorised", "UNAUTHENTICATED")
        return None

    async def _health(self, request: HttpRequest) -> Response:
        """200 once the model has answered its own example. 503 if it does not answer; /health also while it drains."""
        if self.invocations.queue.is_stuck:
            return _json({"status": "stuck"}, 503)
        is_draining = self.invocations.is_draining and request.scope["path"] != LIVENESS_PATH
        return _json({"status": "draining"}, 503) if is_draining else _json({"status": "ok"})

    async def _page(self, request: HttpRequest) -> Response:
        """The page for people."""
        return page_response()

    async def _version(self, request: HttpRequest) -> Response:
        """The model that is served, the version of this package, and why a newer model is not served, if so."""
        tree: dict[str, Any] = {**self.models.current.describe(), "mmoe_rec": VERSION}
        tree["reload_failure"] = self.models.reload_failure
        if (follower := self.invocations.follower) is not None:
            tree |= {"position": str(follower.ingester.position), "events_failure": follower.events_failure}
        return _json(tree)

    async def _model(self, request: HttpRequest) -> Response:
        """The model that is served, its tasks with their weights in the score, and a request that it can answer."""
        served, names = self.models.current, ("name", "kind", "objective", "score_weight")
        tasks = [{name: getattr(task, name) for name in names} for task in served.ranker.info.tasks]
        return _json({**served.describe(), "tasks": tasks, "example": served.example})

    async def _metrics(self, request: HttpRequest) -> Response:
        """What the server counts, in Prometheus' text format."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def _rank(self, request: HttpRequest) -> Response:
        """Rank the candidates of each element."""
        return await self.invocations.answer(request)

    async def _take(self, request: HttpRequest) -> Response:
        """Take events, all rows or none."""
        if self.events is None:
            sentence = "this server takes no events: start it with --journal ADDRESS"
            return error_response(HttpError(404, sentence, "no_journal", "NOT_FOUND"))
        return await self.events.answer(request)

    async def _take_up(self, request: HttpRequest) -> Response:
        """Load the model that the server's address names now, if it is another one, and serve it."""
        assert self._reload is not None, "else there is no such page"
        try:
            require_json(request)
            await self._reload()
            return await self._version(request)
        except HttpError as refused:
            return error_response(refused)
        except UserError as error:
            return error_response(
                HttpError(503, f"the previous model goes on serving: {error}", "reload", INTERNAL_ERROR)
            )

    async def _describe(self, request: HttpRequest) -> Response:
        """The OpenAPI description of all pages, with the columns and the example of the served model."""
        served, limits, paths = self.models.current, self.models.options.limits, dict[str, Any]()
        for method, path, answer in self._pages:
            paths[path] = {method.lower(): {"summary": answer.__doc__, "responses": {"default": {"description": ""}}}}
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
            "description": "Instead of inputs, dataframe_records or dataframe_split may hold a row for each candidate.",
        }
        queries = {"partial": "true: an element that is wrong gets an error in its place"}
        if self.events is not None:
            queries["after"] = "position of the journal: answer once all events up to it are known"
        example = {"inputs": [served.example], "params": {"top_k": 5}}
        paths["/invocations"]["post"] |= {
            "parameters": [{"name": name, "in": "query", "description": text} for name, text in queries.items()],
            "requestBody": {"content": {"application/json": {"schema": call, "example": example}}},
        }
        return _json({"openapi": "3.1.0", "info": {"title": "mmoe-rec serve", "version": VERSION}, "paths": paths})


def _json(tree: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(tree), status, media_type="application/json")


async def _no_page(request: HttpRequest, error: Any) -> Response:
    sentences = {404: "there is no such page; POST /invocations ranks", 405: "this page has another method"}
    sentence = sentences.get(error.status_code, "this request can't be answered")
    code = "RESOURCE_DOES_NOT_EXIST" if error.status_code == 404 else "BAD_REQUEST"
    response = error_response(HttpError(error.status_code, sentence, "page", code))
    response.headers.update(error.headers or {})
    return response


async def _failed(request: HttpRequest, error: Exception) -> Response:
    _log.error("a request failed", exc_info=error)
    return error_response(HttpError(500, "the server failed; the log says why", "internal", INTERNAL_ERROR))


@cache
def page_response() -> Response:
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
