"""Second step of a feature build: each partition of keys answers what rows ask a counter or history, point in time.

A partition holds all events of its keys and all look-ups of them, so no partition needs another one. One that is too
large for memory, as a key may have most of a log's rows, is taken in stretches of time: the memory, compacted to what
later requests can ask for, is carried from one to the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmoe_rec.features.encoded import Ragged
from mmoe_rec.features.encoder import Answers, MemoryEncoder
from mmoe_rec.features.exchange import Exchange, key_range, write_arrow
from mmoe_rec.features.learn import Window, events_of, look_ups_of
from mmoe_rec.features.memory import Memory
from mmoe_rec.features.pipeline import FeaturePipeline, in_window, memory_file, memory_floor

ROWS_PER_BLOCK = 131_072


@dataclass(frozen=True)
class AnswerJob:
    """What the tasks of this step share.

    state: folder of the fitted vocabularies; before: folder with the memories to go on from, or None; training: request
    times whose answers make statistics, None where these are at hand; end: moment as of which memories are kept;
    blocks: number of blocks of `ROWS_PER_BLOCK` rows in the log; rows_in_memory: of a partition at a time.
    """

    state: Path
    before: Path | None
    training: Window | None
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
        return Exchange(self.scratch / "answers", self.blocks)

    def memory_part(self, feature: str, partition: int) -> Path:
        """Where a partition's part of the memory that is kept goes."""
        return self.scratch / "memories" / feature / f"{partition:06d}.arrow"


@dataclass(frozen=True)
class Partition:
    """A counter or history, a partition of its keys, and the rows that were sent there."""

    feature: str
    number: int
    rows: int


def answer_partition(job: AnswerJob, partition: Partition) -> tuple[str, dict[str, Any], int | None]:
    """Answers a partition's look-ups; gives the feature, the counts of its answers, and the floor of its memory."""
    encoder = fitted(job.state).memory_encoders[partition.feature]
    counting = FeaturePipeline(fitted(job.state).schema).memory_encoders[partition.feature]
    memory = _memory_before(job, encoder, partition)
    for turn, stretch in enumerate(_stretches(job, partition)):
        if turn:
            memory = encoder.compacted(memory, stretch.start)
        if stretch.events is not None:
            memory = encoder.extended(memory, stretch.events)
        if stretch.look_ups is None:
            continue
        times = stretch.look_ups["time"].to_numpy()
        answers = encoder.answers(memory, stretch.look_ups["key"].to_numpy(), times)
        rows = stretch.look_ups["row"].to_numpy()
        if job.training is not None:
            inside = in_window(times, job.training)
            counting.learn_answers(answers if inside.all() else _only(answers, inside))
        job.answers.send(partition.feature, (partition.number, turn), _to_table(rows, answers), rows // ROWS_PER_BLOCK)
    memory = encoder.compacted(memory, job.end)
    write_arrow(memory.to_table(), job.memory_part(partition.feature, partition.number))
    return partition.feature, counting.answer_counts, memory.floor


@lru_cache(maxsize=1)
def fitted(state: Path) -> FeaturePipeline:
    """The pipeline saved in a folder, without memories; kept for the next task of this process."""
    return FeaturePipeline.load(state, memories=False)


def _memory_before(job: AnswerJob, encoder: MemoryEncoder[Any], partition: Partition) -> Memory:
    if job.before is None:
        return encoder.memory
    path = job.before / memory_file(partition.feature)
    least, end = key_range(partition.number, job.partitions)
    inside = pc.field("key") >= pa.scalar(least, pa.uint64())
    if end < 2**64:
        inside &= pc.field("key") < pa.scalar(end, pa.uint64())
    return encoder.memory_from(pq.read_table(path, filters=inside), memory_floor(pq.read_schema(path)))


@dataclass(frozen=True)
class Stretch:
    """Events that became known and look-ups that were made in a stretch of time that begins at `start`."""

    start: int
    events: pa.Table | None
    look_ups: pa.Table | None


def _stretches(job: AnswerJob, partition: Partition) -> Iterator[Stretch]:
    events, look_ups = events_of(partition.feature), look_ups_of(partition.feature)
    count = -(-partition.rows // job.rows_in_memory)
    if count <= 1:
        yield Stretch(0, *(job.events.receive_all(channel, partition.number) for channel in (events, look_ups)))
        return
    edges = _edges(job, partition, count)
    for start, end in zip([None, *edges], [*edges, None], strict=True):
        parts = []
        for channel, column in ((events, "known"), (look_ups, "time")):
            tables = (
                table.filter(pa.array(in_window(table[column].to_numpy(), (start, end))))
                for table in job.events.receive(channel, partition.number)
            )
            found = [table for table in tables if table.num_rows]
            parts.append(pa.concat_tables(found, promote_options="permissive").combine_chunks() if found else None)
        yield Stretch(start or 0, *parts)


def _edges(job: AnswerJob, partition: Partition, count: int) -> list[int]:
    """Moments that divide a partition into about `count` equal stretches, from a sample of its times."""
    samples = [
        table[column].to_numpy()[:: 1 + count]
        for channel, column in ((events_of(partition.feature), "known"), (look_ups_of(partition.feature), "time"))
        for table in job.events.receive(channel, partition.number)
    ]
    times = np.sort(np.concatenate(samples))
    return np.unique(times[np.arange(1, count) * len(times) // count]).tolist()


def _only(answers: Answers, rows: np.ndarray) -> Answers:
    places = np.flatnonzero(rows)
    return {name: each.take(places) if isinstance(each, Ragged) else each[places] for name, each in answers.items()}


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
        self._at_hand: dict[str, pa.Table | None] = {}

    def of(self, first: int, wanted: np.ndarray) -> dict[str, Answers]:
        """Answers for the rows from number `first` of the log on that are `wanted`, (N,) bool with any true."""
        rows = first + np.flatnonzero(wanted)
        blocks = range(rows[0] // ROWS_PER_BLOCK, rows[-1] // ROWS_PER_BLOCK + 1)
        tables = [self._load(block) for block in blocks]
        return {feature: _select([table[feature] for table in tables], rows) for feature in self._features}

    def _load(self, block: int) -> dict[str, pa.Table | None]:
        if block != self._block:
            self._at_hand = {}
            for feature in self._features:
                table = self._exchange.receive_all(feature, block)
                self._at_hand[feature] = None if table is None else _in_order(table)
            self._block = block
        return self._at_hand


def _in_order(table: pa.Table) -> pa.Table:
    """The rows of a block by their number."""
    row = table["row"].to_numpy()
    if (row[1:] > row[:-1]).all():
        return table
    first = row.min()
    if int(row.max()) - int(first) + 1 > len(row) or any(map(pa.types.is_nested, table.schema.types)):
        return table.take(pa.array(np.argsort(row)))
    # No number is missing, so each value's place is known: much faster than to sort.
    place = row - first
    columns = {}
    for name in table.column_names:
        columns[name] = np.empty(len(row), table[name].type.to_pandas_dtype())
        columns[name][place] = table[name].to_numpy()
    return pa.table(columns)


def _select(tables: list[pa.Table | None], rows: np.ndarray) -> Answers:
    table = pa.concat_tables([each for each in tables if each is not None]).combine_chunks()
    start, end = np.searchsorted(table["row"].to_numpy(), [rows[0], rows[-1] + 1])
    table = table.slice(start, end - start)
    assert np.array_equal(table["row"].to_numpy(), rows), "every row has one answer"
    answers: dict[str, np.ndarray | Ragged] = {}
    for name in table.column_names[1:]:
        column = table[name].combine_chunks()
        if pa.types.is_list(column.type):
            lengths = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int32)
            answers[name] = Ragged(column.flatten().to_numpy().astype(np.int64), lengths)
        else:
            answers[name] = column.to_numpy()
    return answers
