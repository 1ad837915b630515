"""Serving by workers: processes that listen on one socket, and a parent that starts and replaces them.

On Linux all processes are forked from one that has imported torch and nothing else (multiprocessing's fork server), so
they share the memory of all packages. Elsewhere they are started anew. For each model a process, the loader, reads and
checks the artifact, writes the model to shared memory (`mmoe_rec.server.models`) and ends. Workers map that memory. The
parent looks for another model, has it loaded while workers serve the old one, and then tells them to exchange it.

Messages through a worker's pipe:

    parent -> worker    State, whenever it changes; ("reloaded", why it failed), which answers "reload"; "stop"
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from prometheus_client.multiprocess import mark_process_dead

from mmoe_rec.errors import STOP_SIGNALS, UserError, catch_stop_signals
from mmoe_rec.inference.artifact import ResolvedModel
from mmoe_rec.server.options import ServerOptions, end_process, error_message, listen, log_to_stderr, url_of
from mmoe_rec.server.server_metrics import METRICS_FOLDER_VARIABLE, Metrics

TICK_SECONDS = 0.2
_LOAD_SECONDS, _EXCHANGE_SECONDS = 600.0, 30.0  # a process that takes longer hangs, and is killed
_PAUSE_SECONDS = 2.0  # between two starts of a worker, so that one that fails at once takes little of the machine
_LONGEST_FOLDER = 85  # characters; the path of a Unix socket has 107 at most, and its name in the folder 18
_FRACTION_OF_CALLS, _FRACTION_OF_WORKERS = 0.8, 0.9  # of the time to stop: a worker that has not ended then is killed

_log = logging.getLogger(__name__)


class ModelFinder(Protocol):
    """Finds the model at the server's address."""

    def fingerprint(self) -> str | None:
        """Return what changes whenever another model lies at the address, found at little cost.

        None if that can't be told without fetching the model. Raises UserError.
        """

    def find(self) -> ResolvedModel:
        """The model that lies there now. Raises UserError."""


ReloadCallback = Callable[[str | None], object]
"""Takes the outcome of a reload: why it failed, None if it did not."""


class Reloader:
    """Finds the model at the address and takes it up, again and again, one attempt after the other."""

    def __init__(self, finder: ModelFinder, fingerprint: str | None, deploy: Callable[[ResolvedModel], None]) -> None:
        """Prepare to look.

        Args:
            finder: Finds models.
            fingerprint: The finder's state before it found the model that is served.
            deploy: Loads a model and serves it. Raises UserError for a model that can't be loaded.
        """
        self._finder, self._deploy = finder, deploy
        self._tried = self._served = fingerprint
        self._reported: str | None = None
        self._replies, self._asked = list[ReloadCallback](), threading.Event()

    def request_reload(self, reply: ReloadCallback) -> None:
        """Ask for an attempt, which all share who ask before it begins."""
        self._replies.append(reply)
        self._asked.set()

    def run(self, poll: float) -> None:
        """Look for ever: every `poll` seconds, if it is not 0, and when somebody asks."""
        while True:
            self._asked.wait(poll or None)
            self._asked.clear()
            replies, self._replies = self._replies, []
            failure = self.reload_if_changed(bool(replies))
            for reply in replies:
                reply(failure)

    def reload_if_changed(self, is_requested: bool) -> str | None:
        """Take up the model at the address if it is another one. Return why that failed, None if it did not.

        A model that can't be loaded is not tried again before the address's state changes, unless somebody asks.
        """
        try:
            fingerprint = self._finder.fingerprint()
            if fingerprint == self._served and fingerprint is not None if is_requested else fingerprint == self._tried:
                return None
            source = self._finder.find()
        except Exception as error:  # whatever it is, the next look may succeed, and nobody else would look
            if (sentence := error_message(error)) != self._reported:
                _log.warning("can't look for another model: %s", sentence)
            self._reported = sentence
            return sentence
        self._tried, self._served, self._reported = fingerprint, None, None
        try:
            self._deploy(source)
        except Exception as error:
            _log.warning("the previous model goes on serving: %s", error_message(error))
            return error_message(error)
        self._served = fingerprint
        return None


def serve_by_workers(
    source: ResolvedModel,
    fingerprint: str | None,
    finder: ModelFinder,
    bound: socket.socket,
    options: ServerOptions,
    poll: float,
    workers: int,
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
        os.environ.update({METRICS_FOLDER_VARIABLE: folder, "OPENBLAS_NUM_THREADS": "1"})
        # The fork server's socket is removed with its folder. multiprocessing has no public setting for it.
        vars(multiprocessing.current_process())["_config"]["tempdir"] = sockets
        parent = _Parent(bound, options, workers)
        return parent.run(source, Reloader(finder, fingerprint, parent.deploy), poll)


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
class WorkerState:
    """What workers do.

    Attributes:
        path: File with the model that they serve.
        failure: Why a newer model is not served, None if there is none.
        is_draining: Whether the server is about to end.
    """

    path: str
    reload_failure: str | None = None
    is_draining: bool = False


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
    """Keeps workers. Its main thread listens to them, and another one has other models loaded and taken."""

    def __init__(self, bound: socket.socket, options: ServerOptions, workers: int) -> None:
        self._bound, self._options = bound, options
        self._context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        self._context.set_forkserver_preload(["mmoe_rec.server.preload"])
        self._workers = dict[int, _Worker]()
        self._starts = dict.fromkeys(range(workers), 0.0)  # when to start which worker
        self._metrics = Metrics("parent")
        self._lock = threading.Lock()  # of all workers, and of the state that a new one starts with
        self._stopping = threading.Event()
        self._state = WorkerState("")

    def run(self, source: ResolvedModel, reloads: Reloader, poll: float) -> int:
        """Serve until a signal. Returns the exit code."""
        catch_stop_signals(lambda *_: self._stopping.set())
        try:
            self._model = self._load(source)
        except UserError:
            if self._stopping.is_set():
                return 0
            raise
        self._state = WorkerState(self._model.path)
        listen(self._bound)  # here, as an address that is taken ends the start
        _log.info("serving %s at %s/invocations", source.uri, url_of(self._bound))
        threading.Thread(target=reloads.run, args=(poll,), name="reloads", daemon=True).start()
        try:
            while not self._stopping.is_set():
                self._step(reloads)
            self._tell(is_draining=True)
            until = time.monotonic() + self._options.drain_seconds
            while time.monotonic() < until:
                self._step(reloads)
            return self._end()
        finally:
            for worker in self._workers.values():
                worker.process.kill()

    def _step(self, reloads: Reloader) -> None:
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
                reloads.request_reload(lambda failure, worker=worker: self._reply(worker, failure))  # type: ignore[misc]
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
        with self._lock:
            worker = self._workers.pop(number)
            worker.pipe.close()
        worker.taken.set()
        worker.process.join()
        mark_process_dead(str(number))  # what it had under way; what it has counted stays
        _log.warning("worker %s ended by %s; another one takes its place", worker.process.pid, _end_of(worker.process))
        self._starts[number] = worker.since + _PAUSE_SECONDS

    def _reply(self, worker: _Worker, failure: str | None) -> None:
        with self._lock:
            worker.send(("reloaded", failure))

    def _load(self, source: ResolvedModel) -> _SharedFile:
        """Have the loader write a model to shared memory, or end it once the server ends.

        Raises:
            UserError: The model can't be loaded.
        """
        model, (ours, theirs) = _SharedFile(), self._context.Pipe(duplex=False)
        loader = self._context.Process(target=run_loader, args=(source, self._options, model.path, theirs))
        loader.start()
        theirs.close()
        until, error = time.monotonic() + _LOAD_SECONDS, UserError(f"'{source.uri}' was not loaded in time")
        try:
            while not self._stopping.is_set() and time.monotonic() < until:
                if ours.poll(TICK_SECONDS):
                    error = ours.recv()
                    break
        except EOFError:
            loader.join()
            how = f"was ended by {_end_of(loader)}; is memory short?"
            error = UserError(f"the process that loads the model at '{source.uri}' {how}")
        finally:
            loader.kill()
            loader.join()
            ours.close()
        if error is not None:
            model.close()
            raise error
        return model

    def deploy(self, source: ResolvedModel) -> None:
        """Have a model loaded, and then taken by all workers. Raises UserError for one that can't be loaded."""
        try:
            model = self._load(source)
        except UserError as error:
            self._tell(reload_failure=str(error))
            self._metrics.reloads.labels("failed").inc()
            raise
        before, self._model = self._model, model
        workers = self._tell(path=model.path, reload_failure=None)
        until = time.monotonic() + _EXCHANGE_SECONDS
        for worker in workers:
            if not worker.taken.wait(max(until - time.monotonic(), 0.0)):
                _log.warning("worker %s does not take the model and is killed", worker.process.pid)
                worker.process.kill()
        before.close()
        self._metrics.reloads.labels("done").inc()
        _log.info("serving %s", source.uri)

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
        until = time.monotonic() + _FRACTION_OF_WORKERS * self._options.grace_seconds
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


def run_loader(source: ResolvedModel, options: ServerOptions, path: str, pipe: Connection) -> None:
    """Load a model and write it to shared memory. Sends None, or the error of a model that can't be loaded."""
    from mmoe_rec.server.models import ModelManager, write_shared

    ignore_stop_signals()
    log_to_stderr()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        write_shared(ModelManager(options, source).current, path)
        pipe.send(None)
    except UserError as error:
        pipe.send(error)
    end_process(0)


def ignore_stop_signals() -> None:
    """Ignore signals that ask to stop. Any may reach all processes of a service, and the parent passes it on."""
    for kind in STOP_SIGNALS:
        signal.signal(kind, signal.SIG_IGN)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process has one"
    parent.join()
    end_process(1)


def run_worker(state: WorkerState, bound: socket.socket, options: ServerOptions, number: int, pipe: Connection) -> None:
    """Serve until the parent says otherwise, or has ended.

    Args:
        state: What to do at first.
        bound: Socket to listen on.
        options: How to serve.
        number: Number of this worker. A later worker of this number continues its metric files.
        pipe: Pipe to the parent.
    """
    ignore_stop_signals()
    log_to_stderr()
    worker = _Serving(state, options, number, pipe)
    worker.server.serve_on(bound, lambda: asyncio.get_running_loop().add_reader(pipe.fileno(), worker.obey))
    worker.app.close()
    if worker.is_orphan:  # the parent was killed, and removes no folder
        shutil.rmtree(os.environ[METRICS_FOLDER_VARIABLE], ignore_errors=True)
    end_process(int(worker.app.invocations.queue.is_busy))


class _Serving:
    """A worker, which does what comes through its pipe. Used in its event loop alone."""

    is_orphan = False

    def __init__(self, state: WorkerState, options: ServerOptions, number: int, pipe: Connection) -> None:
        from mmoe_rec.server.app import Application
        from mmoe_rec.server.connections import Server
        from mmoe_rec.server.models import ModelManager, map_shared
        from mmoe_rec.server.ranking_queue import use_one_thread

        self._pipe, self._path, self._metrics, self._map = pipe, state.path, Metrics(str(number)), map_shared
        self._replies = list[asyncio.Future[str | None]]()  # replies come in this order
        self._thread = ThreadPoolExecutor(1, "loading", initializer=use_one_thread)
        use_one_thread()
        self._models = ModelManager(options, self._open(state.path))
        self._metrics.set_model(self._models.current.describe())
        self.app = Application(self._models, self._metrics, self.reload)
        self.server = Server(self.app, options.limits.read_timeout_seconds, _FRACTION_OF_CALLS * options.grace_seconds)
        self._follow(state)

    def _open(self, path: str) -> Any:
        """Map a model, and have it prepare for the first request."""
        served = self._map(path)
        served.ranker.rank(**served.example)
        return served

    async def reload(self) -> None:
        """Ask for the model that the address names now, and wait until it is served. Raises UserError."""
        done = asyncio.get_running_loop().create_future()
        self._replies.append(done)
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
        if isinstance(message, WorkerState):
            self._follow(message)
        elif isinstance(message, tuple):
            if not (done := self._replies.pop(0)).done():
                done.set_result(message[1])
        else:
            self.server.should_exit = True

    def _follow(self, state: WorkerState) -> None:
        """Take over a state. A model is exchanged in a thread of its own."""
        self._models.reload_failure, self.app.invocations.is_draining = state.reload_failure, state.is_draining
        if state.path != self._path:
            self._path = state.path
            self._thread.submit(self._take, state.path)

    def _take(self, path: str) -> None:
        """Exchange the model. A worker that can't ends, and the next one begins with the new model."""
        try:
            served = self._open(path)
            self._models.switch_to(served)
            self._metrics.set_model(served.describe())
            gc.collect()  # the model before goes at once
            self._send("taken")
        except Exception:
            _log.exception("this worker can't take the model and ends")
            self.server.should_exit = True

    def _send(self, message: str) -> None:
        with suppress(OSError):
            self._pipe.send(message)
