"""Serving by several processes that share one listening socket and the memory of one model.

The parent looks for models. A generation, which is a process of its own, loads one, and forks workers from itself, so
that they share its memory; it replaces those that end. Another model is another generation: once its workers serve,
those of the generation before take no more connections, hand over those that are between two requests, answer what they
have, and end. So a model that can't be loaded leaves the one before as it is, whatever happens to the process that
tries.

What they say over pipes: the parent `("stop",)`, `("retire",)`, `("failed", sentence)` and `("reloaded", token,
sentence or None, about the model)`, which a generation passes on to its workers; a worker `("ready",)`, `("retired",)`,
and `("failed", error)` and `("reload", token)`, which the parent gets; and a generation `("ready", about the model)`,
`("retired",)` and `("failed", error)`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import multiprocessing
import os
import queue
import signal
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from mmoe_rec.errors import UserError
from mmoe_rec.server.metrics import FOLDER_VARIABLE, forget_process
from mmoe_rec.server.models import Finder, Reloads, Source, Watch, sentence_of
from mmoe_rec.server.options import Options, address_of, end_process, log_to_stderr
from mmoe_rec.server.ranking_queue import Mark, marks

if TYPE_CHECKING:
    from mmoe_rec.server.models import Models
    from mmoe_rec.server.running import Reloading, Server

LONGEST_PAUSE_SECONDS = 30.0
_TICK_SECONDS = 0.2
_SHARE_OF_WORKERS, _SHARE_OF_GENERATIONS = 0.9, 0.95  # of the time to stop: who has not ended by then is killed

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sockets:
    """bound: on which all workers listen; give, take: ends of a pipe on which connections are handed over."""

    bound: socket.socket
    give: socket.socket
    take: socket.socket

    def close(self) -> None:
        """Closes this process's own handles."""
        for each in (self.bound, self.give, self.take):
            each.close()


def serve_by_workers(
    source: Source, known: str, finder: Finder, bound: socket.socket, options: Options, poll: float, workers: int
) -> int:
    """Serves a model by several processes until SIGTERM or SIGINT; the rest as in `running.serve`.

    Gives the exit code: 0 if all that was accepted was answered. Raises UserError for a model that can't be loaded.
    """
    if sys.platform != "linux":
        raise UserError("several workers are forked from one process, which is safe on Linux alone: take --workers 1")
    try:
        metrics = tempfile.TemporaryDirectory(prefix="mmoe-rec-metrics-")
    except OSError as error:
        raise UserError(f"the temporary folder can't be written to ({error.strerror or error}): set TMPDIR") from None
    with metrics as folder:
        # Read when packages are imported. Threads of OpenBLAS would not be there after a fork.
        os.environ.update({FOLDER_VARIABLE: folder, "OPENBLAS_NUM_THREADS": "1"})
        give, take = socket.socketpair()
        take.setblocking(False)
        return _Parent(finder, Sockets(bound, give, take), options, poll, workers).run(source, known)


class _Parent:
    """Keeps one generation that serves; those before end by themselves. Its main thread waits for signals and ends."""

    def __init__(self, finder: Finder, sockets: Sockets, options: Options, poll: float, workers: int) -> None:
        self.sockets, self.options, self.workers = sockets, options, workers
        self.current: _Child | None = None
        self.news: queue.SimpleQueue[_Child | None] = queue.SimpleQueue()  # a child is ready or has ended; None: stop
        self.reloads = Reloads(finder, self._take_up)
        self._watch = Watch(finder, self.reloads, poll)
        self._starting = threading.Lock()
        self._children: list[_Child] = []

    def run(self, source: Source, known: str) -> int:
        """Serves until a signal; gives the exit code."""
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, lambda *_: self.news.put(None))
        first = self._add(source)
        try:
            while (child := self.news.get()) is not None:
                if child is first and self.current is None:
                    if not child.is_ready:
                        assert child.error is not None
                        raise child.error
                    self.current = child
                    _log.info("serving %s at %s/invocations", source.address, address_of(self.sockets.bound))
                    self._watch.start(known)
                if child is self.current and not child.is_alive:
                    threading.Thread(target=self._replace, args=(child,), daemon=True).start()
        finally:
            code = self._end()
        return code

    def _add(self, source: Source) -> _Child:
        child = _Child(self, source, is_another=self.current is not None)
        self._children = [*(each for each in self._children if each.is_alive), child]
        return child

    def _take_up(self, source: Source, instead_of: _Child | None = None) -> None:
        """Serves another model, or the same instead of a generation that has ended, unless that was done meanwhile.

        Raises UserError for a model that can't be loaded.
        """
        with self._starting:
            before = self.current
            if instead_of not in (None, before):
                return
            child = self._add(source)
            child.started.wait()
            if not child.is_ready:
                assert child.error is not None
                if before is not None:
                    before.send("failed", str(child.error))
                raise child.error
            self.current = child
            if not child.is_alive:  # which has been told before it was the current one
                self.news.put(child)
        _log.info("serving %s", source.address)
        if before is not None:
            before.send("retire")
            before.retired.wait(self.options.grace)

    def _replace(self, ended: _Child) -> None:
        failures = 0
        while self.current is ended:
            _log.warning("the process that holds the model ended by %s; another one takes its place", ended.how)
            try:
                self._take_up(ended.source, ended)
            except UserError as error:
                failures += 1
                _log.error("it can't take its place: %s", error)
                time.sleep(min(2.0**failures, LONGEST_PAUSE_SECONDS))

    def _end(self) -> int:
        self.sockets.close()
        until = time.monotonic() + _SHARE_OF_GENERATIONS * self.options.grace
        alive = [child for child in self._children if child.is_alive]
        for child in alive:
            child.stop()
        return max([child.join(max(until - time.monotonic(), 0.0)) for child in alive], default=0)


class _Child:
    """A generation as the parent sees it, in a thread that listens to it.

    started, retired: set once it has come so far, or has ended; error: why it could not serve; about: its model.
    """

    def __init__(self, parent: _Parent, source: Source, is_another: bool) -> None:
        self.source, self._parent = source, parent
        self.is_ready, self.is_alive = False, True
        self.error: UserError | None = None
        self.about: dict[str, str | None] = {}
        self.started, self.retired = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._pipe, theirs = multiprocessing.Pipe()
        arguments = (source, parent.sockets, parent.options, parent.workers, is_another, theirs)
        self._process = multiprocessing.get_context("spawn").Process(target=_run_generation, args=arguments)
        self._process.start()
        theirs.close()
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def how(self) -> str:
        """How it ended, once it has."""
        self._process.join()
        return _ending(self._process)

    def send(self, *what: Any) -> None:
        """Says something, unless it has ended."""
        with self._lock, suppress(OSError):
            self._pipe.send(what)

    def stop(self) -> None:
        """Ends it, and its workers once they have answered what they accepted."""
        if self.is_ready:
            self.send("stop")
        else:
            self._process.kill()

    def join(self, seconds: float) -> int:
        """Waits for its end, which comes after so many seconds at most; gives its exit code, 0 if it never served."""
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        return int(self.is_ready and self._process.exitcode != 0)

    def _listen(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                what, *rest = self._pipe.recv()
                if what == "ready":
                    self.is_ready, self.about = True, rest[0]
                    self.started.set()
                    self._parent.news.put(self)
                elif what == "failed":
                    self.error = self.error or rest[0]
                    if self.is_ready:
                        _log.error("a worker can't serve: %s", rest[0])
                elif what == "retired":
                    self.retired.set()
                elif what == "reload":
                    self._reload(rest[0])
        self.is_alive = False
        if not self.is_ready and self.error is None:
            hint = ", as the system does where memory is short" if self.how == "SIGKILL" else "; its lines say why"
            start = f"the process that loads the model at '{self.source.address}' was ended by "
            self.error = UserError(start + self.how + hint)
        self.started.set()
        self.retired.set()
        self._parent.news.put(self)

    def _reload(self, token: Any) -> None:
        """Looks for a model, and tells the worker that asked for it what came of it."""

        def tell(done: Future[None]) -> None:
            error, current = done.exception(), self._parent.current
            assert current is not None
            self.send("reloaded", token, None if error is None else sentence_of(error), current.about)

        self._parent.reloads.ask().add_done_callback(tell)


def _ending(process: BaseProcess) -> str:
    code = process.exitcode or 0
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


# A generation


def _run_generation(
    source: Source, sockets: Sockets, options: Options, workers: int, is_another: bool, pipe: Connection
) -> None:
    """Loads a model, which answers its example and learns the journal, and keeps workers that serve it."""
    for each in (signal.SIGINT, signal.SIGTERM):  # either may reach all processes of a service; the parent tells
        signal.signal(each, signal.SIG_IGN)
    log_to_stderr()
    try:
        models = _load(source, options)
    except UserError as error:
        with suppress(OSError):
            pipe.send(("failed", error))
        end_process(1)
    end_process(_Generation(models, sockets, options, workers, is_another, pipe).run())


def _load(source: Source, options: Options) -> Models:
    import torch

    from mmoe_rec.server import app, running  # noqa: F401 - workers need them, and share them like the model
    from mmoe_rec.server.models import Models

    torch.set_num_threads(1)  # a worker ranks with one, and OpenMP's threads would not be there after a fork
    models = Models(options.limits, options.journal, options.log is not None)
    learning = models.load(source).learning
    if learning is not None:
        learning.journal.close()
    gc.collect()
    gc.freeze()  # collecting garbage in a worker would write to the pages of all this, and so copy them
    return models


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    pipe: Connection
    mark: Mark
    is_ready: bool = False
    is_retired: bool = False


class _Generation:
    """Keeps workers until the parent says otherwise, or has ended."""

    def __init__(
        self, models: Models, sockets: Sockets, options: Options, workers: int, is_another: bool, parent: Connection
    ) -> None:
        self._models, self._sockets, self._options, self._parent = models, sockets, options, parent
        self._count, self._is_another = workers, is_another
        self._workers: list[_Worker] = []
        self._free = marks(workers)
        self._was_ready = self._is_ending = self._has_retired = self._is_orphan = False
        self._end, self._next_start, self._code = float("inf"), 0.0, 0

    def run(self) -> int:
        """Gives the exit code: 0 if all workers answered what they had accepted."""
        while self._workers or not self._is_ending:
            while len(self._workers) < self._count and not self._is_ending and time.monotonic() >= self._next_start:
                self._fork()
            pipes = {worker.pipe: worker for worker in self._workers}
            sentinels = [worker.process.sentinel for worker in self._workers]
            waited: list[Any] = [*pipes, *sentinels] if self._is_orphan else [self._parent, *pipes, *sentinels]
            for ready in wait(waited, _TICK_SECONDS):
                if ready is self._parent:
                    self._obey()
                elif ready in pipes:
                    self._hear(pipes[ready])
            for worker in [each for each in self._workers if not each.process.is_alive()]:
                self._bury(worker)
            if self._is_ending and not self._has_retired and all(each.is_retired for each in self._workers):
                self._has_retired = True
                self._tell("retired")
            if time.monotonic() > self._end:
                for worker in self._workers:
                    _log.warning("worker %s does not end and is killed", worker.process.pid)
                    worker.process.kill()
        return self._code

    def _fork(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        mark = self._free.pop()
        is_new = self._is_another and not self._was_ready
        arguments = (self._models, self._sockets, self._options, mark, theirs, is_new)
        process = multiprocessing.get_context("fork").Process(target=_run_worker, args=arguments)
        process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours, mark))

    def _tell(self, *what: Any) -> None:
        with suppress(OSError):  # it has ended
            self._parent.send(what)

    def _obey(self) -> None:
        try:
            what = self._parent.recv()
        except (EOFError, OSError):
            _log.warning("the parent has ended, and so do its workers")
            self._is_orphan, what = True, ("stop",)
        if what[0] in ("stop", "retire") and not self._is_ending:
            self._is_ending = True
            self._sockets.close()
        if what[0] == "stop":
            self._end = min(self._end, time.monotonic() + _SHARE_OF_WORKERS * self._options.grace)
        for worker in self._workers:
            if what[0] == "stop":
                worker.process.terminate()
            else:
                with suppress(OSError):  # it has ended
                    worker.pipe.send(what)

    def _hear(self, worker: _Worker) -> None:
        with suppress(EOFError, OSError):
            while worker.pipe.poll():
                what, *rest = worker.pipe.recv()
                if what == "ready":
                    worker.is_ready = True
                    if self._end < float("inf"):  # it did not listen to signals yet
                        worker.process.terminate()
                    if not self._was_ready and all(each.is_ready for each in self._workers):
                        self._was_ready = True
                        assert self._models.current is not None
                        self._tell("ready", self._models.current.about())
                elif what == "retired":
                    worker.is_retired = True
                else:
                    self._tell(what, *rest)

    def _bury(self, worker: _Worker) -> None:
        self._hear(worker)
        self._workers.remove(worker)
        worker.pipe.close()
        worker.mark.set(False)  # it may have ended in a pass
        self._free.append(worker.mark)
        forget_process(worker.process.pid)
        self._code = max(self._code, int(worker.is_ready and worker.process.exitcode != 0 and self._is_ending))
        if self._is_ending:
            return
        how = _ending(worker.process)
        if not self._was_ready:
            self._tell("failed", UserError(f"a worker ended by {how} before it could serve; its lines say why"))
            for other in self._workers:
                other.process.kill()
            self._is_ending = True
            return
        self._next_start = time.monotonic() + (0.0 if worker.is_ready else 2.0)
        _log.warning("worker %s ended by %s; another one takes its place", worker.process.pid, how)


# A worker


def _run_worker(models: Models, sockets: Sockets, options: Options, mark: Mark, pipe: Connection, is_new: bool) -> None:
    """Serves the model that was loaded before the fork, until SIGTERM, or until it is to retire or its parent ends.

    is_new: whether it is one of the first to serve another model, which they count.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    from mmoe_rec.server.app import Application
    from mmoe_rec.server.metrics import Metrics
    from mmoe_rec.server.running import Reloading, Server

    served, metrics = models.current, Metrics()
    assert served is not None
    talk = _Talk(pipe, Reloading(models, metrics), os.getppid())
    try:
        if served.learning is not None:
            served.learning.catch_up()
        metrics.show_model(served.about())
        if is_new:
            metrics.reloads.labels("done").inc()
        app = Application(models, options.limits, metrics, talk.reload, options.token, options.log, mark)
        server = Server(app, options, sockets.give, sockets.take)
        signal.signal(signal.SIGTERM, server.handle_exit)

        def started(loop: asyncio.AbstractEventLoop) -> None:
            threading.Thread(target=talk.run, args=(loop, server), daemon=True).start()
            talk.send("ready")

        server.serve_on(sockets.bound, started)
    except UserError as error:
        talk.send("failed", error)
        end_process(1)
    end_process(0)


class _Talk:
    """A worker's end of the pipe."""

    def __init__(self, pipe: Connection, reloading: Reloading, parent: int) -> None:
        self._pipe, self._reloading, self._parent = pipe, reloading, parent
        self._numbers = count()
        self._lock = threading.Lock()
        self._waiting: dict[Any, asyncio.Future[tuple[str | None, dict[str, str | None]]]] = {}

    def send(self, *what: Any) -> None:
        """Says something, unless the parent has ended."""
        with self._lock, suppress(OSError):
            self._pipe.send(what)

    async def reload(self) -> dict[str, str | None]:
        """Asks for the model that the address names now; once it is served, gives what it is. Raises UserError."""
        token = os.getpid(), next(self._numbers)
        done = self._waiting[token] = asyncio.get_running_loop().create_future()
        self.send("reload", token)
        failure, about = await done
        if failure is not None:
            raise UserError(failure)
        return about

    def run(self, loop: asyncio.AbstractEventLoop, server: Server) -> None:
        """Does what it is told, until there is nobody to tell it."""
        try:
            while True:
                if self._pipe.poll(_TICK_SECONDS):
                    what, *rest = self._pipe.recv()
                    if what == "failed":
                        self._reloading.fail(str(rest[0]))
                    elif what == "retire":
                        loop.call_soon_threadsafe(server.retire, lambda: self.send("retired"))
                    elif what == "reloaded":
                        loop.call_soon_threadsafe(self._answer, *rest)
                elif os.getppid() != self._parent:
                    raise EOFError
        except (EOFError, OSError):
            _log.warning("the process that holds the model has ended, and so does this worker")
            loop.call_soon_threadsafe(server.stop)

    def _answer(self, token: Any, *result: Any) -> None:
        done = self._waiting.pop(token, None)  # another worker's
        if done is not None and not done.done():
            done.set_result(result)
