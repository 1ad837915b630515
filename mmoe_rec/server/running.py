"""One process that serves: uvicorn around the application, and how it ends."""

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from mmoe_rec.errors import UserError, catch_stop_signals
from mmoe_rec.inference.artifact import Source
from mmoe_rec.server.app import Application
from mmoe_rec.server.connections import BoundedConfig, Bounds
from mmoe_rec.server.measurements import Metrics
from mmoe_rec.server.models import Finder, Models, Reloads
from mmoe_rec.server.options import BACKLOG, MEBIBYTE, Options, address_of, end_process, listen

_LAST_STEPS_SECONDS = 0.5  # of the time to stop, for ending after the last call was answered or given up

_log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn's server, which ends within a time whatever a call does, and with exit code 0 if all were answered."""

    def __init__(self, app: Application) -> None:
        self._app, self._options = app, app.models.options
        limits, seconds = self._options.limits, max(self._options.grace - _LAST_STEPS_SECONDS, 0.0)
        bounds = Bounds(limits.read_seconds, 2 * limits.max_body_mib * MEBIBYTE, lambda: self.should_exit)
        super().__init__(
            BoundedConfig(app, bounds, backlog=BACKLOG, timeout_graceful_shutdown=seconds)  # fractions work, too
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: a server of one process calls `handle_exit`, and the parent of a worker `stop`."""
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain, and then stop. A signal may come twice, to the process and to its group, so later ones do nothing."""
        if not self._app.calls.is_draining:
            self.drain()
            _call_later(self._options.drain, self.stop)

    def drain(self) -> None:
        """Report at `/health` that the server is about to stop."""
        self._app.calls.is_draining = True

    def stop(self) -> None:
        """Answer what was accepted, take no more, and end."""
        if not self.should_exit:
            self.should_exit = True
            _call_later(self._options.grace, _end_now)

    def serve_on(self, bound: socket.socket, started: Callable[[], None]) -> None:
        """Serve until the server is stopped.

        Args:
            bound: Socket to listen on.
            started: Called in the event loop before the first request.

        Raises:
            UserError: The socket can't listen.
        """
        listen(bound)
        self.config.load()

        async def serve() -> None:
            started()
            await self.serve(sockets=[bound])

        with asyncio.Runner(loop_factory=self.config.get_loop_factory()) as runner:
            runner.run(serve())
        self._app.close()
        if self._app.calls.queue.is_busy:
            _end_now()


def _call_later(seconds: float, function: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, function)
    timer.daemon = True
    timer.start()


def _end_now() -> None:
    _log.warning("ended while a call or the log of requests was under way: it took longer than --grace")
    end_process(1)


def serve(
    source: Source, state: str | None, finder: Finder, bound: socket.socket, options: Options, poll: float
) -> None:
    """Serve a model until a signal asks to stop.

    Args:
        source: The model.
        state: The finder's state before it found the model.
        finder: Finds later models.
        bound: Socket to listen on.
        options: How to serve.
        poll: Seconds between looks for another model, 0 for none.

    Raises:
        UserError: The model can't be loaded.
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

    catch_stop_signals(server.handle_exit)
    server.serve_on(bound, started)
