"""Second step of a feature build: each partition of keys answers what rows ask a counter or history, point in time.

A partition holds all events of its keys and all look-ups of them, so no partition needs another one. One that is too
large for memory, as a key may have most of a log's rows, is taken in stretches of time: the memory, compacted to what
later requests can ask for, is carried from one to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmoe_rec.features.encoded import Ragged, join
from mmoe_rec.features.encoder import Answers, MemoryEncoder, shortened
from mmoe_rec.features.exchange import Exchange, key_range
from mmoe_rec.features.learn import Window, events_of, look_ups_of
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
    """A counter or history, a partition of its keys, and the rows that were sent there."""

    feature: str
    number: int
    rows: int


def answer_partition(job: AnswerJob, partition: Partition) -> tuple[str, dict[str, Any]]:
    """Answers a partition's look-ups and keeps its part of the memory; gives the feature and counts of its answers."""
    encoder = fitted(job.state).memory_encoders[partition.feature]
    counting = FeaturePipeline(fitted(job.state).schema).memory_encoders[partition.feature]
    memory = _memory_before(job, encoder, partition)
    for turn, stretch in enumerate(_stretches(job, encoder, partition)):
        if turn:
            memory = encoder.compacted(memory, stretch.start)
        if stretch.events is not None:
            memory = encoder.extended(memory, stretch.events)
        if stretch.look_ups is None:
            continue
        key, times, rows = (stretch.look_ups[name].to_numpy() for name in ("key", "time", "row"))
        answers = shortened(encoder.answers(memory, key, times))
        if job.training is not None and counting.answer_counts:
            inside = in_window(times, job.training)
            counting.learn_answers(_take(answers, np.flatnonzero(inside)))
        job.answers.send(partition.feature, (partition.number, turn), _to_table(rows, answers), rows // ROWS_PER_BLOCK)
    write_memory(encoder.compacted(memory, job.end), job.memories, partition.feature, partition.number)
    return partition.feature, counting.answer_counts


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
class Stretch:
    """Events that became known and look-ups that were made in a stretch of time that begins at `start`."""

    start: int
    events: pa.Table | None
    look_ups: pa.Table | None


def _stretches(job: AnswerJob, encoder: MemoryEncoder[Any], partition: Partition) -> Iterator[Stretch]:
    count = -(-partition.rows // job.rows_in_memory)
    if count <= 1:
        yield _stretch(job, encoder, partition, None, None)
        return
    edges = _edges(job, partition, count)
    for start, end in zip([None, *edges], [*edges, None], strict=True):
        yield _stretch(job, encoder, partition, start, end)


def _stretch(
    job: AnswerJob, encoder: MemoryEncoder[Any], partition: Partition, start: int | None, end: int | None
) -> Stretch:
    """Events that become known, and look-ups that are made, from `start` to before `end`."""
    events = list(job.events.receive(events_of(partition.feature), partition.number))
    look_ups = []
    for table in job.events.receive(look_ups_of(partition.feature), partition.number):
        time = table["time"].to_numpy()
        if encoder.has_labels:
            events.append(encoder.labelled(table["key"].to_numpy(), time, table["label"].to_numpy()))
        wanted = in_any(time, job.windows.values()) & in_window(time, (start, end))
        look_ups.append(table if wanted.all() else table.filter(pa.array(wanted)))
    if start is not None or end is not None:
        events = [each.filter(pa.array(in_window(each["known"].to_numpy(), (start, end)))) for each in events]
    return Stretch(start or 0, _together(events), _together(look_ups))


def _together(tables: list[pa.Table]) -> pa.Table | None:
    tables = [table for table in tables if table.num_rows]
    return pa.concat_tables(tables, promote_options="permissive").combine_chunks() if tables else None


def _edges(job: AnswerJob, partition: Partition, count: int) -> list[int]:
    """Moments that divide a partition into about `count` equal stretches, from a sample of its times."""
    samples = [
        table[column].to_numpy()[:: 1 + count]
        for channel, column in ((events_of(partition.feature), "known"), (look_ups_of(partition.feature), "time"))
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
    """Gives rows, read in order, the answers of the features, block by block."""

    def __init__(self, answers: Exchange, features: list[str]) -> None:
        self._exchange, self._features = answers, features
        self._block = -1
        self._at_hand: dict[str, Answers] = {}

    def of(self, first: int, wanted: np.ndarray) -> dict[str, Answers]:
        """Answers for the rows from number `first` of the log on that are `wanted`, (N,) bool with any true."""
        rows = first + np.flatnonzero(wanted)
        parts = []
        for block in range(rows[0] // ROWS_PER_BLOCK, rows[-1] // ROWS_PER_BLOCK + 1):
            start = block * ROWS_PER_BLOCK
            inside = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + ROWS_PER_BLOCK)] - start
            if len(inside):
                at_hand = self._load(block)
                parts.append({feature: _take(at_hand[feature], inside) for feature in self._features})
        return {feature: _joined([part[feature] for part in parts]) for feature in self._features}

    def _load(self, block: int) -> dict[str, Answers]:
        if block != self._block:
            start = block * ROWS_PER_BLOCK
            self._at_hand = {
                feature: _by_row(list(self._exchange.receive(feature, block)), start) for feature in self._features
            }
            self._block = block
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


def _joined(parts: list[Answers]) -> Answers:
    return parts[0] if len(parts) == 1 else {name: join([part[name] for part in parts]) for name in parts[0]}
