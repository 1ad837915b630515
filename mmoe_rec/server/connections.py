"""uvicorn as the server of one worker, with limits on connections that uvicorn lacks.

uvicorn limits the time of idle connections. It doesn't limit how long a request's headers may take to arrive, or how
long a caller may take to receive a reply. uvicorn's parser, httptools, accepts headers of any size.
"""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mmoe_rec.server.options import BACKLOG

MAX_HEADER_BYTES = 64 * 2**10
_KEEP_ALIVE_SECONDS = 5.0


class Server(uvicorn.Server):
    """A uvicorn server that ends when its worker process sets `should_exit`, and not at a signal."""

    def __init__(self, app: ASGIApp, read_timeout_seconds: float, grace_seconds: float) -> None:
        """Prepare to serve.

        Args:
            app: Application to serve.
            read_timeout_seconds: Limit on the time for a request's headers to arrive, and on the time for the caller to
                receive the reply. This is also the interval of checks, so a connection may last twice as long.
            grace_seconds: Time to answer accepted calls once the server ends. Calls that take longer are dropped.
        """
        config = uvicorn.Config(
            app,
            http=partial(_BoundedProtocol, read_timeout_seconds),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=min(_KEEP_ALIVE_SECONDS, read_timeout_seconds),  # type: ignore[arg-type]  # floats work
            timeout_graceful_shutdown=grace_seconds,  # type: ignore[arg-type]
        )
        super().__init__(config)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Replace uvicorn's signal handlers by none, because the parent process handles signals."""
        yield

    def serve_on(self, bound: socket.socket, started: Callable[[], object]) -> None:
        """Serve on a socket until `should_exit` is set.

        Args:
            bound: Bound socket.
            started: Callback that runs in the event loop before the server starts.
        """

        async def serve() -> None:
            started()
            await self.serve(sockets=[bound])

        with asyncio.Runner(loop_factory=self.config.get_loop_factory()) as runner:
            runner.run(serve())


_Base: Any = HttpToolsProtocol


class _BoundedProtocol(_Base):
    """uvicorn's protocol, which also closes stalled connections and connections with large headers."""

    _timer: asyncio.TimerHandle | None = None
    _unfinished = 0  # Bytes received of headers that aren't complete yet.
    _progress = 0  # Number of started requests and finished replies on this connection.

    def __init__(self, read_timeout_seconds: float, **uvicorn_options: Any) -> None:
        super().__init__(**uvicorn_options)
        self._seconds = read_timeout_seconds

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._schedule_check()

    def data_received(self, data: bytes) -> None:
        if self.cycle is None or not self.cycle.more_body:
            self._unfinished += len(data)
        super().data_received(data)
        if self._unfinished > MAX_HEADER_BYTES:
            self.send_400_response(f"The request's headers have more than {MAX_HEADER_BYTES // 2**10} KiB.")

    def _unsupported_upgrade_warning(self) -> None:
        # After an upgrade header, the parser treats all further data as another protocol. It would never return
        # another request, so the connection is closed after the reply.
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._progress += 1
        self._unfinished = 0

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._progress += 1

    def _schedule_check(self) -> None:
        self._timer = self.loop.call_later(self._seconds, self._check, self._progress)

    def _check(self, progress: int) -> None:
        """Close the connection, unless `_progress` changed or a call is being answered, which has its own timeout."""
        is_answering = self.cycle is not None and not self.cycle.response_complete and not self.cycle.disconnected
        is_sent = self.transport.get_write_buffer_size() == 0
        if progress != self._progress or (is_answering and is_sent):
            self._schedule_check()
        elif is_sent:
            self.transport.close()
        else:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)
