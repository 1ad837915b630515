"""A generation: a process that holds a model, and the workers that it forks from itself (`mmoe_rec.server.workers`).

Messages, each a tuple that goes through a pipe:

    parent -> generation -> its workers    accept, is_another; retire; stop; failed, sentence;
                                           reloaded, process id of a worker, sentence or None, about the model
    worker -> generation -> parent         reload, its process id
    worker -> generation                   ready; retired
    generation -> parent                   failed, error; or ready, about the model; retired (as all of its workers)
"""

import asyncio
import gc
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from mmap import mmap
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, NamedTuple

from prometheus_client.multiprocess import mark_process_dead

from mmoe_rec.errors import STOP_SIGNALS, UserError
from mmoe_rec.inference.artifact import Source
from mmoe_rec.server.metrics import FOLDER_VARIABLE, Metrics
from mmoe_rec.server.models import Models
from mmoe_rec.server.options import Options, end_process, log_to_stderr
from mmoe_rec.server.ranking_queue import Passes

if TYPE_CHECKING:
    from mmoe_rec.server.running import Server

TICK_SECONDS = 0.2
_SHARE_OF_WORKERS = 0.9  # of the time to stop: who has not ended by then is killed

_log = logging.getLogger(__name__)


class Sockets(NamedTuple):
    """bound: on which all workers listen; give, take: ends of a pipe on which connections are handed over; ending: can
    be read once the parent drains or has ended."""

    bound: socket.socket
    give: socket.socket
    take: socket.socket
    ending: socket.socket

    def close(self) -> None:
        """Closes this process's own handles."""
        for each in self:
            each.close()


def describe_end(process: BaseProcess) -> str:
    """How a process has ended, for people."""
    code = process.exitcode or 0
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def tell(pipe: Connection, *message: Any) -> None:
    """Says something to another process, unless it has ended."""
    with suppress(OSError):
        pipe.send(message)


def run_generation(
    source: Source, sockets: Sockets, options: Options, workers: int, parent: Connection, number: int, alive: Connection
) -> None:
    """Load a model, which answers its example and learns the journal, and keep workers that serve it.

    Args:
        source: The model.
        sockets: Sockets that all processes share.
        options: How to serve.
        workers: Number of workers.
        parent: Pipe to the parent.
        number: Number that no other running generation has, for the names of metric files.
        alive: End of a pipe that this process and its workers hold open until the last of them has ended.
    """
    for each in STOP_SIGNALS:  # Any may reach all processes of a service. The parent passes it on.
        signal.signal(each, signal.SIG_IGN)
    log_to_stderr()
    import torch

    from mmoe_rec.server import app, running  # noqa: F401 - workers need them, and share them like the model

    torch.set_num_threads(1)  # a worker ranks with one, and OpenMP's threads would not be there after a fork
    try:
        models = Models(options, source)
    except UserError as error:
        tell(parent, "failed", error)
        end_process(1)
    if models.current.learning is not None:
        models.current.learning.journal.close()
    gc.collect()
    gc.freeze()  # collecting garbage in a worker would write to the pages of all this, and so copy them
    end_process(_Generation(models, sockets, workers, parent, number).run())


@dataclass(eq=False)
class _Worker:
    """number: of its own among those of a generation; counts: what happens to all workers."""

    process: BaseProcess
    pipe: Connection
    number: int
    counts: bool
    is_ready: bool = False
    is_retired: bool = False


class _Generation:
    """Keeps workers until the parent says otherwise, or has ended."""

    def __init__(self, models: Models, sockets: Sockets, workers: int, parent: Connection, number: int) -> None:
        self._models, self._sockets, self._parent, self._count = models, sockets, parent, workers
        self._number = number
        self._workers: list[_Worker] = []
        self._marks = memoryview(mmap(-1, workers))  # forks share it
        self._free = list(range(workers))
        self._was_ready = self._accepts = self._is_retiring = self._is_ending = self._is_orphan = False
        self._end, self._next_start, self._code = float("inf"), 0.0, 0

    def run(self) -> int:
        """Gives the exit code: 0 if all workers answered what they had accepted."""
        while self._workers or not self._is_ending:
            while not self._is_ending and self._free and time.monotonic() >= self._next_start:
                self._fork()
            workers = {worker.pipe: worker for worker in self._workers}
            for ready in wait([*workers] if self._is_orphan else [self._parent, *workers], TICK_SECONDS):
                if ready is self._parent:
                    self._obey()
                else:
                    self._hear(workers[ready])  # type: ignore[index]
            if self._is_retiring and all(each.is_retired for each in self._workers):
                self._is_retiring = False
                tell(self._parent, "retired")
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
        number, counts = self._free.pop(), not any(each.counts for each in self._workers)
        not_its_own = [self._parent, ours, *(each.pipe for each in self._workers)]
        passes, name = Passes(self._marks, number), f"{self._number}.{number}"
        arguments = (self._models, self._sockets, passes, name, theirs, not_its_own, self._accepts, counts)
        process = multiprocessing.get_context("fork").Process(target=_run_worker, args=arguments)
        process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours, number, counts))

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
            tell(worker.pipe, *message)

    def _hear(self, worker: _Worker) -> None:
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            self._bury(worker)
            return
        if message == ("ready",):
            worker.is_ready = True
            if not self._was_ready and not self._free and all(each.is_ready for each in self._workers):
                self._was_ready = True
                tell(self._parent, "ready", self._models.current.about())
        elif message == ("retired",):
            worker.is_retired = True
        else:
            tell(self._parent, *message)

    def _bury(self, worker: _Worker) -> None:
        worker.process.join()
        worker.pipe.close()
        self._workers.remove(worker)
        self._marks[worker.number] = 0  # it may have ended in a pass
        self._free.append(worker.number)
        # What it had under way; what it has counted stays.
        mark_process_dead(f"{self._number}.{worker.number}")
        how = describe_end(worker.process)
        if self._is_ending:
            self._code = max(self._code, int(worker.is_ready and worker.process.exitcode != 0))
        elif self._was_ready:
            self._next_start = time.monotonic() + (0.0 if worker.is_ready else 2.0)
            _log.warning("worker %s ended by %s; another one takes its place", worker.process.pid, how)
        else:
            error = UserError(f"a worker ended by {how} before it could serve; what it printed says why")
            tell(self._parent, "failed", error)
            self._is_ending = True
            for other in self._workers:
                other.process.kill()


# A worker


def _run_worker(
    models: Models,
    sockets: Sockets,
    passes: Passes,
    name: str,
    pipe: Connection,
    not_its_own: list[Connection],
    accepts: bool,
    counts: bool,
) -> None:
    """Serves the model that was loaded before the fork, until it is to stop or retire, or its parent ends.

    name: of its metric files, with which a later worker goes on, so that there are as many files as workers;
    not_its_own: ends of pipes that a fork copies, and that say that a process has ended once nobody holds them;
    accepts: whether it accepts connections at once, else when it is told to; counts: what happens to all workers.
    """
    for each in not_its_own:
        each.close()
    from mmoe_rec.server.app import Application
    from mmoe_rec.server.running import Server

    served, metrics = models.current, Metrics(name)
    talk = _Talk(pipe, models, metrics, counts)
    try:
        if served.learning is not None:
            served.learning.catch_up()
        metrics.show_model(served.about())
        app = Application(models, metrics, talk.reload, passes)
        server = Server(app, sockets.give, sockets.take)

        def listen_to_parent() -> None:
            loop = asyncio.get_running_loop()
            loop.add_reader(pipe.fileno(), talk.obey, server)
            loop.add_reader(sockets.ending, drain, loop)

        def drain(loop: asyncio.AbstractEventLoop) -> None:
            loop.remove_reader(sockets.ending)
            app.calls.is_draining = True

        tell(pipe, "ready")
        if not accepts:
            what, *is_another = talk.receive()
            if what != "accept":
                end_process(0)
            if any(is_another) and counts:
                metrics.reloads.labels("done").inc()
        server.serve_on(sockets.bound, listen_to_parent)
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
        tell(self._pipe, "reload", os.getpid())
        failure, about = await done
        if failure is not None:
            raise UserError(failure)
        return about

    def obey(self, server: "Server") -> None:
        """Does what a message says; in the event loop."""
        what, *rest = self.receive()
        if what == "failed":
            (self._models.failure,) = rest
            if self._counts:
                self._metrics.reloads.labels("failed").inc()
        elif what == "retire":
            server.retire(lambda: tell(self._pipe, "retired"))
        elif what == "reloaded":
            process, *result = rest
            if process == os.getpid() and not (done := self._reloads.pop(0)).done():
                done.set_result(result)
        else:
            server.stop()
            if what == "end":
                asyncio.get_running_loop().remove_reader(self._pipe.fileno())
