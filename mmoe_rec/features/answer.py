"""Second step of a feature build: each partition of keys answers what rows ask a counter or history, point in time.

A partition holds all events of its keys and all look-ups of them, so no partition needs another one. One that is too
large for memory, as a key may have most of a log's rows, is taken in stretches of time: the memory, compacted to what
later requests can ask for, is carried from one to the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmoe_rec.features.encoded import Ragged, join
from mmoe_rec.features.encoder import Answers, MemoryEncoder, arrived, shortened
from mmoe_rec.features.events import LookUps, known_at
from mmoe_rec.features.exchange import Exchange, key_range
from mmoe_rec.features.learn import Window, events_of, label_of, look_ups_of
from mmoe_rec.features.memory import Memory
from mmoe_rec.features.pipeline import FeaturePipeline, in_any, in_window, read_memory, write_memory

ROWS_PER_BLOCK = 131_072


@dataclass(frozen=True)
class AnswerJob:
    """What the tasks of this step share.

    state: folder of the fitted vocabularies; before: folder with the memories to go on from, or None; windows: of the
    splits; training: request times whose answers make statistics, None where these are at hand; memories: folder that
    gets what requests at `end` or later can ask for; blocks: number of blocks of `ROWS_PER_BLOCK` rows in the log;
    rows_in_memory: of a partition at a time.
    """

    state: Path
    before: Path | None
    windows: Mapping[str, Window]
    training: Window | None
    memories: Path
    end: int
    scratch: Path
    partitions: int
    blocks: int
    rows_in_memory: int

    @property
    def events(self) -> Exchange:
        """Where events and look-ups come from."""
        return Exchange(self.scratch / "events", self.partitions)

    @property
    def answers(self) -> Exchange:
        """Where answers go: by block of rows."""
        return answers_in(self.scratch, self.blocks)


def answers_in(scratch: Path, blocks: int) -> Exchange:
    """Where answers lie in a build's folder: by block of rows."""
    return Exchange(scratch / "answers", blocks)


@dataclass(frozen=True)
class Partition:
    """A group of counters and histories that ask by the same key, a partition of its keys, and the rows sent there."""

    group: str
    number: int
    rows: int


def answer_partition(job: AnswerJob, partition: Partition) -> dict[str, dict[str, Any]]:
    """Answers a partition's look-ups and keeps its part of the memories; gives counts of each feature's answers."""
    encoders = {encoder.name: encoder for encoder in fitted(job.state).key_groups[partition.group]}
    counting = FeaturePipeline(fitted(job.state).schema).memory_encoders
    memories = {name: _memory_before(job, encoder, partition) for name, encoder in encoders.items()}
    edges = _edges(job, list(encoders.values()), partition)
    for turn, window in enumerate(pairwise([None, *edges, None])):
        look_ups = _LookUpsOfStretch.read(job, list(encoders.values()), partition.number, window)
        found: dict[str, np.ndarray | Ragged] = {}
        for name, encoder in encoders.items():
            memory = memories.pop(name)
            if turn:
                memory = encoder.compacted(memory, edges[turn - 1])
            events = look_ups.events(encoder, window) if encoder.label else _events(job, encoder, partition, window)
            if events is not None:
                memory = encoder.extended(memory, events, in_order=encoder.label is not None)
            if len(look_ups.asked):
                answers = arrived(shortened(encoder.answers(memory, look_ups.asked)), look_ups.asked)
                found |= answers
                if job.training is not None and counting[name].answer_counts:
                    inside = np.flatnonzero(in_window(look_ups.times, job.training))
                    counting[name].learn_answers(_take(answers, inside))
            if window[1] is None:
                memory = encoder.compacted(memory, job.end)
                write_memory(memory, job.memories, name, partition.number)
            else:
                memories[name] = memory
        if found:
            table, block = _to_table(look_ups.rows, found), look_ups.rows // ROWS_PER_BLOCK
            job.answers.send(partition.group, (partition.number, turn), table, block)
    return {name: counting[name].answer_counts for name in encoders}


def fitted(state: Path) -> FeaturePipeline:
    """The pipeline saved in a folder, without memories; kept for the next task of this process."""
    return _fitted(state, (state / "pipeline.json").stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _fitted(state: Path, written: int) -> FeaturePipeline:
    return FeaturePipeline.load(state, memories=False)


def _memory_before(job: AnswerJob, encoder: MemoryEncoder[Any], partition: Partition) -> Memory:
    if job.before is None:
        return encoder.memory
    least, end = key_range(partition.number, job.partitions)
    inside = pc.field("key") >= pa.scalar(least, pa.uint64())
    if end < 2**64:
        inside &= pc.field("key") < pa.scalar(end, pa.uint64())
    return read_memory(encoder, job.before, inside)


@dataclass(frozen=True)
class _LookUpsOfStretch:
    """What is asked within a stretch of time, and what rows were labelled that become known in it.

    asked: N look-ups by rows of the splits; rows, times: (N,) int64 of each, in the order in which they arrived;
    labelled: rows sorted by key and time; labels: by task, (L,) beside `labelled`.
    """

    asked: LookUps
    rows: np.ndarray
    times: np.ndarray
    labelled: LookUps
    labels: Mapping[str, np.ndarray]

    @staticmethod
    def read(
        job: AnswerJob, encoders: Sequence[MemoryEncoder[Any]], partition: int, window: Window
    ) -> _LookUpsOfStretch:
        """The look-ups that were sent to a partition of a group of encoders."""
        matures_after = {encoder.matures_after for encoder in encoders if encoder.label is not None}
        tables = []
        for table in job.events.receive(look_ups_of(encoders[0].name), partition):
            time = table["time"].to_numpy()
            needed = in_window(time, window)
            for each in matures_after:
                needed |= in_window(known_at(time, each), window)
            tables.append(table if needed.all() else table.filter(pa.array(needed)))
        together = _together(tables)
        if together is None:
            none = np.empty(0, np.int64)
            nothing = LookUps.sort(np.empty(0, np.uint64), none)
            return _LookUpsOfStretch(nothing, none, none, nothing, {})
        columns = {name: together[name].to_numpy() for name in together.column_names}
        time = columns["time"]
        everything = LookUps.sort(columns["key"], time)
        tasks = {encoder.label for encoder in encoders if encoder.label is not None}
        labels = {task: columns[label_of(task)][everything.order] for task in tasks}
        wanted = in_any(time, job.windows.values()) & in_window(time, window)
        asked = everything.where(wanted)
        return _LookUpsOfStretch(asked, columns["row"][wanted], time[wanted], everything, labels)

    def events(self, encoder: MemoryEncoder[Any], window: Window) -> pa.Table | None:
        """Events that become known in the stretch, sorted."""
        if not len(self.labelled):
            return None
        labels = self.labels[encoder.label or ""]
        return _within(encoder.labelled(self.labelled.runs.key, self.labelled.time, labels), window)


def _events(job: AnswerJob, encoder: MemoryEncoder[Any], partition: Partition, window: Window) -> pa.Table | None:
    """Events of a counter or history that become known in a stretch of time."""
    events = job.events.receive(events_of(encoder.name), partition.number)
    return _together([_within(each, window) for each in events])


def _within(events: pa.Table, window: Window) -> pa.Table:
    inside = in_window(events["known"].to_numpy(), window)
    return events if inside.all() else events.filter(pa.array(inside))


def _together(tables: list[pa.Table]) -> pa.Table | None:
    tables = [table for table in tables if table.num_rows]
    return pa.concat_tables(tables, promote_options="permissive").combine_chunks() if tables else None


def _edges(job: AnswerJob, encoders: Sequence[MemoryEncoder[Any]], partition: Partition) -> list[int]:
    """Moments that divide a partition into about equal stretches that fit into memory, from a sample of its times."""
    count = -(-partition.rows // job.rows_in_memory)
    if count <= 1:
        return []
    channels = [(events_of(encoder.name), "known") for encoder in encoders if encoder.label is None]
    samples = [
        table[column].to_numpy()[:: 1 + count]
        for channel, column in [(look_ups_of(partition.group), "time"), *channels]
        for table in job.events.receive(channel, partition.number)
    ]
    times = np.sort(np.concatenate(samples))
    return np.unique(times[np.arange(1, count) * len(times) // count]).tolist()


def _to_table(rows: np.ndarray, answers: Answers) -> pa.Table:
    columns = {"row": pa.array(rows)}
    for name, each in answers.items():
        if isinstance(each, Ragged):
            values = pa.array(each.values.astype(np.int32))
            columns[name] = pa.ListArray.from_arrays(pa.array(each.offsets.astype(np.int32)), values)
        else:
            columns[name] = pa.array(each)
    return pa.table(columns)


class AnswerReader:
    """Gives rows, read in order, the answers of counters and histories, block by block."""

    def __init__(self, answers: Exchange, groups: Sequence[str]) -> None:
        self._exchange, self._groups = answers, groups
        self._block = -1
        self._at_hand: Answers = {}

    def of(self, first: int, wanted: np.ndarray) -> Answers:
        """Answers for the rows from number `first` of the log on that are `wanted`, (N,) bool with any true."""
        rows = first + np.flatnonzero(wanted)
        parts = []
        for block in range(rows[0] // ROWS_PER_BLOCK, rows[-1] // ROWS_PER_BLOCK + 1):
            start = block * ROWS_PER_BLOCK
            inside = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + ROWS_PER_BLOCK)] - start
            if len(inside):
                parts.append(_take(self._load(block), inside))
        return parts[0] if len(parts) == 1 else {name: join([part[name] for part in parts]) for name in parts[0]}

    def _load(self, block: int) -> Answers:
        if block != self._block:
            answers: dict[str, np.ndarray | Ragged] = {}
            for group in self._groups:
                answers |= _by_row(list(self._exchange.receive(group, block)), block * ROWS_PER_BLOCK)
            self._block, self._at_hand = block, answers
        return self._at_hand


def _by_row(tables: list[pa.Table], start: int) -> Answers:
    """Answers of a block whose first row is number `start`, at the place of each row; rows without one may be left."""
    answers: dict[str, np.ndarray | Ragged] = {}
    places = [table["row"].to_numpy() - start for table in tables]
    for field in list(tables[0].schema)[1:] if tables else ():
        if pa.types.is_list(field.type):
            columns = [table[field.name].combine_chunks() for table in tables]
            lengths = np.concatenate([each.value_lengths().to_numpy(zero_copy_only=False) for each in columns])
            values = np.concatenate([each.flatten().to_numpy() for each in columns]).astype(np.int64)
            order = np.full(ROWS_PER_BLOCK, -1)
            order[np.concatenate(places)] = np.arange(len(lengths))
            # Rows without an answer take the empty list that is appended.
            answers[field.name] = Ragged(values, np.append(lengths, 0).astype(np.int32)).take(order)
        else:
            values = np.empty(ROWS_PER_BLOCK, np.float32)
            for place, table in zip(places, tables, strict=True):
                values[place] = table[field.name].to_numpy()
            answers[field.name] = values
    return answers


def _take(answers: Answers, rows: np.ndarray) -> Answers:
    if len(rows) and len(rows) == rows[-1] - rows[0] + 1:  # rows that follow each other need no copy
        start, stop = int(rows[0]), int(rows[-1]) + 1
        return {
            name: each.slice(start, stop) if isinstance(each, Ragged) else each[start:stop]
            for name, each in answers.items()
        }
    return {name: each.take(rows) if isinstance(each, Ragged) else each[rows] for name, each in answers.items()}
