"""Rows that are to be added to a log, of which its files hold some already, or others of their requests.

A build takes a row of a request and candidate once, and a request is one user's and has one time. What other programs
send may be wrong in that, so it is looked up before such rows become a file, which every later build would stop at.
Only files are read whose times say that they may hold such a request, and those that the tables do not know yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from mmoe_rec.build.added.taken import Taken
from mmoe_rec.build.request_summaries import RequestSummaries, read_requests
from mmoe_rec.errors import UserError, quoted
from mmoe_rec.log.checks import LogFile
from mmoe_rec.log.columns import UTC_MICROSECONDS
from mmoe_rec.log.hashing import combine
from mmoe_rec.log.parts import Noticed, cut
from mmoe_rec.log.reader import ROWS_PER_PART, Log, LogReader
from mmoe_rec.log.rows import LogRows
from mmoe_rec.schema import Schema

_FOREVER = np.iinfo(np.int64).max


@dataclass
class LeftOutRows:
    """How many rows were left out for a reason, and the first of them in words."""

    rows: int = 0
    first: str = ""

    def add(self, table: pa.Table, mask: np.ndarray, schema: Schema) -> None:
        """Takes note of the rows where (N,) bool is true."""
        if mask.any():
            self.first = self.first or _words(table, int(mask.argmax()), schema)
            self.rows += int(mask.sum())


class HeldRows:
    """What the files of an interaction log hold now, for rows that are to be added.

    features: of the tables that are to take the rows, which say what the files hold that they know; repeated,
    other_user: rows that were left out.
    """

    def __init__(self, source: str, schema: Schema, features: Path, taken: Taken | None) -> None:
        self.schema, self.repeated, self.other_user = schema, LeftOutRows(), LeftOutRows()
        self._taken = {} if taken is None else taken.logs[0].files
        folder = features / "requests"
        self._requests = folder if folder.is_dir() else None
        types = None if taken is None else taken.logs[0].types
        try:
            self._log: Log | None = Log(source, schema, skip_bad_files=True, types=types, now=_FOREVER)
        except UserError:  # no file can be read, of which the build is to tell, unless these rows become the first one
            self._log = None

    def rest(self, table: pa.Table) -> pa.Table:
        """The rows, of canonical columns, that the log may take: without those whose request and candidate its files
        hold, and those whose request they hold with another user. Of a request that they hold, rows get its time.

        Raises UserError where what the tables know of requests is damaged.
        """
        rows = LogRows(table, self.schema)
        request, user, times = rows.request_hashes(), rows.hashes([self.schema.columns.user]), rows.times()
        held, keys = self._held(request, times)
        if not len(held):
            return table
        place = held.place(request)
        known = held.request[place] == request
        other = known & (user != held.least[place]) & (user != held.greatest[place])
        repeated = ~other & np.isin(keys_of(rows), keys)
        self.other_user.add(table, other, self.schema)
        self.repeated.add(table, repeated, self.schema)
        settled = pa.array(np.where(known, held.first[place], times)).cast(UTC_MICROSECONDS)
        time = self.schema.columns.time
        table = table.set_column(table.column_names.index(time), time, settled)
        return table.filter(pa.array(~other & ~repeated))

    def _held(self, request: np.ndarray, times: np.ndarray) -> tuple[RequestSummaries, np.ndarray]:
        """Of (N,) requests those that are held, and the keys of their rows."""
        asked, found = np.unique(request), RequestSummaries.none()
        for some in read_requests(self._requests, 0, 1):
            found = found.merged([some.take(np.flatnonzero(np.isin(some.request, asked)))])
        by_request = self.schema.columns.request is not None
        spans = (found.first, found.last) if by_request else (times, times)
        keys = [np.empty(0, np.uint64)]
        for rows in self._read(self._files(*spans, all_of_them=by_request and self._requests is None)):
            if len(mine := rows.filter(np.isin(rows.request_hashes(), asked))):
                keys.append(keys_of(mine))
                user = mine.hashes([self.schema.columns.user])
                columns = {"request": mine.request_hashes(), "time": mine.times(), "user": user}
                found = found.merged([RequestSummaries.of_runs(pa.table({**columns, "rows": np.ones(len(mine), int)}))])
        return found, np.concatenate(keys)

    def _files(self, first: np.ndarray, last: np.ndarray, all_of_them: bool) -> list[LogFile]:
        """Those that may hold something of one of (N,) spans of time, microseconds, and those that are new."""
        if self._log is None:
            return []
        found = []
        for file in self._log.files:
            known = self._taken.get(file.address)
            if known is not None and not all_of_them:
                if known.first is None or known.last is None:
                    continue
                if not ((first <= known.last) & (last >= known.first)).any():
                    continue
            found.append(file)
        return found

    def _read(self, files: Sequence[LogFile]) -> Iterator[LogRows]:
        if self._log is not None:
            for part in cut(files, ROWS_PER_PART):
                # A build tells of bad files, and leaves them out or stops.
                yield from key_reader(self._log).read(part, Noticed())


def keys_of(rows: LogRows) -> np.ndarray:
    """(N,) uint64 by which two rows of a request and candidate are known."""
    return combine([rows.request_hashes(), rows.hashes([rows.schema.columns.candidate])])


def key_reader(log: Log) -> LogReader:
    """Reads request, user, candidate and time alone."""
    columns = log.schema.columns
    needed = {columns.request, columns.user, columns.candidate, columns.time}
    return replace(log.reader, uses={name: use for name, use in log.uses.items() if name in needed})


def _words(table: pa.Table, row: int, schema: Schema) -> str:
    columns = schema.columns
    names = [columns.user, columns.time] if columns.request is None else [columns.request]
    if columns.request_scope == "user" and columns.request is not None:
        names.insert(0, columns.user)
    values = [f"{name} {quoted(table[name][row].as_py())}" for name in (*names, columns.candidate)]
    return f"{', '.join(values[:-1])} and {values[-1]}"
