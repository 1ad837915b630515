"""What a model's tables know of requests: further rows of one have its time, and are its user's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.errors import UserError
from mmoe_rec.journal.duplicates import FORGET_AFTER_DAYS
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY, LogRows


@dataclass(frozen=True)
class HeldRequests:
    """R requests by rising hash: (R,) uint64 hash, int64 time in microseconds, uint64 hash of the user."""

    request: np.ndarray
    time: np.ndarray
    user: np.ndarray

    @staticmethod
    def of(features: Path, as_of: int, days: int = FORGET_AFTER_DAYS) -> HeldRequests:
        """Those of the last days before `as_of` (microseconds) that the tables in a folder hold; none where the log's
        requests have no ids. Raises UserError for a damaged file.
        """
        since, found = as_of - days * MICROSECONDS_PER_DAY, [np.empty((3, 0), np.int64)]
        for path in sorted((features / "requests").glob("*.parquet")):
            try:
                with pq.ParquetFile(path) as file:
                    for group in range(file.num_row_groups):
                        table = file.read_row_group(group, ["request", "first", "last", "least", "greatest"])
                        request, first, last, least, greatest = (each.to_numpy() for each in table.columns)
                        kept = (last >= since) & (least == greatest)
                        found.append(np.stack([request.view(np.int64), first, least.view(np.int64)])[:, kept])
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"'{path}' is damaged: {str(error).splitlines()[0]}") from None
        request, time, user = np.concatenate(found, axis=1)
        order = np.argsort(request.view(np.uint64))
        return HeldRequests(request.view(np.uint64)[order], time[order], user.view(np.uint64)[order])

    def __len__(self) -> int:
        return len(self.request)

    def rest(self, rows: LogRows) -> LogRows:
        """Rows of the interaction log, those of these requests with their time, and without those of other users."""
        if not len(self) or not len(rows):
            return rows
        request = rows.request_hashes()
        place = np.minimum(np.searchsorted(self.request, request), len(self) - 1)
        known = self.request[place] == request
        if not known.any():
            return rows
        other = known & (rows.hashes([rows.schema.columns.user]) != self.user[place])
        return rows.with_times(np.where(known, self.time[place], rows.times())).filter(~other)
