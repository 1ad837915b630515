"""A summary of each request, by the hash of its id: in memory a partition at a time, and kept in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from mmoe_rec.preprocessing import requests

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

    def place(self, request: np.ndarray) -> np.ndarray:
        """(N,) int64 place of each request that is one of these; the place of another one otherwise."""
        return np.minimum(np.searchsorted(self.request, request), len(self) - 1)

    def take(self, places: np.ndarray) -> RequestSummaries:
        """Those at the places."""
        return RequestSummaries(*(getattr(self, name)[places] for name in _COLUMNS))


def read_requests(folder: Path | None, partition: int, partitions: int) -> Iterator[RequestSummaries]:
    """The requests in a folder, None for none, some at a time; of the only partition.

    Raises UserError for a folder that can't be read.
    """
    assert (partition, partitions) == (0, 1)
    for table in requests.read_requests(folder):
        yield RequestSummaries(*(table[name].to_numpy() for name in _COLUMNS))
