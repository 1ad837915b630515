"""One process that serves: uvicorn around the application, and how it ends."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from mmoe_rec.errors import UserError
from mmoe_rec.server.app import Application
from mmoe_rec.server.metrics import Metrics
from mmoe_rec.server.models import Finder, Models, Reloads, Source, Watch
from mmoe_rec.server.options import BACKLOG, Options, address_of, end_process, listen
from mmoe_rec.server.protocol import protocol

_LAST_STEPS_SECONDS = 0.5  # of the time to stop, what is left for ending after the last call was answered or given up

_log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn's server, which ends within a time whatever a call does, and with exit code 0 if all were answered.

    give, take: ends of a pipe between workers, on which those that retire hand over their connections; None for a
    server of one process. A worker is told of Ctrl-C, which reaches all processes of a terminal, by its parent.
    """

    def __init__(
        self, app: Application, options: Options, give: socket.socket | None = None, take: socket.socket | None = None
    ) -> None:
        self._app, self._options, self._give, self._take = app, options, give, take
        self._last: threading.Timer | None = None
        self._is_retiring = False
        self._arriving: set[asyncio.Task[Any]] = set()
        limits = options.limits
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol(limits.read_seconds, 2 * limits.max_body_bytes, lambda: self.should_exit, self._taker),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_graceful_shutdown=max(options.grace - _LAST_STEPS_SECONDS, 0.0),  # type: ignore[arg-type]
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Answers what was accepted, takes no more, and ends; a worker does so when its parent says so."""
        if self._take is None:
            self.stop()

    def stop(self) -> None:
        """Does what a signal to end does."""
        if not self.should_exit:
            self.should_exit = True
            self._take_no_more()
            self._last = threading.Timer(self._options.grace, self._end_now)
            self._last.daemon = True
            self._last.start()

    def retire(self, tell: Callable[[], None]) -> None:
        """Leaves all new requests to workers of another model, answers what it has, and ends. In the event loop.

        tell: is called once it accepts no more, before it hands over connections: the others may take them only then.
        """
        if self._is_retiring or self.should_exit:
            return
        self._is_retiring = True
        self._take_no_more()
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
        """Serves until a signal. started: is called in the event loop before the first request.

        Raises UserError where it can't listen.
        """
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


def serve(source: Source, state: str, finder: Finder, bound: socket.socket, options: Options, poll: float) -> None:
    """Serves a model until SIGTERM or SIGINT. Raises UserError for one that can't be loaded.

    state: the finder's before it found the model; poll: seconds between looks for another one, 0 for none.
    """
    models, metrics = Models(options.limits, options.journal, options.log is not None), Metrics()
    metrics.show_model(models.load(source).about())

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
        assert models.current is not None
        return models.current.about()

    server = Server(Application(models, options.limits, metrics, reload, options.token, options.log), options)
    watch = Watch(finder, reloads, poll)

    def started() -> None:
        watch.start(state)
        _log.info("serving %s at %s/invocations", source.address, address_of(bound))

    server.serve_on(bound, started)
