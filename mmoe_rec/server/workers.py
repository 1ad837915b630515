"""Serving by several workers: processes that listen on one socket, and a parent that starts and replaces them.

All processes are forked from one that has imported torch and nothing else (multiprocessing's fork server), so they
share the memory of all packages. For each model a process, the loader, reads and checks the artifact, writes the model
to shared memory (`mmoe_rec.server.shared`) and ends. Workers map that memory. The parent looks for another model, has
it loaded while workers serve the old one, and then tells them to exchange it. Messages through a worker's pipe:

    parent -> worker    take, path; failed, sentence; reloaded, sentence or None; drain; stop
    worker -> parent    reload; taken
"""

import asyncio
import gc
import logging
import multiprocessing
import os
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

from mmoe_rec.errors import UserError, catch_stop_signals
from mmoe_rec.inference.artifact import Source
from mmoe_rec.server.measurements import FOLDER_VARIABLE, Metrics
from mmoe_rec.server.models import Finder, Models, Reloads, ServedModel, sentence_of
from mmoe_rec.server.options import Options, address_of, end_process, listen, log_to_stderr

TICK_SECONDS = 0.2
_LOAD_SECONDS, _EXCHANGE_SECONDS = 600.0, 30.0  # a process that takes longer hangs, and is killed
_PAUSE_SECONDS = 2.0  # between two starts of a worker, so that one that fails at once takes little of the machine
_LONGEST_FOLDER = 85  # characters; the path of a Unix socket has 107 at most, and its name in the folder 18
_FRACTION_OF_WORKERS = 0.9  # of the time to stop: a worker that has not ended by then is killed

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


class _SharedFile:
    """A file in memory, which is gone once it is closed and no process maps it."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("model")
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def close(self) -> None:
        os.close(self._descriptor)


@dataclass(eq=False)
class _Worker:
    """A worker as its parent sees it. taken: set while it serves the last model that it was told to take."""

    process: BaseProcess
    pipe: Connection
    since: float = field(default_factory=time.monotonic)
    taken: threading.Event = field(default_factory=threading.Event)

    def send(self, *message: Any) -> None:
        """Say something to the worker, unless it has ended."""
        with suppress(OSError):
            self.pipe.send(message)


class _Parent:
    """Keeps workers. Its main thread listens to them, and a thread of `Reloads` has other models loaded and taken."""

    def __init__(self, source: Source, finder: Finder, bound: socket.socket, options: Options, workers: int) -> None:
        self._source, self._bound, self._options = source, bound, options
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["mmoe_rec.server.preload"])
        self._marks = self._context.RawArray("b", workers)  # which workers rank now
        self._workers = dict[int, _Worker]()
        self._starts = dict.fromkeys(range(workers), 0.0)  # when to start which worker
        self._reloads, self._metrics = Reloads(finder, self._take_up), Metrics("parent")
        self._lock = threading.RLock()  # of all workers, and of the model that a new one starts with
        self._model: _SharedFile | None = None
        self._failure: str | None = None
        self._is_draining = False

    def run(self, state: str | None, poll: float) -> int:
        """Serve until a signal. Returns the exit code."""
        stopping = threading.Event()
        catch_stop_signals(lambda *_: stopping.set())
        first = ThreadPoolExecutor(1).submit(self._load, self._source)
        try:
            while not stopping.is_set():
                if self._model is None and first.done():
                    self._model = first.result()
                    listen(self._bound)  # here, as an address that is taken ends the start
                    _log.info("serving %s at %s/invocations", self._source.address, address_of(self._bound))
                    self._reloads.watch(state, poll)
                self._step()
            self._is_draining = True
            self._tell("drain")
            until = time.monotonic() + self._options.drain
            while self._model is not None and time.monotonic() < until:
                self._step()
            return self._end()
        finally:
            for worker in self._workers.values():
                worker.process.kill()

    def _step(self) -> None:
        """Start workers that lack, and hear what others say."""
        for number, moment in list(self._starts.items()):
            if self._model is not None and time.monotonic() >= moment:
                del self._starts[number]
                self._start(number, self._model)
        pipes = {worker.pipe: number for number, worker in self._workers.items()}
        for pipe in wait([*pipes], TICK_SECONDS):
            number = pipes[pipe]  # type: ignore[index]
            try:
                (message,) = self._workers[number].pipe.recv()
            except (EOFError, OSError):
                self._bury(number)
                continue
            if message == "reload":
                self._reloads.ask().add_done_callback(self._reply_to(self._workers[number]))
            else:
                self._workers[number].taken.set()

    def _start(self, number: int, model: _SharedFile) -> None:
        ours, theirs = self._context.Pipe()
        with self._lock:
            arguments = (model.path, self._bound, self._options, self._marks, number, theirs)
            process = self._context.Process(target=run_worker, args=arguments)
            process.start()
            worker = self._workers[number] = _Worker(process, ours)
            if self._failure is not None:
                worker.send("failed", self._failure)
            if self._is_draining:
                worker.send("drain")
        theirs.close()

    def _bury(self, number: int) -> None:
        """Note that a worker has ended, and that another one is to take its place."""
        from prometheus_client.multiprocess import mark_process_dead

        with self._lock:
            worker = self._workers.pop(number)
            worker.pipe.close()
        worker.taken.set()
        worker.process.join()
        self._marks[number] = 0  # it may have ended in a pass
        mark_process_dead(str(number))  # what it had under way; what it has counted stays
        _log.warning("worker %s ended by %s; another one takes its place", worker.process.pid, _end_of(worker.process))
        self._starts[number] = worker.since + _PAUSE_SECONDS

    def _reply_to(self, worker: _Worker) -> Callable[[Future[None]], None]:
        def reply(done: Future[None]) -> None:
            error = done.exception()
            with self._lock:
                worker.send("reloaded", None if error is None else sentence_of(error))

        return reply

    def _load(self, source: Source) -> _SharedFile:
        """Have the loader write a model to shared memory. Raises UserError for one that can't be loaded."""
        model, (ours, theirs) = _SharedFile(), self._context.Pipe(duplex=False)
        loader = self._context.Process(target=run_loader, args=(source, self._options, model.path, theirs))
        loader.start()
        theirs.close()
        where = f"a process that loads the model at '{source.address}'"
        try:
            late = UserError(f"{where} has not ended within {_LOAD_SECONDS:.0f} seconds")
            error = ours.recv() if ours.poll(_LOAD_SECONDS) else late
        except EOFError:
            loader.join()
            how = _end_of(loader)
            hint = ", as the system does where memory is short" if how == "SIGKILL" else "; its lines say why"
            error = UserError(f"{where} was ended by {how}{hint}")
        finally:
            loader.kill()
            loader.join()
            ours.close()
        if error is not None:
            model.close()
            raise error
        return model

    def _take_up(self, source: Source) -> None:
        """Have a model loaded, and then taken by all workers. Raises UserError for one that can't be loaded."""
        try:
            model = self._load(source)
        except UserError as error:
            with self._lock:
                self._failure = str(error)
                self._tell("failed", self._failure)
            self._metrics.reloads.labels("failed").inc()
            raise
        with self._lock:
            before, self._model, self._failure = self._model, model, None
            workers = list(self._workers.values())
            for worker in workers:
                worker.taken.clear()
            self._tell("take", model.path)
        until = time.monotonic() + _EXCHANGE_SECONDS
        for worker in workers:
            if not worker.taken.wait(max(until - time.monotonic(), 0.0)):
                _log.warning("worker %s does not take the model and is killed", worker.process.pid)
                worker.process.kill()
        if before is not None:
            before.close()
        self._metrics.reloads.labels("done").inc()
        _log.info("serving %s", source.address)

    def _tell(self, *message: Any) -> None:
        """Say something to all workers."""
        with self._lock:
            for worker in self._workers.values():
                worker.send(*message)

    def _end(self) -> int:
        """Have all workers answer what they have accepted. Returns the exit code."""
        self._tell("stop")
        self._bound.close()
        until = time.monotonic() + _FRACTION_OF_WORKERS * self._options.grace
        processes = [worker.process for worker in self._workers.values()]
        for process in processes:
            process.join(max(until - time.monotonic(), 0.0))
            if process.is_alive():
                _log.warning("worker %s does not end and is killed", process.pid)
                process.kill()
                process.join()
        return int(any(process.exitcode for process in processes))


def _end_of(process: BaseProcess) -> str:
    """Return how a process has ended, for people."""
    code = process.exitcode or 0
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def run_loader(source: Source, options: Options, path: str, pipe: Connection) -> None:
    """Load a model and write it to shared memory. Sends None, or the error of a model that can't be loaded."""
    from mmoe_rec.server.shared import write_shared

    log_to_stderr()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        write_shared(Models(options, source).current, path)
        pipe.send(None)
    except UserError as error:
        pipe.send(error)
    end_process(0)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process was forked"
    parent.join()
    end_process(1)


def run_worker(path: str, bound: socket.socket, options: Options, marks: Any, number: int, pipe: Connection) -> None:
    """Serve a model until the parent says otherwise, or has ended.

    Args:
        path: File with the model.
        bound: Socket to listen on.
        options: How to serve.
        marks: Which workers rank now, in memory that they share.
        number: Number of this worker. A later worker of this number continues its metric files.
        pipe: Pipe to the parent.
    """
    log_to_stderr()
    from mmoe_rec.server.app import Application
    from mmoe_rec.server.ranking_queue import Passes
    from mmoe_rec.server.running import Server

    models, metrics = Models(options, _open_shared(path)), Metrics(str(number))
    metrics.show_model(models.current.about())
    orders = _Orders(pipe, models, metrics)
    server = Server(Application(models, metrics, orders.reload, Passes(marks, number)))
    server.serve_on(bound, lambda: asyncio.get_running_loop().add_reader(pipe.fileno(), orders.obey, server))
    if orders.is_orphan:  # the parent was killed, and removes no folder
        shutil.rmtree(os.environ[FOLDER_VARIABLE], ignore_errors=True)
    end_process(0)


def _open_shared(path: str) -> ServedModel:
    """Map a model, and have it prepare for the first request."""
    from mmoe_rec.server.ranking_queue import take_one_thread
    from mmoe_rec.server.shared import map_shared

    take_one_thread()
    served = map_shared(path)
    served.ranker.rank(**served.example)
    return served


class _Orders:
    """A worker's end of the pipe. Used in its event loop alone."""

    def __init__(self, pipe: Connection, models: Models, metrics: Metrics) -> None:
        self._pipe, self._models, self._metrics = pipe, models, metrics
        self._reloads = list[asyncio.Future[str | None]]()  # replies come in this order
        self._thread = ThreadPoolExecutor(1, "loading")
        self._taking: asyncio.Task[None] | None = None
        self.is_orphan = False

    async def reload(self) -> dict[str, str | None]:
        """Ask for the model that the address names now. Returns its description once it is served."""
        done = asyncio.get_running_loop().create_future()
        self._reloads.append(done)
        self._send("reload")
        if (failure := await done) is not None:
            raise UserError(failure)
        return self._models.current.about()

    def obey(self, server: Any) -> None:
        """Do what the next message says."""
        loop = asyncio.get_running_loop()
        try:
            what, *rest = self._pipe.recv()
        except (EOFError, OSError):
            _log.warning("the parent has ended, and so does this worker")
            self.is_orphan = True
            loop.remove_reader(self._pipe.fileno())
            what, rest = "stop", []
        if what == "take":
            self._taking = loop.create_task(self._take(server, *rest))
        elif what == "failed":
            (self._models.failure,) = rest
        elif what == "reloaded":
            if not (done := self._reloads.pop(0)).done():
                done.set_result(*rest)
        elif what == "drain":
            server.drain()
        else:
            server.stop()

    async def _take(self, server: Any, path: str) -> None:
        """Exchange the model. A worker that can't ends, and the next one begins with the new model."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._exchange, path)
            self._send("taken")
        except Exception:
            _log.exception("this worker can't take the model and ends")
            server.stop()

    def _exchange(self, path: str) -> None:
        served = _open_shared(path)
        self._models.exchange(served)
        self._metrics.show_model(served.about())
        gc.collect()  # the model before goes at once

    def _send(self, message: str) -> None:
        with suppress(OSError):
            self._pipe.send((message,))
