"""Requests to an application in this process, as the server would hand them over."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from starlette.types import ASGIApp

from mmoe_rec.inference.artifact import ResolvedModel
from mmoe_rec.live.request_log import RequestLogOptions
from mmoe_rec.server.app import Application
from mmoe_rec.server.models import ModelManager, ServedModel
from mmoe_rec.server.options import ServerOptions
from mmoe_rec.settings.sections import Serving
from tests.inference.small_model import CONTEXT, ITEMS, USER

PROBES: list[Any] = json.loads("""[null, true, false, 0, 1, 3, -1, 9007199254740992, 9223372036854775807, 0.5,
    -9223372036854775808, 9223372036854775808, 18446744073709551616, -1e300, 1000000, 1000001, "", "1", "a", "soon",
    "2023-11-29", "2024-02-29 10:00", "2023-02-29", "2023-11-29T12:00:00.5+01:00", "2000-02-29T00:00Z", "1900-02-29",
    "1699-12-31", "2199-12-31T23:59:59-12:00", "2200-01-01", [], [1], [0, 2], [0, 1, 2], [null], ["a"], ["a", null],
    [0.5], [1, "a"], [[1]], [true], {}, {"a": 1}, {"click": 1.5}, {"engagement": "1"}, {"liked": -1}, {"liked": 0}]""")
"""What any column or option may be given, rightly or wrongly."""


@dataclass(frozen=True)
class Answer:
    """A reply."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def tree(self) -> Any:
        """The body as JSON values."""
        return json.loads(self.body, parse_constant=lambda name: 1 / 0)

    @property
    def message(self) -> str:
        """The sentence of a refusal, which has nothing beside it and its code."""
        assert self.tree.keys() == {"error_code", "message"}
        return str(self.tree["message"])


def ask(app: ASGIApp, *requests: Any, **more: Any) -> Any:
    """The answer to a request, or the answers to several that come at the same time; see `reply`."""

    async def together() -> list[Answer]:
        return await asyncio.gather(*(reply(app, request, **more) for request in requests))

    actual = asyncio.run(together())
    return actual[0] if len(requests) == 1 else actual


async def reply(
    app: ASGIApp,
    body: Any = b"",
    page: str = "/invocations",
    method: str = "POST",
    headers: Mapping[str, str] = {},
    parts: Iterable[bytes] | AsyncIterator[bytes] | None = None,
    left: asyncio.Event | None = None,
) -> Answer:
    """The answer to one request.

    body: bytes, or JSON values; parts: the body in pieces, without its length;
    headers: also the type of the body, JSON unless it says another, "" for none;
    left: the caller leaves when it is set.
    """
    path, _, query = page.partition("?")
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"content-type": "application/json"} | {name.lower(): value for name, value in headers.items()}
    if not given["content-type"]:
        del given["content-type"]
    if parts is None:
        given.setdefault("content-length", str(len(data)))
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    coming = _pieces(parts if parts is not None else [data], left or asyncio.Event())
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return await anext(coming)

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start, *rest = sent
    assert start["type"] == "http.response.start"
    names = {name.decode(): value.decode() for name, value in start["headers"]}
    return Answer(start["status"], names, b"".join(item.get("body", b"") for item in rest))


async def _pieces(parts: Iterable[bytes] | AsyncIterator[bytes], left: asyncio.Event) -> AsyncIterator[dict[str, Any]]:
    if isinstance(parts, AsyncIterator):
        async for part in parts:
            yield {"type": "http.request", "body": part, "more_body": True}
    else:
        for part in parts:
            yield {"type": "http.request", "body": part, "more_body": True}
    yield {"type": "http.request", "body": b"", "more_body": False}
    await left.wait()
    yield {"type": "http.disconnect"}


def application(
    models: ModelManager, token: str | None = None, allowed_hosts: frozenset[str] | None = None, **limits: Any
) -> Application:
    """An application around the current model, with limits of its own."""
    own = copy(models)
    own.options = ServerOptions(Serving(**limits), token=token, allowed_hosts=allowed_hosts)
    return Application(own)


def take_up(models: ModelManager, source: ResolvedModel) -> ServedModel:
    """Open another model and serve it, as a worker does."""
    served = models.open(source)
    models.switch_to(served)
    return served


def as_json(table: pa.Table) -> list[dict[str, Any]]:
    """Rows of events as a caller sends them."""
    rows: list[dict[str, Any]] = json.loads(json.dumps(table.to_pylist(), default=str))
    return rows


def element(**changes: Any) -> dict[str, Any]:
    """A good request with keys replaced."""
    return {"user": {"user": USER}, "context": dict(CONTEXT), "candidates": {"item": ITEMS}, **changes}


# An application that logs requests


@contextmanager
def logging_app(model: Path, request_log: RequestLogOptions, journal: Path | None = None) -> Iterator[Application]:
    """An application that serves the model in a folder; what is to be logged is written when the block ends."""
    models = ModelManager(
        ServerOptions(journal=journal, request_log=request_log), ResolvedModel(model, "models:/small/7", "a_run")
    )
    app = Application(models)
    try:
        yield app
    finally:
        app.close()


def logged(folder: Path) -> pa.Table:
    """All logged rows, in the order of their files."""
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("*.parquet"))])


def numbers(app: Application) -> dict[str, float]:
    """What the page of metrics says."""
    lines = ask(app, b"", page="/metrics", method="GET").body.decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name.removeprefix("mmoe_rec_"): float(value) for name, value in pairs}


def outcomes(app: Application) -> dict[str, int]:
    """What became of how many replies."""
    return {n.split('"')[1]: int(item) for n, item in numbers(app).items() if n.startswith("request_log_total{")}
