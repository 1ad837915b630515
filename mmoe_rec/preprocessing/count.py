"""First step of a feature build: reads parts of the log, counts, and sends events and look-ups to their partitions.

What is counted (ids, histograms of numbers, first and last times, latest attributes) is small and merged in any order.
Counters and histories are not counted here: a row's events and its look-up go, by the hash of the key that they are
about, to one partition each, where the next step makes the look-ups.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from mmoe_rec.features.encoder import Counts
from mmoe_rec.features.latest import LatestParts
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log.checks import BadFile
from mmoe_rec.log.reader import ROWS_PER_PART, EventReader, LogPart, LogReader, Noticed
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time.exact import units_of
from mmoe_rec.point_in_time.join import Window, in_any, in_window
from mmoe_rec.preprocessing.exchange import DUPLICATES, Exchange, events_of, label_of, look_ups_of, partition_of
from mmoe_rec.preprocessing.requests import OneTimeReader
from mmoe_rec.settings.schema import Schema

Reader = LogReader | OneTimeReader | EventReader


@dataclass(frozen=True)
class CountJob:
    """What the tasks of this step share.

    windows: request times of each split, microseconds; exchange: where events and look-ups go; statistics: whether
    vocabularies and statistics are counted (or are known already); duplicates: whether to look for rows that occur
    twice; until: microseconds of a moment from which on requests and events are read but do not count, None for none.
    """

    schema: Schema
    windows: Mapping[str, Window]
    exchange: Exchange
    statistics: bool
    duplicates: bool
    until: int | None = None


@dataclass
class Counted:
    """What was counted of parts of the log; parts are merged in any order.

    counts, key_types, label_units: as in `FeaturePipeline`; first, last: request times, with the number of a row of
    each; rows: of each split; seen: rows of the interaction log (None) and of each log of events; users, candidates:
    latest attributes; sent: channel -> (partitions,) int64 rows sent to each partition; spans: (log of events or None,
    file) -> first and last time of its rows; bad: problems of files that could not be read, in which case nothing else
    is counted of the part.
    """

    counts: dict[str, Counts] = field(default_factory=dict)
    key_types: dict[str, str] = field(default_factory=dict)
    label_units: dict[str, set[int]] = field(default_factory=dict)
    first: tuple[int, int] = (np.iinfo(np.int64).max, 0)
    last: tuple[int, int] = (np.iinfo(np.int64).min, 0)
    rows: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    seen: dict[str | None, int] = field(default_factory=lambda: defaultdict(int))
    users: LatestParts | None = None
    candidates: LatestParts | None = None
    sent: dict[str, np.ndarray] = field(default_factory=dict)
    spans: dict[tuple[str | None, str], tuple[int, int]] = field(default_factory=dict)
    bad: list[BadFile] = field(default_factory=list)

    def merge(self, other: Counted) -> None:
        """Adds what was counted of other parts."""
        for name, counts in other.counts.items():
            if name in self.counts:
                self.counts[name].merge(counts)
            else:
                self.counts[name] = counts
        self.key_types |= other.key_types
        for task, units in other.label_units.items():
            self.label_units[task] = self.label_units.get(task, set()) | units
        self.first, self.last = min(self.first, other.first), max(self.last, other.last)
        for split, count in other.rows.items():
            self.rows[split] += count
        for source, count in other.seen.items():
            self.seen[source] += count
        self.users = merged(self.users, other.users)
        self.candidates = merged(self.candidates, other.candidates)
        for channel, rows in other.sent.items():
            self.sent[channel] = self.sent[channel] + rows if channel in self.sent else rows
        for file, span in other.spans.items():
            mine = self.spans.get(file, span)
            self.spans[file] = min(mine[0], span[0]), max(mine[1], span[1])
        self.bad += other.bad


def merged(one: LatestParts | None, other: LatestParts | None) -> LatestParts | None:
    """The latest attributes of both."""
    if one is None or other is None:
        return one or other
    one.merge(other)
    return one


def count_part(job: CountJob, readers: Mapping[str | None, Reader], task: tuple[str | None, LogPart]) -> Counted:
    """Counts a part of the log of events of that name, or of the interaction log (None)."""
    source, part = task
    reader = readers[source]
    noticed = Noticed()
    if source is None:
        counted = _count_log(job, reader, part, noticed)
    else:
        counted = _count_events(job, reader, source, part, noticed)
    counted.spans = {(source, address): span for address, span in noticed.spans.items()}
    return Counted(bad=noticed.bad) if noticed.bad else counted


def _count_log(job: CountJob, reader: Reader, part: LogPart, noticed: Noticed) -> Counted:
    schema = job.schema
    pipeline, counted = FeaturePipeline(schema), Counted()
    counted.users = LatestParts(schema, "user")
    counted.candidates = LatestParts(schema, "candidate")
    sender = _Sender(job, part)
    row = part.start
    for read in reader.read(part, noticed):
        if noticed.bad:
            continue  # read on for further bad files; what is good is counted without them
        rows, number = _before(job, read, np.arange(row, row + len(read)))
        row += len(read)
        if not len(rows):
            continue
        times = rows.times()
        counted.seen[None] += len(rows)
        counted.first = min(counted.first, (int(times.min()), int(number[times.argmin()])))
        counted.last = max(counted.last, (int(times.max()), int(number[times.argmax()])))
        for split, window in job.windows.items():
            counted.rows[split] += int(in_window(times, window).sum())
        counted.users.add(rows)
        counted.candidates.add(rows)
        _count_statistics(job, pipeline, rows)
        sender.add(pipeline, rows, number)
    sender.flush()
    counted.counts = pipeline.counts if job.statistics else {}
    counted.key_types, counted.label_units, counted.sent = pipeline.key_types, pipeline.label_units, sender.sent
    return counted


def _before(job: CountJob, rows: LogRows, number: np.ndarray) -> tuple[LogRows, np.ndarray]:
    """The rows that count, of N rows, and their numbers, (N,) int64."""
    if job.until is None or (inside := rows.times() < job.until).all():
        return rows, number
    return rows.filter(inside), number[inside]


def _count_statistics(job: CountJob, pipeline: FeaturePipeline, rows: LogRows) -> None:
    pipeline.note_types(rows)
    if job.statistics:
        start, end = job.windows["train"]
        assert end is not None
        inside = rows.filter(in_window(rows.times(), (start, end)))
        if len(inside):
            pipeline.learn(inside, end)


def _count_events(job: CountJob, reader: Reader, source: str, part: LogPart, noticed: Noticed) -> Counted:
    pipeline, counted = FeaturePipeline(job.schema), Counted()
    sender = _Sender(job, part, source)
    for read in reader.read(part, noticed):
        if not noticed.bad:
            rows, _ = _before(job, read, np.arange(len(read)))
            counted.seen[source] += len(rows)
            sender.add(pipeline, rows, None)
    sender.flush()
    counted.sent = sender.sent
    return counted


class _Sender:
    """Sends a part's events and look-ups, many rows at a time.

    source: the log of events that the part belongs to, None for the interaction log. A channel has one source.
    """

    def __init__(self, job: CountJob, part: LogPart, source: str | None = None) -> None:
        self.job, self.part, self.source = job, part, source
        self.sent: dict[str, np.ndarray] = {}
        self._waiting: dict[str, list[pa.Table]] = defaultdict(list)
        self._rows = 0
        self._turn = 0

    def add(self, pipeline: FeaturePipeline, rows: LogRows, number: np.ndarray | None) -> None:
        """Takes N rows; number: (N,) int64 of each where they are of the interaction log."""
        if number is not None:
            self._add_look_ups(pipeline, rows, number)
        for name, encoder in pipeline.memory_encoders.items():
            if encoder.source == self.source and encoder.label is None:
                self._waiting[events_of(name)].append(encoder.events(rows))
        self._rows += len(rows)
        # A part may be larger than usual: a row group is never divided.
        if self._rows >= ROWS_PER_PART:
            self.flush()

    def _add_look_ups(self, pipeline: FeaturePipeline, rows: LogRows, number: np.ndarray) -> None:
        times = rows.times()
        if self.job.duplicates:
            self._waiting[DUPLICATES].append(pa.table({"key": rows.row_hashes(), "row": number}))
        wanted = np.flatnonzero(in_any(times, self.job.windows.values()))
        labels: dict[str, np.ndarray] = {}
        for name, group in pipeline.key_groups.items():
            look_ups = {"key": group[0].keys(rows), "time": times, "row": number}
            labelled = {encoder.label: encoder for encoder in group if encoder.label is not None}
            for task, encoder in labelled.items():
                if task not in labels:
                    labels[task] = encoder.labels(rows)
                    if labels[task].dtype == np.float64:
                        pipeline.note_units({task: units_of(labels[task])})
                look_ups[label_of(task)] = labels[task]
            if not labelled and len(wanted) < len(rows):
                look_ups = {column: values[wanted] for column, values in look_ups.items()}
            self._waiting[look_ups_of(name)].append(pa.table(look_ups))

    def flush(self) -> None:
        """Writes what is waiting."""
        sender = (self.part.start, self._turn)
        for channel, tables in self._waiting.items():
            table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
            receiver = partition_of(table["key"].to_numpy(), self.job.exchange.receivers)
            rows = self.job.exchange.send(channel, sender, table, receiver)
            self.sent[channel] = self.sent[channel] + rows if channel in self.sent else rows
        self._waiting.clear()
        self._rows, self._turn = 0, self._turn + 1
