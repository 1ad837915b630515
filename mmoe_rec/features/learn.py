"""First step of a feature build: reads parts of the log, counts, and sends events and look-ups to their partitions.

What is counted (ids, histograms of numbers, first and last times, latest attributes) is small and merged in any order.
Counters and histories are not counted here: a row's events and its look-up go, by the hash of the key that they are
about, to one partition each, where the next step answers them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from mmoe_rec.features.encoder import Counts
from mmoe_rec.features.exact import units_of
from mmoe_rec.features.exchange import Exchange, partition_of
from mmoe_rec.features.hashing import combine
from mmoe_rec.features.latest import LatestParts
from mmoe_rec.features.log import ROWS_PER_PART, BadFile, EventReader, LogPart, LogReader
from mmoe_rec.features.pipeline import FeaturePipeline, in_any, in_window
from mmoe_rec.features.requests import OneTimeReader
from mmoe_rec.features.rows import LogRows
from mmoe_rec.schema import Schema

Window = tuple[int | None, int | None]
Reader = LogReader | OneTimeReader | EventReader
DUPLICATES = "duplicates"


def events_of(feature: str) -> str:
    """Channel of what a counter or history remembers."""
    return f"events.{feature}"


def look_ups_of(group: str) -> str:
    """Channel of what rows ask a group of counters and histories, see `FeaturePipeline.key_groups`."""
    return f"look_ups.{group}"


def label_of(task: str) -> str:
    """Column of a look-up that holds the label by which its row is an event."""
    return f"label.{task}"


@dataclass(frozen=True)
class LearnJob:
    """What the tasks of this step share.

    windows: request times of each split, microseconds; exchange: where events and look-ups go; statistics: whether
    vocabularies and statistics are learnt (or are at hand already); duplicates: whether to look for rows that occur
    twice.
    """

    schema: Schema
    windows: Mapping[str, Window]
    exchange: Exchange
    statistics: bool
    duplicates: bool


@dataclass
class Learnt:
    """What was learnt of parts of the log; parts are merged in any order.

    counts, key_types, label_units: as in `FeaturePipeline`; first, last: request times, with the number of a row of
    each; rows: of each split; users, candidates: latest attributes; sent: channel -> (partitions,) int64 rows sent to
    each partition; bad: files that could not be read.
    """

    counts: dict[str, Counts] = field(default_factory=dict)
    key_types: dict[str, str] = field(default_factory=dict)
    label_units: dict[str, set[int]] = field(default_factory=dict)
    first: tuple[int, int] = (np.iinfo(np.int64).max, 0)
    last: tuple[int, int] = (np.iinfo(np.int64).min, 0)
    rows: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    users: LatestParts | None = None
    candidates: LatestParts | None = None
    sent: dict[str, np.ndarray] = field(default_factory=dict)
    bad: list[BadFile] = field(default_factory=list)

    def merge(self, other: Learnt) -> None:
        """Adds what was learnt of other parts."""
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
        self.users = _merged(self.users, other.users)
        self.candidates = _merged(self.candidates, other.candidates)
        for channel, rows in other.sent.items():
            self.sent[channel] = self.sent[channel] + rows if channel in self.sent else rows
        self.bad += other.bad


def _merged(one: LatestParts | None, other: LatestParts | None) -> LatestParts | None:
    if one is None or other is None:
        return one or other
    one.merge(other)
    return one


def learn_part(job: LearnJob, readers: Mapping[str | None, Reader], task: tuple[str | None, LogPart]) -> Learnt:
    """Learns a part of the log of events of that name, or of the interaction log (None)."""
    source, part = task
    reader = readers[source]
    return _learn_log(job, reader, part) if source is None else _learn_events(job, reader, source, part)


def _learn_log(job: LearnJob, reader: Reader, part: LogPart) -> Learnt:
    schema = job.schema
    pipeline, learnt = FeaturePipeline(schema), Learnt()
    learnt.users = LatestParts(schema, "user")
    learnt.candidates = LatestParts(schema, "candidate")
    sender = _Sender(job, part)
    row = part.start
    try:
        for rows in reader.read(part):
            times = rows.times()
            learnt.first = min(learnt.first, (int(times.min()), row + int(times.argmin())))
            learnt.last = max(learnt.last, (int(times.max()), row + int(times.argmax())))
            for split, window in job.windows.items():
                learnt.rows[split] += int(in_window(times, window).sum())
            learnt.users.add(rows)
            learnt.candidates.add(rows)
            _learn_statistics(job, pipeline, rows)
            sender.add(pipeline, rows, row)
            row += len(rows)
    except BadFile as error:
        return Learnt(bad=[error])
    sender.flush()
    learnt.counts = pipeline.counts if job.statistics else {}
    learnt.key_types, learnt.label_units, learnt.sent = pipeline.key_types, pipeline.label_units, sender.sent
    return learnt


def _learn_statistics(job: LearnJob, pipeline: FeaturePipeline, rows: LogRows) -> None:
    pipeline.learn_types(rows)
    if job.statistics:
        start, end = job.windows["train"]
        assert end is not None
        inside = rows.filter(in_window(rows.times(), (start, end)))
        if len(inside):
            pipeline.learn(inside, end)


def _learn_events(job: LearnJob, reader: Reader, source: str, part: LogPart) -> Learnt:
    pipeline = FeaturePipeline(job.schema)
    sender = _Sender(job, part, source)
    try:
        for rows in reader.read(part):
            sender.add(pipeline, rows, None)
    except BadFile as error:
        return Learnt(bad=[error])
    sender.flush()
    return Learnt(sent=sender.sent)


class _Sender:
    """Sends a part's events and look-ups, many rows at a time.

    source: the log of events that the part belongs to, None for the interaction log. A channel has one source.
    """

    def __init__(self, job: LearnJob, part: LogPart, source: str | None = None) -> None:
        self.job, self.part, self.source = job, part, source
        self.sent: dict[str, np.ndarray] = {}
        self._waiting: dict[str, list[pa.Table]] = defaultdict(list)
        self._rows = 0
        self._turn = 0

    def add(self, pipeline: FeaturePipeline, rows: LogRows, first_row: int | None) -> None:
        """Takes rows; `first_row` is the number of the first one where they are of the interaction log."""
        if first_row is not None:
            self._add_look_ups(pipeline, rows, first_row)
        for name, encoder in pipeline.memory_encoders.items():
            if encoder.source == self.source and encoder.label is None:
                self._waiting[events_of(name)].append(encoder.events(rows))
        self._rows += len(rows)
        # A part may be larger than usual: a row group is never divided.
        if self._rows >= ROWS_PER_PART:
            self.flush()

    def _add_look_ups(self, pipeline: FeaturePipeline, rows: LogRows, first_row: int) -> None:
        number, times = np.arange(first_row, first_row + len(rows)), rows.times()
        if self.job.duplicates:
            candidate = rows.hashes([rows.schema.columns.candidate])
            key = combine([rows.request_hashes(), candidate])
            self._waiting[DUPLICATES].append(pa.table({"key": key, "row": number}))
        wanted = np.flatnonzero(in_any(times, self.job.windows.values()))
        labels: dict[str, np.ndarray] = {}
        for name, group in pipeline.key_groups.items():
            look_ups = {"key": group[0].keys(rows), "time": times, "row": number}
            labelled = {encoder.label: encoder for encoder in group if encoder.label is not None}
            for task, encoder in labelled.items():
                if task not in labels:
                    labels[task] = encoder.labels(rows)
                    if labels[task].dtype == np.float64:
                        pipeline.learn_units({task: units_of(labels[task])})
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
