"""Serving by several processes that share one listening socket, and the parent that keeps them going.

The parent looks for models, has each loaded once, by a process of its own (`mmoe_rec.server.sharing`), and sends it to
all workers, so that they serve the same, in memory that they share; it neither loads one nor answers requests. A worker
that ends is replaced by one with the model that was last loaded. What they say to each other over a pipe: the parent
`("load",)`, followed by the file, `("failed", sentence)` about a model that can't be loaded, and `("reloaded", number,
sentence or None)` once the attempt that a worker asked for has ended; a worker `("ready",)`, `("failed", sentence)`,
`("reload", number)` and `("loaded", sentence or None)`.
"""

from __future__ import annotations

import logging
import multiprocessing
import queue
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from mmoe_rec.errors import UserError
from mmoe_rec.server.metrics import FOLDER_VARIABLE, forget_process
from mmoe_rec.server.options import Options, address_of
from mmoe_rec.server.reloading import Finder, Reloads, Source, Watch, sentence_of
from mmoe_rec.server.sharing.passes import Mark, marks
from mmoe_rec.server.sharing.preparing import Prepared, Preparing, no_room
from mmoe_rec.server.sharing.starting import forking, started
from mmoe_rec.server.worker import run_worker

LONGEST_PAUSE_SECONDS = 30.0
_TICK_SECONDS = 0.1
_SHARE_OF_WORKERS = 0.9  # of the time to stop: a worker that has not ended by then is killed

_log = logging.getLogger(__name__)


def serve_by_workers(
    source: Source, known: str, finder: Finder, bound: socket.socket, options: Options, poll: float, count: int
) -> int:
    """Serves a model by `count` processes until SIGTERM or SIGINT; the rest as in `running.serve`.

    Gives the exit code: 0 if all that was accepted was answered. Raises UserError for a model that can't be loaded.
    """
    try:
        metrics = tempfile.TemporaryDirectory(prefix="mmoe-rec-metrics-")
    except OSError as error:
        raise UserError(no_room(error, tempfile.gettempdir())) from None
    with metrics as folder, forking(folder, {FOLDER_VARIABLE: folder}):
        return _Parent(source, finder, bound, options, poll).run(known, count)


@dataclass(frozen=True)
class _Wanted:
    """A model to be loaded. sent: ends once it has been sent to all workers, with UserError if it can't be loaded."""

    source: Source
    sent: Future[None] = field(default_factory=Future)


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    pipe: Connection
    mark: Mark
    is_ready: bool = False


class _Parent:
    """Keeps `count` workers. Everything but finding models happens in its main thread."""

    def __init__(self, source: Source, finder: Finder, bound: socket.socket, options: Options, poll: float) -> None:
        self._bound, self._grace = bound, options.grace
        self._options = replace(options, grace=_SHARE_OF_WORKERS * options.grace)
        self._workers: list[_Worker] = []
        self._free: list[Mark] = []
        self._wanted: _Wanted | None = _Wanted(source)  # what is loaded next
        self._loading: _Wanted | None = None
        self._preparing: Preparing | None = None
        self._prepared: Prepared | None = None  # what workers serve
        self._todo: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._reloads = Reloads(finder, self._take_up)
        self._watch = Watch(finder, self._reloads, poll)
        self._stopping = self._was_ready = False
        self._failures, self._next_start = 0, 0.0

    def run(self, known: str, count: int) -> int:
        """Keeps so many workers until a signal; gives the exit code."""
        self._free = marks(count)
        before = {each: signal.signal(each, self._stop) for each in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._watch.start(known)
            while not self._stopping:
                self._prepare()
                self._start_missing(count)
                self._listen()
                while not self._todo.empty():
                    self._todo.get()()
        finally:
            code = self._end()
            for each, handler in before.items():
                signal.signal(each, handler)
        return code

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _prepare(self) -> None:
        """Has the next model loaded, and sends workers the one that has been."""
        try:
            if self._preparing is not None and self._preparing.has_ended():
                done, self._preparing = self._preparing, None
                self._serve(done.result())
                self._settle(None)
            if self._preparing is None and self._wanted is not None:
                self._loading, self._wanted = self._wanted, None
                self._preparing = Preparing(self._loading.source, self._options, lambda: self._stopping)
        except UserError as error:
            if self._prepared is None:
                raise
            for worker in self._workers:
                self._tell(worker, "failed", str(error))
            self._settle(error)

    def _settle(self, error: UserError | None) -> None:
        assert self._loading is not None
        if error is None:
            self._loading.sent.set_result(None)
        else:
            self._loading.sent.set_exception(error)
        self._loading = None

    def _serve(self, prepared: Prepared) -> None:
        before, self._prepared = self._prepared, prepared
        for worker in self._workers:
            self._send_model(worker)
        if before is not None:
            before.file.close()

    def _send_model(self, worker: _Worker) -> None:
        if self._prepared is None:  # it imports what is heavy meanwhile
            return
        with suppress(OSError):  # it has ended, and its replacement will get it
            worker.pipe.send(("load",))
            self._prepared.send(worker.process, worker.pipe)

    def _start_missing(self, count: int) -> None:
        while len(self._workers) < count and time.monotonic() >= self._next_start and not self._stopping:
            ours, theirs = multiprocessing.Pipe()
            mark = self._free[0]
            process = started(run_worker, (self._bound, self._options, theirs, mark), lambda: self._stopping)
            theirs.close()
            if process is None:
                return
            self._free.remove(mark)
            worker = _Worker(process, ours, mark)
            self._send_model(worker)
            self._workers.append(worker)

    def _listen(self) -> None:
        """What workers say, and which of them have ended, within a short while, or as soon as a model is loaded."""
        pipes = {worker.pipe: worker for worker in self._workers}
        waited: list[Any] = [*pipes, *(worker.process.sentinel for worker in self._workers)]
        if self._preparing is not None:
            waited += self._preparing.waited_for
        for ready in wait(waited, _TICK_SECONDS):
            if ready in pipes:
                with suppress(EOFError, OSError):
                    while ready.poll():
                        self._heard(pipes[ready], *ready.recv())
        for worker in [each for each in self._workers if not each.process.is_alive()]:
            self._ended(worker)
        if not waited:
            time.sleep(_TICK_SECONDS)

    def _heard(self, worker: _Worker, what: str, *rest: Any) -> None:
        if what == "ready":
            worker.is_ready, self._failures = True, 0
            if not self._was_ready:
                assert self._prepared is not None
                _log.info("serving %s at %s/invocations", self._prepared.source.address, address_of(self._bound))
            self._was_ready = True
        elif what == "failed":
            if not self._was_ready:
                raise UserError(rest[0])
            _log.error("a worker can't serve: %s", rest[0])
        elif what == "loaded" and rest[0] is not None:
            _log.warning("worker %s goes on with the previous model: %s", worker.process.pid, rest[0])
        elif what == "reload":
            number = rest[0]
            attempt = self._reloads.ask()
            attempt.add_done_callback(lambda done: self._todo.put(lambda: self._reloaded(worker, number, done)))

    def _reloaded(self, worker: _Worker, number: int, attempt: Future[None]) -> None:
        """Tells a worker what came of the attempt that it asked for, after the model itself, or why there is none."""
        error = attempt.exception()
        self._tell(worker, "reloaded", number, None if error is None else sentence_of(error))

    def _take_up(self, source: Source) -> None:
        """Has the main thread load a model and send it to all workers; called in the thread of the reloads."""
        wanted = _Wanted(source)
        self._todo.put(lambda: self._want(wanted))
        wanted.sent.result()

    def _want(self, wanted: _Wanted) -> None:
        self._wanted = wanted

    @staticmethod
    def _tell(worker: _Worker, *what: Any) -> None:
        with suppress(OSError):  # it has ended, and its replacement will be told
            worker.pipe.send(what)

    def _ended(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.mark.set(False)  # it may have ended in a pass
        self._free.append(worker.mark)
        with suppress(EOFError, OSError):
            while worker.pipe.poll():
                self._heard(worker, *worker.pipe.recv())
        worker.pipe.close()
        forget_process(worker.process.pid)
        if self._stopping:
            return
        code = worker.process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if not worker.is_ready:
            self._failures += 1
            if not self._was_ready:
                raise UserError(f"a worker ended by {how} before it could serve; its own lines above say why")
        pause = min(2.0**self._failures, LONGEST_PAUSE_SECONDS) if self._failures else 0.0
        self._next_start = time.monotonic() + pause
        _log.warning("worker %s ended by %s; another one takes its place", worker.process.pid, how)

    def _end(self) -> int:
        self._bound.close()
        if self._preparing is not None:
            self._preparing.stop()
        for worker in self._workers:
            worker.process.terminate()
            if not worker.is_ready:  # it may just have been forked, and not listen to signals yet
                worker.pipe.close()
        end = time.monotonic() + self._grace
        code = 0
        for worker in self._workers:
            worker.process.join(max(end - time.monotonic(), 0.0))
            if worker.process.is_alive():
                _log.warning("worker %s does not end and is killed", worker.process.pid)
                worker.process.kill()
                worker.process.join()
            if worker.is_ready and worker.process.exitcode != 0:
                code = 1
        return code
