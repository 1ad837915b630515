"""An all-to-all exchange of rows between steps of a feature build, through files.

Senders write one Arrow IPC file each, with a record batch for every receiver in each turn; a receiver reads its batches
of all files. So what is exchanged never has to fit into memory, and workers need nothing in common but a folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa

Sender = tuple[int, int]
DUPLICATES = "duplicates"  # the channel of each row's request and candidate


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
        """Sends each of N rows to its receiver, (N,) integers; gives the number of rows each got, (receivers,) int64.

        The rows that a receiver gets keep their order.
        """
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

    def receive_all(self, channel: str, receiver: int) -> pa.Table | None:
        """The rows for a receiver as one table; None if there are none."""
        tables = list(self.receive(channel, receiver))
        return pa.concat_tables(tables, promote_options="permissive").combine_chunks() if tables else None

    def remove(self) -> None:
        """Removes all that was sent, once no other thread receives any more."""
        shutil.rmtree(self.folder, ignore_errors=True)


def partition_of(keys: np.ndarray, partitions: int) -> np.ndarray:
    """(N,) int64 partition of each key, uint64: ranges of equal width, so that partitions in order hold rising keys."""
    return (((keys >> np.uint64(32)) * np.uint64(partitions)) >> np.uint64(32)).astype(np.int64)


def key_range(partition: int, partitions: int) -> tuple[int, int]:
    """Least key of a partition, and of the next one (2^64 after the last)."""
    return tuple((-(-number * 2**32 // partitions)) << 32 for number in (partition, partition + 1))  # type: ignore
