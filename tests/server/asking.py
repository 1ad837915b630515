"""Requests to an application in this process, as the server would hand them over."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp

from tests.inference.small_model import CONTEXT, ITEMS, USER


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
        return await asyncio.gather(*(reply(app, each, **more) for each in requests))

    found = asyncio.run(together())
    return found[0] if len(requests) == 1 else found


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
    left: the caller leaves when it is set.
    """
    path, _, query = page.partition("?")
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"content-type": "application/json"} | {name.lower(): value for name, value in headers.items()}
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
    return Answer(start["status"], names, b"".join(each.get("body", b"") for each in rest))


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


def element(**changes: Any) -> dict[str, Any]:
    """A good request with keys replaced."""
    return {"user": {"user": USER}, "context": dict(CONTEXT), "candidates": {"item": ITEMS}, **changes}
