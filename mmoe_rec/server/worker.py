"""What a worker process does: it serves, and maps the models that its parent sends (see `mmoe_rec.server.workers`)."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from mmoe_rec.errors import UserError
from mmoe_rec.server.options import Options, end_process, ignore_interrupts, log_to_stderr
from mmoe_rec.server.sharing.preparing import received

if TYPE_CHECKING:
    from mmoe_rec.server.running import Reloading

_log = logging.getLogger(__name__)


def run_worker(bound: socket.socket, options: Options, pipe: Connection) -> None:
    """Serves the model that the parent sends, until SIGTERM, or until the parent ends. It imports what is heavy."""
    from mmoe_rec.server.app import Application
    from mmoe_rec.server.metrics import Metrics
    from mmoe_rec.server.models import Models
    from mmoe_rec.server.running import Reloading, Server

    ignore_interrupts()
    log_to_stderr()
    models, metrics = Models(options.limits), Metrics()
    try:
        pipe.recv()  # that a model follows
        file = received(pipe)
    except (EOFError, OSError):  # the parent has ended
        raise SystemExit(1) from None
    try:
        with file:
            metrics.show_model(models.map(file).about())
    except UserError as error:
        with suppress(OSError):  # the parent has ended
            pipe.send(("failed", str(error)))
        raise SystemExit(1) from None
    talk = _Talk(pipe, Reloading(models, metrics))
    server = Server(
        Application(models, options.limits, metrics, talk.reload, options.token), options, ignored=(signal.SIGINT,)
    )
    # uvicorn listens to it only a moment after the parent was told that this worker is ready.
    signal.signal(signal.SIGTERM, server.handle_exit)

    def started(loop: asyncio.AbstractEventLoop) -> None:
        threading.Thread(target=talk.run, args=(loop, server.stop), daemon=True).start()
        with suppress(OSError):  # the parent has ended
            pipe.send(("ready",))

    server.serve_on(bound, started)
    end_process(0)


class _Talk:
    """A worker's end of the pipe."""

    def __init__(self, pipe: Connection, reloading: Reloading) -> None:
        self._pipe, self._reloading = pipe, reloading
        self._asked: list[asyncio.Future[str | None]] = []

    async def reload(self) -> None:
        """Asks the parent for the current model, and ends when this worker serves it. Raises UserError."""
        asked: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._asked.append(asked)
        self._pipe.send(("reload",))
        if (failure := await asked) is not None:
            raise UserError(failure)

    def run(self, loop: asyncio.AbstractEventLoop, stop: Callable[[], None]) -> None:
        """Does what the parent says, until it ends."""
        while True:
            try:
                what, *rest = self._pipe.recv()
                failure = self._mapped() if what == "load" else str(*rest)
            except (EOFError, OSError):
                _log.warning("the parent has ended, and so does this worker")
                loop.call_soon_threadsafe(stop)
                return
            if what == "load":
                self._pipe.send(("loaded", failure))
            elif what == "failed":
                self._reloading.fail(str(failure))
            loop.call_soon_threadsafe(self._answer, failure)

    def _mapped(self) -> str | None:
        try:
            with received(self._pipe) as file:
                self._reloading.map(file)
        except UserError as error:
            return str(error)
        return None

    def _answer(self, failure: str | None) -> None:
        asked, self._asked = self._asked, []
        for each in asked:
            if not each.done():
                each.set_result(failure)
