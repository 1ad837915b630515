"""Serving by workers: processes that listen on one socket, and a parent that starts and replaces them.

On Linux all processes are forked from one that has imported torch and nothing else (multiprocessing's fork server), so
they share the memory of all packages. Elsewhere they are started anew. For each model a process, the loader, reads and
checks the artifact, writes the model to shared memory (`mmoe_rec.server.shared`) and ends. Workers map that memory. The
parent looks for another model, has it loaded while workers serve the old one, and then tells them to exchange it.

Messages through a worker's pipe:

    parent -> worker    State, whenever it changes; Reloaded, which answers "reload"; "stop"
    worker -> parent    "reload"; "taken", once it serves the state's model
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
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from mmoe_rec.errors import STOP_SIGNALS, UserError, catch_stop_signals
from mmoe_rec.inference.artifact import Source
from mmoe_rec.server.measurements import FOLDER_VARIABLE, Metrics
from mmoe_rec.server.models import Finder, Models, Reloads, ServedModel, sentence_of
from mmoe_rec.server.options import Options, address_of, end_process, listen, log_to_stderr

TICK_SECONDS = 0.2
_LOAD_SECONDS, _EXCHANGE_SECONDS = 600.0, 30.0  # a process that takes longer hangs, and is killed
_PAUSE_SECONDS = 2.0  # between two starts of a worker, so that one that fails at once takes little of the machine
_LONGEST_FOLDER = 85  # characters; the path of a Unix socket has 107 at most, and its name in the folder 18
_FRACTION_OF_CALLS, _FRACTION_OF_WORKERS = 0.8, 0.9  # of the time to stop: a worker that has not ended then is killed

_log = logging.getLogger(__name__)


def serve_by_workers(
    source: Source, state: str | None, finder: Finder, bound: socket.socket, options: Options, poll: float, workers: int
) -> int:
    """Serve a model by one or more processes until a signal asks to stop.

    Args:
        source: The model.
        state: The finder's state before it found the model.
        finder: Finds later models.
        bound: Socket to listen on.
        options: How to serve.
        poll: Seconds between looks for another model, 0 for none.
        workers: Number of processes that serve.

    Returns:
        The exit code, 0 if all accepted calls were answered.

    Raises:
        UserError: The model can't be loaded.
    """
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
        return _Parent(finder, bound, options, workers).run(source, state, poll)


class _SharedFile:
    """A file in memory, or a temporary one, which is gone once it is closed and no process maps it."""

    def __init__(self) -> None:
        if sys.platform == "linux":
            self._file: Any = open(os.memfd_create("model"), "wb")  # noqa: SIM115
            self.path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
        else:
            self._file = tempfile.NamedTemporaryFile()  # noqa: SIM115
            self.path = self._file.name

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class State:
    """What workers do.

    Attributes:
        path: File with the model that they serve.
        failure: Why a newer model is not served, None if there is none.
        is_draining: Whether the server is about to end.
    """

    path: str
    failure: str | None = None
    is_draining: bool = False


@dataclass(frozen=True)
class Reloaded:
    """The outcome of a reload: why it failed, None if it did not."""

    failure: str | None


@dataclass(eq=False)
class _Worker:
    """A worker as its parent sees it. taken: set while it serves the model that it was last told to serve."""

    process: BaseProcess
    pipe: Connection
    since: float = field(default_factory=time.monotonic)
    taken: threading.Event = field(default_factory=threading.Event)

    def send(self, message: Any) -> None:
        """Say something to the worker, unless it has ended."""
        with suppress(OSError):
            self.pipe.send(message)


class _Parent:
    """Keeps workers. Its main thread listens to them, and a thread of `Reloads` has other models loaded and taken."""

    def __init__(self, finder: Finder, bound: socket.socket, options: Options, workers: int) -> None:
        self._bound, self._options = bound, options
        self._context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        self._context.set_forkserver_preload(["mmoe_rec.server.preload"])
        self._workers = dict[int, _Worker]()
        self._starts = dict.fromkeys(range(workers), 0.0)  # when to start which worker
        self._reloads, self._metrics = Reloads(finder, self._take_up), Metrics("parent")
        self._lock = threading.Lock()  # of all workers, and of the state that a new one starts with
        self._stopping = threading.Event()
        self._state = State("")

    def run(self, source: Source, state: str | None, poll: float) -> int:
        """Serve until a signal. Returns the exit code."""
        catch_stop_signals(lambda *_: self._stopping.set())
        try:
            self._model = self._load(source)
        except UserError:
            if self._stopping.is_set():
                return 0
            raise
        self._state = State(self._model.path)
        listen(self._bound)  # here, as an address that is taken ends the start
        _log.info("serving %s at %s/invocations", source.address, address_of(self._bound))
        self._reloads.watch(state, poll)
        try:
            while not self._stopping.is_set():
                self._step()
            self._tell(is_draining=True)
            until = time.monotonic() + self._options.drain
            while time.monotonic() < until:
                self._step()
            return self._end()
        finally:
            for worker in self._workers.values():
                worker.process.kill()

    def _step(self) -> None:
        """Start workers that lack, and hear what others say."""
        for number, moment in list(self._starts.items()):
            if time.monotonic() >= moment:
                del self._starts[number]
                self._start(number)
        pipes = {worker.pipe: number for number, worker in self._workers.items()}
        for pipe in wait([*pipes], TICK_SECONDS):
            number = pipes[pipe]  # type: ignore[index]
            worker = self._workers[number]
            try:
                message = worker.pipe.recv()
            except (EOFError, OSError):
                self._bury(number)
                continue
            if message == "reload":
                self._reloads.ask().add_done_callback(partial(self._reply, worker))
            else:
                worker.taken.set()

    def _start(self, number: int) -> None:
        ours, theirs = self._context.Pipe()
        with self._lock:
            arguments = (self._state, self._bound, self._options, number, theirs)
            process = self._context.Process(target=run_worker, args=arguments)
            process.start()
            self._workers[number] = _Worker(process, ours)
        theirs.close()

    def _bury(self, number: int) -> None:
        """Note that a worker has ended, and that another one is to take its place."""
        from prometheus_client.multiprocess import mark_process_dead

        with self._lock:
            worker = self._workers.pop(number)
            worker.pipe.close()
        worker.taken.set()
        worker.process.join()
        mark_process_dead(str(number))  # what it had under way; what it has counted stays
        _log.warning("worker %s ended by %s; another one takes its place", worker.process.pid, _end_of(worker.process))
        self._starts[number] = worker.since + _PAUSE_SECONDS

    def _reply(self, worker: _Worker, done: Future[None]) -> None:
        error = done.exception()
        with self._lock:
            worker.send(Reloaded(None if error is None else sentence_of(error)))

    def _load(self, source: Source) -> _SharedFile:
        """Have the loader write a model to shared memory, or end it once the server ends.

        Raises:
            UserError: The model can't be loaded.
        """
        model, (ours, theirs) = _SharedFile(), self._context.Pipe(duplex=False)
        loader = self._context.Process(target=run_loader, args=(source, self._options, model.path, theirs))
        loader.start()
        theirs.close()
        where, until = f"a process that loads the model at '{source.address}'", time.monotonic() + _LOAD_SECONDS
        error: UserError | None = UserError(f"{where} was ended, as the server ends")
        try:
            while not self._stopping.is_set():
                if ours.poll(TICK_SECONDS):
                    error = ours.recv()
                    break
                if time.monotonic() > until:
                    error = UserError(f"{where} has not ended within {_LOAD_SECONDS:.0f} seconds")
                    break
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
            self._tell(failure=str(error))
            self._metrics.reloads.labels("failed").inc()
            raise
        before, self._model = self._model, model
        workers = self._tell(path=model.path, failure=None)
        until = time.monotonic() + _EXCHANGE_SECONDS
        for worker in workers:
            if not worker.taken.wait(max(until - time.monotonic(), 0.0)):
                _log.warning("worker %s does not take the model and is killed", worker.process.pid)
                worker.process.kill()
        before.close()
        self._metrics.reloads.labels("done").inc()
        _log.info("serving %s", source.address)

    def _tell(self, **changes: Any) -> list[_Worker]:
        """Change the state, tell it to all workers, and return them."""
        with self._lock:
            state = replace(self._state, **changes)
            is_new = state.path != self._state.path
            self._state = state
            for worker in self._workers.values():
                if is_new:
                    worker.taken.clear()
                worker.send(state)
            return list(self._workers.values())

    def _end(self) -> int:
        """Have all workers answer what they have accepted. Returns the exit code."""
        with self._lock:
            for worker in self._workers.values():
                worker.send("stop")
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

    leave_signals()
    log_to_stderr()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        write_shared(Models(options, source).current, path)
        pipe.send(None)
    except UserError as error:
        pipe.send(error)
    end_process(0)


def leave_signals() -> None:
    """Ignore signals that ask to stop. Any may reach all processes of a service, and the parent passes it on."""
    for kind in STOP_SIGNALS:
        signal.signal(kind, signal.SIG_IGN)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process has one"
    parent.join()
    end_process(1)


def run_worker(state: State, bound: socket.socket, options: Options, number: int, pipe: Connection) -> None:
    """Serve until the parent says otherwise, or has ended.

    Args:
        state: What to do at first.
        bound: Socket to listen on.
        options: How to serve.
        number: Number of this worker. A later worker of this number continues its metric files.
        pipe: Pipe to the parent.
    """
    leave_signals()
    log_to_stderr()
    from mmoe_rec.server.app import Application
    from mmoe_rec.server.connections import Server

    models, metrics = Models(options, _open_shared(state.path)), Metrics(str(number))
    metrics.show_model(models.current.about())
    orders = _Orders(pipe, models, metrics, state.path)
    orders.app = app = Application(models, metrics, orders.reload)
    orders.server = Server(app, options.limits.read_seconds, _FRACTION_OF_CALLS * options.grace)
    orders.follow(state)
    orders.server.serve_on(bound, lambda: asyncio.get_running_loop().add_reader(pipe.fileno(), orders.obey))
    app.close()
    if orders.is_orphan:  # the parent was killed, and removes no folder
        shutil.rmtree(os.environ[FOLDER_VARIABLE], ignore_errors=True)
    end_process(int(app.calls.queue.is_busy))


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

    app: Any
    server: Any
    is_orphan = False

    def __init__(self, pipe: Connection, models: Models, metrics: Metrics, path: str) -> None:
        self._pipe, self._models, self._metrics, self._path = pipe, models, metrics, path
        self._reloads = list[asyncio.Future[str | None]]()  # replies come in this order
        self._thread = ThreadPoolExecutor(1, "loading")

    async def reload(self) -> None:
        """Ask for the model that the address names now, and wait until it is served. Raises UserError."""
        done = asyncio.get_running_loop().create_future()
        self._reloads.append(done)
        self._send("reload")
        if (failure := await done) is not None:
            raise UserError(failure)

    def obey(self) -> None:
        """Do what the next message says."""
        try:
            message = self._pipe.recv()
        except (EOFError, OSError):
            _log.warning("the parent has ended, and so does this worker")
            self.is_orphan = True
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())
            message = "stop"
        if isinstance(message, State):
            self.follow(message)
        elif isinstance(message, Reloaded):
            if not (done := self._reloads.pop(0)).done():
                done.set_result(message.failure)
        else:
            self.server.should_exit = True

    def follow(self, state: State) -> None:
        """Take over a state. A model is exchanged in a thread of its own."""
        self._models.failure, self.app.calls.is_draining = state.failure, state.is_draining
        if state.path != self._path:
            self._path = state.path
            self._thread.submit(self._take, state.path)

    def _take(self, path: str) -> None:
        """Exchange the model. A worker that can't ends, and the next one begins with the new model."""
        try:
            served = _open_shared(path)
            self._models.exchange(served)
            self._metrics.show_model(served.about())
            gc.collect()  # the model before goes at once
            self._send("taken")
        except Exception:
            _log.exception("this worker can't take the model and ends")
            self.server.should_exit = True

    def _send(self, message: str) -> None:
        with suppress(OSError):
            self._pipe.send(message)
