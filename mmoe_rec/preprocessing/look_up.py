"""Second step of a feature build: in each partition of keys, what counters and histories knew at the time of each row.

A partition holds all events of its keys and all look-ups of them, so no partition needs another one. One that is too
large for memory, as a key may have most of a log's rows, is taken in chunks of time: the memory, compacted to what
later requests can ask for, is carried from one to the next. It is read twice, to sample its times and to write each row
to the pieces that need it; what is still too large is divided again. So what is read grows with the rows, and not with
the rows times the pieces. A single moment cannot be divided.
"""

from __future__ import annotations

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
from mmoe_rec.point_in_time.join import LookUps, Window, in_any, in_window, known_at
from mmoe_rec.point_in_time.memory import Memory
from mmoe_rec.preprocessing.exchange import Exchange, ResultExchange, events_of, key_range, label_of, look_ups_of, take

Group = Sequence[MemoryEncoder[Any]]
_PIECES_AT_MOST = 1024  # of one division: what is held at a time is written as a batch a piece
_ROOM = 1.1  # for pieces that are larger than the sample says


@dataclass(frozen=True)
class ReceivedRows:
    """What was sent to a partition of the keys of a group of counters and histories, or to a piece of one. rows:
    look-ups, and the events of one counter or history, which are held in memory at a time."""

    exchange: Exchange
    number: int
    group: Group
    window: Window
    rows: int

    def look_ups(self) -> Iterator[pa.Table]:
        """key, time, row, and labels by which rows are events; the rows that ask within the window rise."""
        return self.exchange.receive(look_ups_of(self.group[0].name), self.number)

    def events(self, encoder: MemoryEncoder[Any]) -> Iterator[pa.Table]:
        """Events of a counter or history that are not look-ups too."""
        return self.exchange.receive(events_of(encoder.name), self.number)

    @property
    def unlabelled(self) -> list[MemoryEncoder[Any]]:
        """Those of the group whose events are not look-ups too."""
        return [encoder for encoder in self.group if encoder.label is None]

    def divide(self, rows_in_memory: int, scratch: Path) -> Iterator[ReceivedRows]:
        """Pieces in the order of time, each of at most `rows_in_memory` rows or of one moment, in files in `scratch`,
        which last until the next one is asked for."""
        start, end = self.window
        is_a_moment = start is not None and end is not None and end - start <= 1
        if self.rows <= rows_in_memory or is_a_moment:
            yield self
            return
        edges = self._edges(rows_in_memory)
        windows = list(pairwise([start, *edges, end]))
        exchange = Exchange(scratch / "pieces", len(windows))
        try:
            rows = self._send(exchange, np.array(edges), rows_in_memory)
            for number, window in enumerate(windows):
                piece = ReceivedRows(exchange, number, self.group, window, int(rows[number]))
                yield from piece.divide(rows_in_memory, scratch / f"{number}")
        finally:
            exchange.remove()

    def _edges(self, rows_in_memory: int) -> list[int]:
        """Moments that divide the window into about equal pieces, from a sample of its times."""
        # An event that becomes known late is in two pieces: that of its look-up and that of when it is known.
        copies = 1 + sum(each > 1 for each in self._matures_after)
        pieces = min(int(_ROOM * copies * self.rows / rows_in_memory) + 1, _PIECES_AT_MOST)
        step = 1 + pieces
        samples = [moments[::step] for table in self.look_ups() for moments in self.moments(table)]
        samples += [t["known"].to_numpy()[::step] for encoder in self.unlabelled for t in self.events(encoder)]
        times = np.concatenate(samples)
        times = np.sort(times[in_window(times, self.window)])
        edges = times[np.arange(1, pieces) * len(times) // pieces]
        # A moment that would fill a piece becomes one of its own.
        many = np.searchsorted(times, edges, "right") - np.searchsorted(times, edges) >= len(times) // pieces
        edges = np.unique(np.append(edges, edges[many] + 1))
        start, end = self.window
        return [edge for edge in edges.tolist() if (start is None or edge > start) and (end is None or edge < end)]

    def _send(self, exchange: Exchange, edges: np.ndarray, rows_in_memory: int) -> np.ndarray:
        """Writes each row to the pieces that need it; gives the rows of each piece, (pieces,) int64."""
        tables = rebatch(self.look_ups(), rows_in_memory)
        turns = (self._spread(table, self.moments(table), edges) for table in tables)
        look_ups = exchange.send_in_turns(look_ups_of(self.group[0].name), (0, 0), turns)
        most = np.zeros(exchange.receivers, np.int64)
        for encoder in self.unlabelled:
            tables = rebatch(self.events(encoder), rows_in_memory)
            turns = (self._spread(table, [table["known"].to_numpy()], edges) for table in tables)
            most = np.maximum(most, exchange.send_in_turns(events_of(encoder.name), (0, 0), turns))
        return look_ups + most

    def _spread(self, table: pa.Table, moments: Sequence[np.ndarray], edges: np.ndarray) -> tuple[pa.Table, np.ndarray]:
        """The rows and the piece of each, once for each piece that holds one of their moments, the first one first."""
        rows, pieces = [], []
        places: list[np.ndarray] = []
        for each in moments:
            place = np.where(in_window(each, self.window), np.searchsorted(edges, each, "right"), -1)
            needed = np.flatnonzero(np.logical_and.reduce([place >= 0, *(place != other for other in places)]))
            places.append(place)
            rows.append(needed)
            pieces.append(place[needed])
        if len(moments) == 1 and len(rows[0]) == table.num_rows:
            return table, pieces[0]
        return table.take(pa.array(np.concatenate(rows))), np.concatenate(pieces)

    def moments(self, look_ups: pa.Table) -> list[np.ndarray]:
        """(N,) int64 each: when N look-ups ask, and when they are known as events."""
        time = look_ups["time"].to_numpy()
        return [time, *(known_at(time, each) for each in self._matures_after)]

    @property
    def _matures_after(self) -> list[int]:
        return sorted({encoder.matures_after for encoder in self.group if encoder.label is not None})


class Chunk:
    """Look-ups that are made, and events that become known, in a window of time.

    asked, rows, times: the look-ups of N rows that lie in one of the splits' windows, the rows' numbers, rising, and
    their times, (N,) int64; until: no later chunk asks for an earlier moment, None for the last one.
    """

    def __init__(
        self,
        received: ReceivedRows,
        splits: Sequence[Window],
        look_ups: Sequence[pa.Table],
        events: Mapping[str, Sequence[pa.Table]] | None,
        until: int | None,
    ) -> None:
        """events: of counters and histories, None for all that was received, which is then read one by one."""
        self._received, self._events, self.until = received, events, until
        labelled = {encoder.label for encoder in received.group if encoder.label is not None}
        found = join_tables(look_ups) if look_ups else None
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
            events = self._received.events(encoder) if self._events is None else self._events.get(encoder.name, ())
            tables = list(events)
            return encoder.extended(memory, join_tables(tables)) if tables else memory
        if not self._labels:
            return memory
        events = encoder.labelled(self._key, self._time, self._labels[encoder.label])
        inside = in_window(events["known"].to_numpy(), self._received.window)
        return encoder.extended(memory, events if inside.all() else events.filter(pa.array(inside)), in_order=True)


def chunks(received: ReceivedRows, splits: Sequence[Window], rows_in_memory: int, scratch: Path) -> Iterator[Chunk]:
    """All that was received, in the order of time, at most `rows_in_memory` rows at a time."""
    for piece in received.divide(rows_in_memory, scratch):
        if piece.rows > rows_in_memory:
            yield from _of_a_moment(piece, splits, rows_in_memory)
        elif piece.rows or piece.window[1] is None:
            yield Chunk(piece, splits, list(piece.look_ups()), None, piece.window[1])


def _of_a_moment(piece: ReceivedRows, splits: Sequence[Window], rows: int) -> Iterator[Chunk]:
    """First its events, of which some are earlier look-ups, then its look-ups."""
    start = piece.window[0]
    for encoder in piece.unlabelled:
        for table in rebatch(piece.events(encoder), rows):
            yield Chunk(piece, splits, [], {encoder.name: [table]}, start)
    for asks in (False, True):
        tables = (table.filter(pa.array((table["time"].to_numpy() == start) == asks)) for table in piece.look_ups())
        for table in rebatch(tables, rows):
            yield Chunk(piece, splits, [table], {}, start)


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
    received = ReceivedRows(job.events, partition.number, group, (None, None), partition.rows)
    scratch = job.scratch / partition.group / f"{partition.number}"
    splits = list(job.windows.values())

    for turn, chunk in enumerate(chunks(received, splits, job.rows_in_memory, scratch)):
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
