"""Second step of a feature build: in each partition of keys, what counters and histories knew at the time of each row.

A partition holds all events of its keys and all look-ups of them, so no partition needs another one. A partition that
is too large for memory, as a key may have most of a log's rows, is taken in chunks of time: the memory, compacted to
what later requests can ask for, is carried from one to the next, with labels that become known later. It is read
twice, to sample its times and to write its pieces. Rows of a single moment are not divided.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmoe_rec.features.encoder import MemoryEncoder
from mmoe_rec.features.numbers import NumberHistogram
from mmoe_rec.features.pipeline import FeaturePipeline, read_memory, write_memory
from mmoe_rec.point_in_time.arrays import SharedRagged, join_tables, rebatch
from mmoe_rec.point_in_time.join import LookUps, Memory, Window, in_any, in_window
from mmoe_rec.preprocessing.exchange import Exchange, ResultExchange, events_of, key_range, label_of, look_ups_of, take

Group = Sequence[MemoryEncoder[Any]]
_ROOM = 1.2  # for pieces that are larger than the sample says


@dataclass(frozen=True)
class ReceivedRows:
    """Rows that were sent to a partition of the keys of a group of counters and histories, or to a piece of one."""

    exchange: Exchange
    number: int
    group: Group
    window: Window = (None, None)

    def receive(self, channel: str) -> Iterator[pa.Table]:
        """The rows that were sent through a channel."""
        return self.exchange.receive(channel, self.number)

    def divide(self, rows: int, rows_in_memory: int, scratch: Path) -> "Iterator[ReceivedRows]":
        """Divide the rows by time into pieces of about `rows_in_memory`, which are yielded in the order of time.

        Args:
            rows: Number of look-ups, and events of one counter or history, which are held in memory at a time.
            rows_in_memory: Wanted number of such rows in a piece.
            scratch: Folder for the pieces, which last until the iterator ends.
        """
        if rows <= rows_in_memory:
            yield self
            return
        times = {look_ups_of(self.group[0].name): "time"}
        times |= {events_of(encoder.name): "known" for encoder in self.group if encoder.label is None}
        pieces = int(_ROOM * rows / rows_in_memory) + 1
        step = 1 + pieces // 8  # more samples than pieces, so that pieces differ little in size
        samples = [table[time].to_numpy()[::step] for channel, time in times.items() for table in self.receive(channel)]
        moments = np.sort(np.concatenate(samples))
        edges = np.unique(moments[np.arange(1, pieces) * len(moments) // pieces])
        exchange = Exchange(scratch, len(edges) + 1)
        try:
            for channel, time in times.items():
                tables = rebatch(self.receive(channel), rows_in_memory)
                turns = ((table, np.searchsorted(edges, table[time].to_numpy(), "right")) for table in tables)
                exchange.send_in_turns(channel, (0, 0), turns)
            for number, window in enumerate(pairwise([None, *edges.tolist(), None])):
                yield ReceivedRows(exchange, number, self.group, window)
        finally:
            exchange.remove()


class Chunk:
    """Look-ups that are made in a window of time, and their labels, which become known in it or later.

    asked, rows, times: the look-ups of N rows that lie in one of the splits' windows, the rows' numbers, rising, and
    their times, (N,) int64; until: no later chunk asks for an earlier moment, None for the last one.
    """

    def __init__(self, received: ReceivedRows, splits: Sequence[Window]) -> None:
        self._received, self.until = received, received.window[1]
        tables = list(received.receive(look_ups_of(received.group[0].name)))
        none = np.empty(0, np.int64)
        columns = {"key": none.view(np.uint64), "time": none, "row": none}
        if tables:
            found = join_tables(tables)
            columns = {name: found[name].to_numpy() for name in found.column_names}
        key, time = columns["key"], columns["time"]
        order = np.lexsort((time, key))
        self._key, self._time = key[order], time[order]
        self._labels = {name: values[order] for name, values in columns.items() if name not in ("key", "time", "row")}
        wanted = in_any(time, splits)
        self.asked = LookUps.in_order(self._key, self._time, order).where(wanted)
        self.rows, self.times = columns["row"][wanted], time[wanted]

    def extended(self, encoder: MemoryEncoder[Any], memory: Any) -> Any:
        """A memory of a counter or history of the group with the chunk's events."""
        if encoder.label is None:
            tables = list(self._received.receive(events_of(encoder.name)))
            return encoder.extended(memory, join_tables(tables)) if tables else memory
        if not self._labels:
            return memory
        events = encoder.labelled(self._key, self._time, self._labels[label_of(encoder.label)])
        return encoder.extended(memory, events, in_order=True)


@dataclass(frozen=True)
class LookUpJob:
    """Arguments that all tasks of this step share.

    Attributes:
        state: Folder of the fitted vocabularies.
        before: Folder with the memories to continue from, None to begin with empty ones.
        windows: Request times of the splits, microseconds.
        training: Request times whose results make statistics, None if these are known.
        memories: Folder for the memories that requests at `end` or later can ask for.
        end: Time of the first later request, microseconds.
        events: Where events and look-ups come from.
        results: Where results go.
        rows_in_memory: Rows of a partition that are held at a time.
        scratch: Folder for partitions that have more rows.
    """

    state: Path
    before: Path | None
    windows: Mapping[str, Window]
    training: Window | None
    memories: Path
    end: int
    events: Exchange
    results: ResultExchange
    rows_in_memory: int
    scratch: Path


@dataclass(frozen=True)
class Partition:
    """A group of counters and histories that ask by the same key, a partition of its keys, and the rows sent there."""

    group: str
    number: int
    rows: int


def look_up_partition(job: LookUpJob, partition: Partition) -> dict[str, dict[str, NumberHistogram]]:
    """Makes a partition's look-ups and keeps its part of the memories; gives counts of each feature's results."""
    group = load_pipeline(job.state).key_groups[partition.group]
    counting = FeaturePipeline(load_pipeline(job.state).schema).memory_encoders
    memories: dict[str, Memory] = {encoder.name: _memory_before(job, encoder, partition) for encoder in group}
    received = ReceivedRows(job.events, partition.number, group)
    scratch = job.scratch / partition.group / f"{partition.number}"
    splits = list(job.windows.values())

    for turn, piece in enumerate(received.divide(partition.rows, job.rows_in_memory, scratch)):
        chunk = Chunk(piece, splits)
        inside = None if job.training is None else np.flatnonzero(in_window(chunk.times, job.training))
        found: dict[str, np.ndarray | SharedRagged] = {}
        for encoder in group:
            memory = chunk.extended(encoder, memories.pop(encoder.name))
            results = encoder.results(memory, chunk.asked)
            if inside is not None and encoder.numbers:
                counting[encoder.name].learn_results(take(results, inside))
            found |= results
            if chunk.until is not None:
                # No later than the next requests: labels may become known long after the last row.
                memories[encoder.name] = encoder.compacted(memory, min(chunk.until, job.end))
            else:
                write_memory(encoder.compacted(memory, job.end), job.memories, encoder.name, partition.number)
        if len(chunk.rows):
            job.results.send(partition.group, (partition.number, turn), chunk.rows, found)
    numbers = {encoder.name: counting[encoder.name].numbers for encoder in group}
    return {name: {each: number.histogram for each, number in some.items()} for name, some in numbers.items()}


def load_pipeline(state: Path) -> FeaturePipeline:
    """The pipeline saved in a folder, without memories; kept for the next task of this process."""
    return _load_pipeline(state, (state / "pipeline.json").stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _load_pipeline(state: Path, written: int) -> FeaturePipeline:
    return FeaturePipeline.load(state, memories=False)


def _memory_before(job: LookUpJob, encoder: MemoryEncoder[Any], partition: Partition) -> Memory:
    if job.before is None:
        return encoder.memory
    least, end = key_range(partition.number, job.events.receivers)
    inside = pc.field("key") >= pa.scalar(least, pa.uint64())
    if end < 2**64:
        inside &= pc.field("key") < pa.scalar(end, pa.uint64())
    return read_memory(encoder, job.before, inside)
