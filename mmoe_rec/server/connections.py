"""Connections of one process: uvicorn's protocol with limits that hold against any caller.

uvicorn gives an idle connection a time, but none to the headers of a request, and httptools no size either. The rest of
a body that was refused is read until it ends, or, if the connection is to close, not at all, so that the system resets
it and the reply is lost. A reply that nobody takes is kept for ever. Invalid HTTP is answered in plain text, and before
the reply to the request ahead of it. A request that asks for another protocol loses its body, and everything that
follows it on the connection.
"""

import asyncio
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import orjson
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mmoe_rec.server.options import MOST_HEADER_BYTES, Refused, large_headers

LAST_REQUEST_SECONDS = 1.0  # for a connection that comes while the server ends
LONGEST_PAUSE_SECONDS = 1.0  # in the rest of a body that was refused
MOST_PIPELINED = 256  # requests sent before the reply to an earlier one is there; no usual client sends any
_KEEP_ALIVE_SECONDS = 5.0


@dataclass(frozen=True)
class Bounds:
    """Limits of a connection.

    Attributes:
        seconds: Time for the headers of a request to arrive, for the rest of a body that was refused, and for the
            caller to take the reply. Up to twice as much for headers and replies.
        dropped: Bytes that are read and dropped of such a rest, as many callers read no reply before they have sent
            everything.
        is_ending: Whether the server answers what was accepted, and ends.
    """

    seconds: float
    dropped: int
    is_ending: Callable[[], bool]


class BoundedConfig(uvicorn.Config):
    """uvicorn's settings of an application whose connections have bounds."""

    def __init__(self, app: ASGIApp, bounds: Bounds, **options: Any) -> None:
        self.bounds = bounds
        super().__init__(
            DropRest(app, bounds),
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=min(_KEEP_ALIVE_SECONDS, bounds.seconds),  # type: ignore[arg-type]  # fractions work
            **options,
        )


class DropRest:
    """An ASGI application that reads and drops, within bounds, the rest of a body that another one has not read."""

    def __init__(self, app: ASGIApp, bounds: Bounds) -> None:
        self._app, self._bounds = app, bounds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request as the other application does."""
        more_comes = any(name in (b"content-length", b"transfer-encoding") for name, _ in scope.get("headers", ()))

        async def received() -> Message:
            nonlocal more_comes
            message = await receive()
            more_comes = more_comes and message.get("more_body", False)
            return message

        async def drop(most: int, seconds: float, pause: float) -> None:
            size = 0
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while more_comes and size <= most:
                        async with asyncio.timeout(pause):
                            size += len((await received()).get("body", b""))

        async def sent(message: Message) -> None:
            if more_comes and message["type"] == "http.response.start":
                await drop(0, 0.0, 0.0)  # A body that is there needs no end of the connection.
                if more_comes:
                    message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            elif more_comes and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await drop(self._bounds.dropped, self._bounds.seconds, LONGEST_PAUSE_SECONDS)
                message = {"type": message["type"]}
            await send(message)

        await self._app(scope, received, sent)


_Base: Any = HttpToolsProtocol


class BoundedProtocol(_Base):
    """uvicorn's protocol, closing connections on which nothing goes on."""

    _timer: asyncio.TimerHandle | None = None
    _unfinished = 0  # bytes of headers that are not whole
    _progress = 0  # requests begun and replies ended
    _is_refused = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        bounds = self.config.bounds
        self._look_in(min(bounds.seconds, LAST_REQUEST_SECONDS) if bounds.is_ending() else bounds.seconds)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        if self.cycle is None or not self.cycle.more_body:
            self._unfinished += len(data)
        super().data_received(data)
        if self._is_refused:
            return
        is_large = self._unfinished > MOST_HEADER_BYTES
        if len(self.pipeline) > MOST_PIPELINED or (is_large and self._is_answering):
            self._drop()
        elif is_large:
            self._refuse(large_headers())

    def send_400_response(self, msg: str) -> None:
        if self._is_answering and not self.cycle.more_body:
            # What follows a whole request is at fault, which gets its reply.
            self.cycle.keep_alive = False
            self.flow.pause_reading()
        else:
            self._refuse(Refused(400, "the request is not valid HTTP/1.1", "page", "BAD_REQUEST"))

    def _refuse(self, refused: Refused) -> None:
        """Reply, and read and drop what the caller goes on sending: else the system resets the connection."""
        body = orjson.dumps(refused.body())
        lines = [
            f"HTTP/1.1 {refused.status} {HTTPStatus(refused.status).phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
        ]
        self.transport.write("\r\n".join([*lines, "\r\n"]).encode() + body)
        self.transport.write_eof()
        self._is_refused = True
        if self._is_answering:  # who waits for the rest of the body is told, as by a connection that is lost
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _unsupported_upgrade_warning(self) -> None:
        # The parser takes what follows for the other protocol, and would never give another request.
        if self.cycle is not None:
            self.cycle.keep_alive = False

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.disconnected

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._progress += 1
        self._unfinished = 0
        # uvicorn tells the connections that it knows of, and not one that the system has just handed over.
        if self.config.bounds.is_ending():
            self.cycle.keep_alive = False

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._progress += 1

    def _look_in(self, seconds: float) -> None:
        self._timer = self.loop.call_later(seconds, self._look, self._progress)

    def _look(self, progress: int) -> None:
        """Close the connection if nothing has gone on since the last look. A call has limits of its own."""
        is_taken = self.transport.get_write_buffer_size() == 0
        if progress != self._progress or (self._is_answering and is_taken):
            self._look_in(self.config.bounds.seconds)
        elif is_taken:
            self.transport.close()
        else:
            self._drop()

    def _drop(self) -> None:
        # Without this the system would keep for minutes what the caller does not take.
        at_once = struct.pack("ii", 1, 0)
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)
