"""An all-to-all exchange of rows between steps of a feature build, through files.

Senders write one Arrow IPC file each, with a record batch for every receiver in each turn; a receiver reads its batches
of all files. So what is exchanged never has to fit into memory, and workers need nothing in common but a folder.

Results of counters and histories go to blocks of rows, in a table of each group of them. A list that many rows in a row
share, as the candidates of a request share their user's history, is sent once: null stands for the list before.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from mmoe_rec.features.encoder import Results
from mmoe_rec.point_in_time.arrays import Ragged, SharedRagged, one_array

Sender = tuple[int, int]
DUPLICATES = "duplicates"  # the channel of each row's request and candidate, with its labels


def events_of(feature: str) -> str:
    """Channel of what a counter or history remembers."""
    return f"events.{feature}"


def look_ups_of(group: str) -> str:
    """Channel of what rows ask a group of counters and histories, see `FeaturePipeline.key_groups`."""
    return f"look_ups.{group}"


def label_of(task: str) -> str:
    """Column of a look-up that holds the label by which its row is an event."""
    return f"label.{task}"


class Exchange:
    """A folder of files `CHANNEL/SENDER.arrow`. A sender is a pair of numbers, so that it may write in turns."""

    def __init__(self, folder: Path, receivers: int) -> None:
        self.folder = folder
        self.receivers = receivers

    def send(self, channel: str, sender: Sender, table: pa.Table, receiver: np.ndarray) -> np.ndarray:
        """Sends each of N rows to its receiver, (N,) integers, in order; gives the rows of each, (receivers,) int64."""
        return self.send_in_turns(channel, sender, [(table, receiver)])

    def send_in_turns(self, channel: str, sender: Sender, turns: Iterable[tuple[pa.Table, np.ndarray]]) -> np.ndarray:
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


def partition_of(keys: np.ndarray, partitions: int) -> np.ndarray:
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

    def send(self, group: str, sender: Sender, rows: np.ndarray, results: Results) -> None:
        """Sends a group's results for (N,) rising row numbers."""
        block = rows // ROWS_PER_BLOCK
        columns = {"row": pa.array(rows)}
        for name, each in results.items():
            columns[name] = _lists(each, block) if isinstance(each, SharedRagged) else pa.array(each)
        self.exchange.send(group, sender, pa.table(columns), block)

    def receive(self, groups: Sequence[str], block: int) -> Results:
        """What was sent to a block, at the place of each row; rows without a result hold any value."""
        results: dict[str, np.ndarray | SharedRagged] = {}
        start = block * ROWS_PER_BLOCK
        for group in groups:
            results |= _by_row(list(self.exchange.receive(group, block)), start, min(ROWS_PER_BLOCK, self.rows - start))
        return results


def _lists(results: SharedRagged, block: np.ndarray) -> pa.Array:
    number = results.number
    first = np.append(len(number) > 0, (number[1:] != number[:-1]) | (block[1:] != block[:-1]))
    lists = results.lists.take(number[first])
    offsets = np.zeros(len(number) + 1, np.int32)
    offsets[1:][first] = lists.lengths
    return pa.ListArray.from_arrays(
        pa.array(np.cumsum(offsets, dtype=np.int32)), pa.array(lists.values.astype(np.int32)), mask=pa.array(~first)
    )


class ResultReader:
    """Gives rows, read in order, the results of counters and histories, block by block."""

    def __init__(self, results: ResultExchange, groups: Sequence[str]) -> None:
        self._results, self._groups = results, groups
        self._block = -1
        self._loaded: Results = {}

    def of(self, rows: np.ndarray) -> Results:
        """Results for rows by their numbers in the log, (N,) int64, which rise, at least one."""
        block, place = np.divmod(rows, ROWS_PER_BLOCK)
        parts = []
        for number in np.unique(block).tolist():
            if number != self._block:
                self._block, self._loaded = number, self._results.receive(self._groups, number)
            parts.append(take(self._loaded, place[block == number]))
        return {name: join_results([part[name] for part in parts]) for name in parts[0]}


def _by_row(tables: Sequence[pa.Table], start: int, rows: int) -> Results:
    """Results of a block of rows, the first of which is number `start`."""
    results: dict[str, np.ndarray | SharedRagged] = {}
    places = [table["row"].to_numpy() - start for table in tables]
    for field in list(tables[0].schema)[1:] if tables else ():
        columns = [one_array(table[field.name]) for table in tables]
        if pt.is_list(field.type):
            parts = SharedRagged.join([_shared(column) for column in columns])
            number = np.zeros(rows, np.int64)
            number[np.concatenate(places)] = parts.number
            results[field.name] = SharedRagged(parts.lists, number)
        else:
            values = np.empty(rows, np.float32)
            for place, column in zip(places, columns, strict=True):
                values[place] = column.to_numpy()
            results[field.name] = values
    return results


def _shared(column: pa.ListArray) -> SharedRagged:
    first = column.is_valid().to_numpy(zero_copy_only=False)
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)[first].astype(np.int32)
    return SharedRagged(Ragged(column.flatten().to_numpy(), lengths), np.cumsum(first) - 1)


def take(results: Results, rows: np.ndarray) -> Results:
    """The results of the given rows."""
    together = len(rows) > 0 and bool((np.diff(rows) == 1).all())
    its = slice(int(rows[0]), int(rows[-1]) + 1) if together else rows  # a slice is not copied
    return {name: each.take(its) if isinstance(each, SharedRagged) else each[its] for name, each in results.items()}


def join_results(parts: Sequence[np.ndarray | SharedRagged]) -> np.ndarray | SharedRagged:
    """One counter's or history's results of several blocks of rows, one after the other."""
    if len(parts) == 1:
        return parts[0]
    lists = [part for part in parts if isinstance(part, SharedRagged)]
    return SharedRagged.join(lists) if lists else np.concatenate([np.asarray(part) for part in parts])
