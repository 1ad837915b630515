"""Serving by several workers: processes that listen on one socket, and a parent that starts and replaces them.

Workers are forked from a process that has imported torch and nothing else (multiprocessing's fork server), so they
share the memory of all packages. Each worker loads the model. The parent looks for another model, has each worker load
it beside the old one, and then tells all of them to exchange it. Messages through a worker's pipe:

    parent -> worker    serve; drain; stop; load, source; exchange; failed, sentence;
                        reloaded, sentence or None, about the model
    worker -> parent    ready, about the model; failed, error; reload; loaded, error or about the model; exchanged
"""

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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from mmoe_rec.errors import STOP_SIGNALS, UserError, catch_stop_signals
from mmoe_rec.inference.artifact import Source
from mmoe_rec.server.metrics import FOLDER_VARIABLE, Metrics
from mmoe_rec.server.models import Finder, Models, Reloads, ServedModel, sentence_of
from mmoe_rec.server.options import Options, address_of, end_process, listen, log_to_stderr

TICK_SECONDS = 0.2
_LOAD_SECONDS, _EXCHANGE_SECONDS = 600.0, 30.0  # a worker that takes longer hangs, and is replaced
_PAUSE_SECONDS = 2.0  # before a worker that could not serve is replaced
_LONGEST_FOLDER = 85  # characters; the path of a Unix socket has 107 at most, and its name in the folder 18
_SHARE_OF_WORKERS = 0.9  # of the time to stop: a worker that has not ended by then is killed

_log = logging.getLogger(__name__)


def serve_by_workers(
    source: Source, state: str | None, finder: Finder, bound: socket.socket, options: Options, poll: float, workers: int
) -> int:
    """Serve a model by several processes until a signal asks to stop; arguments as in `running.serve`.

    Returns:
        The exit code, 0 if all accepted calls were answered.

    Raises:
        UserError: The model can't be loaded.
    """
    if sys.platform != "linux":
        raise UserError("several workers are forked from one process, which is safe on Linux alone: take --workers 1")
    with ExitStack() as stack:
        try:
            folder = sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="mmoe-rec-metrics-"))
            if len(sockets) > _LONGEST_FOLDER:
                sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="mmoe-rec-", dir="/tmp"))
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"the temporary folder can't be written to ({reason}): set TMPDIR") from None
        # Read when packages are imported. Threads of OpenBLAS would not be there after a fork.
        os.environ.update({FOLDER_VARIABLE: folder, "OPENBLAS_NUM_THREADS": "1"})
        # The fork server's socket is removed with its folder. multiprocessing has no public setting for it.
        vars(multiprocessing.current_process())["_config"]["tempdir"] = sockets
        return _Parent(source, finder, bound, options, workers).run(state, poll)


class _EndedError(UserError):
    """A worker ended, or hung, before it replied."""


@dataclass(eq=False)
class _Worker:
    """A worker as its parent sees it. replies: to the orders of a reload."""

    number: int
    source: Source
    process: BaseProcess
    pipe: Connection
    about: dict[str, str | None] | None = None
    serves: bool = False
    replies: "queue.SimpleQueue[Any]" = field(default_factory=queue.SimpleQueue)

    def send(self, *message: Any) -> None:
        """Say something to the worker, unless it has ended."""
        with suppress(OSError):
            self.pipe.send(message)

    def wait(self, seconds: float) -> Any:
        """Return the next reply, or an error for a worker that ends or hangs."""
        with suppress(queue.Empty):
            return self.replies.get(timeout=seconds)
        self.process.kill()
        return _EndedError(f"a worker did not answer within {seconds:.0f} seconds")


class _Parent:
    """Keeps workers. Its main thread listens to them, and a thread of `Reloads` gives the orders of a reload."""

    def __init__(self, source: Source, finder: Finder, bound: socket.socket, options: Options, workers: int) -> None:
        self._source, self._bound, self._options, self._count = source, bound, options, workers
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["mmoe_rec.server.preload"])
        self._marks = self._context.RawArray("b", workers)  # which workers rank now
        self._workers = dict[int, _Worker]()
        self._starts = dict.fromkeys(range(workers), 0.0)  # when to start which worker
        self._reloads, self._metrics = Reloads(finder, self._take_up), Metrics("parent")
        self._lock = threading.RLock()
        self._about: dict[str, str | None] | None = None
        self._failure: str | None = None
        self._is_reloading = self._is_draining = False

    def run(self, state: str | None, poll: float) -> int:
        """Serve until a signal. Returns the exit code."""
        stopping = threading.Event()
        catch_stop_signals(lambda *_: stopping.set())
        try:
            while not stopping.is_set():
                was_serving = self._about is not None
                self._step()
                if self._about is not None and not was_serving:
                    _log.info("serving %s at %s/invocations", self._source.address, address_of(self._bound))
                    self._reloads.watch(state, poll)
        except BaseException:
            self._kill()
            raise
        self._is_draining = True
        self._tell("drain")
        until = time.monotonic() + self._options.drain
        while self._about is not None and time.monotonic() < until:
            self._step()
        return self._end()

    def _step(self) -> None:
        """Start workers that lack, and hear what others say."""
        for number, moment in list(self._starts.items()):
            if time.monotonic() >= moment:
                del self._starts[number]
                self._start(number)
        pipes = {worker.pipe: worker for worker in self._workers.values()}
        for pipe in wait([*pipes], TICK_SECONDS):
            worker = pipes[pipe]  # type: ignore[index]
            try:
                what, *rest = worker.pipe.recv()
            except (EOFError, OSError):
                self._bury(worker)
                continue
            if what == "ready":
                (worker.about,) = rest
            elif what == "failed":
                self._fail(worker, *rest)
            elif what == "reload":
                self._reloads.ask().add_done_callback(self._reply_to(worker))
            else:
                worker.replies.put(*rest)
        with self._lock:
            for worker in self._workers.values():
                if worker.about is not None and not worker.serves and not self._is_reloading:
                    self._admit(worker)

    def _start(self, number: int) -> None:
        ours, theirs = self._context.Pipe()
        arguments = (self._source, self._bound, self._options, self._marks, number, theirs)
        process = self._context.Process(target=run_worker, args=arguments)
        process.start()
        theirs.close()
        with self._lock:
            self._workers[number] = _Worker(number, arguments[0], process, ours)

    def _admit(self, worker: _Worker) -> None:
        """Let a worker serve that has loaded the model, unless another one has taken the model's place meanwhile."""
        if worker.source is not self._source:
            worker.process.kill()
            return
        if self._about is None:
            listen(self._bound)  # here, as an address that is taken ends the start
        if self._failure is not None:
            worker.send("failed", self._failure)
        if self._is_draining:
            worker.send("drain")
        worker.send("serve")
        worker.serves, self._about = True, worker.about

    def _fail(self, worker: _Worker, error: UserError) -> None:
        """Note why a worker can't serve, which ends the start."""
        if self._about is None:
            raise error
        _log.error("a worker can't serve: %s", error)

    def _bury(self, worker: _Worker) -> None:
        from prometheus_client.multiprocess import mark_process_dead

        with self._lock:
            del self._workers[worker.number]
            worker.pipe.close()
        worker.process.join()
        self._marks[worker.number] = 0  # it may have ended in a pass
        mark_process_dead(str(worker.number))  # what it had under way; what it has counted stays
        how = _describe_end(worker.process)
        hint = ", as the system does where memory is short" if how == "SIGKILL" else "; its lines say why"
        error = _EndedError(f"a process that loads the model at '{self._source.address}' was ended by {how}{hint}")
        worker.replies.put(error)
        if self._about is None:
            raise error
        if worker.source is self._source:
            _log.warning("worker %s ended by %s; another one takes its place", worker.process.pid, how)
        self._starts[worker.number] = time.monotonic() + (0.0 if worker.about is not None else _PAUSE_SECONDS)

    def _reply_to(self, worker: _Worker) -> Callable[[Future[None]], None]:
        def reply(done: Future[None]) -> None:
            error = done.exception()
            with self._lock:
                worker.send("reloaded", None if error is None else sentence_of(error), self._about)

        return reply

    def _take_up(self, source: Source) -> None:
        """Have all workers load a model, and then exchange it. Raises UserError for one that can't be loaded."""
        with self._lock:
            workers = [worker for worker in self._workers.values() if worker.serves]
            self._is_reloading = True
            self._tell("load", source)
        try:
            found = [worker.wait(_LOAD_SECONDS) for worker in workers] or [_EndedError("no worker serves now")]
            loaded = [about for about in found if not isinstance(about, UserError)]
            errors = [error for error in found if isinstance(error, UserError)]
            # A worker that ended is replaced by one that loads the new model.
            if refused := [error for error in errors if not loaded or not isinstance(error, _EndedError)]:
                self._failure = str(refused[0])
                self._tell("failed", self._failure)
                self._metrics.reloads.labels("failed").inc()
                raise refused[0]
            self._source, self._about, self._failure = source, loaded[0], None
            for worker in workers:
                worker.source = source
            self._tell("exchange")
            for worker in workers:
                worker.wait(_EXCHANGE_SECONDS)
            self._metrics.reloads.labels("done").inc()
            _log.info("serving %s", source.address)
        finally:
            self._is_reloading = False

    def _tell(self, *message: Any) -> None:
        """Say something to all workers that serve."""
        with self._lock:
            for worker in self._workers.values():
                if worker.serves:
                    worker.send(*message)

    def _end(self) -> int:
        """Have all workers answer what they have accepted. Returns the exit code."""
        self._tell("stop")
        self._bound.close()
        until = time.monotonic() + _SHARE_OF_WORKERS * self._options.grace
        serving = [worker.process for worker in self._workers.values() if worker.serves]
        for process in serving:
            process.join(max(until - time.monotonic(), 0.0))
            if process.is_alive():
                _log.warning("worker %s does not end and is killed", process.pid)
        self._kill()
        return int(any(process.exitcode for process in serving))

    def _kill(self) -> None:
        for worker in list(self._workers.values()):
            worker.process.kill()
            worker.process.join()


def _describe_end(process: BaseProcess) -> str:
    """Return how a process has ended, for people."""
    code = process.exitcode or 0
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


# A worker


def run_worker(
    source: Source, bound: socket.socket, options: Options, marks: Any, number: int, pipe: Connection
) -> None:
    """Load a model, and serve it until the parent says otherwise, or has ended.

    Args:
        source: The model.
        bound: Socket to listen on.
        options: How to serve.
        marks: Which workers rank now, in memory that they share.
        number: Number of this worker. A later worker of this number continues its metric files.
        pipe: Pipe to the parent.
    """
    for each in STOP_SIGNALS:  # Any may reach all processes of a service. The parent passes it on.
        signal.signal(each, signal.SIG_IGN)
    log_to_stderr()
    from mmoe_rec.server.app import Application
    from mmoe_rec.server.ranking_queue import Passes, take_one_thread
    from mmoe_rec.server.running import Server

    take_one_thread()
    try:
        models, metrics = Models(options, source), Metrics(str(number))
        metrics.show_model(models.current.about())
        talk = _Talk(pipe, models, metrics)
        server = Server(Application(models, metrics, talk.reload, Passes(marks, number)), is_worker=True)
        pipe.send(("ready", models.current.about()))
        talk.wait_for_start(server)
        server.serve_on(bound, lambda: asyncio.get_running_loop().add_reader(pipe.fileno(), talk.obey, server))
    except UserError as error:
        with suppress(OSError):
            pipe.send(("failed", error))
        end_process(1)
    if talk.is_orphan:  # the parent was killed, and removes no folder
        shutil.rmtree(os.environ[FOLDER_VARIABLE], ignore_errors=True)
    end_process(0)


class _Talk:
    """A worker's end of the pipe. Used in its main thread alone."""

    def __init__(self, pipe: Connection, models: Models, metrics: Metrics) -> None:
        self._pipe, self._models, self._metrics = pipe, models, metrics
        self._reloads = list[asyncio.Future[Any]]()  # replies come in this order
        self._loaded: ServedModel | None = None
        self._thread: ThreadPoolExecutor | None = None
        self.is_orphan = False

    def wait_for_start(self, server: Any) -> None:
        """Obey the parent until it says that this worker may serve."""
        while not self.is_orphan and (message := self._receive())[0] != "serve":
            self._do(server, *message)

    def obey(self, server: Any) -> None:
        """Do what a message says; in the event loop."""
        self._do(server, *self._receive())

    async def reload(self) -> dict[str, str | None]:
        """Ask for the model that the address names now. Returns its description once it is served."""
        done = asyncio.get_running_loop().create_future()
        self._reloads.append(done)
        self._send("reload")
        failure, about = await done
        if failure is not None:
            raise UserError(failure)
        return dict(about)

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            _log.warning("the parent has ended, and so does this worker")
            self.is_orphan = True
            return ("stop",)

    def _send(self, *message: Any) -> None:
        with suppress(OSError):
            self._pipe.send(message)

    def _do(self, server: Any, what: str, *rest: Any) -> None:
        if what == "load":
            self._run(self._load, *rest)
        elif what == "exchange":
            self._run(self._exchange)
        elif what == "failed":
            (self._models.failure,), self._loaded = rest, None
        elif what == "reloaded":
            if not (done := self._reloads.pop(0)).done():
                done.set_result(rest)
        elif what == "drain":
            server.drain()
        else:
            server.stop()
            if self.is_orphan and server.started:
                asyncio.get_running_loop().remove_reader(self._pipe.fileno())

    def _run(self, work: Callable[..., tuple[Any, ...]], *arguments: Any) -> None:
        """Do something in a thread, and tell the parent what came of it."""
        from mmoe_rec.server.ranking_queue import take_one_thread

        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "loading", initializer=take_one_thread)
        done = asyncio.wrap_future(self._thread.submit(work, *arguments))
        done.add_done_callback(lambda done: self._send(*done.result()))

    def _load(self, source: Source) -> tuple[Any, ...]:
        try:
            self._loaded = self._models.open(source)
            return "loaded", self._loaded.about()
        except UserError as error:
            return "loaded", error

    def _exchange(self) -> tuple[Any, ...]:
        assert self._loaded is not None, "it was loaded"
        self._models.exchange(self._loaded)
        self._metrics.show_model(self._loaded.about())
        self._loaded = None
        gc.collect()  # the model before goes at once
        return "exchanged", None
