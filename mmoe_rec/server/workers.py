"""Serving by several processes that share one listening socket and the memory of one model.

The parent looks for models. A generation, which is a process of its own, loads one, and forks workers from itself, so
that they share its memory; it replaces those that end. Another model is another generation. Once its workers are ready,
those of the generation before take no more connections, hand over those that are between two requests, answer what they
have, and end. Only then the new ones accept, so that no caller meets the model before once more; callers wait in the
socket's queue meanwhile. A model that can't be loaded leaves the one before as it is, whatever happens to the process
that tries.

Messages, each a tuple that goes through a pipe:

    parent -> generation -> its workers    accept, is_another; retire; stop; failed, sentence;
                                           reloaded, process id of a worker, sentence or None, about the model
    worker -> generation -> parent         reload, its process id
    worker -> generation                   ready; retired
    generation -> parent                   failed, error; or ready, about the model; retired (as all of its workers)
"""

from __future__ import annotations

import asyncio
import gc
import logging
import multiprocessing
import os
import queue
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from mmap import mmap
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, NamedTuple

from prometheus_client.multiprocess import mark_process_dead

from mmoe_rec.errors import UserError
from mmoe_rec.inference.artifact import Source
from mmoe_rec.server.metrics import FOLDER_VARIABLE, Metrics
from mmoe_rec.server.models import Finder, Models, Reloads, sentence_of
from mmoe_rec.server.options import Options, address_of, end_process, listen, log_to_stderr
from mmoe_rec.server.ranking_queue import Passes

if TYPE_CHECKING:
    from mmoe_rec.server.running import Server

LONGEST_PAUSE_SECONDS = 30.0
_TICK_SECONDS = 0.2
_SHARE_OF_WORKERS, _SHARE_OF_GENERATIONS = 0.9, 0.95  # of the time to stop: who has not ended by then is killed

_log = logging.getLogger(__name__)


class Sockets(NamedTuple):
    """bound: on which all workers listen; give, take: ends of a pipe on which connections are handed over."""

    bound: socket.socket
    give: socket.socket
    take: socket.socket

    def close(self) -> None:
        """Closes this process's own handles."""
        for each in self:
            each.close()


def serve_by_workers(
    source: Source, state: str, finder: Finder, bound: socket.socket, options: Options, poll: float, workers: int
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
        return _Parent(finder, Sockets(bound, give, take), options, poll, workers).run(source, state)


class _Parent:
    """Keeps one generation that serves; those before end by themselves. Its main thread waits for a signal."""

    def __init__(self, finder: Finder, sockets: Sockets, options: Options, poll: float, workers: int) -> None:
        self.sockets, self.options, self.workers, self._poll = sockets, options, workers, poll
        self.current: _Child | None = None
        self.reloads = Reloads(finder, self._exchange)
        self._ends: queue.SimpleQueue[UserError | None] = queue.SimpleQueue()  # why it ends; None for a signal
        self._is_ending = False
        self._exchanging, self._starting = threading.RLock(), threading.Lock()
        self._children: list[_Child] = []

    def run(self, source: Source, state: str) -> int:
        """Serves until a signal; gives the exit code."""
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, lambda *_: self._ends.put(None))
        threading.Thread(target=self._start, args=(source, state), daemon=True).start()
        error = self._wait_for_end()
        with self._starting:
            self._is_ending = True
        self.sockets.close()
        until = time.monotonic() + _SHARE_OF_GENERATIONS * self.options.grace
        children = list(self._children)
        for child in children:
            if child.about is None:
                child.process.kill()
            else:
                child.send("stop")
        for child in children:
            if not child.has_ended.wait(max(until - time.monotonic(), 0.0)):
                child.process.kill()
            child.has_ended.wait()
        code = int(any(child.about is not None and child.process.exitcode for child in children))
        if error is not None:
            raise error
        return code

    def _wait_for_end(self) -> UserError | None:
        """Looks up now and then: a signal that comes just before a wait does not end it."""
        while True:
            with suppress(queue.Empty):
                return self._ends.get(timeout=_TICK_SECONDS)

    def _start(self, source: Source, state: str) -> None:
        try:
            self._exchange(source)
        except UserError as error:
            self._ends.put(error)
        else:
            _log.info("serving %s at %s/invocations", source.address, address_of(self.sockets.bound))
            self.reloads.watch(state, self._poll)

    def _exchange(self, source: Source) -> None:
        """Serves a model by another generation. Raises UserError for one that can't be loaded."""
        with self._exchanging:
            before = self.current
            with self._starting:  # none that the end does not know of
                if self._is_ending:
                    raise UserError("the server is ending")
                child = _Child(self, source)
                self._children = [*(each for each in self._children if not each.has_ended.is_set()), child]
            child.has_started.wait()
            if child.error is not None:
                if before is not None:
                    before.send("failed", str(child.error))
                raise child.error
            self.current = child
            if before is None:
                listen(self.sockets.bound)
            else:
                _log.info("serving %s", source.address)
                before.send("retire")
                before.has_retired.wait(self.options.grace)
            child.send("accept", before is not None)

    def replace(self, ended: _Child) -> None:
        """Serves the same model again, unless the generation that has ended has another one in its place already."""
        failures = 0
        while not self._is_ending:
            with self._exchanging:
                if self.current is not ended:
                    return
                how = _ending_of(ended.process)
                _log.warning("the process that holds the model ended by %s; another one takes its place", how)
                try:
                    return self._exchange(ended.source)
                except UserError as error:
                    failures += 1
                    _log.error("it can't take its place: %s", error)
            time.sleep(min(2.0**failures, LONGEST_PAUSE_SECONDS))


class _Child:
    """A generation as the parent sees it, in a thread that listens to it.

    has_...: events, all set at its end; error: why it could not serve; about: its model, once it serves.
    """

    def __init__(self, parent: _Parent, source: Source) -> None:
        self.source, self._parent = source, parent
        self.error: UserError | None = None
        self.about: dict[str, str | None] | None = None
        self.has_started, self.has_retired, self.has_ended = threading.Event(), threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._pipe, theirs = multiprocessing.Pipe()
        arguments = (source, parent.sockets, parent.options, parent.workers, theirs)
        self.process = multiprocessing.get_context("spawn").Process(target=_run_generation, args=arguments)
        self.process.start()
        theirs.close()
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, *message: Any) -> None:
        """Says something, unless it has ended."""
        with self._lock, suppress(OSError):
            self._pipe.send(message)

    def _listen(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                what, *rest = self._pipe.recv()
                if what == "ready":
                    (self.about,) = rest
                    self.has_started.set()
                elif what == "failed":
                    (self.error,) = rest
                elif what == "retired":
                    self.has_retired.set()
                elif what == "reload":
                    self._reload(rest[0])
        self.process.join()
        if self.about is None and self.error is None:
            how = _ending_of(self.process)
            hint = ", as the system does where memory is short" if how == "SIGKILL" else "; its lines say why"
            self.error = UserError(
                f"the process that loads the model at '{self.source.address}' was ended by {how}{hint}"
            )
        for each in (self.has_started, self.has_retired, self.has_ended):
            each.set()
        self._parent.replace(self)

    def _reload(self, worker: int) -> None:
        """Looks for a model, and tells the worker that wants it what came of it."""

        def tell(done: Future[None]) -> None:
            error, current = done.exception(), self._parent.current
            assert current is not None
            self.send("reloaded", worker, None if error is None else sentence_of(error), current.about)

        self._parent.reloads.ask().add_done_callback(tell)


def _ending_of(process: BaseProcess) -> str:
    """How a process has ended, for people."""
    code = process.exitcode or 0
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


# A generation


def _run_generation(source: Source, sockets: Sockets, options: Options, workers: int, parent: Connection) -> None:
    """Loads a model, which answers its example and learns the journal, and keeps workers that serve it."""
    for each in (signal.SIGINT, signal.SIGTERM):  # either may reach all processes of a service; the parent tells
        signal.signal(each, signal.SIG_IGN)
    log_to_stderr()
    import torch

    from mmoe_rec.server import app, running  # noqa: F401 - workers need them, and share them like the model

    torch.set_num_threads(1)  # a worker ranks with one, and OpenMP's threads would not be there after a fork
    try:
        models = Models(options, source)
    except UserError as error:
        with suppress(OSError):
            parent.send(("failed", error))
        end_process(1)
    if models.current.learning is not None:
        models.current.learning.journal.close()
    gc.collect()
    gc.freeze()  # collecting garbage in a worker would write to the pages of all this, and so copy them
    end_process(_Generation(models, sockets, workers, parent).run())


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    pipe: Connection
    number: int
    is_ready: bool = False
    is_retired: bool = False


class _Generation:
    """Keeps workers until the parent says otherwise, or has ended."""

    def __init__(self, models: Models, sockets: Sockets, workers: int, parent: Connection) -> None:
        self._models, self._sockets, self._parent = models, sockets, parent
        self._workers: list[_Worker] = []
        self._marks = memoryview(mmap(-1, workers))  # forks share it
        self._free = list(range(workers))
        self._was_ready = self._accepts = self._is_retiring = self._is_ending = self._is_orphan = False
        self._end, self._next_start, self._code = float("inf"), 0.0, 0

    def run(self) -> int:
        """Gives the exit code: 0 if all workers answered what they had accepted."""
        while self._workers or not self._is_ending:
            while self._free and not self._is_ending and time.monotonic() >= self._next_start:
                self._fork()
            workers = {worker.pipe: worker for worker in self._workers}
            for ready in wait([*workers] if self._is_orphan else [self._parent, *workers], _TICK_SECONDS):
                if ready is self._parent:
                    self._obey()
                else:
                    self._hear(workers[ready])  # type: ignore[index]
            if self._is_retiring and all(each.is_retired for each in self._workers):
                self._is_retiring = False
                self._tell("retired")
            if time.monotonic() > self._end:
                self._end = float("inf")
                for worker in self._workers:
                    _log.warning("worker %s does not end and is killed", worker.process.pid)
                    worker.process.kill()
        if self._is_orphan:  # the parent was killed, and removes no folder
            shutil.rmtree(os.environ[FOLDER_VARIABLE], ignore_errors=True)
        return self._code

    def _fork(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        number = self._free.pop()
        not_its_own = [self._parent, ours, *(each.pipe for each in self._workers)]
        passes = Passes(self._marks, number)
        arguments = (self._models, self._sockets, passes, theirs, not_its_own, self._accepts)
        process = multiprocessing.get_context("fork").Process(target=_run_worker, args=arguments)
        process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours, number))

    def _tell(self, *message: Any) -> None:
        with suppress(OSError):  # it has ended
            self._parent.send(message)

    def _obey(self) -> None:
        try:
            message = self._parent.recv()
        except (EOFError, OSError):
            _log.warning("the parent has ended, and so do its workers")
            self._is_orphan, message = True, ("stop",)
        if message[0] == "accept":
            self._accepts = True
        elif message[0] == "retire":
            self._is_retiring = True
        elif message[0] == "stop":
            self._end = time.monotonic() + _SHARE_OF_WORKERS * self._models.options.grace
        if message[0] in ("stop", "retire") and not self._is_ending:
            self._is_ending = True
            self._sockets.close()
        for worker in self._workers:
            with suppress(OSError):  # it has ended
                worker.pipe.send(message)

    def _hear(self, worker: _Worker) -> None:
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            self._bury(worker)
            return
        if message == ("ready",):
            worker.is_ready = True
            if not self._was_ready and all(each.is_ready for each in self._workers):
                self._was_ready = True
                self._tell("ready", self._models.current.about())
        elif message == ("retired",):
            worker.is_retired = True
        else:
            self._tell(*message)

    def _bury(self, worker: _Worker) -> None:
        worker.process.join()
        worker.pipe.close()
        self._workers.remove(worker)
        self._marks[worker.number] = 0  # it may have ended in a pass
        self._free.append(worker.number)
        mark_process_dead(worker.process.pid)  # what it had under way; what it has counted stays
        how = _ending_of(worker.process)
        if self._is_ending:
            self._code = max(self._code, int(worker.is_ready and worker.process.exitcode != 0))
        elif self._was_ready:
            self._next_start = time.monotonic() + (0.0 if worker.is_ready else 2.0)
            _log.warning("worker %s ended by %s; another one takes its place", worker.process.pid, how)
        else:
            self._tell("failed", UserError(f"a worker ended by {how} before it could serve; what it printed says why"))
            self._is_ending = True
            for other in self._workers:
                other.process.kill()


# A worker


def _run_worker(
    models: Models, sockets: Sockets, passes: Passes, pipe: Connection, not_its_own: list[Connection], accepts: bool
) -> None:
    """Serves the model that was loaded before the fork, until it is to stop or retire, or its parent ends.

    not_its_own: ends of pipes that a fork copies, and that say that a process has ended once nobody holds them;
    accepts: whether it accepts connections at once, else when it is told to.
    """
    for each in not_its_own:
        each.close()
    from mmoe_rec.server.app import Application
    from mmoe_rec.server.running import Server

    served, metrics = models.current, Metrics()
    counts = passes.number == 0  # one of the workers counts what happens to all of them
    talk = _Talk(pipe, models, metrics, counts)
    try:
        if served.learning is not None:
            served.learning.catch_up()
        metrics.show_model(served.about())
        server = Server(Application(models, metrics, talk.reload, passes), sockets.give, sockets.take)
        talk.send("ready")
        if not accepts:
            what, *is_another = talk.receive()
            if what != "accept":
                end_process(0)
            if any(is_another) and counts:
                metrics.reloads.labels("done").inc()
        server.serve_on(sockets.bound, lambda: asyncio.get_running_loop().add_reader(pipe.fileno(), talk.obey, server))
    except UserError as error:
        _log.error("a worker can't serve: %s", error)
        end_process(1)
    end_process(0)


class _Talk:
    """A worker's end of the pipe; used in its main thread alone."""

    def __init__(self, pipe: Connection, models: Models, metrics: Metrics, counts: bool) -> None:
        """counts: whether this worker counts attempts to take up another model."""
        self._pipe, self._models, self._metrics, self._counts = pipe, models, metrics, counts
        self._reloads: list[asyncio.Future[Any]] = []  # replies come in this order

    def send(self, *message: Any) -> None:
        """Says something, unless the parent has ended."""
        with suppress(OSError):
            self._pipe.send(message)

    def receive(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            _log.warning("the process that holds the model has ended, and so does this worker")
            return ("end",)

    async def reload(self) -> dict[str, str | None]:
        """Asks for the model that the address names now; once it is served, gives what it is. Raises UserError."""
        done = asyncio.get_running_loop().create_future()
        self._reloads.append(done)
        self.send("reload", os.getpid())
        failure, about = await done
        if failure is not None:
            raise UserError(failure)
        return about

    def obey(self, server: Server) -> None:
        """Does what a message says; in the event loop."""
        what, *rest = self.receive()
        if what == "failed":
            (self._models.failure,) = rest
            if self._counts:
                self._metrics.reloads.labels("failed").inc()
        elif what == "retire":
            server.retire(lambda: self.send("retired"))
        elif what == "reloaded":
            process, *result = rest
            if process == os.getpid() and not (done := self._reloads.pop(0)).done():
                done.set_result(result)
        else:
            server.stop()
            if what == "end":
                asyncio.get_running_loop().remove_reader(self._pipe.fileno())
