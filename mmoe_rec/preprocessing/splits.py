"""Last step of a feature build: encodes the rows of each split into Parquet files that training and evaluation read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.errors import UserError
from mmoe_rec.features.layout import Layout, arrow_columns, label_types
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log.checks import format_time
from mmoe_rec.log.reader import LogPart, LogReader
from mmoe_rec.log.rows import LogRows, labels_of, unmatured
from mmoe_rec.point_in_time.join import Window, in_window
from mmoe_rec.preprocessing.count import LogCounts
from mmoe_rec.preprocessing.exchange import ResultExchange, ResultReader
from mmoe_rec.preprocessing.look_up import load_pipeline
from mmoe_rec.settings.log_columns import SplitColumn
from mmoe_rec.settings.schema import Schema

ROWS_PER_GROUP = 32_768


@dataclass
class SplitCounts:
    """Rows of a split, and per task the observed labels and their sum; the same with rows that weigh what their column
    of weights says, and with that / their rate of sampling; and the labels that had not matured. known_by: when labels
    must have matured to count, microseconds."""

    rows: int = 0
    observed: dict[str, int] = field(default_factory=dict)
    label_sum: dict[str, float] = field(default_factory=dict)
    given_weight: dict[str, float] = field(default_factory=dict)
    given_sum: dict[str, float] = field(default_factory=dict)
    weight: dict[str, float] = field(default_factory=dict)
    weighted_sum: dict[str, float] = field(default_factory=dict)
    unmatured: dict[str, int] = field(default_factory=dict)
    known_by: int | None = None

    def add(
        self, labels: Mapping[str, np.ndarray], given: np.ndarray, rates: np.ndarray, unmatured: Mapping[str, int]
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
                    given_weight={task: float(own.sum())},
                    given_sum={task: float((own * found).sum())},
                    weight={task: float(weights.sum())},
                    weighted_sum={task: float((weights * found).sum())},
                )
            )
        self.merge(SplitCounts(rows=len(given), unmatured=dict(unmatured)))

    def merge(self, other: "SplitCounts") -> None:
        """Adds what another one counted."""
        self.rows += other.rows
        for name in ("observed", "label_sum", "given_weight", "given_sum", "weight", "weighted_sum", "unmatured"):
            mine = getattr(self, name)
            for task, each in getattr(other, name).items():
                mine[task] = mine.get(task, 0) + each


def check_splits(counted: LogCounts, windows: Mapping[str, Window], log: str, split: SplitColumn | None = None) -> None:
    """Raises UserError where a split has no rows. split: the column that says it, None where times do."""
    for name in windows:
        if counted.rows[name] == 0 and split is not None:
            listed = ", ".join(map(repr, split.values[name]))
            raise UserError(
                f"the {name} split is empty: no row of the log '{log}' has {listed} in column '{split.column}'; "
                f"list its values under split.{name}"
            )
        if counted.rows[name] == 0:
            raise UserError(
                f"the {name} split is empty: the log '{log}' has requests from {format_time(counted.first)} to "
                f"{format_time(counted.last)}; set `split.train_end`, `split.validation_end` and `split.test_end` "
                "inside that span (and `columns.time_unit`, if these times are wrong)"
            )


def empty_split(split: str, folder: Path) -> str:
    """The sentence on features that have no rows of a split, which only an extension leaves behind."""
    return (
        f"the features in '{folder}' have no {split} rows: days were added to them, so only the new rows are encoded, "
        "and none of these lies in that split. Set `split` around the requests of the next new files before you add "
        "them with --extend, or set another `data.work`, where features are built anew from all files of the log"
    )


def check_classes(schema: Schema, counts: SplitCounts) -> None:
    """Raises UserError where a task has nothing to learn from in the training rows."""
    for name, task in schema.tasks.items():
        observed, positive = counts.observed[name], counts.label_sum[name]
        if observed == 0:
            reasons = [f"column '{task.label}' is null in all training rows"]
            if task.observed_when is not None:
                reasons.append(f"column '{task.observed_when.column}' never equals {task.observed_when.equals!r}")
            if task.given is not None:
                reasons.append(f"task '{task.given}' never happened where it has a value")
            if task.matures_after_days:
                reasons.append(f"no label had matured by split.train_end, {task.matures_after_days:g} days after it")
            raise UserError(
                f"task '{name}' has no observed label in training: {', or '.join(reasons)}; "
                "give it labels, train on a longer period, or remove the task"
            )
        if task.kind.is_binary and positive in (0, observed):
            raise UserError(
                f"task '{name}' has one class in training: all {observed} observed labels in column '{task.label}' "
                f"are {positive / observed:g}; a task needs both 0 and 1, so train on a longer period or remove it"
            )


def encode_part(
    state: Path,
    windows: Mapping[str, Window],
    known_by: Mapping[str, int],
    exchange: ResultExchange,
    encoded: Path,
    reader: LogReader,
    task: tuple[int, LogPart],
) -> dict[str, SplitCounts]:
    """Encodes part number `task[0]` of a log into `encoded`/SPLIT/part-NUMBER.parquet, one file for each split.

    state: folder of the fitted pipeline; windows: request times [start, end) of each split; known_by: when a split's
    labels must have matured to count (both in microseconds); exchange: results of counters and histories.
    """
    number, part = task
    pipeline, columns = load_pipeline(state), reader.schema.columns
    results = ResultReader(exchange, list(pipeline.key_groups))
    asked = {name for encoder in pipeline.memory_encoders.values() for name in encoder.result_columns()}
    counts = {name: SplitCounts() for name in windows}
    writers = {name: _SplitWriter(encoded / name / f"part-{number:05d}.parquet") for name in windows}
    for rows in reader.read(part):
        for name, window in windows.items():
            inside = rows.filter(in_window(rows.times(), window))
            if len(inside):
                its = results.of(inside.row_numbers)
                assert asked <= its.keys(), "a memory of this process, which is empty, would be asked in their place"
                inside = LogRows(inside.table, rows.schema, its)
                labels, late = labels_of(inside, known_by[name]), unmatured(inside, known_by[name])
                weights, rates = numbers_or_ones(inside, columns.weight), numbers_or_ones(inside, columns.sampling_rate)
                counts[name].add(labels, weights, rates, late)
                writers[name].write(encoded_table(pipeline, pipeline.layout, inside, labels))
    for writer in writers.values():
        writer.close()
    return counts


def encoded_table(pipeline: FeaturePipeline, layout: Layout, rows: LogRows, labels: dict[str, np.ndarray]) -> pa.Table:
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
