"""One process that serves: uvicorn around the application, its connections, and how it ends.

uvicorn gives an idle connection a time, but none to the headers of a request, and httptools no size either; what a
caller goes on sending after a refusal is read until it ends, or, where the connection is to close, not at all, so that
the system resets it and the reply is lost; and a reply that nobody takes is kept for ever. What is no HTTP is answered
in plain text, and before the reply to the request ahead of it. A request that asks for another protocol loses its body,
and everything that follows it on the connection.
"""

import asyncio
import logging
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from types import FrameType
from typing import Any

import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mmoe_rec.errors import UserError, catch_stop_signals
from mmoe_rec.inference.artifact import Source
from mmoe_rec.server.app import Application
from mmoe_rec.server.metrics import Metrics
from mmoe_rec.server.models import Finder, Models, Reloads
from mmoe_rec.server.options import (
    BACKLOG,
    MEBIBYTE,
    MOST_HEADER_BYTES,
    Options,
    Refused,
    address_of,
    end_process,
    large_headers,
    listen,
)

_LAST_STEPS_SECONDS = 0.5  # of the time to stop, what is left for ending after the last call was answered or given up
LAST_REQUEST_SECONDS = 1.0  # for a connection that comes while the server ends
MOST_PIPELINED = 256  # requests sent before the reply to an earlier one is there; no usual client sends any

_log = logging.getLogger(__name__)


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


def protocol(
    seconds: float,
    dropped: int,
    is_ending: Callable[[], bool],
    taker: Callable[[], socket.socket | None] = lambda: None,
) -> type[asyncio.Protocol]:
    """The class for uvicorn's `http`.

    seconds: for the headers of a request to arrive, for the rest of a body that was refused, and for the caller to take
    the reply; dropped: bytes that are read and dropped of such a rest, as many callers read no reply before they have
    sent everything; is_ending: whether the server answers what was accepted, and ends; taker: the pipe to processes
    that go on with connections of this one, None unless it retires.
    """
    base: Any = HttpToolsProtocol

    class BoundedProtocol(base):
        """uvicorn's protocol, closing connections between requests that stay unfinished."""

        _end: asyncio.TimerHandle | None = None
        _written: asyncio.TimerHandle | None = None
        _unfinished = _dropped = _replies = 0
        _more_comes = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(_Transport(transport, self._close))
            self._arm()
            if taker() is not None:
                self.shutdown()

        def shutdown(self) -> None:
            if (give := taker()) is None or self._is_answering or self.transport.get_write_buffer_size():
                super().shutdown()
            elif not self._unfinished and not self.transport.is_closing():  # else the rest of a request comes
                socket.send_fds(give, [b"\n"], [self.transport.get_extra_info("socket").fileno()])
                self.transport.abort()

        def data_received(self, data: bytes) -> None:
            if self.transport.has_ended:
                self._drop_of_body(data)
                return
            super().data_received(data)
            # uvicorn tells the connections that it knows of, and not one that the system has just handed over.
            if self.cycle is not None and is_ending():
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
            if self._dropped > dropped:
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
                self._written = self.loop.call_later(seconds, self._not_taken, self._replies)

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
                longest = min(seconds, LAST_REQUEST_SECONDS) if is_ending() else seconds
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

    return BoundedProtocol


class Server(uvicorn.Server):
    """uvicorn's server, which ends within a time whatever a call does, and with exit code 0 if all were answered.

    give, take: ends of a pipe between workers, on which those that retire hand over their connections; None for a
    server of one process. A worker is told of Ctrl-C, which reaches all processes of a terminal, by its parent.
    """

    def __init__(self, app: Application, give: socket.socket | None = None, take: socket.socket | None = None) -> None:
        self._app, self._options, self._give, self._take = app, app.models.options, give, take
        self._last: threading.Timer | None = None
        self._is_retiring = False
        self._arriving: set[asyncio.Task[Any]] = set()
        limits = self._options.limits
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol(
                    limits.read_seconds, 2 * limits.max_body_mib * MEBIBYTE, lambda: self.should_exit, self._taker
                ),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_graceful_shutdown=max(self._options.grace - _LAST_STEPS_SECONDS, 0.0),  # type: ignore[arg-type]
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Catch the signals that ask to stop, which uvicorn does without SIGHUP. A worker's parent catches them."""
        if self._take is None:
            catch_stop_signals(self.handle_exit)
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain, and then stop. A signal may come twice, to the process and to its group, so later ones do nothing."""
        if not self._app.calls.is_draining:
            self._app.calls.is_draining = True
            self._call_later(self._options.drain, self.stop)

    def stop(self) -> None:
        """Answer what was accepted, take no more, and end."""
        if not self.should_exit:
            self.should_exit = True
            self._take_no_more()
            self._call_later(self._options.grace, self._end_now)

    def _call_later(self, seconds: float, function: Callable[[], None]) -> None:
        self._last = threading.Timer(seconds, function)
        self._last.daemon = True
        self._last.start()

    def retire(self, tell: Callable[[], None]) -> None:
        """Leaves all new requests to workers of another model, answers what it has, and ends. In the event loop.

        tell: is called once it accepts no more, before it hands over connections: the others may take them only then.
        """
        loop = asyncio.get_running_loop()
        self._take_no_more()
        for bound in (each for server in self.servers for each in server.sockets):
            loop.remove_reader(bound)
        # Only in its next step does asyncio take up what it has accepted; it resets that if its servers close before.
        loop.call_soon(self._hand_over, tell)

    def _hand_over(self, tell: Callable[[], None]) -> None:
        if self._is_retiring or self.should_exit:
            return
        self._is_retiring = True
        for each in self.servers:
            each.close()
        tell()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        self.config.timeout_graceful_shutdown = None  # each call has its own time
        self.should_exit = True

    def _taker(self) -> socket.socket | None:
        """Where connections are handed over, if they are."""
        return self._give if self._is_retiring else None

    def _take_no_more(self) -> None:
        if self._take is not None:
            asyncio.get_running_loop().remove_reader(self._take)

    def _accept_handed(self, take: socket.socket) -> None:
        try:
            _, handles, _, _ = socket.recv_fds(take, 1, 1)
        except BlockingIOError:  # another worker was faster
            return
        loop, config = asyncio.get_running_loop(), self.config
        kind: Any = config.http_protocol_class
        make = partial(kind, config=config, server_state=self.server_state, app_state={})
        for handle in handles:
            task = loop.create_task(loop.connect_accepted_socket(make, socket.socket(fileno=handle)))
            self._arriving.add(task)
            task.add_done_callback(self._arriving.discard)

    def serve_on(self, bound: socket.socket, started: Callable[[], None]) -> None:
        """Serves until a signal. started: is called in the event loop before the first request. Raises UserError where
        it can't listen."""
        listen(bound)
        config = self.config
        config.load()

        async def serve() -> None:
            started()
            if self._take is not None:
                asyncio.get_running_loop().add_reader(self._take, self._accept_handed, self._take)
            await self.serve(sockets=[bound])

        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(serve())
        self._app.close()
        if self._last is not None:
            self._last.cancel()
        if self._app.calls.queue.is_busy:
            self._end_now()

    @staticmethod
    def _end_now() -> None:
        _log.warning("ended while a call or the log of requests was under way: it took longer than --grace")
        end_process(1)


def serve(
    source: Source, state: str | None, finder: Finder, bound: socket.socket, options: Options, poll: float
) -> None:
    """Serves a model until a signal asks to stop. Raises UserError for one that can't be loaded.

    state: the finder's before it found the model; poll: seconds between looks for another one, 0 for none.
    """
    models, metrics = Models(options, source), Metrics()
    metrics.show_model(models.current.about())

    def take_up(source: Source) -> None:
        try:
            served = models.load(source)
        except UserError:
            metrics.reloads.labels("failed").inc()
            raise
        metrics.reloads.labels("done").inc()
        metrics.show_model(served.about())
        _log.info("serving %s", source.address)

    reloads = Reloads(finder, take_up)

    async def reload() -> dict[str, str | None]:
        await asyncio.shield(asyncio.wrap_future(reloads.ask()))  # others may wait for it, too
        return models.current.about()

    server = Server(Application(models, metrics, reload))

    def started() -> None:
        reloads.watch(state, poll)
        _log.info("serving %s at %s/invocations", source.address, address_of(bound))

    server.serve_on(bound, started)
