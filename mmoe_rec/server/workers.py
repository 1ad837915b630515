"""Worker processes that listen on one socket, and a parent process that starts and replaces them.

On Linux, multiprocessing's fork server imports torch and the other packages once. It then forks all other processes,
which share the memory of the packages. Other systems spawn new processes.

For each model, a loader process writes the model to shared memory (`mmoe_rec.server.models`) and ends. Workers map that
memory. They serve the old model while a loader loads a new one. The parent and each worker exchange messages through a
pipe: `WorkerMessage`, `WorkerState` and `ReloadResult`.
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
from enum import StrEnum
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from prometheus_client.multiprocess import mark_process_dead

from mmoe_rec.errors import STOP_SIGNALS, UserError, catch_stop_signals
from mmoe_rec.inference.artifact import ResolvedModel
from mmoe_rec.server.options import ServerOptions, end_process, error_message, listen, log_to_stderr, url_of
from mmoe_rec.server.server_metrics import METRICS_FOLDER_VARIABLE, Metrics

TICK_SECONDS = 0.2
_LOAD_SECONDS, _SWITCH_SECONDS = 600.0, 30.0  # A process that takes longer to load or switch a model is killed.
_PAUSE_SECONDS = 2.0  # Pause between two starts of a worker, so that repeated failures don't use the whole machine.
_MAX_FOLDER_CHARACTERS = 85  # A Unix socket's path has at most 107 characters, and the file name takes 18 of them.
# Fractions of the grace period after which unfinished calls are dropped, and workers that are still alive are killed.
_CALLS_FRACTION, _WORKERS_FRACTION = 0.8, 0.9

_log = logging.getLogger(__name__)


class WorkerMessage(StrEnum):
    """Message without data between a worker and its parent.

    Attributes:
        RELOAD: From a worker: check for a new model now, because a caller asks for it.
        DEPLOYED: From a worker: the worker now serves the model of the state that it received last.
        STOP: From the parent: finish the accepted calls and end.
    """

    RELOAD = "reload"
    DEPLOYED = "deployed"
    STOP = "stop"


@dataclass(frozen=True)
class ReloadResult:
    """Reply to a worker's RELOAD message.

    Attributes:
        failure: Why loading a new model failed, None if it succeeded or there was no new model.
    """

    failure: str | None


class ReloadOutcome(StrEnum):
    """Outcome of loading a new model, as a label of the metric `reloads`."""

    FAILED = "failed"
    DONE = "done"


class ModelFinder(Protocol):
    """Finds the model at the server's URI."""

    def fingerprint(self) -> str | None:
        """Return a value that changes whenever the URI names another model. Raise UserError if the URI can't be read.

        The model isn't fetched. None means that only fetching the model would show a change.
        """

    def find(self) -> ResolvedModel:
        """Fetch the model that the URI names now. Raise UserError if there is none or the fetch fails."""


ReloadCallback = Callable[[str | None], object]
"""Function that receives the reason why a reload failed, or None if it succeeded."""


class Reloader:
    """Checks whether the server's URI names a new model, and deploys it. Only one attempt runs at a time."""

    def __init__(self, finder: ModelFinder, fingerprint: str | None, deploy: Callable[[ResolvedModel], None]) -> None:
        """Remember the served model. `run` starts the checks.

        Args:
            finder: Finds models.
            fingerprint: Result of `finder.fingerprint()` from just before the served model was fetched.
            deploy: Loads a model and serves it. Raises UserError if the model can't be loaded.
        """
        self._finder, self._deploy = finder, deploy
        self._tried = self._served = fingerprint
        self._reported: str | None = None
        self._callbacks, self._wake = list[ReloadCallback](), threading.Event()

    def request_reload(self, callback: ReloadCallback) -> None:
        """Request a check for a new model. Requests that arrive before the next check begins share this check."""
        self._callbacks.append(callback)
        self._wake.set()

    def run(self, poll: float) -> None:
        """Check for a new model forever, on request and every `poll` seconds (0: only on request)."""
        while True:
            self._wake.wait(poll or None)
            self._wake.clear()
            callbacks, self._callbacks = self._callbacks, []
            failure = self.reload_if_changed(bool(callbacks))
            for callback in callbacks:
                callback(failure)

    def reload_if_changed(self, is_requested: bool) -> str | None:
        """Deploy the model at the URI if its fingerprint has changed. Return why that failed, None otherwise.

        On request, also deploy a model without a fingerprint, and retry a model that could not be loaded.
        """
        try:
            fingerprint = self._finder.fingerprint()
            if fingerprint == self._served and fingerprint is not None if is_requested else fingerprint == self._tried:
                return None
            source = self._finder.find()
        except Exception as error:  # No error may end this thread, because the next attempt may succeed.
            if (sentence := error_message(error)) != self._reported:
                _log.warning("checking for a new model failed: %s", sentence)
            self._reported = sentence
            return sentence
        self._tried, self._served, self._reported = fingerprint, None, None
        try:
            self._deploy(source)
        except Exception as error:
            _log.warning("the previous model is still served: %s", error_message(error))
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
    """Serve a model with one or more processes until a stop signal.

    Args:
        source: Model to serve first.
        fingerprint: Result of `finder.fingerprint()` from just before `source` was fetched.
        finder: Finds new models.
        bound: Bound socket to listen on.
        options: Options of the server.
        poll: Seconds between checks for a new model, 0 for none.
        workers: Number of worker processes.

    Returns:
        Exit code, 0 if all accepted calls were answered.

    Raises:
        UserError: The model can't be loaded.
    """
    with ExitStack() as stack:
        try:
            folder = sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="mmoe-rec-metrics-"))
            if len(sockets) > _MAX_FOLDER_CHARACTERS:
                sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="mmoe-rec-", dir="/tmp"))
        except OSError as error:
            problem = f"the temporary folder can't be written to ({error.strerror or error})"
            raise UserError(f"{problem}: set TMPDIR") from None
        # Packages read these variables at import. A fork copies only one thread, so OpenBLAS must not start others.
        os.environ.update({METRICS_FOLDER_VARIABLE: folder, "OPENBLAS_NUM_THREADS": "1"})
        # Put the fork server's socket into a folder that is removed at the end. multiprocessing has no public setting
        # for this folder.
        vars(multiprocessing.current_process())["_config"]["tempdir"] = sockets
        parent = _Parent(bound, options, workers)
        return parent.run(source, Reloader(finder, fingerprint, parent.deploy), poll)


class _SharedFile:
    """File for a model, which disappears once it is closed and no process maps it. On Linux, it is in memory."""

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
    """State that all workers should have.

    Attributes:
        path: File with the model to serve.
        reload_failure: Why the newest model could not be loaded, None if it is served.
        is_draining: Whether the server is about to end.
    """

    path: str
    reload_failure: str | None = None
    is_draining: bool = False


@dataclass(eq=False)
class _Worker:
    """A worker, as the parent sees it. `is_deployed` is set while the worker serves the newest loaded model."""

    process: BaseProcess
    pipe: Connection
    since: float = field(default_factory=time.monotonic)  # Start by the monotonic clock.
    is_deployed: threading.Event = field(default_factory=threading.Event)


def _send(pipe: Connection, message: Any) -> None:
    """Send a message, unless the process at the other end of the pipe has ended."""
    with suppress(OSError):
        pipe.send(message)


class _Parent:
    """Parent of the workers. Its main thread reads their messages, and a second thread deploys new models."""

    def __init__(self, bound: socket.socket, options: ServerOptions, workers: int) -> None:
        self._bound, self._options = bound, options
        self._context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        self._context.set_forkserver_preload(["mmoe_rec.server.preload"])
        self._workers = dict[int, _Worker]()
        self._starts = dict.fromkeys(range(workers), 0.0)  # Number of a missing worker -> time to start it.
        self._metrics = Metrics("parent")
        self._lock = threading.Lock()  # Protects the workers and the state.
        self._stopping = threading.Event()
        self._state = WorkerState("")

    def run(self, source: ResolvedModel, reloader: Reloader, poll: float) -> int:
        """Serve until a signal and return the exit code."""
        catch_stop_signals(lambda *_: self._stopping.set())
        try:
            self._model = self._load(source)
        except UserError:
            if self._stopping.is_set():
                return 0
            raise
        self._state = WorkerState(self._model.path)
        listen(self._bound)  # This comes before the workers, so that the server ends here if the port is in use.
        _log.info("serving %s at %s/invocations", source.uri, url_of(self._bound))
        threading.Thread(target=reloader.run, args=(poll,), name="reloads", daemon=True).start()
        try:
            while not self._stopping.is_set():
                self._step(reloader)
            self._update_state(is_draining=True)
            until = time.monotonic() + self._options.drain_seconds
            while time.monotonic() < until:
                self._step(reloader)
            return self._end()
        finally:
            for worker in self._workers.values():
                worker.process.kill()

    def _step(self, reloader: Reloader) -> None:
        """Start missing workers and read messages."""
        for number, start_time in list(self._starts.items()):
            if time.monotonic() >= start_time:
                del self._starts[number]
                self._start(number)
        pipes = {worker.pipe: number for number, worker in self._workers.items()}
        for pipe in wait([*pipes], TICK_SECONDS):
            number = pipes[pipe]  # type: ignore[index]
            worker = self._workers[number]
            try:
                message = worker.pipe.recv()
            except (EOFError, OSError):
                self._remove(number)
                continue
            if message == WorkerMessage.RELOAD:
                reloader.request_reload(lambda failure, worker=worker: self._reply(worker, failure))  # type: ignore[misc]
            else:
                worker.is_deployed.set()

    def _start(self, number: int) -> None:
        parent_end, worker_end = self._context.Pipe()
        with self._lock:
            arguments = (self._state, self._bound, self._options, number, worker_end)
            process = self._context.Process(target=_work, args=arguments)
            process.start()
            self._workers[number] = _Worker(process, parent_end)
        worker_end.close()

    def _remove(self, number: int) -> None:
        """Remove a worker that has ended, and schedule the start of its replacement."""
        with self._lock:
            worker = self._workers.pop(number)
            worker.pipe.close()
        worker.is_deployed.set()
        worker.process.join()
        mark_process_dead(str(number))  # Drop the worker's gauges from the metrics. Its counters stay.
        _log.warning("worker %s ended by %s and is replaced", worker.process.pid, _describe_end(worker.process))
        self._starts[number] = worker.since + _PAUSE_SECONDS

    def _reply(self, worker: _Worker, failure: str | None) -> None:
        with self._lock:
            _send(worker.pipe, ReloadResult(failure))

    def _load(self, source: ResolvedModel) -> _SharedFile:
        """Write a model to shared memory in a loader process. Raise UserError if the model can't be loaded."""
        model, (parent_end, loader_end) = _SharedFile(), self._context.Pipe(duplex=False)
        loader = self._context.Process(target=_run_loader, args=(source, self._options, model.path, loader_end))
        loader.start()
        loader_end.close()
        until, error = time.monotonic() + _LOAD_SECONDS, UserError(f"'{source.uri}' took too long to load")
        try:
            while not self._stopping.is_set() and time.monotonic() < until:
                if parent_end.poll(TICK_SECONDS):
                    error = parent_end.recv()
                    break
        except EOFError:
            loader.join()
            end = f"was ended by {_describe_end(loader)}; is there enough memory?"
            error = UserError(f"the process that loads the model at '{source.uri}' {end}")
        finally:
            loader.kill()
            loader.join()
            parent_end.close()
        if error is not None:
            model.close()
            raise error
        return model

    def deploy(self, source: ResolvedModel) -> None:
        """Load a model and switch all workers to it. Raise UserError if the model can't be loaded."""
        try:
            model = self._load(source)
        except UserError as error:
            self._update_state(reload_failure=str(error))
            self._metrics.reloads.labels(ReloadOutcome.FAILED).inc()
            raise
        previous, self._model = self._model, model
        workers = self._update_state(path=model.path, reload_failure=None)
        until = time.monotonic() + _SWITCH_SECONDS
        for worker in workers:
            if not worker.is_deployed.wait(max(until - time.monotonic(), 0.0)):
                problem = "doesn't switch to the new model in time"
                _log.warning("worker %s %s, so the server kills it", worker.process.pid, problem)
                worker.process.kill()
        previous.close()
        self._metrics.reloads.labels(ReloadOutcome.DONE).inc()
        _log.info("serving %s", source.uri)

    def _update_state(self, **changes: Any) -> list[_Worker]:
        """Change fields of the workers' state, send the new state to all workers, and return the workers."""
        with self._lock:
            self._state = replace(self._state, **changes)
            for worker in self._workers.values():
                if "path" in changes:
                    worker.is_deployed.clear()
                _send(worker.pipe, self._state)
            return list(self._workers.values())

    def _end(self) -> int:
        """Let all workers finish their accepted calls, and return the exit code."""
        with self._lock:
            for worker in self._workers.values():
                _send(worker.pipe, WorkerMessage.STOP)
        self._bound.close()
        until = time.monotonic() + _WORKERS_FRACTION * self._options.grace_seconds
        processes = [worker.process for worker in self._workers.values()]
        for process in processes:
            process.join(max(until - time.monotonic(), 0.0))
            if process.is_alive():
                _log.warning("worker %s doesn't end in time, so the server kills it", process.pid)
                process.kill()
                process.join()
        return int(any(process.exitcode for process in processes))


def _describe_end(process: BaseProcess) -> str:
    """Return the name of the signal or the exit code that ended a process."""
    code = process.exitcode or 0
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _run_loader(source: ResolvedModel, options: ServerOptions, path: str, pipe: Connection) -> None:
    """Load a model, write it to the file `path`, and end the process. The parent gets None or a UserError by `pipe`."""
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
    """Ignore stop signals. A service manager may send them to all processes, but the parent alone stops its workers."""
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, signal.SIG_IGN)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a parent started this process"
    parent.join()
    end_process(1)


def _work(state: WorkerState, bound: socket.socket, options: ServerOptions, number: int, pipe: Connection) -> None:
    """Serve until the parent sends STOP or ends. A later worker with this `number` continues the metric files."""
    ignore_stop_signals()
    log_to_stderr()
    worker = _Serving(state, options, number, pipe)
    worker.server.serve_on(bound, lambda: asyncio.get_running_loop().add_reader(pipe, worker.handle_message))
    worker.app.close()
    if worker.is_orphan:  # The parent was killed before it could remove the folder.
        shutil.rmtree(os.environ[METRICS_FOLDER_VARIABLE], ignore_errors=True)
    end_process(int(worker.app.invocations.queue.is_busy))


class _Serving:
    """A worker that acts on its parent's messages. Use it in its event loop only."""

    is_orphan = False

    def __init__(self, state: WorkerState, options: ServerOptions, number: int, pipe: Connection) -> None:
        from mmoe_rec.server.app import Application
        from mmoe_rec.server.connections import Server
        from mmoe_rec.server.models import ModelManager, map_shared
        from mmoe_rec.server.ranking_queue import use_one_thread

        self._pipe, self._path, self._metrics, self._map = pipe, state.path, Metrics(str(number)), map_shared
        self._reloads = list[asyncio.Future[str | None]]()  # The parent replies in the order of these requests.
        self._thread = ThreadPoolExecutor(1, "loading", initializer=use_one_thread)
        use_one_thread()
        self._models = ModelManager(options, self._open(state.path))
        self._metrics.set_model(self._models.current.describe())
        self.app = Application(self._models, self._metrics, self.reload)
        self.server = Server(self.app, options.limits.read_timeout_seconds, _CALLS_FRACTION * options.grace_seconds)
        self._apply_state(state)

    def _open(self, path: str) -> Any:
        """Map a model and rank its example, so that the first request is as fast as later ones."""
        served = self._map(path)
        served.ranker.rank(**served.example)
        return served

    async def reload(self) -> None:
        """Ask the parent to reload the model and wait for the result. Raise UserError if it fails."""
        done = asyncio.get_running_loop().create_future()
        self._reloads.append(done)
        _send(self._pipe, WorkerMessage.RELOAD)
        if (failure := await done) is not None:
            raise UserError(failure)

    def handle_message(self) -> None:
        """Act on the next message from the parent."""
        try:
            message = self._pipe.recv()
        except (EOFError, OSError):
            _log.warning("this worker ends because its parent has ended")
            self.is_orphan = True
            asyncio.get_running_loop().remove_reader(self._pipe)
            message = WorkerMessage.STOP
        if isinstance(message, WorkerState):
            self._apply_state(message)
        elif isinstance(message, ReloadResult):
            if not (done := self._reloads.pop(0)).done():
                done.set_result(message.failure)
        else:
            self.server.should_exit = True

    def _apply_state(self, state: WorkerState) -> None:
        """Apply a state from the parent. If the state has a new model, another thread opens the model."""
        self._models.reload_failure, self.app.invocations.is_draining = state.reload_failure, state.is_draining
        if state.path != self._path:
            self._path = state.path
            self._thread.submit(self._switch_model, state.path)

    def _switch_model(self, path: str) -> None:
        """Switch to another model. If that fails, the worker ends, and a new worker starts with the other model."""
        try:
            served = self._open(path)
            self._models.switch_to(served)
            self._metrics.set_model(served.describe())
            gc.collect()  # Free the previous model at once.
            _send(self._pipe, WorkerMessage.DEPLOYED)
        except Exception:
            _log.exception("this worker can't switch to the new model and ends")
            self.server.should_exit = True
