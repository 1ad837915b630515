"""Connections of one process: uvicorn's protocol with limits that hold against any caller.

uvicorn gives an idle connection a time, but none to the headers of a request, and httptools no size either; what a
caller goes on sending after a refusal is read until it ends, or, where the connection is to close, not at all, so that
the system resets it and the reply is lost; and a reply that nobody takes is kept for ever. What is no HTTP is answered
in plain text, and before the reply to the request ahead of it. A request that asks for another protocol loses its body,
and everything that follows it on the connection.
"""

import asyncio
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mmoe_rec.server.options import MOST_HEADER_BYTES, Refused, large_headers

LAST_REQUEST_SECONDS = 1.0  # for a connection that comes while the server ends
MOST_PIPELINED = 256  # requests sent before the reply to an earlier one is there; no usual client sends any


@dataclass(frozen=True)
class Bounds:
    """Limits of a connection.

    Attributes:
        seconds: Time for the headers of a request to arrive, for the rest of a body that was refused, and for the
            caller to take the reply.
        dropped: Bytes that are read and dropped of such a rest, as many callers read no reply before they have sent
            everything.
        is_ending: Whether the server answers what was accepted, and ends.
    """

    seconds: float
    dropped: int
    is_ending: Callable[[], bool]


class BoundedConfig(uvicorn.Config):
    """uvicorn's settings of an application whose connections have bounds."""

    def __init__(self, app: Any, bounds: Bounds, **options: Any) -> None:
        self.bounds = bounds
        super().__init__(
            app,
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            **options,
        )


class _Transport:
    """uvicorn's end of a connection; the protocol decides how it closes."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self._transport, self.close = transport, close
        self.has_ended = False
        """Whether nothing more is said; what comes may still be read."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self.has_ended or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        if not self.has_ended:
            self._transport.write(data)

    def end(self) -> None:
        """Says nothing more, once all is sent that was written."""
        self.has_ended = True
        if self._transport.can_write_eof():
            self._transport.write_eof()

    def close_now(self) -> None:
        self._transport.close()


_Base: Any = HttpToolsProtocol


class BoundedProtocol(_Base):
    """uvicorn's protocol, closing connections between requests that stay unfinished."""

    _end: asyncio.TimerHandle | None = None
    _written: asyncio.TimerHandle | None = None
    _unfinished = _dropped = _replies = 0
    _more_comes = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(_Transport(transport, self._close))
        self._arm()

    def data_received(self, data: bytes) -> None:
        if self.transport.has_ended:
            self._drop_of_body(data)
            return
        super().data_received(data)
        # uvicorn tells the connections that it knows of, and not one that the system has just handed over.
        if self.cycle is not None and self.config.bounds.is_ending():
            self.cycle.keep_alive = False
        if self.transport.is_closing():
            return
        if len(self.pipeline) > MOST_PIPELINED:
            self._drop()
            return
        if self._is_answering:
            self._disarm()
            self._unfinished = self._dropped = 0
            return
        self._arm()
        # What follows a refusal is read and dropped; all else are headers, which are kept until they are whole.
        if self.cycle is not None and self.cycle.more_body:
            self._drop_of_body(data)
        else:
            self._unfinished += len(data)
            if self._unfinished > MOST_HEADER_BYTES:
                self._refuse(large_headers())

    def _drop_of_body(self, data: bytes) -> None:
        self._dropped += len(data)
        if self._dropped > self.config.bounds.dropped:
            self._drop()

    def _close(self) -> None:
        """Closes the connection; but first reads and drops what the caller goes on sending, for a time.

        Else the system would answer it by a reset, for which many callers lose the reply.
        """
        transport = self.transport
        if transport.is_closing() or not (self._more_comes or (self.cycle is not None and self.cycle.more_body)):
            transport.close_now()
            return
        transport.end()
        if self._is_answering:  # who waits for the rest of the body is told, as by a connection that is lost
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.flow.resume_reading()
        self._disarm()
        self._arm()

    def send_400_response(self, msg: str) -> None:
        if self._is_answering and not self.cycle.more_body:
            # What follows a whole request is at fault, which gets its reply.
            self.cycle.keep_alive, self._more_comes = False, True
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
        self._more_comes = True
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        # The parser takes what follows for the other protocol, and would never give another request.
        if self.cycle is not None:
            self.cycle.keep_alive = False

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._written is not None:
            self._written.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._replies += 1
        if self._written is None:
            self._wait_until_taken()

    def _wait_until_taken(self) -> None:
        self._written = None
        if self.transport.get_write_buffer_size():
            self._written = self.loop.call_later(self.config.bounds.seconds, self._not_taken, self._replies)

    def _not_taken(self, replies: int) -> None:
        if self._replies > replies:  # what is left may be of a later one
            self._wait_until_taken()
        elif self.transport.get_write_buffer_size():
            self._drop()
        else:
            self._written = None

    def _drop(self) -> None:
        # Without this the system would keep for minutes what the caller does not take.
        at_once = struct.pack("ii", 1, 0)
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        self.transport.abort()

    def _arm(self) -> None:
        if self._end is None:
            bounds = self.config.bounds
            longest = min(bounds.seconds, LAST_REQUEST_SECONDS) if bounds.is_ending() else bounds.seconds
            self._end = self.loop.call_later(longest, self._too_late)

    def _disarm(self) -> None:
        if self._end is not None:
            self._end.cancel()
            self._end = None

    def _too_late(self) -> None:
        self._end = None
        if self.transport.has_ended or (not self.transport.is_closing() and not self._is_answering):
            if self.transport.get_write_buffer_size():  # a refusal that the caller does not take
                self._drop()
            else:
                self.transport.close_now()
