"""First step of a feature build: reads parts of the log, counts, and sends events and look-ups to their partitions.

What is counted (ids, histograms of numbers, first and last times, latest attributes) is small and merged in any order.
Counters and histories are not counted here: a row's events and its look-up go, by the hash of the key that they are
about, to one partition each, where the next step makes the look-ups.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa

from mmoe_rec.errors import UserError
from mmoe_rec.features.latest import LatestRole, LatestValues
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log.checks import format_time
from mmoe_rec.log.reader import ROWS_PER_PART, Log, LogPart, LogReader
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time.arrays import join_tables
from mmoe_rec.point_in_time.join import Window, grown, in_any, in_window
from mmoe_rec.preprocessing.exchange import DUPLICATES, Exchange, events_of, label_of, look_ups_of, partition_of
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
    """What was counted of parts of the log; parts are merged in any order.

    counts, key_types: as in `FeaturePipeline`; first, last: request times, microseconds; rows: of each split; seen:
    rows of the interaction log (None) and of each log of events; latest: attributes of users and candidates; sent:
    channel -> (partitions,) int64 rows sent to each partition; spans: (log of events or None, file) -> first and last
    time of its rows.
    """

    counts: dict[str, Any] = field(default_factory=dict)
    key_types: dict[str, str] = field(default_factory=dict)
    first: int = np.iinfo(np.int64).max
    last: int = np.iinfo(np.int64).min
    rows: Counter[str] = field(default_factory=Counter)
    seen: Counter[str | None] = field(default_factory=Counter)
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
        self.seen.update(other.seen)
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
                self.latest[role] = grown(self.latest.get(role, ()), each, LatestValues.merged)

    def add_latest_of(self, folder: Path, schema: Schema) -> None:
        """Adds the latest attributes that `save_latest` wrote."""
        columns = schema.columns
        self.add_latest({role: (LatestValues.load(folder, role, getattr(columns, role)),) for role in _ROLES})

    def save_latest(self, folder: Path) -> None:
        """Writes the latest attributes of users and candidates."""
        for role, parts in self.latest.items():
            LatestValues.together(parts).save(folder, role)


def check_times(log: Log, counted: LogCounts) -> None:
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
        counted.seen[source] += len(rows)
        if source is None:
            times = rows.times()
            counted.first, counted.last = min(counted.first, int(times.min())), max(counted.last, int(times.max()))
            for split, window in job.windows.items():
                counted.rows[split] += int(in_window(times, window).sum())
            counted.add_latest({role: (LatestValues.of(rows, role),) for role in _ROLES})
            pipeline.note_types(rows)
            assert train_end is not None
            if job.statistics and len(learnt := rows.filter(in_window(times, (start, train_end)))):
                pipeline.learn(learnt, train_end)
        sender.add(pipeline, rows)
    sender.flush()
    if source is None:
        counted.counts, counted.key_types = pipeline.counts if job.statistics else {}, pipeline.key_types
    counted.sent = sender.sent
    counted.spans = {(source, address): span for address, span in spans.items()}
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
        for name, encoder in pipeline.memory_encoders.items():
            if encoder.source == self.source and encoder.label is None:
                self._waiting[events_of(name)].append(encoder.events(rows))
        self._rows += len(rows)
        # A part may be larger than usual: a row group is never divided.
        if self._rows >= ROWS_PER_PART:
            self.flush()

    def _add_look_ups(self, pipeline: FeaturePipeline, rows: LogRows) -> None:
        times, number = rows.times(), rows.row_numbers
        if self.job.duplicates:
            self._waiting[DUPLICATES].append(pa.table({"key": rows.row_hashes(), "row": number}))
        wanted = np.flatnonzero(in_any(times, self.job.windows.values()))
        of_tasks: dict[str, np.ndarray] = {}
        for name, group in pipeline.key_groups.items():
            look_ups = {"key": rows.hashes(group[0].by), "time": times, "row": number}
            labelled = {encoder.label: encoder for encoder in group if encoder.label is not None}
            for task, encoder in labelled.items():
                if task not in of_tasks:
                    of_tasks[task] = encoder.labels(rows)
                look_ups[label_of(task)] = of_tasks[task]
            if not labelled and len(wanted) < len(rows):
                look_ups = {column: values[wanted] for column, values in look_ups.items()}
            self._waiting[look_ups_of(name)].append(pa.table(look_ups))

    def flush(self) -> None:
        """Writes what is waiting."""
        sender = (self.part.start, self._turn)
        for channel, tables in self._waiting.items():
            table = join_tables(tables)
            receiver = partition_of(table["key"].to_numpy(), self.job.exchange.receivers)
            rows = self.job.exchange.send(channel, sender, table, receiver)
            self.sent[channel] = self.sent[channel] + rows if channel in self.sent else rows
        self._waiting.clear()
        self._rows, self._turn = 0, self._turn + 1
