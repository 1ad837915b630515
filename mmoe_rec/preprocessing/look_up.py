"""Second step of a feature build: in each partition of keys, what counters and histories knew at the time of each row.

A partition holds all events of its keys and all look-ups of them, so no partition needs another one. A partition that
is too large for memory, as a key may have most of a log's rows, is taken in chunks of time: the memory, compacted to
what later requests can ask for, is carried from one to the next, with labels that become known later. It is read
twice, to sample its times and to write its pieces. Rows of a single moment are not divided.

Steps exchange rows through files, all to all. Senders write one Arrow IPC file each, with a record batch for every
receiver in each turn; a receiver reads its batches of all files. So what is exchanged never has to fit into memory, and
workers need nothing in common but a folder.

Results of counters and histories go to blocks of rows, in a table of each group of them. A list that many rows in a row
share, as the candidates of a request share their user's history, is sent once: null stands for the list before.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from mmoe_rec.features.encoder import LookupResults, PointInTimeEncoder
from mmoe_rec.features.numeric_statistics import NumberHistogram
from mmoe_rec.features.pipeline import FeaturePipeline, read_event_store, write_event_store
from mmoe_rec.point_in_time.arrays import DedupedRagged, Ragged, concat_tables, one_array, rebatch
from mmoe_rec.point_in_time.join import EventStore, Lookups, Window, in_any_window, in_window

Sender = tuple[int, int]
ROW_KEYS_CHANNEL = "duplicates"  # the channel of each row's request and candidate, with its labels


def events_channel(feature: str) -> str:
    """Channel of what a counter or history remembers."""
    return f"events.{feature}"


def lookups_channel(group: str) -> str:
    """Channel of what rows ask a group of counters and histories, see `FeaturePipeline.key_groups`."""
    return f"look_ups.{group}"


def label_column(task: str) -> str:
    """Column of a look-up that holds the label by which its row is an event."""
    return f"label.{task}"


class Exchange:
    """A folder of files `CHANNEL/SENDER.arrow`. A sender is a pair of numbers, so that it may write in turns."""

    def __init__(self, folder: Path, receivers: int) -> None:
        self.folder = folder
        self.receivers = receivers

    def send(self, channel: str, sender: Sender, table: pa.Table, receiver: np.ndarray) -> np.ndarray:
        """Sends each of N rows to its receiver, (N,) integers, in order; gives the rows of each, (receivers,) int64."""
        return self.send_batches(channel, sender, [(table, receiver)])

    def send_batches(self, channel: str, sender: Sender, turns: Iterable[tuple[pa.Table, np.ndarray]]) -> np.ndarray:
        """Sends tables of one schema, as `send` does each, through one file: receivers have few files to open."""
        total = np.zeros(self.receivers, np.int64)
        path = self.folder / channel / f"{sender[0]:012d}-{sender[1]:04d}.arrow"
        with ExitStack() as stack:
            writer = None
            for table, receiver in turns:
                if not table.num_rows:
                    continue
                in_order, rows = self._in_order(table, receiver)
                total += rows
                if writer is None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    file = stack.enter_context(pa.OSFile(str(path), "wb"))
                    writer = stack.enter_context(pa.ipc.new_file(file, table.schema))
                whole, ends = in_order.combine_chunks().to_batches()[0], np.cumsum(rows)
                for start, end in zip(ends - rows, ends, strict=True):
                    writer.write_batch(whole.slice(start, end - start))
        return total

    def _in_order(self, table: pa.Table, receiver: np.ndarray) -> tuple[pa.Table, np.ndarray]:
        """The rows by their receiver, and the number of rows of each."""
        if (receiver[1:] >= receiver[:-1]).all():
            ends = np.searchsorted(receiver, np.arange(self.receivers), side="right")
            return table, np.diff(ends, prepend=0)
        # Numpy's stable sort of 16 bits counts instead of comparing.
        small = receiver.astype(np.uint16 if self.receivers < 2**16 else np.uint32)
        order = pa.array(np.argsort(small, kind="stable"))
        return table.take(order), np.bincount(receiver, minlength=self.receivers)

    def receive(self, channel: str, receiver: int) -> Iterator[pa.Table]:
        """The rows for a receiver, sender by sender in order."""
        folder = self.folder / channel
        for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
            # Not mapped: what is mapped would count as memory as long as a batch is there.
            with pa.OSFile(os.path.join(folder, name)) as file, pa.ipc.open_file(file) as reader:
                for number in range(receiver, reader.num_record_batches, self.receivers):
                    batch = reader.get_batch(number)
                    if batch.num_rows:
                        yield pa.Table.from_batches([batch])

    def remove(self) -> None:
        """Removes all that was sent, once no other thread receives any more."""
        shutil.rmtree(self.folder, ignore_errors=True)


def assign_partitions(keys: np.ndarray, partitions: int) -> np.ndarray:
    """(N,) int64 partition of each key, uint64: ranges of equal width, so that partitions in order hold rising keys."""
    return (((keys >> np.uint64(32)) * np.uint64(partitions)) >> np.uint64(32)).astype(np.int64)


def key_range(partition: int, partitions: int) -> tuple[int, int]:
    """Least key of a partition, and of the next one (2^64 after the last)."""
    return tuple((-(-number * 2**32 // partitions)) << 32 for number in (partition, partition + 1))  # type: ignore


ROWS_PER_BLOCK = 131_072


@dataclass(frozen=True)
class ResultExchange:
    """Where results lie in a build's folder: by block of `ROWS_PER_BLOCK` of the log's `rows`."""

    folder: Path
    rows: int

    @property
    def exchange(self) -> Exchange:
        """The exchange, whose receivers are blocks."""
        return Exchange(self.folder, -(-self.rows // ROWS_PER_BLOCK))

    def send(self, group: str, sender: Sender, rows: np.ndarray, results: LookupResults) -> None:
        """Sends a group's results for (N,) rising row numbers."""
        block = rows // ROWS_PER_BLOCK
        columns = {"row": pa.array(rows)}
        for name, each in results.items():
            columns[name] = _lists(each, block) if isinstance(each, DedupedRagged) else pa.array(each)
        self.exchange.send(group, sender, pa.table(columns), block)

    def receive(self, groups: Sequence[str], block: int) -> LookupResults:
        """What was sent to a block, at the place of each row; rows without a result hold any value."""
        results: dict[str, np.ndarray | DedupedRagged] = {}
        start = block * ROWS_PER_BLOCK
        for group in groups:
            results |= _by_row(list(self.exchange.receive(group, block)), start, min(ROWS_PER_BLOCK, self.rows - start))
        return results


def _lists(results: DedupedRagged, block: np.ndarray) -> pa.Array:
    inverse = results.inverse
    first = np.append(len(inverse) > 0, (inverse[1:] != inverse[:-1]) | (block[1:] != block[:-1]))
    lists = results.lists.take(inverse[first])
    offsets = np.zeros(len(inverse) + 1, np.int32)
    offsets[1:][first] = lists.lengths
    return pa.ListArray.from_arrays(
        pa.array(np.cumsum(offsets, dtype=np.int32)), pa.array(lists.values.astype(np.int32)), mask=pa.array(~first)
    )


class ResultReader:
    """Gives rows, read in order, the results of counters and histories, block by block."""

    def __init__(self, results: ResultExchange, groups: Sequence[str]) -> None:
        self._results, self._groups = results, groups
        self._block = -1
        self._loaded: LookupResults = {}

    def of(self, rows: np.ndarray) -> LookupResults:
        """Results for rows by their numbers in the log, (N,) int64, which rise, at least one."""
        block, place = np.divmod(rows, ROWS_PER_BLOCK)
        parts = []
        for number in np.unique(block).tolist():
            if number != self._block:
                self._block, self._loaded = number, self._results.receive(self._groups, number)
            parts.append(take_rows(self._loaded, place[block == number]))
        return {name: concat_results([part[name] for part in parts]) for name in parts[0]}


def _by_row(tables: Sequence[pa.Table], start: int, rows: int) -> LookupResults:
    """Results of a block of rows, the first of which is number `start`."""
    results: dict[str, np.ndarray | DedupedRagged] = {}
    places = [table["row"].to_numpy() - start for table in tables]
    for field in list(tables[0].schema)[1:] if tables else ():
        columns = [one_array(table[field.name]) for table in tables]
        if pt.is_list(field.type):
            parts = DedupedRagged.concat([_shared(column) for column in columns])
            inverse = np.zeros(rows, np.int64)
            inverse[np.concatenate(places)] = parts.inverse
            results[field.name] = DedupedRagged(parts.lists, inverse)
        else:
            values = np.empty(rows, np.float32)
            for place, column in zip(places, columns, strict=True):
                values[place] = column.to_numpy()
            results[field.name] = values
    return results


def _shared(column: pa.ListArray) -> DedupedRagged:
    first = column.is_valid().to_numpy(zero_copy_only=False)
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)[first].astype(np.int32)
    return DedupedRagged(Ragged(column.flatten().to_numpy(), lengths), np.cumsum(first) - 1)


def take_rows(results: LookupResults, rows: np.ndarray) -> LookupResults:
    """The results of the given rows."""
    together = len(rows) > 0 and bool((np.diff(rows) == 1).all())
    its = slice(int(rows[0]), int(rows[-1]) + 1) if together else rows  # a slice is not copied
    return {name: each.take(its) if isinstance(each, DedupedRagged) else each[its] for name, each in results.items()}


def concat_results(parts: Sequence[np.ndarray | DedupedRagged]) -> np.ndarray | DedupedRagged:
    """One counter's or history's results of several blocks of rows, one after the other."""
    if len(parts) == 1:
        return parts[0]
    lists = [part for part in parts if isinstance(part, DedupedRagged)]
    return DedupedRagged.concat(lists) if lists else np.concatenate([np.asarray(part) for part in parts])


EncoderGroup = Sequence[PointInTimeEncoder[Any]]
_ROOM = 1.2  # for pieces that are larger than the sample says


@dataclass(frozen=True)
class ReceivedRows:
    """Rows that were sent to a partition of the keys of a group of counters and histories, or to a piece of one."""

    exchange: Exchange
    number: int
    group: EncoderGroup
    window: Window = (None, None)

    def receive(self, channel: str) -> Iterator[pa.Table]:
        """The rows that were sent through a channel."""
        return self.exchange.receive(channel, self.number)

    def split_by_time(self, rows: int, rows_in_memory: int, scratch: Path) -> "Iterator[ReceivedRows]":
        """Divide the rows by time into pieces of about `rows_in_memory`, which are yielded in the order of time.

        Args:
            rows: Number of look-ups, and events of one counter or history, which are held in memory at a time.
            rows_in_memory: Wanted number of such rows in a piece.
            scratch: Folder for the pieces, which last until the iterator ends.
        """
        if rows <= rows_in_memory:
            yield self
            return
        times = {lookups_channel(self.group[0].name): "time"}
        times |= {events_channel(encoder.name): "available_at" for encoder in self.group if encoder.label is None}
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
                exchange.send_batches(channel, (0, 0), turns)
            for number, window in enumerate(pairwise([None, *edges.tolist(), None])):
                yield ReceivedRows(exchange, number, self.group, window)
        finally:
            exchange.remove()


class TimeChunk:
    """Look-ups that are made in a window of time, and their labels, which become known in it or later.

    asked, rows, times: the look-ups of N rows that lie in one of the splits' windows, the rows' numbers, rising, and
    their times, (N,) int64; until: no later chunk asks for an earlier moment, None for the last one.
    """

    def __init__(self, received: ReceivedRows, splits: Sequence[Window]) -> None:
        self._received, self.end_time = received, received.window[1]
        tables = list(received.receive(lookups_channel(received.group[0].name)))
        none = np.empty(0, np.int64)
        columns = {"key": none.view(np.uint64), "time": none, "row": none}
        if tables:
            found = concat_tables(tables)
            columns = {name: found[name].to_numpy() for name in found.column_names}
        key, time = columns["key"], columns["time"]
        order = np.lexsort((time, key))
        self._key, self._time = key[order], time[order]
        self._labels = {name: values[order] for name, values in columns.items() if name not in ("key", "time", "row")}
        wanted = in_any_window(time, splits)
        self.lookups = Lookups.from_sorted(self._key, self._time, order).select_rows(wanted)
        self.rows, self.times = columns["row"][wanted], time[wanted]

    def extended(self, encoder: PointInTimeEncoder[Any], store: Any) -> Any:
        """A memory of a counter or history of the group with the chunk's events."""
        if encoder.label is None:
            tables = list(self._received.receive(events_channel(encoder.name)))
            return encoder.extended(store, concat_tables(tables)) if tables else store
        if not self._labels:
            return store
        events = encoder.events_from_labels(self._key, self._time, self._labels[label_column(encoder.label)])
        return encoder.extended(store, events, is_sorted=True)


@dataclass(frozen=True)
class LookupJob:
    """Arguments that all tasks of this step share.

    Attributes:
        pipeline_dir: Folder of the fitted vocabularies.
        previous: Folder with the memories to continue from, None to begin with empty ones.
        windows: Request times of the splits, microseconds.
        training: Request times whose results make statistics, None if these are known.
        stores: Folder for the memories that requests at `end` or later can ask for.
        end: Time of the first later request, microseconds.
        events: Where events and look-ups come from.
        results: Where results go.
        rows_in_memory: Rows of a partition that are held at a time.
        scratch: Folder for partitions that have more rows.
    """

    pipeline_dir: Path
    previous: Path | None
    windows: Mapping[str, Window]
    training: Window | None
    stores: Path
    end: int
    events: Exchange
    results: ResultExchange
    rows_in_memory: int
    scratch: Path


@dataclass(frozen=True)
class KeyPartition:
    """A group of counters and histories that ask by the same key, a partition of its keys, and the rows sent there."""

    group: str
    number: int
    rows: int


def look_up_partition(job: LookupJob, partition: KeyPartition) -> dict[str, dict[str, NumberHistogram]]:
    """Makes a partition's look-ups and keeps its part of the memories; gives counts of each feature's results."""
    group = load_pipeline(job.pipeline_dir).key_groups[partition.group]
    counting = FeaturePipeline(load_pipeline(job.pipeline_dir).schema).point_in_time_encoders
    stores: dict[str, EventStore] = {encoder.name: _memory_before(job, encoder, partition) for encoder in group}
    received = ReceivedRows(job.events, partition.number, group)
    scratch = job.scratch / partition.group / f"{partition.number}"
    splits = list(job.windows.values())

    for turn, piece in enumerate(received.split_by_time(partition.rows, job.rows_in_memory, scratch)):
        chunk = TimeChunk(piece, splits)
        inside = None if job.training is None else np.flatnonzero(in_window(chunk.times, job.training))
        found: dict[str, np.ndarray | DedupedRagged] = {}
        for encoder in group:
            store = chunk.extended(encoder, stores.pop(encoder.name))
            results = encoder.results(store, chunk.lookups)
            if inside is not None and encoder.numbers:
                counting[encoder.name].partial_fit_results(take_rows(results, inside))
            found |= results
            if chunk.end_time is not None:
                # No later than the next requests: labels may become known long after the last row.
                stores[encoder.name] = encoder.compacted(store, min(chunk.end_time, job.end))
            else:
                write_event_store(encoder.compacted(store, job.end), job.stores, encoder.name, partition.number)
        if len(chunk.rows):
            job.results.send(partition.group, (partition.number, turn), chunk.rows, found)
    numbers = {encoder.name: counting[encoder.name].numbers for encoder in group}
    return {name: {each: number.histogram for each, number in some.items()} for name, some in numbers.items()}


def load_pipeline(pipeline_dir: Path) -> FeaturePipeline:
    """The pipeline saved in a folder, without memories; kept for the next task of this process."""
    return _load_pipeline(pipeline_dir, (pipeline_dir / "pipeline.json").stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _load_pipeline(pipeline_dir: Path, written: int) -> FeaturePipeline:
    return FeaturePipeline.load(pipeline_dir, stores=False)


def _memory_before(job: LookupJob, encoder: PointInTimeEncoder[Any], partition: KeyPartition) -> EventStore:
    if job.previous is None:
        return encoder.store
    least, end = key_range(partition.number, job.events.receivers)
    inside = pc.field("key") >= pa.scalar(least, pa.uint64())
    if end < 2**64:
        inside &= pc.field("key") < pa.scalar(end, pa.uint64())
    return read_event_store(encoder, job.previous, inside)
