"""One process that serves: uvicorn around the application, and how it ends."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import BinaryIO

import uvicorn

from mmoe_rec.errors import UserError
from mmoe_rec.server.app import Application
from mmoe_rec.server.metrics import Metrics
from mmoe_rec.server.models import Models, Served
from mmoe_rec.server.options import BACKLOG, Options, address_of, end_process, listen
from mmoe_rec.server.protocol import protocol
from mmoe_rec.server.reloading import Finder, Reloads, Source, Watch

_LAST_STEPS_SECONDS = 0.5  # of the time to stop, what is left for ending after the last call was answered or given up

_log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn's server, which ends within a time whatever a call does, and with exit code 0 if all were answered.

    ignored: signals that end other processes of the group, and that this one is told of otherwise.
    """

    def __init__(self, app: Application, options: Options, ignored: tuple[int, ...] = ()) -> None:
        self._app, self._options, self._ignored = app, options, ignored
        self._last: threading.Timer | None = None
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol(options.limits.read_seconds, 2 * options.limits.max_body_bytes, lambda: self.should_exit),
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
        """Answers what was accepted, takes no more, and ends."""
        if sig not in self._ignored:
            self.stop()

    def stop(self) -> None:
        """As a signal to end."""
        if not self.should_exit:
            self.should_exit = True
            self._last = threading.Timer(self._options.grace, self._end_now)
            self._last.daemon = True
            self._last.start()

    def serve_on(self, bound: socket.socket, started: Callable[[asyncio.AbstractEventLoop], None]) -> None:
        """Serves until a signal. started: is called in the event loop before the first request.

        Raises UserError where it can't listen.
        """
        listen(bound)
        config = self.config
        config.load()

        async def serve() -> None:
            started(asyncio.get_running_loop())
            await self.serve(sockets=[bound])

        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(serve())
        self._app.close()
        if self._last is not None:
            self._last.cancel()
        if self._app.calls.batcher.is_busy:
            self._end_now()

    @staticmethod
    def _end_now() -> None:
        _log.warning("ended while a call or the log of requests was under way: it took longer than --grace")
        end_process(1)


class Reloading:
    """Loads models, and counts and tells what came of it."""

    def __init__(self, models: Models, metrics: Metrics) -> None:
        self.models, self.metrics = models, metrics

    def take_up(self, source: Source) -> None:
        """Serves another model. Raises UserError for one that can't be loaded."""
        self._take_up(lambda: self.models.load(source))

    def map(self, file: BinaryIO) -> None:
        """Serves another model that is mapped. Raises UserError for one that can't be."""
        self._take_up(lambda: self.models.map(file))

    def fail(self, sentence: str) -> None:
        """Goes on with the model before, as another one could not be loaded for the reason in a sentence."""
        self.models.failure = sentence
        self.metrics.reloads.labels("failed").inc()

    def _take_up(self, load: Callable[[], Served]) -> None:
        try:
            served = load()
        except UserError as error:
            self.fail(str(error))
            raise
        self.metrics.reloads.labels("done").inc()
        self.metrics.show_model(served.about())
        _log.info("serving %s", served.source.address)


def serve(source: Source, known: str, finder: Finder, bound: socket.socket, options: Options, poll: float) -> None:
    """Serves a model until SIGTERM or SIGINT. Raises UserError for one that can't be loaded.

    known: the finder's state before it found the model; poll: seconds between looks for another one, 0 for none.
    """
    models, metrics = Models(options.limits, options.journal, options.log is not None), Metrics()
    metrics.show_model(models.load(source).about())
    reloads = Reloads(finder, Reloading(models, metrics).take_up)

    async def reload() -> None:
        await asyncio.wrap_future(reloads.ask())

    app = Application(models, options.limits, metrics, reload, options.token, options.log)
    server = Server(app, options)
    watch = Watch(finder, reloads, poll)

    def started(loop: asyncio.AbstractEventLoop) -> None:
        watch.start(known)
        _log.info("serving %s at %s/invocations", source.address, address_of(bound))

    server.serve_on(bound, started)
