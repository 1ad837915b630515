"""Rows that are to be added to a log, of which its files hold some already, or others of their requests.

A build takes a row of a request and candidate once, and a request is one user's and has one time. What other programs
send may be wrong in that, so it is looked up before such rows become a file, which every later build would stop at.
Only files are read whose times say that they may hold such a request, and those that the tables do not know yet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from mmoe_rec.errors import UserError, quoted
from mmoe_rec.log.checks import LogFile
from mmoe_rec.log.files import FoundFile
from mmoe_rec.log.parts import Noticed, cut
from mmoe_rec.log.reader import ROWS_PER_PART, Log, LogReader
from mmoe_rec.log.rows import LogRows
from mmoe_rec.preprocessing.added.taken import Taken, TakenFile
from mmoe_rec.preprocessing.logs import DEFAULTS, BuildOptions
from mmoe_rec.preprocessing.request_summaries import RequestSummaries, read_requests
from mmoe_rec.settings.schema import Schema

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

    features: of the tables that are to take the rows, which say what the files hold that they know; taken: those files;
    options: by which the log is to be read; anew: whether the tables are made of all files; doubted: addresses of files
    that are not to be looked at.

    repeated, other_user: rows that were left out; relied_on: files that the tables do not know, as they are now, and
    that hold requests of rows. What was given is right only as long as these files stay, and tables take them in.
    """

    def __init__(
        self,
        source: str,
        schema: Schema,
        features: Path,
        taken: Taken | None,
        options: BuildOptions = DEFAULTS,
        anew: bool = False,
        doubted: Collection[str] = (),
    ) -> None:
        self.schema, self.repeated, self.other_user = schema, LeftOutRows(), LeftOutRows()
        self.relied_on: dict[str, FoundFile] = {}
        self._options, self._doubted = options, set(doubted)
        folder = features / "requests"
        self._requests = folder if folder.is_dir() else None
        types = None if taken is None else taken.logs[0].types
        now = None if options.future_times == "error" else _FOREVER
        try:
            self._log: Log | None = Log(source, schema, skip_bad_files=True, types=types, now=now)
        except UserError:  # no file can be read, of which the build is to tell, unless these rows become the first one
            self._log = None
        self._taken: dict[str, TakenFile] = {}
        if self._log is not None and taken is not None:
            self._taken = taken.logs[0].unchanged(self._log)
            if not anew:  # tables that go on leave these out again
                self._doubted.update(taken.logs[0].left_out_of(self._log))

    def rest(self, table: pa.Table) -> pa.Table:
        """The rows, of canonical columns, that the log may take: without those whose request and candidate its files
        hold, where such rows are no error, and those whose request they hold with another user. Of a request that they
        hold, rows get its time.

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
        repeated = ~other & np.isin(rows.row_hashes(), keys)
        if self._options.duplicates == "keep":
            repeated[:] = False
        self.other_user.add(table, other, self.schema)
        self.repeated.add(table, repeated, self.schema)
        return rows.with_times(np.where(known, held.first[place], times)).filter(~other & ~repeated).table

    def _held(self, request: np.ndarray, times: np.ndarray) -> tuple[RequestSummaries, np.ndarray]:
        """Of (N,) requests those that are held, and the keys of their rows."""
        asked = np.unique(request)
        found, keys = known_requests(self._requests, asked), [np.empty(0, np.uint64)]
        by_request = self.schema.columns.request is not None
        spans = (found.first, found.last) if by_request else (times, times)
        for rows in self._read(self._files(*spans, all_of_them=by_request and self._requests is None), asked):
            keys.append(rows.row_hashes())
            user = rows.hashes([self.schema.columns.user])
            columns = {"request": rows.request_hashes(), "time": rows.times(), "user": user}
            found = found.merged([RequestSummaries.of_runs(pa.table({**columns, "rows": np.ones(len(rows), int)}))])
        return found, np.concatenate(keys)

    def _files(self, first: np.ndarray, last: np.ndarray, all_of_them: bool) -> list[LogFile]:
        """Those that may hold something of one of (N,) spans of time, microseconds, and those that are new."""
        if self._log is None:
            return []
        found = []
        for file in self._log.files:
            known = self._taken.get(file.address)
            if known is None:
                if file.address not in self._doubted:
                    found.append(file)
            elif all_of_them or may_hold(known, first, last):
                found.append(file)
        return found

    def _read(self, files: Sequence[LogFile], asked: np.ndarray) -> Iterator[LogRows]:
        """Rows of the requests asked for, (R,) rising hashes."""
        if self._log is None:
            return
        keys_alone = key_reader(self._log)
        for file in files:
            is_new = file.address not in self._taken
            # A build leaves out all of a file that is bad in one value, or stops.
            reader = self._log.reader if is_new and self._options.skip_bad_files else keys_alone
            noticed, held = Noticed(), list[LogRows]()
            for part in cut([file], ROWS_PER_PART):
                for rows in reader.read(part, noticed):
                    if len(mine := rows.filter(among(rows.request_hashes(), asked))):
                        held.append(LogRows(mine.table.select(list(keys_alone.uses)), self.schema))
            if noticed.bad and self._options.skip_bad_files:
                continue
            if held and is_new:
                self.relied_on[file.address] = self._log.found[file.address]
            yield from held


def known_requests(folder: Path | None, asked: np.ndarray) -> RequestSummaries:
    """Those of the requests that are kept in a folder, None for none, that are among (R,) rising hashes."""
    if not len(asked):
        return RequestSummaries.none()
    found = [some.take(np.flatnonzero(among(some.request, asked))) for some in read_requests(folder, 0, 1)]
    return RequestSummaries.none().merged(found)


def may_hold(file: TakenFile, first: np.ndarray, last: np.ndarray) -> bool:
    """Whether a file has rows of the time of one of (N,) spans, microseconds."""
    if file.first is None or file.last is None:
        return False
    return bool(((first <= file.last) & (last >= file.first)).any())


def among(values: np.ndarray, rising: np.ndarray) -> np.ndarray:
    """(N,) bool: which of the values are among those that rise."""
    if not len(rising):
        return np.zeros(len(values), bool)
    found: np.ndarray = rising[np.minimum(np.searchsorted(rising, values), len(rising) - 1)] == values
    return found


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
