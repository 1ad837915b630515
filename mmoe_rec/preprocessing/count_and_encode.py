"""The steps `count` and `encode` of a feature build. Their tasks read parts of the log.

The step `count` counts IDs, numbers and rows, and finds the latest attributes of users and candidates. These results
are small and can be merged in any order. The step also writes the inputs of the step `look up`: events and lookups,
divided by key. The step `encode` comes last. It writes the encoded rows of each split to Parquet files.
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
    COMPARED_GROUP,
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
    """Arguments that all tasks of the step `count` share.

    Attributes:
        schema: Schema of the logs.
        windows: Request times [start, end) of each split, in microseconds.
        exchange: Files with the events and lookups for the next step.
        statistics: Whether to count IDs and numbers of training rows, to fit vocabularies and statistics.
        duplicates: Whether to write a hash of each row's request and candidate, to find repeated rows.
    """

    schema: Schema
    windows: Mapping[str, Window]
    exchange: Exchange
    statistics: bool
    duplicates: bool


@dataclass
class LogCounts:
    """Counts of a log or of a part of it.

    Attributes:
        counts: Counts for features and labels, as in `FeaturePipeline.counts`.
        key_types: Types of the key columns, as in `FeaturePipeline`.
        first: First request time, in microseconds.
        last: Last request time, in microseconds.
        rows: Number of rows of the interaction log by split.
        rows_by_log: Number of rows by name of an event log, or None for the interaction log.
        latest: Latest attributes of users and candidates by role, in levels (see `add_level`).
        sent: Number of rows sent to each partition of keys, shape (partitions,), int64, by channel of the exchange.
        spans: First and last time of a file's rows, in microseconds, by (event log or None, URI).
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
        """Add the counts of other parts."""
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
            own = self.spans.get(file, span)
            self.spans[file] = min(own[0], span[0]), max(own[1], span[1])

    def add_latest(self, latest: Mapping[LatestRole, Sequence[LatestValues]]) -> None:
        """Add latest attributes of users and candidates, by role."""
        for role, parts in latest.items():
            for part in parts:
                self.latest[role] = add_level(self.latest.get(role, ()), part, LatestValues.merged)

    def load_latest(self, folder: Path, schema: Schema) -> None:
        """Add the latest attributes of users and candidates to `latest`, from files that `save_latest` wrote.

        Args:
            folder: Folder of the files.
            schema: Schema with the columns of users and candidates.
        """
        columns = schema.columns
        self.add_latest({role: (LatestValues.load(folder, role, getattr(columns, role)),) for role in _ROLES})

    def save_latest(self, folder: Path) -> None:
        """Write the latest attributes of users and candidates to a folder."""
        for role, parts in self.latest.items():
            LatestValues.merge_all(parts).save(folder, role)


def check_time_units(log: Log, counted: LogCounts) -> None:
    """Raise UserError if some times are in 1970 and others decades later, because their units must differ.

    Args:
        log: Interaction log.
        counted: Counts of the log.
    """
    if counted.first < _YEAR and counted.last > 20 * _YEAR:
        raise UserError(
            f"column '{log.schema.columns.time}' of the log '{log.source}' goes from {format_time(counted.first)} to "
            f"{format_time(counted.last)}. Write all times in one unit, the one in columns.time_unit."
        )


def count_part(job: CountJob, readers: Mapping[str | None, LogReader], task: tuple[str | None, LogPart]) -> LogCounts:
    """Count a part of a log, and send events and lookups to the partitions of their keys.

    Args:
        job: Arguments of all tasks.
        readers: Readers by name of an event log, or None for the interaction log.
        task: Name of the event log or None, and part of this log.
    """
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
            if job.statistics and len(train_rows := rows.filter(in_window(times, (start, train_end)))):
                pipeline.partial_fit(train_rows, train_end)
        sender.add(pipeline, rows)
    sender.flush()
    if source is None:
        counted.counts, counted.key_types = pipeline.counts if job.statistics else {}, pipeline.key_types
    counted.sent = sender.sent
    counted.spans = {(source, uri): span for uri, span in spans.items()}
    return counted


class _Sender:
    """Sender of the events and lookups of one part of an event log (`source`) or of the interaction log (None)."""

    def __init__(self, job: CountJob, part: LogPart, source: str | None) -> None:
        self.job, self.part, self.source = job, part, source
        self.sent: dict[str, np.ndarray] = {}
        self._waiting: dict[str, list[pa.Table]] = defaultdict(list)
        self._rows = 0
        self._turn = 0

    def add(self, pipeline: FeaturePipeline, rows: LogRows) -> None:
        """Collect the events and lookups in `rows` for all counters and histories, and send them if they are many."""
        if self.source is None:
            self._add_lookups(pipeline, rows)
        for name, encoder in pipeline.point_in_time_encoders.items():
            if encoder.source == self.source and encoder.label is None:
                self._waiting[events_channel(name)].append(encoder.events(rows))
        self._rows += len(rows)
        # Limit the rows in memory: a part has more than ROWS_PER_PART rows if a row group of the file is larger.
        if self._rows >= ROWS_PER_PART:
            self.flush()

    def _add_lookups(self, pipeline: FeaturePipeline, rows: LogRows) -> None:
        times, number = rows.times(), rows.row_numbers
        if self.job.duplicates:
            self._waiting[ROW_KEYS_CHANNEL].append(pa.table({"key": rows.row_hashes(), "row": number}))
        wanted = np.flatnonzero(in_any_window(times, self.job.windows.values()))
        task_labels: dict[str, np.ndarray] = {}
        for name, group in pipeline.key_groups.items():
            lookups = {"key": group[0].keys(rows), "time": times, "row": number}
            labeled = {encoder.label: encoder for encoder in group if encoder.label is not None}
            for task, encoder in labeled.items():
                if task not in task_labels:
                    task_labels[task] = encoder.labels(rows)
                lookups[label_column(task)] = task_labels[task]
            if not labeled and len(wanted) < len(rows):
                lookups = {column: values[wanted] for column, values in lookups.items()}
            self._waiting[lookups_channel(name)].append(pa.table(lookups))

    def flush(self) -> None:
        """Send the collected rows."""
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
    """Counts of a split's rows and labels. Dictionaries have a value for each task or joint outcome.

    Attributes:
        rows: Number of rows.
        observed: Number of observed labels.
        label_sum: Sum of the observed labels.
        row_weight: Sum of the weights of rows with an observed label.
        row_weighted_sum: Sum of the observed labels times weight.
        weight: Sum of weight / sampling rate of rows with an observed label.
        weighted_sum: Sum of the observed labels times weight / sampling rate.
        pending_labels: Number of labels that don't count because they were not final at `label_cutoff`.
        label_cutoff: Time in microseconds. Only labels that were final at this time count as observed.
    """

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
        self, labels: Mapping[str, np.ndarray], weight: np.ndarray, rates: np.ndarray, pending_labels: Mapping[str, int]
    ) -> None:
        """Count the labels of N rows.

        Args:
            labels: Labels by task or joint outcome, shape (N,). NaN stands for an unobserved label.
            weight: Weights of the rows, shape (N,).
            rates: Sampling rates of the rows, shape (N,).
            pending_labels: Number of labels that were not final, by task.
        """
        for task, task_labels in labels.items():
            observed = ~np.isnan(task_labels)
            values, row_weights = task_labels[observed], weight[observed]
            weights = row_weights / rates[observed]
            # Don't use `@`, because the threads of BLAS keep the cores busy for a while after a product.
            self.merge(
                SplitCounts(
                    observed={task: len(values)},
                    label_sum={task: float(values.sum())},
                    row_weight={task: float(row_weights.sum())},
                    row_weighted_sum={task: float((row_weights * values).sum())},
                    weight={task: float(weights.sum())},
                    weighted_sum={task: float((weights * values).sum())},
                )
            )
        self.merge(SplitCounts(rows=len(weight), pending_labels=dict(pending_labels)))

    def merge(self, other: "SplitCounts") -> None:
        """Add other counts of the same split."""
        self.rows += other.rows
        for name, totals in vars(self).items():
            if isinstance(totals, dict):
                for task, count in getattr(other, name).items():
                    totals[task] = totals.get(task, 0) + count


def encode_part(
    pipeline_dir: Path,
    windows: Mapping[str, Window],
    label_cutoff: Mapping[str, int],
    exchange: ResultExchange,
    encoded: Path,
    reader: LogReader,
    task: tuple[int, LogPart],
) -> dict[str, SplitCounts]:
    """Encode a part of the log to the files `encoded`/SPLIT/part-NUMBER.parquet.

    Args:
        pipeline_dir: Folder of the fitted pipeline.
        windows: Request times [start, end) of each split, in microseconds.
        label_cutoff: Time in microseconds, by split. Labels that were not final at this time are unobserved.
        exchange: Values of counters and histories for each row.
        encoded: Folder for the encoded rows.
        reader: Reader of the interaction log.
        task: Number of the part and the part.

    Returns:
        Counts of each split.
    """
    number, part = task
    pipeline, columns = load_pipeline(pipeline_dir), reader.schema.columns
    results = ResultReader(exchange, [*pipeline.key_groups, COMPARED_GROUP])
    required = {name for encoder in pipeline.point_in_time_encoders.values() for name in encoder.result_columns()}
    required |= {name for encoder in pipeline.relative_encoders for name in encoder.numbers}
    counts = {name: SplitCounts() for name in windows}
    writers = {name: _SplitWriter(encoded / name / f"part-{number:05d}.parquet") for name in windows}
    for rows in reader.read(part):
        for name, window in windows.items():
            inside = rows.filter(in_window(rows.times(), window))
            if len(inside):
                inside_results = results.of(inside.row_numbers)
                assert required <= inside_results.keys(), "missing results would be computed from incomplete data"
                inside = LogRows(inside.table, rows.schema, inside_results)
                labels, late = compute_labels(inside, label_cutoff[name]), pending_labels(inside, label_cutoff[name])
                weights = _numbers_or_ones(inside, columns.weight)
                counts[name].add(labels, weights, _numbers_or_ones(inside, columns.sampling_rate), late)
                writers[name].write(encode_rows(pipeline, pipeline.layout, inside, labels))
    for writer in writers.values():
        writer.close()
    return counts


def encode_rows(pipeline: FeaturePipeline, layout: Layout, rows: LogRows, labels: dict[str, np.ndarray]) -> pa.Table:
    """Encode rows as an Arrow table.

    Args:
        pipeline: Fitted pipeline.
        layout: Layout of the inputs.
        rows: N rows of the log.
        labels: Labels by task or joint outcome, shape (N,). NaN stands for an unobserved label and becomes null.

    Returns:
        Columns `id.*`, `dense.*`, `label.*`, user, candidate, request, time, sampling_rate and, if any, weight.
    """
    encoded = pipeline.inputs(rows)
    columns = arrow_columns(encoded.ids, encoded.dense, layout)
    inputs = set(columns)
    types = label_types(layout)
    for task, values in labels.items():
        columns[f"label.{task}"] = pa.array(values, types[task], mask=np.isnan(values))
    names = rows.schema.columns
    columns["user"], columns["candidate"] = rows.column(names.user), rows.column(names.candidate)
    columns["request"], columns["time"] = rows.requests(), rows.column(names.time)
    columns["sampling_rate"] = pa.array(_numbers_or_ones(rows, names.sampling_rate).astype(np.float32))
    if names.weight is not None:
        columns["weight"] = pa.array(rows.numbers(names.weight))
    # Parquet columns that are declared without nulls are written and read faster.
    fields = [pa.field(name, column.type, nullable=name not in inputs) for name, column in columns.items()]
    return pa.table(list(columns.values()), schema=pa.schema(fields))


def _numbers_or_ones(rows: LogRows, name: str | None) -> np.ndarray:
    """Return the column `name` as numbers, or ones without a name (no sampling rates or weights in the log)."""
    return np.ones(len(rows)) if name is None else rows.numbers(name)


class _SplitWriter:
    """Writer of a Parquet file with row groups of equal size. Without rows, it creates no file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[pa.Table] = []
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        """Append rows."""
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
            # Don't use dictionaries for inputs. They are numbers, so a dictionary costs time and saves little space.
            # LZ4 is the compression that is fastest to read.
            keys = ["user", "candidate", "request", "time", "sampling_rate"]
            options = {"compression": "lz4", "use_dictionary": keys, "write_statistics": False}
            self._writer = pq.ParquetWriter(self.path, table.schema, **options)
        self._writer.write_table(table, row_group_size=ROWS_PER_GROUP)

    def close(self) -> None:
        """Write the remaining rows and close the file."""
        if any(map(len, self._waiting)):
            self._append(pa.concat_tables(self._waiting))
        if self._writer is not None:
            self._writer.close()
