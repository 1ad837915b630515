"""uvicorn around the application: the server of one worker, and its connections with limits against any caller.

uvicorn gives an idle connection a time, but none to the headers of a request, and httptools no size either. It closes a
connection whose request it has not read to the end, so that the system resets it and the reply is lost. A reply that
nobody takes is kept for ever. A request that asks for another protocol loses its body, and everything that follows it
on the connection.
"""

import asyncio
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from typing import Any

import orjson
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mmoe_rec.server.options import BACKLOG, MOST_HEADER_BYTES, Refused, large_headers

LAST_REQUEST_SECONDS = 1.0  # for a connection that comes while the server ends
MOST_PIPELINED = 256  # requests sent before the reply to an earlier one is there; no usual client sends any
_KEEP_ALIVE_SECONDS = 5.0


class Server(uvicorn.Server):
    """uvicorn's server of an application, which a worker's parent tells when to end."""

    def __init__(self, app: ASGIApp, read_seconds: float, grace: float) -> None:
        """Prepare to serve.

        Args:
            app: The application.
            read_seconds: Time for the headers of a request to arrive, for the caller to take the reply, and for the
                rest of a body that was refused. Up to twice as much.
            grace: Time to answer what was accepted once the server ends. A call that takes longer is given up.
        """
        protocol = partial(BoundedProtocol, read_seconds, lambda: self.should_exit)
        config = uvicorn.Config(
            app,
            http=protocol,  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=min(_KEEP_ALIVE_SECONDS, read_seconds),  # type: ignore[arg-type]  # fractions work
            timeout_graceful_shutdown=grace,  # type: ignore[arg-type]
        )
        super().__init__(config)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the parent."""
        yield

    def serve_on(self, bound: socket.socket, started: Callable[[], object]) -> None:
        """Serve on a socket until `should_exit` is set. `started` is called in the event loop before."""

        async def serve() -> None:
            started()
            await self.serve(sockets=[bound])

        with asyncio.Runner(loop_factory=self.config.get_loop_factory()) as runner:
            runner.run(serve())


_Base: Any = HttpToolsProtocol


class BoundedProtocol(_Base):
    """uvicorn's protocol, closing connections on which nothing goes on."""

    _timer: asyncio.TimerHandle | None = None
    _unfinished = 0  # bytes of headers that are not whole
    _progress = 0  # requests begun and replies ended
    _is_over = False  # whether the last reply was written, and the connection waits for the caller to close it

    def __init__(self, read_seconds: float, is_ending: Callable[[], bool], **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._seconds, self._is_ending = read_seconds, is_ending

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._look_in(min(self._seconds, LAST_REQUEST_SECONDS) if self._is_ending() else self._seconds)

    def data_received(self, data: bytes) -> None:
        if self._is_over:
            return
        if self.cycle is None or not self.cycle.more_body:
            self._unfinished += len(data)
        super().data_received(data)
        if self._is_over:
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
        body = orjson.dumps(refused.body())
        lines = [
            f"HTTP/1.1 {refused.status} {HTTPStatus(refused.status).phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
        ]
        self.transport.write("\r\n".join([*lines, "\r\n"]).encode() + body)
        self._end()
        if self._is_answering:  # who waits for the rest of the body is told, as by a connection that is lost
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _end(self) -> None:
        """Write no more, and drop what the caller goes on sending: else the system resets the connection."""
        self.transport.write_eof()
        self._is_over = True

    def close(self) -> None:
        """Close the connection after a reply, once the caller has read it."""
        if self.cycle.more_body:
            self._end()
        else:
            self.transport.close()

    def write(self, data: bytes) -> None:
        """Write a part of a reply."""
        self.transport.write(data)

    def _unsupported_upgrade_warning(self) -> None:
        # The parser takes what follows for the other protocol, and would never give another request.
        if self.cycle is not None:
            self.cycle.keep_alive = False

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.disconnected

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self.cycle.transport = self
        self._progress += 1
        self._unfinished = 0
        # uvicorn tells the connections that it knows of, and not one that the system has just handed over.
        if self._is_ending():
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
            self._look_in(self._seconds)
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
