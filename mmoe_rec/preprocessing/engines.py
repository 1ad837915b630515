"""Where a job's tasks run: `local`, a thread or process for each core, or `ray`, a Ray cluster through Ray Data.

A job is a function of this package and a list of tasks that are independent of each other. An engine gives the results
in the order of the tasks, so that nothing depends on the engine or on the number of workers. A `UserError` of a task
ends the job and is raised as it is.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
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
def open_engine(name: EngineName, workers: int | None = None, processes: bool = True) -> Iterator[Engine]:
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

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task], lasting: bool = False) -> Iterator[Result]:
        """Results of a picklable function, in the order of the tasks. lasting: whether a process holds something large
        in memory for the tasks that follow, so that it should be an actor where processes come and go."""
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
    """Tasks as rows of a Ray data set, on the cluster at RAY_ADDRESS if that variable is set, else on this machine."""

    def __init__(self, workers: int) -> None:
        if not os.environ.get("RAY_ADDRESS"):
            # Under `uv run`, Ray would start each process by `uv run` too, in an environment made for it alone. On this
            # machine the one that runs is the right one.
            os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        try:
            import ray
            import ray.data
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
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # plans and timings of each step
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True

    def close(self) -> None:
        """Ends what was started here."""
        if self._mine:
            self._ray.shutdown()

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task], lasting: bool = False) -> Iterator[Result]:
        """Does what `map` of the other engine does."""
        if not tasks:
            return
        table = pa.table({"task": pa.array([pickle.dumps(task) for task in tasks], pa.large_binary())})
        dataset = self._ray.data.from_arrow([table.slice(index, 1) for index in range(len(tasks))])
        options: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "num_cpus": 1}
        if lasting:
            options |= {"fn_constructor_kwargs": {"function": function}, "concurrency": (1, self._workers)}
            dataset = dataset.map_batches(_Tasks, **options)
        else:
            dataset = dataset.map_batches(_run_tasks, fn_kwargs={"function": function}, **options)
        for batch in dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=1):
            for packed in batch["result"]:
                result = pickle.loads(packed.as_py())
                if isinstance(result, UserError):
                    raise result
                yield result


def _run_tasks(table: pa.Table, function: Callable[[Any], Any]) -> pa.Table:
    results = []
    for packed in table["task"]:
        try:
            results.append(function(pickle.loads(packed.as_py())))
        except UserError as error:
            results.append(error)
    return pa.table({"result": pa.array([pickle.dumps(result) for result in results], pa.large_binary())})


class _Tasks:
    """An actor that runs tasks."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def __call__(self, table: pa.Table) -> pa.Table:
        return _run_tasks(table, self._function)


Engine = _LocalEngine | _RayEngine
"""Runs the tasks of a job."""
