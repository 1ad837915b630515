"""The step `look up` of a feature build: compute counters and histories for the time of each row.

The keys are divided into partitions. A task gets all events and lookups of its partition's keys, so tasks are
independent. If a partition doesn't fit into memory, the task divides it by time and processes the pieces in order. Rows
of the same time stay together. Each piece gets the event stores of the piece before it.

Tasks exchange rows through files (`Exchange`), so rows never have to fit into memory, and workers share only a folder.
`ResultExchange` returns the results (values of counters and histories) to the rows in the same way.
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

Sender = tuple[int, int]  # Number of a task, and number of the file among the files of the task.
# Group of the results of relative features. Other groups have the name of a feature, which can't contain a space.
COMPARED_GROUP = "compared by request"
ROW_KEYS_CHANNEL = "duplicates"  # Channel of hashes of request and candidate, which find repeated rows.


def events_channel(feature: str) -> str:
    """Return the `Exchange` channel for the events of a counter or history."""
    return f"events.{feature}"


def lookups_channel(group: str) -> str:
    """Return the `Exchange` channel for the lookups of a group in `FeaturePipeline.key_groups`."""
    return f"look_ups.{group}"


def label_column(task: str) -> str:
    """Return the name of the column with a task's labels in a table of lookups. Rows with a label are events, too."""
    return f"label.{task}"


@dataclass(frozen=True)
class Exchange:
    """Exchange of rows between tasks through files `CHANNEL/SENDER.arrow`, with a record batch for each receiver.

    Attributes:
        folder: Folder of the files, which need not exist.
        receivers: Number of receivers, such as partitions of keys.
    """

    folder: Path
    receivers: int

    def send(self, channel: str, sender: Sender, table: pa.Table, receiver: np.ndarray) -> np.ndarray:
        """Write rows to a new file. Each receiver gets rows in the order of the table.

        Args:
            channel: Name of the channel.
            sender: Number of the sending task, and number of the file among its files.
            table: N rows.
            receiver: Receiver of each row, shape (N,), integers.

        Returns:
            Number of rows for each receiver, shape (receivers,), int64.
        """
        return self.send_batches(channel, sender, [(table, receiver)])

    def send_batches(self, channel: str, sender: Sender, turns: Iterable[tuple[pa.Table, np.ndarray]]) -> np.ndarray:
        """Send several tables of the same schema in one file, so that receivers open few files.

        Args:
            channel: Name of the channel.
            sender: Number of the sending task, and number of the file among its files.
            turns: Tables with the receiver of each row, as in `send`.

        Returns:
            Number of rows for each receiver, shape (receivers,), int64.
        """
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
        """Return the rows sorted by receiver, and the number of rows for each receiver."""
        if (receiver[1:] >= receiver[:-1]).all():
            ends = np.searchsorted(receiver, np.arange(self.receivers), side="right")
            return table, np.diff(ends, prepend=0)
        # NumPy's stable sort of 16-bit integers is a radix sort, which is faster than a comparison sort.
        small = receiver.astype(np.uint16 if self.receivers < 2**16 else np.uint32)
        order = pa.array(np.argsort(small, kind="stable"))
        return table.take(order), np.bincount(receiver, minlength=self.receivers)

    def receive(self, channel: str, receiver: int) -> Iterator[pa.Table]:
        """Yield the rows for a receiver in the order of the senders.

        Args:
            channel: Name of the channel.
            receiver: Number of the receiver.
        """
        folder = self.folder / channel
        for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
            # Don't memory-map the file, because mapped pages count as memory of the process while a batch exists.
            with pa.OSFile(os.path.join(folder, name)) as file, pa.ipc.open_file(file) as reader:
                for number in range(receiver, reader.num_record_batches, self.receivers):
                    batch = reader.get_batch(number)
                    if batch.num_rows:
                        yield pa.Table.from_batches([batch])

    def remove(self) -> None:
        """Remove all files. Call it only while no task receives rows."""
        shutil.rmtree(self.folder, ignore_errors=True)


def assign_partitions(keys: np.ndarray, partitions: int) -> np.ndarray:
    """Assign keys to partitions, which are equally wide ranges of keys.

    Args:
        keys: Hashes, shape (N,), uint64.
        partitions: Number of partitions.

    Returns:
        Partition of each key, shape (N,), int64.
    """
    return (((keys >> np.uint64(32)) * np.uint64(partitions)) >> np.uint64(32)).astype(np.int64)


def key_range(partition: int, partitions: int) -> tuple[int, int]:
    """Return the range [start, end) of a partition's keys, which are uint64 hashes. The last range ends at 2^64.

    Args:
        partition: Number of the partition.
        partitions: Number of partitions.
    """
    return tuple((-(-number * 2**32 // partitions)) << 32 for number in (partition, partition + 1))  # type: ignore


ROWS_PER_BLOCK = 131_072


@dataclass(frozen=True)
class ResultExchange:
    """Exchange of values of counters and histories. Receivers are blocks of `ROWS_PER_BLOCK` consecutive rows.

    Attributes:
        folder: Folder of the files.
        rows: Number of rows of the log.
    """

    folder: Path
    rows: int

    @property
    def exchange(self) -> Exchange:
        """The underlying exchange, with the blocks as receivers."""
        return Exchange(self.folder, -(-self.rows // ROWS_PER_BLOCK))

    def send(self, group: str, sender: Sender, rows: np.ndarray, results: LookupResults) -> None:
        """Send the results of a group of features to the blocks of their rows.

        Args:
            group: Name of the group, see `FeaturePipeline.key_groups`.
            sender: Number of the sending task, and number of the file among its files.
            rows: Numbers of the N rows in the log, in ascending order, shape (N,).
            results: Results for the N rows.
        """
        block = rows // ROWS_PER_BLOCK
        columns = {"row": pa.array(rows)}
        for name, result in results.items():
            columns[name] = _lists(result, block) if isinstance(result, DedupedRagged) else pa.array(result)
        self.exchange.send(group, sender, pa.table(columns), block)

    def receive(self, groups: Sequence[str], block: int) -> LookupResults:
        """Return the results for a block's rows, by name. Rows without a result have an arbitrary value.

        Args:
            groups: Names of the groups of features.
            block: Number of the block.
        """
        results: dict[str, np.ndarray | DedupedRagged] = {}
        start = block * ROWS_PER_BLOCK
        for group in groups:
            results |= _by_row(list(self.exchange.receive(group, block)), start, min(ROWS_PER_BLOCK, self.rows - start))
        return results


def _lists(results: DedupedRagged, block: np.ndarray) -> pa.Array:
    """Return a column of lists. Null stands for the list of the row before, as candidates of a request share lists."""
    inverse = results.inverse
    first = np.append(len(inverse) > 0, (inverse[1:] != inverse[:-1]) | (block[1:] != block[:-1]))
    lists = results.lists.take(inverse[first])
    offsets = np.zeros(len(inverse) + 1, np.int32)
    offsets[1:][first] = lists.lengths
    return pa.ListArray.from_arrays(
        pa.array(np.cumsum(offsets, dtype=np.int32)), pa.array(lists.values.astype(np.int32)), mask=pa.array(~first)
    )


class ResultReader:
    """Reader of the values of counters and histories, in ascending order of rows. It loads one block at a time."""

    def __init__(self, results: ResultExchange, groups: Sequence[str]) -> None:
        """Create a reader that has loaded no block.

        Args:
            results: Exchange of the results.
            groups: Names of the groups of features.
        """
        self._results, self._groups = results, groups
        self._block = -1
        self._loaded: LookupResults = {}

    def of(self, rows: np.ndarray) -> LookupResults:
        """Return the results for `rows`: one or more row numbers in ascending order, shape (N,), int64."""
        block, offset = np.divmod(rows, ROWS_PER_BLOCK)
        parts = []
        for number in np.unique(block).tolist():
            if number != self._block:
                self._block, self._loaded = number, self._results.receive(self._groups, number)
            parts.append(_take_rows(self._loaded, offset[block == number]))
        return {name: _concat_results([part[name] for part in parts]) for name in parts[0]}


def _by_row(tables: Sequence[pa.Table], start: int, rows: int) -> LookupResults:
    """Combine the tables of a block into the results for its `rows` rows. The first row has the number `start`."""
    results: dict[str, np.ndarray | DedupedRagged] = {}
    offsets = [table["row"].to_numpy() - start for table in tables]
    for field in list(tables[0].schema)[1:] if tables else ():
        columns = [one_array(table[field.name]) for table in tables]
        if pt.is_list(field.type):
            parts = DedupedRagged.concat([_deduped(column) for column in columns])
            inverse = np.zeros(rows, np.int64)
            inverse[np.concatenate(offsets)] = parts.inverse
            results[field.name] = DedupedRagged(parts.lists, inverse)
        else:
            values = np.empty(rows, np.float32)
            for offset, column in zip(offsets, columns, strict=True):
                values[offset] = column.to_numpy()
            results[field.name] = values
    return results


def _deduped(column: pa.ListArray) -> DedupedRagged:
    first = column.is_valid().to_numpy(zero_copy_only=False)
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)[first].astype(np.int32)
    return DedupedRagged(Ragged(column.flatten().to_numpy(), lengths), np.cumsum(first) - 1)


def _take_rows(results: LookupResults, rows: np.ndarray) -> LookupResults:
    """Return the results at the indices `rows`."""
    contiguous = len(rows) > 0 and bool((np.diff(rows) == 1).all())
    index = slice(int(rows[0]), int(rows[-1]) + 1) if contiguous else rows  # A slice avoids a copy.
    return {name: r.take(index) if isinstance(r, DedupedRagged) else r[index] for name, r in results.items()}


def _concat_results(parts: Sequence[np.ndarray | DedupedRagged]) -> np.ndarray | DedupedRagged:
    """Concatenate the values of one result for consecutive rows."""
    if len(parts) == 1:
        return parts[0]
    lists = [part for part in parts if isinstance(part, DedupedRagged)]
    return DedupedRagged.concat(lists) if lists else np.concatenate([np.asarray(part) for part in parts])


EncoderGroup = Sequence[PointInTimeEncoder[Any]]
_PIECES_FACTOR = 1.2  # Make more pieces than needed, as some get more rows than sampling suggests.


@dataclass(frozen=True)
class ReceivedRows:
    """Events and lookups of a partition, or of a piece of a partition that was divided by time.

    Attributes:
        exchange: Files with the rows.
        number: Number of the partition or piece, which is the receiver of its rows.
        group: Encoders of the counters and histories that share the key columns, such as the user.
        window: Times [start, end) of the piece, in microseconds. None means no limit.
        all_events: Whether to receive the events of all partitions.
    """

    exchange: Exchange
    number: int
    group: EncoderGroup
    window: Window = (None, None)
    all_events: bool = False

    def receive(self, channel: str) -> Iterator[pa.Table]:
        """Yield the rows that were sent through a channel."""
        is_shared = self.all_events and channel != lookups_channel(self.group[0].name)
        for number in range(self.exchange.receivers) if is_shared else [self.number]:
            yield from self.exchange.receive(channel, number)

    def split_by_time(self, rows: int, rows_in_memory: int, scratch: Path) -> "Iterator[ReceivedRows]":
        """Divide the rows by time into pieces of about `rows_in_memory` rows, and yield the pieces in order.

        Args:
            rows: Number of lookups, plus the number of events of the feature with the most events.
            rows_in_memory: Maximum number of rows that fit into memory.
            scratch: Folder for the pieces. They are removed when the iterator ends.
        """
        if rows <= rows_in_memory:
            yield self
            return
        times = {lookups_channel(self.group[0].name): "time"}
        times |= {events_channel(encoder.name): "available_at" for encoder in self.group if encoder.label is None}
        pieces = int(_PIECES_FACTOR * rows / rows_in_memory) + 1
        step = 1 + pieces // 8  # Take several samples for each piece, so that pieces have similar sizes.
        samples = [table[time].to_numpy()[::step] for channel, time in times.items() for table in self.receive(channel)]
        sampled_times = np.sort(np.concatenate(samples))
        edges = np.unique(sampled_times[np.arange(1, pieces) * len(sampled_times) // pieces])
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
    """The events and lookups of a partition, or of a piece that fits into memory.

    Attributes:
        lookups: Lookups for the N rows that lie in a split, sorted by key and time.
        rows: Numbers of these rows in ascending order, shape (N,), int64.
        times: Request times of these rows, in microseconds, shape (N,), int64.
        end_time: Earliest possible time of later pieces, in microseconds. None for the last piece.
    """

    def __init__(self, received: ReceivedRows, splits: Sequence[Window]) -> None:
        """Read and sort the rows.

        Args:
            received: Events and lookups of the partition or piece.
            splits: Request times [start, end) of the splits, in microseconds.
        """
        self._received, self.end_time = received, received.window[1]
        tables = list(received.receive(lookups_channel(received.group[0].name)))
        empty = np.empty(0, np.int64)
        columns = {"key": empty.view(np.uint64), "time": empty, "row": empty}
        if tables:
            table = concat_tables(tables)
            columns = {name: table[name].to_numpy() for name in table.column_names}
        key, time = columns["key"], columns["time"]
        order = np.lexsort((time, key))
        self._key, self._time = key[order], time[order]
        self._labels = {name: values[order] for name, values in columns.items() if name not in ("key", "time", "row")}
        wanted = in_any_window(time, splits)
        self.lookups = Lookups.from_sorted(self._key, self._time, order).select_rows(wanted)
        self.rows, self.times = columns["row"][wanted], time[wanted]

    def extended(self, encoder: PointInTimeEncoder[Any], store: Any) -> Any:
        """Return an event store with the events of the chunk added.

        Args:
            encoder: Encoder of a counter or history.
            store: Event store of the encoder, with the events of earlier chunks.
        """
        if encoder.label is None:
            tables = list(self._received.receive(events_channel(encoder.name)))
            return encoder.extended(store, concat_tables(tables)) if tables else store
        if not self._labels:
            return store
        events = encoder.events_from_labels(self._key, self._time, self._labels[label_column(encoder.label)])
        return encoder.extended(store, events, is_sorted=True)


@dataclass(frozen=True)
class LookupJob:
    """Arguments that all tasks of the step `look up` share.

    Attributes:
        pipeline_dir: Folder of the pipeline with fitted vocabularies.
        previous: Folder with event stores to continue from. None starts with empty stores.
        windows: Request times [start, end) of the splits, in microseconds.
        training: Request times [start, end) of the rows whose results count in histograms. None counts no rows.
        stores: Folder for the event stores.
        end: Time in microseconds. The stores keep only events that requests from this time on can look up.
        events: Exchange from which tasks receive events and lookups.
        results: Exchange to which tasks send results.
        rows_in_memory: Maximum number of rows in memory. Larger partitions are divided by time.
        scratch: Folder for the pieces of divided partitions.
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
    """A partition of the keys of a group of features.

    Attributes:
        group: Name of the group, see `FeaturePipeline.key_groups`.
        number: Number of the partition.
        rows: Number of rows that the partition would hold in memory if it were not divided by time.
    """

    group: str
    number: int
    rows: int


def look_up_partition(job: LookupJob, partition: KeyPartition) -> dict[str, dict[str, NumberHistogram]]:
    """Compute counters and histories for a partition's lookups, send them to blocks of rows, and write event stores.

    Args:
        job: Arguments of all tasks.
        partition: Partition of the keys.

    Returns:
        Histograms of the values of rows in `job.training`, by feature and name of the result.
    """
    group = load_pipeline(job.pipeline_dir).key_groups[partition.group]
    counting = FeaturePipeline(load_pipeline(job.pipeline_dir).schema).point_in_time_encoders
    stores: dict[str, EventStore] = {encoder.name: _previous_store(job, encoder, partition) for encoder in group}
    received = ReceivedRows(job.events, partition.number, group, all_events=group[0].needs_all_keys)
    scratch = job.scratch / partition.group / f"{partition.number}"
    splits = list(job.windows.values())

    for turn, piece in enumerate(received.split_by_time(partition.rows, job.rows_in_memory, scratch)):
        chunk = TimeChunk(piece, splits)
        inside = None if job.training is None else np.flatnonzero(in_window(chunk.times, job.training))
        chunk_results: dict[str, np.ndarray | DedupedRagged] = {}
        for encoder in group:
            store = chunk.extended(encoder, stores.pop(encoder.name))
            results = encoder.results(store, chunk.lookups)
            if inside is not None and encoder.numbers:
                counting[encoder.name].partial_fit_results(_take_rows(results, inside))
            chunk_results |= results
            if chunk.end_time is not None:
                # Labels may become available long after the last request, so a piece can end after `job.end`.
                stores[encoder.name] = encoder.compacted(store, min(chunk.end_time, job.end))
            else:
                store = encoder.compacted(store, job.end)
                if encoder.needs_all_keys:
                    own = assign_partitions(store.events.key, job.events.receivers) == partition.number
                    columns = {name: column[own] for name, column in store.to_columns().items()}
                    store = store.with_columns(columns, store.compacted_at)
                write_event_store(store, job.stores, encoder.name, partition.number)
        if len(chunk.rows):
            job.results.send(partition.group, (partition.number, turn), chunk.rows, chunk_results)
    features = {encoder.name: counting[encoder.name].numbers for encoder in group}
    return {name: {result: n.histogram for result, n in numbers.items()} for name, numbers in features.items()}


def load_pipeline(pipeline_dir: Path) -> FeaturePipeline:
    """Load the pipeline of a folder, without event stores, and cache it for the next task of the process."""
    return _load_pipeline(pipeline_dir, (pipeline_dir / "pipeline.json").stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _load_pipeline(pipeline_dir: Path, written: int) -> FeaturePipeline:
    return FeaturePipeline.load(pipeline_dir, stores=False)


def _previous_store(job: LookupJob, encoder: PointInTimeEncoder[Any], partition: KeyPartition) -> EventStore:
    if job.previous is None:
        return encoder.store
    if encoder.needs_all_keys:
        return read_event_store(encoder, job.previous)
    start, end = key_range(partition.number, job.events.receivers)
    inside = pc.field("key") >= pa.scalar(start, pa.uint64())
    if end < 2**64:
        inside &= pc.field("key") < pa.scalar(end, pa.uint64())
    return read_event_store(encoder, job.previous, inside)
