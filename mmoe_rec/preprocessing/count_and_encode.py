"""First and last step of a feature build, whose tasks read parts of the log.

The first step counts, and sends events and look-ups to their partitions. What is counted (ids, histograms of numbers,
first and last times, latest attributes) is small and merged in any order. Counters and histories are not counted here:
a row's events and its look-up go, by the hash of the key that they are about, to one partition each, where the next
step makes the look-ups.

The last step encodes the rows of each split into Parquet files that training and evaluation read.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.errors import UserError
from mmoe_rec.features.latest_values import LatestRole, LatestValues
from mmoe_rec.features.layout import Layout, arrow_columns, label_types
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log.checks import format_time
from mmoe_rec.log.reader import ROWS_PER_PART, Log, LogPart, LogReader
from mmoe_rec.log.rows import LogRows, compute_labels, pending_labels
from mmoe_rec.point_in_time.arrays import concat_tables
from mmoe_rec.point_in_time.join import Window, add_level, in_any_window, in_window
from mmoe_rec.preprocessing.look_up import (
    ROW_KEYS_CHANNEL,
    Exchange,
    ResultExchange,
    ResultReader,
    assign_partitions,
    events_channel,
    label_column,
    load_pipeline,
    lookups_channel,
)
from mmoe_rec.settings.schema import Schema

_ROLES: tuple[LatestRole, ...] = get_args(LatestRole)
_YEAR = 365 * 86_400_000_000


@dataclass(frozen=True)
class CountJob:
    """What the tasks of this step share.

    windows: request times of each split, microseconds; exchange: where events and look-ups go; statistics: whether
    vocabularies and statistics are counted (or are known already); duplicates: whether requests and candidates are
    sent.
    """

    schema: Schema
    windows: Mapping[str, Window]
    exchange: Exchange
    statistics: bool
    duplicates: bool


@dataclass
class LogCounts:
    """Counts of parts of the log. Parts are merged in any order.

    Attributes:
        counts: Counts of each feature, as in `FeaturePipeline`.
        key_types: Types of the keys, as in `FeaturePipeline`.
        first: First request time, microseconds.
        last: Last request time, microseconds.
        rows: Split -> its rows.
        rows_by_log: Log of events, None for the interaction log -> its rows.
        latest: Role -> latest attributes of its users or candidates.
        sent: Channel -> rows sent to each partition, shape (partitions,), int64.
        spans: Log of events or None, and file -> first and last time of the file's rows, microseconds.
    """

    counts: dict[str, Any] = field(default_factory=dict)
    key_types: dict[str, str] = field(default_factory=dict)
    first: int = np.iinfo(np.int64).max
    last: int = np.iinfo(np.int64).min
    rows: Counter[str] = field(default_factory=Counter)
    rows_by_log: Counter[str | None] = field(default_factory=Counter)
    latest: dict[LatestRole, tuple[LatestValues, ...]] = field(default_factory=dict)
    sent: dict[str, np.ndarray] = field(default_factory=dict)
    spans: dict[tuple[str | None, str], tuple[int, int]] = field(default_factory=dict)

    def merge(self, other: "LogCounts") -> None:
        """Adds what was counted of other parts."""
        for name, counts in other.counts.items():
            if name in self.counts:
                self.counts[name].merge(counts)
            else:
                self.counts[name] = counts
        self.key_types |= other.key_types
        self.first, self.last = min(self.first, other.first), max(self.last, other.last)
        self.rows.update(other.rows)
        self.rows_by_log.update(other.rows_by_log)
        self.add_latest(other.latest)
        for channel, rows in other.sent.items():
            self.sent[channel] = self.sent[channel] + rows if channel in self.sent else rows
        for file, span in other.spans.items():
            mine = self.spans.get(file, span)
            self.spans[file] = min(mine[0], span[0]), max(mine[1], span[1])

    def add_latest(self, latest: Mapping[LatestRole, Sequence[LatestValues]]) -> None:
        """Adds attributes of users and candidates."""
        for role, parts in latest.items():
            for each in parts:
                self.latest[role] = add_level(self.latest.get(role, ()), each, LatestValues.merged)

    def load_latest(self, folder: Path, schema: Schema) -> None:
        """Adds the latest attributes that `save_latest` wrote."""
        columns = schema.columns
        self.add_latest({role: (LatestValues.load(folder, role, getattr(columns, role)),) for role in _ROLES})

    def save_latest(self, folder: Path) -> None:
        """Writes the latest attributes of users and candidates."""
        for role, parts in self.latest.items():
            LatestValues.merge_all(parts).save(folder, role)


def check_time_units(log: Log, counted: LogCounts) -> None:
    """Raise UserError if some times are in 1970 and others are not, as they have different units."""
    if counted.first < _YEAR and counted.last > 20 * _YEAR:
        raise UserError(
            f"column '{log.schema.columns.time}' of the log '{log.source}' goes from {format_time(counted.first)} to "
            f"{format_time(counted.last)}. Write all times in one unit, the one in columns.time_unit."
        )


def count_part(job: CountJob, readers: Mapping[str | None, LogReader], task: tuple[str | None, LogPart]) -> LogCounts:
    """Counts a part of the log of events of that name, or of the interaction log (None)."""
    source, part = task
    pipeline, counted, spans = FeaturePipeline(job.schema), LogCounts(), dict[str, tuple[int, int]]()
    sender = _Sender(job, part, source)
    start, train_end = job.windows["train"] if job.statistics else (None, 0)
    for rows in readers[source].read(part, spans):
        counted.rows_by_log[source] += len(rows)
        if source is None:
            times = rows.times()
            counted.first, counted.last = min(counted.first, int(times.min())), max(counted.last, int(times.max()))
            for split, window in job.windows.items():
                counted.rows[split] += int(in_window(times, window).sum())
            counted.add_latest({role: (LatestValues.from_rows(rows, role),) for role in _ROLES})
            pipeline.record_key_types(rows)
            assert train_end is not None
            if job.statistics and len(learnt := rows.filter(in_window(times, (start, train_end)))):
                pipeline.partial_fit(learnt, train_end)
        sender.add(pipeline, rows)
    sender.flush()
    if source is None:
        counted.counts, counted.key_types = pipeline.counts if job.statistics else {}, pipeline.key_types
    counted.sent = sender.sent
    counted.spans = {(source, uri): span for uri, span in spans.items()}
    return counted


class _Sender:
    """Sends events and look-ups of a part of a log of events of name `source`, None for the interaction log."""

    def __init__(self, job: CountJob, part: LogPart, source: str | None) -> None:
        self.job, self.part, self.source = job, part, source
        self.sent: dict[str, np.ndarray] = {}
        self._waiting: dict[str, list[pa.Table]] = defaultdict(list)
        self._rows = 0
        self._turn = 0

    def add(self, pipeline: FeaturePipeline, rows: LogRows) -> None:
        """Takes rows."""
        if self.source is None:
            self._add_look_ups(pipeline, rows)
        for name, encoder in pipeline.point_in_time_encoders.items():
            if encoder.source == self.source and encoder.label is None:
                self._waiting[events_channel(name)].append(encoder.events(rows))
        self._rows += len(rows)
        # A part may be larger than usual: a row group is never divided.
        if self._rows >= ROWS_PER_PART:
            self.flush()

    def _add_look_ups(self, pipeline: FeaturePipeline, rows: LogRows) -> None:
        times, number = rows.times(), rows.row_numbers
        if self.job.duplicates:
            self._waiting[ROW_KEYS_CHANNEL].append(pa.table({"key": rows.row_hashes(), "row": number}))
        wanted = np.flatnonzero(in_any_window(times, self.job.windows.values()))
        of_tasks: dict[str, np.ndarray] = {}
        for name, group in pipeline.key_groups.items():
            lookups = {"key": rows.hashes(group[0].key_columns), "time": times, "row": number}
            labelled = {encoder.label: encoder for encoder in group if encoder.label is not None}
            for task, encoder in labelled.items():
                if task not in of_tasks:
                    of_tasks[task] = encoder.labels(rows)
                lookups[label_column(task)] = of_tasks[task]
            if not labelled and len(wanted) < len(rows):
                lookups = {column: values[wanted] for column, values in lookups.items()}
            self._waiting[lookups_channel(name)].append(pa.table(lookups))

    def flush(self) -> None:
        """Writes what is waiting."""
        sender = (self.part.start, self._turn)
        for channel, tables in self._waiting.items():
            table = concat_tables(tables)
            receiver = assign_partitions(table["key"].to_numpy(), self.job.exchange.receivers)
            rows = self.job.exchange.send(channel, sender, table, receiver)
            self.sent[channel] = self.sent[channel] + rows if channel in self.sent else rows
        self._waiting.clear()
        self._rows, self._turn = 0, self._turn + 1


ROWS_PER_GROUP = 32_768


@dataclass
class SplitCounts:
    """Rows of a split, and per task the observed labels and their sum; the same with rows that weigh what their column
    of weights says, and with that / their rate of sampling; and the labels that had not matured. known_by: when labels
    must have matured to count, microseconds."""

    rows: int = 0
    observed: dict[str, int] = field(default_factory=dict)
    label_sum: dict[str, float] = field(default_factory=dict)
    row_weight: dict[str, float] = field(default_factory=dict)
    row_weighted_sum: dict[str, float] = field(default_factory=dict)
    weight: dict[str, float] = field(default_factory=dict)
    weighted_sum: dict[str, float] = field(default_factory=dict)
    pending_labels: dict[str, int] = field(default_factory=dict)
    label_cutoff: int | None = None

    def add(
        self, labels: Mapping[str, np.ndarray], given: np.ndarray, rates: np.ndarray, pending_labels: Mapping[str, int]
    ) -> None:
        """Counts the labels of N rows: task -> (N,), NaN where unobserved; given: (N,) their weights; rates: (N,) at
        which they were sampled; unmatured: task -> how many of the labels had not matured."""
        for task, values in labels.items():
            observed = ~np.isnan(values)
            found, own = values[observed], given[observed]
            weights = own / rates[observed]
            # No `@`: for a while after it BLAS keeps its threads, and the cores, busy.
            self.merge(
                SplitCounts(
                    observed={task: len(found)},
                    label_sum={task: float(found.sum())},
                    row_weight={task: float(own.sum())},
                    row_weighted_sum={task: float((own * found).sum())},
                    weight={task: float(weights.sum())},
                    weighted_sum={task: float((weights * found).sum())},
                )
            )
        self.merge(SplitCounts(rows=len(given), pending_labels=dict(pending_labels)))

    def merge(self, other: "SplitCounts") -> None:
        """Adds what another one counted."""
        self.rows += other.rows
        for name in (
            "observed",
            "label_sum",
            "row_weight",
            "row_weighted_sum",
            "weight",
            "weighted_sum",
            "pending_labels",
        ):
            mine = getattr(self, name)
            for task, each in getattr(other, name).items():
                mine[task] = mine.get(task, 0) + each


def encode_part(
    pipeline_dir: Path,
    windows: Mapping[str, Window],
    label_cutoff: Mapping[str, int],
    exchange: ResultExchange,
    encoded: Path,
    reader: LogReader,
    task: tuple[int, LogPart],
) -> dict[str, SplitCounts]:
    """Encodes part number `task[0]` of a log into `encoded`/SPLIT/part-NUMBER.parquet, one file for each split.

    pipeline_dir: folder of the fitted pipeline; windows: request times [start, end) of each split; known_by: when a
    split's labels must have matured to count (both in microseconds); exchange: results of counters and histories.
    """
    number, part = task
    pipeline, columns = load_pipeline(pipeline_dir), reader.schema.columns
    results = ResultReader(exchange, list(pipeline.key_groups))
    asked = {name for encoder in pipeline.point_in_time_encoders.values() for name in encoder.result_columns()}
    counts = {name: SplitCounts() for name in windows}
    writers = {name: _SplitWriter(encoded / name / f"part-{number:05d}.parquet") for name in windows}
    for rows in reader.read(part):
        for name, window in windows.items():
            inside = rows.filter(in_window(rows.times(), window))
            if len(inside):
                its = results.of(inside.row_numbers)
                assert asked <= its.keys(), "a memory of this process, which is empty, would be asked in their place"
                inside = LogRows(inside.table, rows.schema, its)
                labels, late = compute_labels(inside, label_cutoff[name]), pending_labels(inside, label_cutoff[name])
                weights, rates = numbers_or_ones(inside, columns.weight), numbers_or_ones(inside, columns.sampling_rate)
                counts[name].add(labels, weights, rates, late)
                writers[name].write(encode_rows(pipeline, pipeline.layout, inside, labels))
    for writer in writers.values():
        writer.close()
    return counts


def encode_rows(pipeline: FeaturePipeline, layout: Layout, rows: LogRows, labels: dict[str, np.ndarray]) -> pa.Table:
    """Encoded rows as Arrow: `id.*`, `dense.*`, `label.*` (null is unobserved), user, request, time and so on."""
    encoded = pipeline.inputs(rows)
    columns = arrow_columns(encoded.ids, encoded.dense, layout)  # a matrix of numbers would only be taken apart again
    inputs = set(columns)
    types = label_types(layout)
    for task, values in labels.items():
        columns[f"label.{task}"] = pa.array(values, types[task], mask=np.isnan(values))
    names = rows.schema.columns
    columns["user"], columns["candidate"] = rows.column(names.user), rows.column(names.candidate)
    columns["request"], columns["time"] = rows.requests(), rows.column(names.time)
    columns["sampling_rate"] = pa.array(numbers_or_ones(rows, names.sampling_rate).astype(np.float32))
    if names.weight is not None:
        columns["weight"] = pa.array(rows.numbers(names.weight))
    # Columns declared to have no nulls are written and read faster.
    fields = [pa.field(name, column.type, nullable=name not in inputs) for name, column in columns.items()]
    return pa.table(list(columns.values()), schema=pa.schema(fields))


def numbers_or_ones(rows: LogRows, name: str | None) -> np.ndarray:
    """(N,) float64 of a column of rates or weights; 1 where the log has none."""
    return np.ones(len(rows)) if name is None else rows.numbers(name)


class _SplitWriter:
    """Writes a file in row groups of one size (the last one smaller); no rows, no file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[pa.Table] = []
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        """Appends rows."""
        self._waiting.append(table)
        rows = sum(map(len, self._waiting))
        if rows >= ROWS_PER_GROUP:
            waiting = pa.concat_tables(self._waiting)
            full = rows - rows % ROWS_PER_GROUP
            self._append(waiting.slice(0, full))
            self._waiting = [waiting.slice(full)]

    def _append(self, table: pa.Table) -> None:
        if self._writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A dictionary of inputs, which are numbers, costs time and gains little; LZ4 is read fastest.
            keys = ["user", "candidate", "request", "time", "sampling_rate"]
            options = {"compression": "lz4", "use_dictionary": keys, "write_statistics": False}
            self._writer = pq.ParquetWriter(self.path, table.schema, **options)
        self._writer.write_table(table, row_group_size=ROWS_PER_GROUP)

    def close(self) -> None:
        """Writes the last rows."""
        if any(map(len, self._waiting)):
            self._append(pa.concat_tables(self._waiting))
        if self._writer is not None:
            self._writer.close()
