"""What a worker process does: it serves, and maps the models that its parent sends (see `mmoe_rec.server.workers`)."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NoReturn

from mmoe_rec.errors import UserError
from mmoe_rec.server.options import Options, end_process, ignore_interrupts, log_to_stderr
from mmoe_rec.server.sharing.passes import Mark
from mmoe_rec.server.sharing.preparing import received

if TYPE_CHECKING:
    from mmoe_rec.server.running import Reloading

_log = logging.getLogger(__name__)


def run_worker(bound: socket.socket, options: Options, pipe: Connection, mark: Mark) -> None:
    """Serves the model that the parent sends, until SIGTERM, or until the parent ends. It imports what is heavy."""
    from mmoe_rec.server.app import Application
    from mmoe_rec.server.metrics import Metrics
    from mmoe_rec.server.models import Models
    from mmoe_rec.server.running import Reloading, Server

    ignore_interrupts()
    log_to_stderr()
    models, metrics = Models(options.limits, options.journal, options.log is not None), Metrics()
    try:
        pipe.recv()  # that a model follows
        file = received(pipe)
    except (EOFError, OSError):  # the parent has ended
        raise SystemExit(1) from None
    try:
        with file:
            metrics.show_model(models.map(file).about())
    except UserError as error:
        _end_with(error, pipe)
    talk = _Talk(pipe, Reloading(models, metrics))
    try:
        app = Application(models, options.limits, metrics, talk.reload, options.token, options.log, mark=mark)
    except UserError as error:
        _end_with(error, pipe)
    server = Server(app, options, ignored=(signal.SIGINT,))
    # uvicorn listens to it only a moment after the parent was told that this worker is ready.
    signal.signal(signal.SIGTERM, server.handle_exit)

    def started(loop: asyncio.AbstractEventLoop) -> None:
        threading.Thread(target=talk.run, args=(loop, server.stop), daemon=True).start()
        with suppress(OSError):  # the parent has ended
            pipe.send(("ready",))

    try:
        server.serve_on(bound, started)
    except UserError as error:
        _end_with(error, pipe)
    end_process(0)


def _end_with(error: UserError, pipe: Connection) -> NoReturn:
    with suppress(OSError):  # the parent has ended
        pipe.send(("failed", str(error)))
    raise SystemExit(1)


class _Talk:
    """A worker's end of the pipe."""

    def __init__(self, pipe: Connection, reloading: Reloading) -> None:
        self._pipe, self._reloading = pipe, reloading
        self._numbers = count()
        self._asked: dict[int, asyncio.Future[str | None]] = {}
        self._failure: str | None = None  # why the model that was last sent is not served

    async def reload(self) -> None:
        """Asks the parent for the current model, and ends when this worker serves it. Raises UserError."""
        number = next(self._numbers)
        asked = self._asked[number] = asyncio.get_running_loop().create_future()
        self._pipe.send(("reload", number))
        if (failure := await asked) is not None:
            raise UserError(failure)

    def run(self, loop: asyncio.AbstractEventLoop, stop: Callable[[], None]) -> None:
        """Does what the parent says, until it ends."""
        while True:
            try:
                what, *rest = self._pipe.recv()
                if what == "load":
                    self._failure = self._mapped()
                    self._pipe.send(("loaded", self._failure))
            except (EOFError, OSError):
                _log.warning("the parent has ended, and so does this worker")
                loop.call_soon_threadsafe(stop)
                return
            if what == "failed":
                self._reloading.fail(str(*rest))
            elif what == "reloaded":
                number, failure = rest
                loop.call_soon_threadsafe(self._answer, number, failure or self._failure)

    def _mapped(self) -> str | None:
        try:
            with received(self._pipe) as file:
                self._reloading.map(file)
        except UserError as error:
            return str(error)
        return None

    def _answer(self, number: int, failure: str | None) -> None:
        asked = self._asked.pop(number)
        if not asked.done():
            asked.set_result(failure)
