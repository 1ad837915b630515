"""The steps of a feature build, each a job of independent tasks on an engine: requests, count, look up, encode.

    requests parts of the log      -> one time for each request (see `mmoe_rec.preprocessing.request_times`)
    count    parts of the logs     -> counts, merged here; events and look-ups, to partitions of keys through files
    look up  partitions of keys    -> results, to blocks of rows through files; memories, kept
    encode   parts of the log      -> encoded rows

docs/explanation/point-in-time.md describes the data that steps exchange.

An engine runs the tasks: `local`, a thread or process for each core, or `ray`, actors of a Ray cluster. It gives the
results in the order of the tasks, so that nothing depends on the engine or on the number of workers. A `UserError` of a
task ends the job and is raised as it is.
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

import pyarrow as pa

from mmoe_rec.devices import keep_freed_memory, keeping_freed_memory, usable_cores
from mmoe_rec.errors import UserError
from mmoe_rec.features.encoder import PointInTimeEncoder
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log.reader import ROWS_PER_PART, Log, LogPart, LogReader, find_bad_file
from mmoe_rec.point_in_time.join import Window
from mmoe_rec.preprocessing.build_inputs import Logs
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
# This many share one interpreter well, since most of their time is spent in NumPy and Arrow; they start at once.
MAX_THREADS = 4


@contextmanager
def open_engine(name: EngineName, workers: int | None = None, processes: bool = True) -> "Iterator[Engine]":
    """The engine of that name, with so many tasks at a time, by default one for each core. processes: whether `local`
    may start processes, for more workers than threads suit."""
    workers = workers or usable_cores()
    if not processes and name == "local":
        workers = min(workers, MAX_THREADS)
    if name == "ray":
        with closing(_RayEngine(workers)) as engine:
            yield engine
        return
    pool: Executor | None = None
    if workers > MAX_THREADS:
        # Not forked: a child of a process with threads, as Arrow has, may wait for a lock for ever.
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker)
    elif workers > 1:
        pool = ThreadPoolExecutor(workers, thread_name_prefix="worker")
    with keeping_freed_memory():
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


# Fewer rows are done before further processes have started.
MIN_ROWS_FOR_PROCESSES = 500_000
_FIRST_TIMES, _RESULTS, _REPEATS = "first_times.parquet", "results", "repeats.parquet"


def open_reader(folder: Path, log: Log) -> LogReader:
    """Reads parts of a log after the steps that found its requests, see `BuildSteps.move_results`."""
    path = folder / _FIRST_TIMES
    return replace(log.reader, time_overrides=path if path.exists() else None)


def open_results(folder: Path, log: Log) -> ResultExchange:
    """What counters and histories knew of the rows, see `BuildSteps.move_results`."""
    return ResultExchange(folder / _RESULTS, log.rows)


class BuildSteps:
    """The steps of one build, in a scratch folder that is removed at the end. Use it as a context. logs: as they are
    read, without files that turned out to be bad; requests: what was found out about them."""

    def __init__(self, logs: Logs, windows: Mapping[str, Window], scratch: Path) -> None:
        self.logs, self.windows, self.scratch = logs, windows, scratch
        self._stack = ExitStack()
        self._counted = LogCounts()
        self.requests = RequestCounts()
        self._repeats = scratch.with_name(_REPEATS)  # outlives what was read with them

    def __enter__(self) -> "BuildSteps":
        options = self.logs.options
        few = self.logs.rows < MIN_ROWS_FOR_PROCESSES
        in_memory = self.logs.log.source.startswith("memory://")  # which other processes do not see
        engine = open_engine(options.engine, options.workers, processes=not (few or in_memory))
        self._stack.callback(shutil.rmtree, self.scratch, ignore_errors=True)
        self._stack.callback(self._repeats.unlink, missing_ok=True)
        self._engine: Engine = self._stack.enter_context(engine)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def _partitions(self) -> int:
        # A row of the log is both an event and a look-up.
        return -(-(self.logs.log.rows + self.logs.rows) // self.logs.options.rows_in_memory)

    def count(self, statistics: bool, requests_dir: Path | None = None, previous: Path | None = None) -> LogCounts:
        """Finds the times of requests and reads the logs, and does both again without rows that came before. Where bad
        files are skipped, it first reads all files for what is wrong with them.

        statistics: whether vocabularies and the like are counted; kept: folder that gets what is known of the requests;
        previous: such a folder of the files that are not read.

        Raises UserError for a bad file, unless such files are skipped, for rows that occur twice, and for requests of
        several users, or times where that is wanted.
        """
        if self.logs.options.skip_bad_files:
            pieces = [each for log in self.logs.all for each in log.pieces()]
            faults = self._run(find_bad_file, pieces, [piece.rows for _, piece in pieces], "checking")
            self.logs = self.logs.without_bad_files(list(faults))
        look = (
            self.logs.options.on_duplicates == "error" or requests_dir is not None
        ) and self.logs.schema.columns.has_candidate
        while True:
            self.requests = self._find_requests(previous, requests_dir)
            self._counted = self._count(statistics, look)
            check_time_units(self.logs.log, self._counted)
            check_requests(self.logs.log, self.requests)
            sent, database = self._events.folder / ROW_KEYS_CHANNEL, self.scratch / "database"
            if not look or not check_duplicates(self.logs, sent, database, self._repeats, previous, requests_dir):
                return self._counted
            shutil.rmtree(self.scratch, ignore_errors=True)  # what was read with them

    def find_requests(self) -> None:
        """Only finds the times of requests, for rows whose counters and histories are known elsewhere. Raises UserError
        for a bad file, and as `count` does for requests of several users or times."""
        self.requests = self._find_requests()
        check_requests(self.logs.log, self.requests)

    def move_results(self, folder: Path) -> None:
        """Moves what `open_reader` reads, and the results of look-ups, out of the scratch folder, to `folder`, which is
        of the same file system and is there."""
        for name in (_FIRST_TIMES, _RESULTS):
            if (self.scratch / name).exists():
                (self.scratch / name).rename(folder / name)

    def _find_requests(self, previous: Path | None = None, requests_dir: Path | None = None) -> RequestCounts:
        scratch, time_overrides = self.scratch / "requests", self.scratch / _FIRST_TIMES
        return find_requests(
            self.logs, self._reader, self.parts, self._run, scratch, time_overrides, previous, requests_dir
        )

    def _count(self, statistics: bool, look: bool) -> LogCounts:
        job = CountJob(self.logs.schema, self.windows, self._events, statistics, look)
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
        """The parts of the interaction log, each a task, whatever runs them."""
        # Enough of them for many workers to end at about the same time.
        return self.logs.log.parts(min(max(self.logs.log.rows // 64, ROWS_PER_PART // 2), ROWS_PER_PART))

    def look_up(
        self, pipeline: FeaturePipeline, folder: Path, end: int, training: Window | None, previous: Path | None = None
    ) -> None:
        """Makes all look-ups and writes memories, as of `end` (microseconds), into a folder.

        pipeline: with complete vocabularies; where `training` is given, it counts results of rows requested then.
        previous: folder with memories to go on from.
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
        tasks.sort(key=lambda task: -task.rows)  # so that workers end at about the same time
        encoders = pipeline.point_in_time_encoders
        done = self._run(
            partial(look_up_partition, job), tasks, [task.rows for task in tasks], "counters and histories"
        )
        for features in done:
            for name, counts in features.items():
                for result, number in encoders[name].numbers.items():
                    number.histogram.merge(counts[result])
        self._events.remove()

    @property
    def _events(self) -> Exchange:
        return Exchange(self.scratch / "events", self._partitions)

    def _count_sent(self, group: Sequence[PointInTimeEncoder[Any]], partition: int) -> int:
        """Rows of a partition that are held at a time: look-ups, and the events of one counter or history."""
        sent = self._counted.sent
        lookups, *events = (
            int(sent[channel][partition]) if channel in sent else 0
            for channel in (lookups_channel(group[0].name), *(events_channel(encoder.name) for encoder in group))
        )
        return lookups + max(events)

    def encode(self, pipeline_dir: Path, folder: Path, label_cutoff: Mapping[str, int]) -> dict[str, SplitCounts]:
        """Encodes the rows of each split into `folder`/SPLIT, and writes the layout beside them.

        pipeline_dir: folder of the fitted pipeline; known_by: when a split's labels must have matured to count.

        Raises UserError for a file that has changed meanwhile: what was counted of its rows no longer holds.
        """
        tasks = list(enumerate(self.parts))
        counts = {name: SplitCounts(label_cutoff=label_cutoff[name]) for name in self.windows}
        results = open_results(self.scratch, self.logs.log)
        function = partial(encode_part, pipeline_dir, self.windows, label_cutoff, results, folder, self._reader)
        sizes = [part.rows for _, part in tasks]
        for part in self._run(function, tasks, sizes, "encoding"):
            for name, each in part.items():
                counts[name].merge(each)
        for log in self.logs.all:
            log.check_unchanged()
        folder.mkdir(exist_ok=True)
        layout = load_pipeline(pipeline_dir).layout
        (folder / "layout.json").write_text(layout.to_json(), encoding="utf-8")
        return counts

    def _run(
        self, function: Callable[[Any], Result], tasks: Sequence[Any], sizes: Sequence[int], what: str
    ) -> Iterator[Result]:
        if not sum(sizes):  # of 0 of 0 a bar would show 0%, and never an end
            yield from self._engine.map(function, tasks)
            return
        with bar() as progress:
            task = progress.add_task(what, total=sum(sizes))
            for result, size in zip(self._engine.map(function, tasks), sizes, strict=True):
                progress.advance(task, size)
                yield result
