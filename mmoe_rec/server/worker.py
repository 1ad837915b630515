"""What a worker process does: it serves, and loads what its parent says (see `mmoe_rec.server.workers`)."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from mmoe_rec.errors import UserError
from mmoe_rec.server.options import Options, end_process, ignore_interrupts, log_to_stderr
from mmoe_rec.server.reloading import Source

if TYPE_CHECKING:
    from mmoe_rec.server.running import Reloading

_log = logging.getLogger(__name__)


def run_worker(source: Source, bound: socket.socket, options: Options, pipe: Connection) -> None:
    """Serves a model until SIGTERM, or until the parent ends. It alone imports what is heavy."""
    from mmoe_rec.server.app import Application
    from mmoe_rec.server.metrics import FOLDER_VARIABLE, Metrics
    from mmoe_rec.server.models import Models
    from mmoe_rec.server.running import Reloading, Server

    ignore_interrupts()
    log_to_stderr()
    models, metrics = Models(options.limits, Path(os.environ[FOLDER_VARIABLE])), Metrics()
    try:
        metrics.show_model(models.load(source).about())
    except UserError as error:
        pipe.send(("failed", str(error)))
        raise SystemExit(1) from None
    talk = _Talk(pipe, Reloading(models, metrics))
    server = Server(
        Application(models, options.limits, metrics, talk.reload, options.token), options, ignored=(signal.SIGINT,)
    )

    def started(loop: asyncio.AbstractEventLoop) -> None:
        threading.Thread(target=talk.run, args=(loop, server.stop), daemon=True).start()
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
                what, about = self._pipe.recv()
            except (EOFError, OSError):
                _log.warning("the parent has ended, and so does this worker")
                loop.call_soon_threadsafe(stop)
                return
            failure = about
            if what == "load":
                failure = self._loaded(about)
                self._pipe.send(("loaded", about, failure))
            loop.call_soon_threadsafe(self._answer, failure)

    def _loaded(self, source: Source) -> str | None:
        try:
            self._reloading.take_up(source)
        except UserError as error:
            return str(error)
        return None

    def _answer(self, failure: str | None) -> None:
        asked, self._asked = self._asked, []
        for each in asked:
            if not each.done():
                each.set_result(failure)
