"""Small batches, and journals of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from mmoe_rec.journal.follower import Follower
from mmoe_rec.journal.journal import Journal
from mmoe_rec.journal.records import Batch
from mmoe_rec.journal.segments import segment_path


def batch(*numbers: int, source: str | None = None, text: str = "x") -> Batch:
    """A batch of a row for each number, which need not mean anything to a schema."""
    return Batch(source, 7, pa.table({"number": pa.array(numbers, pa.int64()), "text": [text] * len(numbers)}))


def numbers_in(batches: list[Batch]) -> list[int]:
    """The numbers of batches of `batch`, in order."""
    return [number for each in batches for number in each.table["number"].to_pylist()]


def every_batch(folder: Path, most_rows: int = 1000) -> Iterator[Batch]:
    """All batches of a journal, by a new follower."""
    follower = Follower(folder)
    try:
        while batches := follower.read(most_rows):
            yield from batches
    finally:
        follower.close()


def all_numbers(folder: Path) -> list[int]:
    """The numbers of all batches of a journal."""
    return numbers_in(list(every_batch(folder)))


def filled(folder: Path, records: int = 3) -> tuple[Path, list[int]]:
    """The segment of a closed journal of records 0, 1, ...; and the offsets of its begin and of their ends."""
    journal = Journal(folder)
    ends = [journal.end().offset, *(journal.append(batch(number)).offset for number in range(records))]
    journal.close()
    return segment_path(folder, 1), ends


def forget_end(folder: Path) -> None:
    """As after a loss of power: what is not flushed, the file `end`, is gone."""
    os.unlink(folder / "end")
