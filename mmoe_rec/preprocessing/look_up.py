"""Second step of a feature build: in each partition of keys, what counters and histories knew at the time of each row.

A partition holds all events of its keys and all look-ups of them, so no partition needs another one. A partition that
is too large for memory, as a key may have most of a log's rows, is taken in chunks of time: the memory, compacted to
what later requests can ask for, is carried from one to the next. It is read twice, to sample its times and to write
each row to the pieces that need it. Rows of a single moment are not divided.
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
from mmoe_rec.point_in_time.join import LookUps, Memory, Window, in_any, in_window, known_at
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

    def look_ups(self) -> Iterator[pa.Table]:
        """key, time, row, and labels by which rows are events; the rows that ask within the window rise."""
        return self.exchange.receive(look_ups_of(self.group[0].name), self.number)

    def events(self, encoder: MemoryEncoder[Any]) -> Iterator[pa.Table]:
        """Events of a counter or history that are not look-ups too."""
        return self.exchange.receive(events_of(encoder.name), self.number)

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
        edges = self._edges(rows, rows_in_memory)
        exchange = Exchange(scratch, len(edges) + 1)
        try:
            self._send(exchange, edges, rows_in_memory)
            for number, window in enumerate(pairwise([None, *edges.tolist(), None])):
                yield ReceivedRows(exchange, number, self.group, window)
        finally:
            exchange.remove()

    @property
    def _unlabelled(self) -> list[MemoryEncoder[Any]]:
        """Those of the group whose events are not look-ups too."""
        return [encoder for encoder in self.group if encoder.label is None]

    def _edges(self, rows: int, rows_in_memory: int) -> np.ndarray:
        """Moments that divide the rows into about equal pieces, from a sample of their times."""
        # An event that becomes known late is in two pieces: that of its look-up and that of when it is known.
        copies = 1 + sum(each > 1 for each in self._matures_after)
        pieces = int(_ROOM * copies * rows / rows_in_memory) + 1
        step = 1 + pieces // 8  # more samples than pieces, so that pieces differ little in size
        samples = [moments[::step] for table in self.look_ups() for moments in self._moments(table)]
        samples += [t["known"].to_numpy()[::step] for encoder in self._unlabelled for t in self.events(encoder)]
        times = np.sort(np.concatenate(samples))
        return np.unique(times[np.arange(1, pieces) * len(times) // pieces])

    def _send(self, exchange: Exchange, edges: np.ndarray, rows_in_memory: int) -> None:
        """Writes each row to the pieces that need it."""
        tables = rebatch(self.look_ups(), rows_in_memory)
        turns = (_spread(table, self._moments(table), edges) for table in tables)
        exchange.send_in_turns(look_ups_of(self.group[0].name), (0, 0), turns)
        for encoder in self._unlabelled:
            tables = rebatch(self.events(encoder), rows_in_memory)
            turns = (_spread(table, [table["known"].to_numpy()], edges) for table in tables)
            exchange.send_in_turns(events_of(encoder.name), (0, 0), turns)

    def _moments(self, look_ups: pa.Table) -> list[np.ndarray]:
        """(N,) int64 each: when N look-ups ask, and when they are known as events."""
        time = look_ups["time"].to_numpy()
        return [time, *(known_at(time, each) for each in self._matures_after)]

    @property
    def _matures_after(self) -> list[int]:
        return sorted({encoder.matures_after for encoder in self.group if encoder.label is not None})


def _spread(table: pa.Table, moments: Sequence[np.ndarray], edges: np.ndarray) -> tuple[pa.Table, np.ndarray]:
    """The rows and the piece of each, once for each piece that holds one of their moments, the first one first."""
    places, rows, pieces = [np.searchsorted(edges, each, "right") for each in moments], [], []
    for number, place in enumerate(places):
        needed = np.ones(len(table), bool)
        for earlier in places[:number]:
            needed &= place != earlier
        rows.append(np.flatnonzero(needed))
        pieces.append(place[needed])
    return table.take(pa.array(np.concatenate(rows))), np.concatenate(pieces)


class Chunk:
    """Look-ups that are made, and events that become known, in a window of time.

    asked, rows, times: the look-ups of N rows that lie in one of the splits' windows, the rows' numbers, rising, and
    their times, (N,) int64; until: no later chunk asks for an earlier moment, None for the last one.
    """

    def __init__(self, received: ReceivedRows, splits: Sequence[Window]) -> None:
        self._received, self.until = received, received.window[1]
        labelled = {encoder.label for encoder in received.group if encoder.label is not None}
        tables = list(received.look_ups())
        found = join_tables(tables) if tables else None
        columns = {} if found is None else {name: found[name].to_numpy() for name in found.column_names}
        none = np.empty(0, np.int64)
        key, time = columns.get("key", none.view(np.uint64)), columns.get("time", none)
        order = np.lexsort((time, key))
        self._key, self._time = key[order], time[order]
        self._labels = {task: columns[label_of(task)][order] for task in labelled} if columns else {}
        wanted = in_any(time, splits) & in_window(time, received.window)
        self.asked = LookUps.in_order(self._key, self._time, order).where(wanted)
        self.rows, self.times = columns.get("row", none)[wanted], time[wanted]

    def extended(self, encoder: MemoryEncoder[Any], memory: Any) -> Any:
        """A memory of a counter or history of the group with the chunk's events."""
        if encoder.label is None:
            tables = list(self._received.events(encoder))
            return encoder.extended(memory, join_tables(tables)) if tables else memory
        if not self._labels:
            return memory
        events = encoder.labelled(self._key, self._time, self._labels[encoder.label])
        inside = in_window(events["known"].to_numpy(), self._received.window)
        return encoder.extended(memory, events if inside.all() else events.filter(pa.array(inside)), in_order=True)


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
