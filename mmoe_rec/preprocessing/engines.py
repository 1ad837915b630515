"""Where a job's tasks run: `local`, a thread or process for each core, or `ray`, actors of a Ray cluster.

A job is a function of this package and a list of tasks that are independent of each other. An engine gives the results
in the order of the tasks, so that nothing depends on the engine or on the number of workers. A `UserError` of a task
ends the job and is raised as it is.
"""

import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from typing import Any, TypeVar

import pyarrow as pa

from mmoe_rec.devices import freed_memory_kept, keep_freed_memory, usable_cores
from mmoe_rec.errors import UserError
from mmoe_rec.settings.sections import EngineName

Task = TypeVar("Task")
Result = TypeVar("Result")
# This many share one interpreter well, since most of their time is spent in NumPy and Arrow; they start at once.
THREADS_AT_MOST = 4


@contextmanager
def open_engine(name: EngineName, workers: int | None = None, processes: bool = True) -> "Iterator[Engine]":
    """The engine of that name, with so many tasks at a time, by default one for each core. processes: whether `local`
    may start processes, for more workers than threads suit."""
    workers = workers or usable_cores()
    if not processes and name == "local":
        workers = min(workers, THREADS_AT_MOST)
    if name == "ray":
        with closing(_RayEngine(workers)) as engine:
            yield engine
        return
    pool: Executor | None = None
    if workers > THREADS_AT_MOST:
        # Not forked: a child of a process with threads, as Arrow has, may wait for a lock for ever.
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker)
    elif workers > 1:
        pool = ThreadPoolExecutor(workers, thread_name_prefix="worker")
    with freed_memory_kept():
        try:
            yield _LocalEngine(pool)
        finally:
            if pool is not None:
                pool.shutdown(cancel_futures=True)  # waits for tasks that have begun, and forgets the others


class _LocalEngine:
    """Tasks of a pool of threads or processes, or of this thread alone."""

    def __init__(self, pool: Executor | None) -> None:
        self._pool = pool

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Results of a picklable function, in the order of the tasks."""
        try:
            yield from map(function, tasks) if self._pool is None else self._pool.map(function, tasks)
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, most likely for want of memory; set data.workers or "
                "data.rows_in_memory to a lower number"
            ) from None


def _start_worker() -> None:
    """Ends with the process that started it, even where that one is killed, and leaves the other cores alone."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, name="end-with-parent", daemon=True).start()
    pa.set_cpu_count(1)
    keep_freed_memory()


class _RayEngine:
    """Tasks of actors, on the cluster at RAY_ADDRESS if that variable is set, else on this machine."""

    def __init__(self, workers: int) -> None:
        if not os.environ.get("RAY_ADDRESS"):
            # Under `uv run`, Ray would start each process by `uv run` too, in an environment made for it alone. On this
            # machine the one that runs is the right one.
            os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        try:
            import ray
        except ImportError:
            raise UserError("the engine 'ray' needs Ray: install this package with its extra `ray`") from None
        self._ray, self._workers = ray, workers
        self._mine = not ray.is_initialized()
        if self._mine:
            quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
            here = {
                "address": "local",  # not what someone else happens to have running on this machine
                "num_cpus": workers,
                "include_dashboard": False,
                "object_store_memory": 256 * 2**20,
            }
            ray.init(**quiet, **({} if os.environ.get("RAY_ADDRESS") else here))
        if os.environ.get("RAY_ADDRESS"):
            self._workers = max(1, int(ray.cluster_resources().get("CPU", 1)))

    def close(self) -> None:
        """Ends what was started here."""
        if self._mine:
            self._ray.shutdown()

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Does what `map` of the other engine does."""
        from ray.util import ActorPool

        worker, shared = self._ray.remote(num_cpus=1)(_Worker), self._ray.put(function)
        pool = ActorPool([worker.remote() for _ in range(min(self._workers, len(tasks)))])
        try:
            yield from pool.map(lambda actor, task: actor.run.remote(shared, task), tasks)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise


class _Worker:
    """A process that runs tasks one after the other, and so keeps what they load."""

    def run(self, function: Callable[[Any], Any], task: Any) -> Any:
        return function(task)


Engine = _LocalEngine | _RayEngine
"""Runs the tasks of a job."""
