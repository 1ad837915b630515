"""Serving by several processes that share one listening socket and the memory of one model.

The parent looks for models. A generation, which is a process of its own, loads one, and forks workers from itself, so
that they share its memory; it replaces those that end. Another model is another generation. The
README says what callers see of it.
"""

import logging
import multiprocessing
import os
import queue
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

from prometheus_client.multiprocess import mark_process_dead

from mmoe_rec.errors import UserError, catch_stop_signals
from mmoe_rec.inference.artifact import Source
from mmoe_rec.server.generation import TICK_SECONDS, Sockets, describe_end, run_generation, tell
from mmoe_rec.server.metrics import FOLDER_VARIABLE
from mmoe_rec.server.models import Finder, Reloads, sentence_of
from mmoe_rec.server.options import Options, address_of, listen

LONGEST_PAUSE_SECONDS = 30.0
_SHARE_OF_GENERATIONS = 0.95  # of the time to stop: who has not ended by then is killed

_log = logging.getLogger(__name__)


def serve_by_workers(
    source: Source, state: str | None, finder: Finder, bound: socket.socket, options: Options, poll: float, workers: int
) -> int:
    """Serves a model by several processes until a signal asks to stop; the rest as in `running.serve`.

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
        serving, ending = socket.socketpair()
        return _Parent(finder, Sockets(bound, give, take, ending), serving, options, poll, workers).run(source, state)


class _Parent:
    """Keeps one generation that serves; those before end by themselves. Its main thread waits for a signal."""

    def __init__(
        self, finder: Finder, sockets: Sockets, serving: socket.socket, options: Options, poll: float, workers: int
    ) -> None:
        """serving: the other end of `sockets.ending`, open until the server drains. numbers: of children that have
        processes."""
        self.sockets, self.options, self.workers, self._poll = sockets, options, workers, poll
        self._serving, self.numbers = serving, set[int]()
        self.current: _Child | None = None
        self.reloads = Reloads(finder, self._exchange)
        self._ends: queue.SimpleQueue[UserError | None] = queue.SimpleQueue()  # why it ends; None for a signal
        self._is_ending = False
        self._exchanging, self._starting = threading.RLock(), threading.Lock()
        self._children: list[_Child] = []

    def run(self, source: Source, state: str | None) -> int:
        """Serves until a signal; gives the exit code."""
        catch_stop_signals(lambda *_: self._ends.put(None))
        threading.Thread(target=self._start, args=(source, state), daemon=True).start()
        error = self._wait_for_end()
        self._serving.close()
        if self.current is not None:
            time.sleep(self.options.drain)
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
                return self._ends.get(timeout=TICK_SECONDS)

    def _start(self, source: Source, state: str | None) -> None:
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
                child = _Child(self, source, next(number for number in count() if number not in self.numbers))
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

    def replace(self, ended: "_Child") -> None:
        """Serves the same model again, unless the generation that has ended has another one in its place already."""
        failures = 0
        while not self._is_ending:
            with self._exchanging:
                if self.current is not ended:
                    return
                how = describe_end(ended.process)
                _log.warning("the process that holds the model ended by %s; another one takes its place", how)
                try:
                    return self._exchange(ended.source)
                except UserError as error:
                    failures += 1
                    _log.error("it can't take its place: %s", error)
            time.sleep(min(2.0**failures, LONGEST_PAUSE_SECONDS))


class _Child:
    """A generation as the parent sees it, in a thread that listens to it.

    has_...: events, all set at its end; error: why it could not serve; about: its model, once it serves; number: of its
    metric files, which the next child of this number continues.
    """

    def __init__(self, parent: _Parent, source: Source, number: int) -> None:
        self.source, self._parent, self.number = source, parent, number
        self.error: UserError | None = None
        self.about: dict[str, str | None] | None = None
        self.has_started, self.has_retired, self.has_ended = threading.Event(), threading.Event(), threading.Event()
        parent.numbers.add(number)
        self._lock = threading.Lock()
        self._pipe, theirs = multiprocessing.Pipe()
        ours, alive = multiprocessing.Pipe()
        arguments = (source, parent.sockets, parent.options, parent.workers, theirs, number, alive)
        self.process = multiprocessing.get_context("spawn").Process(target=run_generation, args=arguments)
        self.process.start()
        theirs.close()
        alive.close()
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._wait_until_gone, args=(ours,), daemon=True).start()

    def send(self, *message: Any) -> None:
        """Says something, unless it has ended."""
        with self._lock:
            tell(self._pipe, *message)

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
            how = describe_end(self.process)
            hint = ", as the system does where memory is short" if how == "SIGKILL" else "; its lines say why"
            self.error = UserError(
                f"the process that loads the model at '{self.source.address}' was ended by {how}{hint}"
            )
        for each in (self.has_started, self.has_retired, self.has_ended):
            each.set()
        self._parent.replace(self)

    def _wait_until_gone(self, alive: Connection) -> None:
        """Remove the gauges of workers that nobody has counted out, as the generation was killed before them."""
        with suppress(EOFError, OSError):
            alive.recv()
        with suppress(OSError):  # The server has ended, and its folder is gone.
            mark_process_dead(f"{self.number}.*")
        self._parent.numbers.discard(self.number)

    def _reload(self, worker: int) -> None:
        """Looks for a model, and tells the worker that wants it what came of it."""

        def tell(done: Future[None]) -> None:
            error, current = done.exception(), self._parent.current
            assert current is not None
            self.send("reloaded", worker, None if error is None else sentence_of(error), current.about)

        self._parent.reloads.ask().add_done_callback(tell)
