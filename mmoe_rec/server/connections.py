"""uvicorn around the application: the server of one worker, with limits on connections that uvicorn lacks.

uvicorn limits the time of an idle connection, but neither that of a request's headers nor that of a caller who does not
take a reply. httptools takes headers of any size.
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
    """uvicorn's server of an application, which a worker's parent tells when to end."""

    def __init__(self, app: ASGIApp, read_timeout_seconds: float, grace_seconds: float) -> None:
        """Prepare to serve.

        Args:
            app: The application.
            read_timeout_seconds: Time for the headers of a request to arrive, and for the caller to take the reply. Up
            to
                twice as much.
            grace_seconds: Time to answer what was accepted once the server ends. A call that takes longer is given up.
        """
        config = uvicorn.Config(
            app,
            http=partial(BoundedProtocol, read_timeout_seconds),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=min(_KEEP_ALIVE_SECONDS, read_timeout_seconds),  # type: ignore[arg-type]  # fractions work
            timeout_graceful_shutdown=grace_seconds,  # type: ignore[arg-type]
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
    """uvicorn's protocol, closing connections with large headers, and those on which nothing goes on."""

    _timer: asyncio.TimerHandle | None = None
    _unfinished = 0  # bytes of headers that are not whole
    _progress = 0  # requests begun and replies ended

    def __init__(self, read_timeout_seconds: float, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._seconds = read_timeout_seconds

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._look_in()

    def data_received(self, data: bytes) -> None:
        if self.cycle is None or not self.cycle.more_body:
            self._unfinished += len(data)
        super().data_received(data)
        if self._unfinished > MAX_HEADER_BYTES:
            self.send_400_response(f"The request's headers have more than {MAX_HEADER_BYTES // 2**10} KiB.")

    def _unsupported_upgrade_warning(self) -> None:
        # The parser takes what follows for the other protocol, and would never give another request.
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._progress += 1
        self._unfinished = 0

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._progress += 1

    def _look_in(self) -> None:
        self._timer = self.loop.call_later(self._seconds, self._look, self._progress)

    def _look(self, progress: int) -> None:
        """Close the connection if nothing has gone on since the last look. A call has limits of its own."""
        is_answering = self.cycle is not None and not self.cycle.response_complete and not self.cycle.disconnected
        is_taken = self.transport.get_write_buffer_size() == 0
        if progress != self._progress or (is_answering and is_taken):
            self._look_in()
        elif is_taken:
            self.transport.close()
        else:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)
