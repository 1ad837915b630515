"""Steps of a feature build. Each step is a job of independent tasks that run on an engine.

    step      each task reads        the step gives
    requests  a part of the log      the time of each request (see `mmoe_rec.preprocessing.request_times`)
    count     a part of a log        merged counts, and files with the events and lookups of each partition of keys
    look up   a partition of keys    event stores, and files with the results for each block of rows
    compare   a part of the log, and then a partition of requests: relative features, as files like those of `look up`
    encode    a part of the log      encoded rows

docs/explanation/point-in-time.md describes the data that steps exchange.

The engine `local` uses a thread or process for each core. The engine `ray` uses actors of a Ray cluster. An engine
yields results in the order of the tasks, so a build doesn't depend on the engine or the number of workers. A
`UserError` of a task ends the job and is raised unchanged.
"""

import logging
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from mmoe_rec.devices import keep_freed_memory, keeping_freed_memory, usable_cores
from mmoe_rec.errors import UserError
from mmoe_rec.features.encoder import PointInTimeEncoder, StatisticsEncoder
from mmoe_rec.features.numeric_statistics import NumberHistogram
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log.reader import ROWS_PER_PART, Log, LogPart, LogReader, find_bad_file
from mmoe_rec.point_in_time.join import Window
from mmoe_rec.preprocessing.build_inputs import Logs
from mmoe_rec.preprocessing.compare_candidates import CompareJob, PrepareRows, compare_partition, send_numbers
from mmoe_rec.preprocessing.count_and_encode import (
    CountJob,
    LogCounts,
    SplitCounts,
    check_time_units,
    count_part,
    encode_part,
)
from mmoe_rec.preprocessing.look_up import (
    ROW_KEYS_CHANNEL,
    Exchange,
    KeyPartition,
    LookupJob,
    ResultExchange,
    events_channel,
    load_pipeline,
    look_up_partition,
    lookups_channel,
)
from mmoe_rec.preprocessing.request_times import RequestCounts, check_duplicates, check_requests, find_requests
from mmoe_rec.progress import bar
from mmoe_rec.settings.sections import EngineName

Task = TypeVar("Task")
Result = TypeVar("Result")
# Up to this many workers run as threads, which start faster. NumPy and Arrow release the interpreter lock.
MAX_THREADS = 4


@contextmanager
def open_engine(name: EngineName, workers: int | None = None, processes: bool = True) -> "Iterator[Engine]":
    """Open an engine that runs tasks, and close it at the end of the `with` block.

    Args:
        name: Name of the engine.
        workers: Number of tasks that run at the same time, by default one per usable core. A Ray cluster at RAY_ADDRESS
            uses all of its CPUs instead.
        processes: Whether the engine `local` may start processes for more than `MAX_THREADS` workers.
    """
    workers = workers or usable_cores()
    if not processes and name == "local":
        workers = min(workers, MAX_THREADS)
    if name == "ray":
        with closing(_RayEngine(workers)) as engine:
            yield engine
        return
    pool: Executor | None = None
    if workers > MAX_THREADS:
        # Don't fork: Arrow starts threads, and a forked child of a process with threads may deadlock.
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker)
    elif workers > 1:
        pool = ThreadPoolExecutor(workers, thread_name_prefix="worker")
    with keeping_freed_memory():
        try:
            yield _LocalEngine(pool)
        finally:
            if pool is not None:
                pool.shutdown(cancel_futures=True)  # Wait for tasks that have started and cancel the rest.


class _LocalEngine:
    """Engine that runs tasks in a pool of threads or processes, or in the current thread."""

    def __init__(self, pool: Executor | None) -> None:
        self._pool = pool

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Yield the results of a picklable function in the order of the tasks."""
        try:
            yield from map(function, tasks) if self._pool is None else self._pool.map(function, tasks)
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, probably because memory ran out. Lower data.workers or "
                "data.rows_in_memory."
            ) from None


def _start_worker() -> None:
    """Make a worker process end with its parent, even if the parent is killed, and use only one core."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, name="end-with-parent", daemon=True).start()
    pa.set_cpu_count(1)
    keep_freed_memory()


class _RayEngine:
    """Engine that runs tasks in Ray actors, in the cluster at RAY_ADDRESS or, without this variable, locally."""

    def __init__(self, workers: int) -> None:
        if not os.environ.get("RAY_ADDRESS"):
            # Under `uv run`, Ray would start each process with `uv run` in a new environment. Local actors need the
            # current environment.
            os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        try:
            import ray
        except ImportError:
            raise UserError("the engine 'ray' needs Ray: install this package with its extra `ray`") from None
        self._ray, self._workers = ray, workers
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
            local = {
                "address": "local",  # Don't join another user's cluster on this machine.
                "num_cpus": workers,
                "include_dashboard": False,
                "object_store_memory": 256 * 2**20,
            }
            ray.init(**quiet, **({} if os.environ.get("RAY_ADDRESS") else local))
        if os.environ.get("RAY_ADDRESS"):
            self._workers = max(1, int(ray.cluster_resources().get("CPU", 1)))

    def close(self) -> None:
        """Shut Ray down if this engine started it."""
        if self._owns_ray:
            self._ray.shutdown()

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Yield the results of a picklable function in the order of the tasks."""
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
    """Ray actor that runs many tasks. Data that one task caches are available to the next task."""

    def run(self, function: Callable[[Any], Any], task: Any) -> Any:
        return function(task)


Engine = _LocalEngine | _RayEngine
"""Runner of a job's tasks."""


# Use threads for logs with fewer rows. They finish in less time than worker processes need to start.
MIN_ROWS_FOR_PROCESSES = 500_000
_FIRST_TIMES, _RESULTS, _REPEATS = "first_times.parquet", "results", "repeats.parquet"


def open_reader(folder: Path, log: Log) -> LogReader:
    """Return a reader that gives all rows of a request the same time, as determined by `BuildSteps`.

    Args:
        folder: Scratch folder of the build, or the folder given to `BuildSteps.move_results`.
        log: Interaction log.
    """
    path = folder / _FIRST_TIMES
    return replace(log.reader, time_overrides=path if path.exists() else None)


def open_results(folder: Path, log: Log) -> ResultExchange:
    """Return the files with the values of counters and histories for each row, which `BuildSteps.look_up` wrote.

    Args:
        folder: Scratch folder of the build, or the folder given to `BuildSteps.move_results`.
        log: Interaction log.
    """
    return ResultExchange(folder / _RESULTS, log.rows)


class BuildSteps:
    """Steps of one build, as a context manager that removes the scratch folder at the end.

    After `count`, the attribute `logs` has the logs without bad files, and `requests` the counts of their requests.
    """

    def __init__(self, logs: Logs, windows: Mapping[str, Window], scratch: Path) -> None:
        """Prepare the steps.

        Args:
            logs: Logs to read.
            windows: Request times [start, end) of each split, in microseconds.
            scratch: Folder for temporary files.
        """
        self.logs, self.windows, self.scratch = logs, windows, scratch
        self._stack = ExitStack()
        self._counted = LogCounts()
        self.requests = RequestCounts()
        self._repeats = scratch.with_name(_REPEATS)  # `count` removes the scratch folder but needs this file.

    def __enter__(self) -> "BuildSteps":
        options = self.logs.options
        few = self.logs.rows < MIN_ROWS_FOR_PROCESSES
        in_memory = self.logs.log.source.startswith("memory://")  # Only this process can read such files.
        engine = open_engine(options.engine, options.workers, processes=not (few or in_memory))
        self._stack.callback(shutil.rmtree, self.scratch, ignore_errors=True)
        self._stack.callback(self._repeats.unlink, missing_ok=True)
        self._engine: Engine = self._stack.enter_context(engine)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def _partitions(self) -> int:
        # A row of the interaction log is both an event and a lookup.
        return -(-(self.logs.log.rows + self.logs.rows) // self.logs.options.rows_in_memory)

    def count(self, statistics: bool, requests_dir: Path | None = None, previous: Path | None = None) -> LogCounts:
        """Run the steps `requests` and `count`.

        If new rows repeat rows of earlier files, both steps run again without the repeated rows. If bad files may be
        skipped, all files are checked before the first step.

        Args:
            statistics: Whether to count IDs and numbers of training rows, to fit vocabularies and statistics.
            requests_dir: Folder for the record of all requests and rows. None writes no record.
            previous: Folder with the record of the requests and rows in earlier files.

        Raises:
            UserError: A file is bad and bad files are not skipped. A request has several users. The options forbid
                repeated rows or several times of a request, and the log has them.
        """
        if self.logs.options.skip_bad_files:
            pieces = [piece for log in self.logs.all for piece in log.pieces()]
            faults = self._run(find_bad_file, pieces, [piece.rows for _, piece in pieces], "checking")
            self.logs = self.logs.without_bad_files(list(faults))
        check = (
            self.logs.options.on_duplicates == "error" or requests_dir is not None
        ) and self.logs.schema.columns.has_candidate
        while True:
            self.requests = self._find_requests(previous, requests_dir)
            self._counted = self._count(statistics, check)
            check_time_units(self.logs.log, self._counted)
            check_requests(self.logs.log, self.requests)
            sent, database = self._events.folder / ROW_KEYS_CHANNEL, self.scratch / "database"
            if not check or not check_duplicates(self.logs, sent, database, self._repeats, previous, requests_dir):
                return self._counted
            shutil.rmtree(self.scratch, ignore_errors=True)  # These files include the repeated rows.

    def find_requests(self) -> None:
        """Run the step `requests` without `count`, for rows whose counters and histories are already computed.

        Raises:
            UserError: A file is bad, or a request has several users or times as in `count`.
        """
        self.requests = self._find_requests()
        check_requests(self.logs.log, self.requests)

    def move_results(self, folder: Path) -> None:
        """Move the inputs of `open_reader` and `open_results` from the scratch folder to an existing `folder`.

        Both folders must be in the same file system.
        """
        for name in (_FIRST_TIMES, _RESULTS):
            if (self.scratch / name).exists():
                (self.scratch / name).rename(folder / name)

    def _find_requests(self, previous: Path | None = None, requests_dir: Path | None = None) -> RequestCounts:
        scratch, time_overrides = self.scratch / "requests", self.scratch / _FIRST_TIMES
        return find_requests(
            self.logs, self._reader, self.parts, self._run, scratch, time_overrides, previous, requests_dir
        )

    def _count(self, statistics: bool, check: bool) -> LogCounts:
        job = CountJob(self.logs.schema, self.windows, self._events, statistics, check)
        readers: dict[str | None, LogReader] = {None: self._reader}
        parts: list[tuple[str | None, LogPart]] = [(None, part) for part in self.parts]
        for events in self.logs.events:
            readers[events.name] = events.reader
            parts += [(events.name, part) for part in events.parts()]
        counted = LogCounts()
        for part in self._run(partial(count_part, job, readers), parts, [part.rows for _, part in parts], "reading"):
            counted.merge(part)
        return counted

    @property
    def _reader(self) -> LogReader:
        reader = open_reader(self.scratch, self.logs.log)
        return replace(reader, excluded_rows=self._repeats if self._repeats.exists() else None)

    @property
    def parts(self) -> list[LogPart]:
        """Parts of the interaction log, one for each task. They don't depend on the engine."""
        # Make enough parts for many workers to end at about the same time.
        return self.logs.log.parts(min(max(self.logs.log.rows // 64, ROWS_PER_PART // 2), ROWS_PER_PART))

    def look_up(
        self, pipeline: FeaturePipeline, folder: Path, end: int, training: Window | None, previous: Path | None = None
    ) -> None:
        """Compute counters and histories for each row, and write their event stores.

        Args:
            pipeline: Pipeline with complete vocabularies. Its histograms count the values of rows in `training`.
            folder: Folder for the event stores.
            end: Time from which the event stores must answer lookups, in microseconds.
            training: Request times [start, end) of the rows to count in histograms. None counts no rows.
            previous: Folder with event stores to continue from. None starts with empty stores.
        """
        pipeline_dir = self.scratch / "state"
        pipeline_dir.mkdir(parents=True)
        pipeline.save(pipeline_dir)
        options, partitions = self.logs.options, self._partitions
        job = LookupJob(
            pipeline_dir=pipeline_dir,
            previous=previous,
            windows=self.windows,
            training=training,
            stores=folder,
            end=end,
            events=self._events,
            results=open_results(self.scratch, self.logs.log),
            rows_in_memory=options.rows_in_memory,
            scratch=self.scratch / "pieces",
        )
        tasks = [
            KeyPartition(name, number, self._count_sent(group, number))
            for name, group in pipeline.key_groups.items()
            for number in range(partitions)
        ]
        tasks.sort(key=lambda task: -task.rows)  # The largest task first: workers then end at about the same time.
        partition_counts = self._run(
            partial(look_up_partition, job), tasks, [task.rows for task in tasks], "counters and histories"
        )
        _merge_histograms(pipeline, partition_counts)
        self._events.remove()
        self.compare(pipeline, training)

    def compare(
        self, pipeline: FeaturePipeline, training: Window | None = None, prepare: PrepareRows | None = None
    ) -> None:
        """Compute relative features for each row of a split, if there are any.

        Args:
            pipeline: Features. Their histograms count the values of rows in `training`.
            training: Request times [start, end) of the rows to count in histograms. None counts no rows.
            prepare: Function that adds missing columns and results of counters to rows. None if rows are complete.
        """
        if not pipeline.relative_encoders or not self.windows:
            return
        job = CompareJob(
            schema=pipeline.schema,
            reader=self._reader,
            prepare=prepare,
            windows=self.windows,
            training=training,
            exchange=Exchange(self.scratch / "compared", self._partitions),
            results=open_results(self.scratch, self.logs.log),
        )
        parts, partitions = self.parts, range(self._partitions)
        for _ in self._run(partial(send_numbers, job), parts, [part.rows for part in parts], "reading lists"):
            pass
        compared = self._run(partial(compare_partition, job), partitions, [1] * len(partitions), "comparing candidates")
        _merge_histograms(pipeline, compared)
        job.exchange.remove()

    @property
    def _events(self) -> Exchange:
        return Exchange(self.scratch / "events", self._partitions)

    def _count_sent(self, group: Sequence[PointInTimeEncoder[Any]], partition: int) -> int:
        """Return how many rows a partition holds in memory: all lookups, plus the most events of one feature."""
        sent, none = self._counted.sent, np.zeros(partition + 1, np.int64)
        events = [sent.get(events_channel(encoder.name), none) for encoder in group]
        most = max(int(rows.sum() if group[0].needs_all_keys else rows[partition]) for rows in events)
        return int(sent.get(lookups_channel(group[0].name), none)[partition]) + most

    def encode(self, pipeline_dir: Path, folder: Path, label_cutoff: Mapping[str, int]) -> dict[str, SplitCounts]:
        """Encode the rows of each split to `folder`/SPLIT, and write the layout to `folder`.

        Args:
            pipeline_dir: Folder of the fitted pipeline.
            folder: Folder for the encoded rows.
            label_cutoff: Time for each split, in microseconds. Labels that are not final at this time are unobserved.

        Returns:
            Counts of each split.

        Raises:
            UserError: A file has changed since the logs were opened.
        """
        tasks = list(enumerate(self.parts))
        counts = {name: SplitCounts(label_cutoff=label_cutoff[name]) for name in self.windows}
        results = open_results(self.scratch, self.logs.log)
        function = partial(encode_part, pipeline_dir, self.windows, label_cutoff, results, folder, self._reader)
        sizes = [part.rows for _, part in tasks]
        for part in self._run(function, tasks, sizes, "encoding"):
            for name, split_counts in part.items():
                counts[name].merge(split_counts)
        for log in self.logs.all:
            log.check_unchanged()
        folder.mkdir(exist_ok=True)
        layout = load_pipeline(pipeline_dir).layout
        (folder / "layout.json").write_text(layout.to_json(), encoding="utf-8")
        return counts

    def _run(
        self, function: Callable[[Any], Result], tasks: Sequence[Any], sizes: Sequence[int], description: str
    ) -> Iterator[Result]:
        if not sum(sizes):  # A progress bar with a total of 0 would stay at 0%.
            yield from self._engine.map(function, tasks)
            return
        with bar() as progress:
            task = progress.add_task(description, total=sum(sizes))
            for result, size in zip(self._engine.map(function, tasks), sizes, strict=True):
                progress.advance(task, size)
                yield result


def _merge_histograms(pipeline: FeaturePipeline, counts: Iterator[dict[str, dict[str, NumberHistogram]]]) -> None:
    """Add histograms by feature and name of the result to the histograms of a pipeline."""
    for features in counts:
        for name, histograms in features.items():
            encoder = pipeline.encoders[name]
            assert isinstance(encoder, StatisticsEncoder)
            for result, number in encoder.numbers.items():
                number.histogram.merge(histograms[result])
