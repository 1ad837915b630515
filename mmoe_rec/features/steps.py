"""The steps of a feature build, each a job of independent tasks on an engine: requests, learn, answer, encode.

    requests parts of the log      -> one time for each request (see `mmoe_rec.features.requests`)
    learn    parts of the logs     -> counts, merged here; events and look-ups, to partitions of keys through files
    answer   partitions of keys    -> answers, to blocks of rows through files; memories, kept
    encode   parts of the log      -> encoded rows

What is exchanged are Arrow tables. On the way there: (key, time, row, labels) of each look-up, once for all counters
and histories that ask by the same columns, and (key, known, value) of each event that is not a look-up by its label. On
the way back: (row, answers). Everything else stays with the worker that read it.
"""

from __future__ import annotations

import copy
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from mmoe_rec.engines import Engine, EngineName, open_engine
from mmoe_rec.errors import UserError
from mmoe_rec.features.answer import AnswerJob, Partition, answer_partition
from mmoe_rec.features.answers import AnswerExchange, Blocks
from mmoe_rec.features.checks import check_readings, check_requests, check_times, place
from mmoe_rec.features.duplicates import repeats
from mmoe_rec.features.encoder import MemoryEncoder
from mmoe_rec.features.exchange import Exchange
from mmoe_rec.features.learn import (
    DUPLICATES,
    LearnJob,
    Learnt,
    Reader,
    Window,
    events_of,
    learn_part,
    look_ups_of,
)
from mmoe_rec.features.log import (
    ROWS_PER_PART,
    BadFile,
    EventRows,
    LeftOut,
    Log,
    LogPart,
    LogReader,
    none_usable,
)
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.features.requests import OneTimeReader, Requests, RequestsJob, find_requests
from mmoe_rec.features.splits import EncodeJob, SplitCounts, encode_part
from mmoe_rec.progress import bar
from mmoe_rec.schema import Schema

# Fewer rows are done before further processes have started.
ROWS_FOR_PROCESSES = 500_000
_NEVER = np.iinfo(np.int64).max
Result = TypeVar("Result")
Source = TypeVar("Source", Log, EventRows)


@dataclass(frozen=True)
class BuildOptions:
    """How features are built, as described in `mmoe_rec.settings.sections.Data`; no choice changes a feature."""

    engine: EngineName = "local"
    workers: int | None = None
    rows_in_memory: int = 1_048_576
    skip_bad_files: bool = False
    duplicates: Literal["error", "keep"] = "error"
    future_times: Literal["error", "keep"] = "error"
    several_times: Literal["first", "error"] = "first"

    @property
    def unchecked(self) -> list[str]:
        """Settings by which a build does not look for rows that most logs hold by mistake only."""
        return [name for name in ("duplicates", "future_times") if getattr(self, name) == "keep"]


DEFAULTS = BuildOptions()


class Logs:
    """An interaction log with its logs of events. only_new: whether these are some of their files, see `rest`.

    types: of the columns of each of them, as `Log` takes them.
    """

    only_new = False

    def __init__(
        self, source: str, schema: Schema, options: BuildOptions, types: Sequence[Mapping[str, str]] | None = None
    ) -> None:
        self.schema, self.options = schema, options
        skip = options.skip_bad_files
        now = None if options.future_times == "error" else _NEVER
        of_log, *of_events = types or [{}] * (1 + len(schema.events))
        self.log = Log(source, schema, skip_bad_files=skip, types=of_log, now=now)
        self.events = [
            EventRows(name, self.log, skip_bad_files=skip, types=each)
            for name, each in zip(schema.events, of_events, strict=True)
        ]

    @property
    def all(self) -> list[Log | EventRows]:
        """The interaction log, then the logs of events."""
        return [self.log, *self.events]

    @property
    def rows(self) -> int:
        """Rows of all of them."""
        return sum(each.rows for each in self.all)

    def without(self, bad: Sequence[BadFile]) -> Logs:
        """The same logs without further files. Raises UserError where nothing is left to read of one."""
        first = {error.address: error for error in reversed(bad)}  # many parts of a file may tell of it
        reasons = {address: LeftOut(address, str(error.explained())) for address, error in first.items()}
        fewer = copy.copy(self)
        fewer.log, fewer.events = self.log.without(reasons), [each.without(reasons) for each in self.events]
        for log, before in zip(fewer.all, self.all, strict=True):
            if before.files and not log.files and (log is fewer.log or not self.only_new):
                raise none_usable(log.source, log.left_out)
        if not fewer.log.rows:
            raise UserError(f"the log '{self.log.source}' has no rows")
        return fewer

    def rest(self, not_read: Sequence[Collection[str]]) -> Logs:
        """The same logs, of which some files are not read: addresses for each of `all`.

        Raises UserError where the other files of the interaction log have no rows.
        """
        rest = copy.copy(self)
        rest.only_new = True
        rest.log = _without_files(self.log, not_read[0])
        rest.events = [_without_files(each, done) for each, done in zip(self.events, not_read[1:], strict=True)]
        if not rest.log.rows:
            raise UserError(f"the new files of the log '{self.log.source}' have no rows")
        return rest


def _without_files(log: Source, addresses: Collection[str]) -> Source:
    rest = copy.copy(log)
    rest.files = [file for file in log.files if file.address not in addresses]
    return rest


class Steps:
    """The steps of one build, in a scratch folder that is removed at the end. Use it as a context.

    logs: as they are read, without files that turned out to be bad; requests: what was found out about them.
    """

    def __init__(self, logs: Logs, windows: Mapping[str, Window], scratch: Path) -> None:
        self.logs, self.windows, self.scratch = logs, windows, scratch
        self._stack = ExitStack()
        self._learnt = Learnt()
        self.requests = Requests()

    def __enter__(self) -> Steps:
        options = self.logs.options
        few = self.logs.rows < ROWS_FOR_PROCESSES
        in_memory = self.logs.log.source.startswith("memory://")  # which other processes do not see
        engine = open_engine(options.engine, options.workers, processes=not (few or in_memory))
        self._stack.callback(shutil.rmtree, self.scratch, ignore_errors=True)
        self._engine: Engine = self._stack.enter_context(engine)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def _partitions(self) -> int:
        # A row of the log is both an event and a look-up.
        return -(-(self.logs.log.rows + self.logs.rows) // self.logs.options.rows_in_memory)

    def learn(self, statistics: bool, kept: Path | None = None, before: Path | None = None) -> Learnt:
        """Finds the times of requests and reads the logs, and both once more without bad files where some are skipped.

        statistics: whether vocabularies and the like are counted; kept: folder that gets what is known of the requests;
        before: such a folder of the files that are not read.

        Raises UserError for a bad file, unless such files are skipped, for rows that occur twice, and for requests of
        several users, or times where that is wanted.
        """
        check_readings(self.logs.log)
        while (learnt := self._read_all(statistics, kept, before)).bad:
            self.leave_out(learnt.bad)
        self._learnt = learnt
        check_times(self.logs.log, learnt)
        check_requests(self.logs.log, self.requests)
        if self.logs.options.duplicates == "error":
            self._check_duplicates()
        return learnt

    def leave_out(self, bad: Sequence[BadFile]) -> None:
        """Forgets what was learnt, and reads without further files from now on."""
        self.logs = self.logs.without(bad)
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _read_all(self, statistics: bool, kept: Path | None, before: Path | None) -> Learnt:
        self.requests = find_requests(self._requests_job(kept, before), self.logs.log, self._parts, self._run)
        bad = self.requests.bad
        if bad and not self.logs.options.skip_bad_files:
            raise bad[0].explained()
        learnt = self._learn(statistics)  # which finds further bad files at once
        return Learnt(bad=[*bad, *learnt.bad]) if bad else learnt

    def _requests_job(self, kept: Path | None, before: Path | None) -> RequestsJob:
        runs, blocks = Exchange(self.scratch / "requests", self._partitions), Blocks.of(self._parts)
        first_times = Exchange(self.scratch / "first_times", len(blocks))
        one_time = self.logs.options.several_times == "error"
        return RequestsJob(runs, first_times, blocks, before, kept, one_time)

    @property
    def _reader(self) -> LogReader | OneTimeReader:
        job, reader = self._requests_job(None, None), self.logs.log.reader
        return OneTimeReader(reader, job.first_times, job.blocks) if self.requests.moved else reader

    def _learn(self, statistics: bool) -> Learnt:
        options = self.logs.options
        look = options.duplicates == "error"
        job = LearnJob(self.logs.schema, self.windows, self._events, statistics, look)
        readers: dict[str | None, Reader] = {None: self._reader}
        parts: list[tuple[str | None, LogPart]] = [(None, part) for part in self._parts]
        for events in self.logs.events:
            readers[events.name] = events.reader
            parts += [(events.name, part) for part in events.parts()]
        learnt = Learnt()
        for part in self._run(partial(learn_part, job, readers), parts, [part.rows for _, part in parts], "reading"):
            if part.bad and not options.skip_bad_files:
                raise part.bad[0].explained()
            learnt.merge(part)
        return learnt

    @property
    def _parts(self) -> list[LogPart]:
        # Enough of them for many workers to end at about the same time.
        return self.logs.log.parts(min(max(self.logs.log.rows // 64, ROWS_PER_PART // 2), ROWS_PER_PART))

    def _check_duplicates(self) -> None:
        partitions = range(self._partitions)
        sizes = self._learnt.sent[DUPLICATES].tolist()
        found = list(self._run(partial(repeats, self._events), partitions, sizes, "looking for duplicates"))
        if repeated := sum(count for count, _ in found):
            columns, log = self.logs.schema.columns, self.logs.log
            first, second = (place(log, row) for row in min(pair for _, pair in found if pair is not None))
            names = f"'{columns.request}'" if columns.request else f"'{columns.user}', '{columns.time}'"
            raise UserError(
                f"{second} repeats request and candidate (columns {names} and '{columns.candidate}') of {first}; "
                f"{repeated:,} rows of the log do so: remove them, or set data.duplicates to keep if they are meant"
            )

    def answer(
        self, pipeline: FeaturePipeline, folder: Path, end: int, training: Window | None, before: Path | None = None
    ) -> None:
        """Answers all look-ups and writes memories, as of `end` (microseconds), into a folder.

        pipeline: with complete vocabularies; where `training` is given, it counts answers of rows requested then.
        before: folder with memories to go on from.
        """
        pipeline.learn_units(self._learnt.label_units)
        state = self.scratch / "state"
        state.mkdir(parents=True)
        pipeline.save(state)
        options, partitions = self.logs.options, self._partitions
        job = AnswerJob(
            state=state,
            before=before,
            windows=self.windows,
            training=training,
            memories=folder,
            end=end,
            events=self._events,
            answers=self._answers,
            rows_in_memory=options.rows_in_memory,
            scratch=self.scratch / "pieces",
        )
        tasks = [
            Partition(name, number, self._sent(group, number))
            for name, group in pipeline.key_groups.items()
            for number in range(partitions)
        ]
        tasks.sort(key=lambda task: -task.rows)  # so that workers end at about the same time
        encoders = pipeline.memory_encoders
        done = self._run(partial(answer_partition, job), tasks, [task.rows for task in tasks], "counters and histories")
        for features in done:
            for name, counts in features.items():
                for answer, mine in encoders[name].answer_counts.items():
                    mine.merge(counts[answer])
        # What was sent is of no use any more; removing gigabytes takes its time, in which encoding can begin.
        removing = threading.Thread(target=shutil.rmtree, args=(job.events.folder,), kwargs={"ignore_errors": True})
        removing.start()
        self._stack.callback(removing.join)

    @property
    def _events(self) -> Exchange:
        return Exchange(self.scratch / "events", self._partitions)

    @property
    def _answers(self) -> AnswerExchange:
        return AnswerExchange(self.scratch / "answers", Blocks.of(self._parts))

    def _sent(self, group: Sequence[MemoryEncoder[Any]], partition: int) -> int:
        """Rows of a partition that are held at a time: look-ups, and the events of one counter or history."""
        sent = self._learnt.sent
        look_ups, *events = (
            int(sent[channel][partition]) if channel in sent else 0
            for channel in (look_ups_of(group[0].name), *(events_of(encoder.name) for encoder in group))
        )
        return look_ups + max(events)

    def encode(self, state: Path, folder: Path, known_by: Mapping[str, int]) -> dict[str, SplitCounts]:
        """Encodes the rows of each split into `folder`/SPLIT, and writes the layout beside them.

        state: folder of the fitted pipeline; known_by: when a split's labels must have matured to count.

        Raises UserError for a file that has changed meanwhile: what was learnt of its rows is no longer theirs.
        """
        job = EncodeJob(state, self.windows, known_by, self._answers, folder)
        tasks = list(enumerate(self._parts))
        counts = {name: SplitCounts(known_by=known_by[name]) for name in self.windows}
        function = partial(encode_part, job, self._reader)
        for part in self._run(function, tasks, [part.rows for _, part in tasks], "encoding"):
            for name, each in part.items():
                counts[name].merge(each)
        for log in self.logs.all:
            log.check_unchanged()
        folder.mkdir(exist_ok=True)
        layout = FeaturePipeline.load(state, memories=False).layout
        (folder / "layout.json").write_text(layout.to_json(), encoding="utf-8")
        return counts

    def _run(
        self, function: Callable[[Any], Result], tasks: Sequence[Any], sizes: Sequence[int], what: str
    ) -> Iterator[Result]:
        if not tasks:
            return
        with bar() as progress:
            task = progress.add_task(what, total=sum(sizes))
            for result, size in zip(self._engine.map(function, tasks), sizes, strict=True):
                progress.advance(task, size)
                yield result
