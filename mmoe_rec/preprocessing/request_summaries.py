"""A summary of each request, by the hash of its id: in memory a partition at a time, and kept in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.errors import UserError
from mmoe_rec.log.files import first_line
from mmoe_rec.log.reader import ROWS_PER_PART
from mmoe_rec.preprocessing.exchange import key_range

_COLUMNS = ("request", "first", "last", "least", "greatest", "rows")
_HASHES = ("request", "least", "greatest")


@dataclass
class RequestSummaries:
    """R distinct requests, by rising hash: first and last time, least and greatest hash of their users, rows."""

    request: np.ndarray
    first: np.ndarray
    last: np.ndarray
    least: np.ndarray
    greatest: np.ndarray
    rows: np.ndarray

    @staticmethod
    def none() -> RequestSummaries:
        """No requests."""
        return RequestSummaries(*(np.empty(0, np.uint64 if name in _HASHES else np.int64) for name in _COLUMNS))

    @staticmethod
    def of_runs(runs: pa.Table) -> RequestSummaries:
        """The requests of runs of rows."""
        request, time, user, rows = (runs[name].to_numpy() for name in ("request", "time", "user", "rows"))
        return RequestSummaries(request, time, time, user, user, rows)._distinct()

    def merged(self, others: Sequence[RequestSummaries]) -> RequestSummaries:
        """These requests and others."""
        every = (np.concatenate([getattr(each, name) for each in (self, *others)]) for name in _COLUMNS)
        return RequestSummaries(*every)._distinct()

    def _distinct(self) -> RequestSummaries:
        order = np.argsort(self.request, kind="stable")
        request = self.request[order]
        start = np.flatnonzero(np.append(len(request) > 0, request[1:] != request[:-1]))
        if not len(start):
            return RequestSummaries.none()
        return RequestSummaries(
            request[start],
            np.minimum.reduceat(self.first[order], start),
            np.maximum.reduceat(self.last[order], start),
            np.minimum.reduceat(self.least[order], start),
            np.maximum.reduceat(self.greatest[order], start),
            np.add.reduceat(self.rows[order], start),
        )

    def __len__(self) -> int:
        return len(self.request)

    @property
    def several_times(self) -> np.ndarray:
        """(R,) bool."""
        return self.last > self.first

    def place(self, request: np.ndarray) -> np.ndarray:
        """(N,) int64 place of each request that is one of these; the place of another one otherwise."""
        return np.minimum(np.searchsorted(self.request, request), len(self) - 1)

    def take(self, places: np.ndarray) -> RequestSummaries:
        """Those at the places."""
        return RequestSummaries(*(getattr(self, name)[places] for name in _COLUMNS))

    def to_table(self) -> pa.Table:
        """As columns."""
        return pa.table({name: getattr(self, name) for name in _COLUMNS})


def read_requests(folder: Path | None, partition: int, partitions: int) -> Iterator[RequestSummaries]:
    """The requests in a folder, None for none, that are a partition's; some at a time.

    Raises UserError for a folder that can't be read.
    """
    if folder is None:
        return
    least, end = key_range(partition, partitions)
    try:
        for path in sorted(folder.iterdir()):
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    within = file.metadata.row_group(group).column(0).statistics
                    if within.max >= least and within.min < end:
                        yield _inside(file.read_row_group(group), least, end)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"'{folder}' is damaged: {first_line(error)}; build the features anew") from None


def _inside(table: pa.Table, least: int, end: int) -> RequestSummaries:
    summaries = RequestSummaries(*(table[name].to_numpy() for name in _COLUMNS))
    inside = summaries.request >= np.uint64(least)
    if end < 2**64:
        inside &= summaries.request < np.uint64(end)
    return summaries.take(np.flatnonzero(inside))


class RequestWriter:
    """Writes a partition's requests into a folder, or nowhere; no requests, no file."""

    def __init__(self, folder: Path | None, partition: int) -> None:
        self._path = None if folder is None else folder / f"part-{partition:05d}.parquet"
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []

    def __enter__(self) -> RequestWriter:
        return self

    def write(self, summaries: RequestSummaries) -> None:
        """Takes requests, and writes many at a time."""
        if self._path is not None and len(summaries):
            self._waiting.append(summaries.to_table())
            if sum(map(len, self._waiting)) >= ROWS_PER_PART:
                self._append()

    def _append(self) -> None:
        if self._path is not None and self._waiting:
            table = pa.concat_tables(self._waiting).combine_chunks()
            if self._writer is None:
                self._writer = pq.ParquetWriter(
                    self._path, table.schema, compression="zstd", write_statistics=["request"]
                )
            self._writer.write_table(table)
            self._waiting.clear()

    def __exit__(self, *error: object) -> None:
        self._append()
        if self._writer is not None:
            self._writer.close()
