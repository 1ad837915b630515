"""One request has one time: the first step of a build finds requests whose rows have several, and their first.

A request's rows may lie in any parts of a log. So each part writes (request, time, user, row, rows) of its rows, once
for consecutive rows that agree, and a database groups these by the hash of the request's id. Where a request has
several times, its rows get the first one: a file says which, by rising row, and whoever reads the log reads it as well.
What is known of requests is kept with the features (`requests.parquet`), so that rows in a later day's files are
recognised; so are hashes of all rows (`rows.parquet`), as rows of a day before do not count when they come again.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from mmoe_rec.errors import UserError, first_line
from mmoe_rec.log.database import Database, open_database
from mmoe_rec.log.reader import Log, LogPart, LogReader
from mmoe_rec.log.rows import LogRows
from mmoe_rec.preprocessing.build_inputs import Logs
from mmoe_rec.progress import say

_RUNS = pa.schema(
    {"request": pa.uint64(), "time": pa.int64(), "who": pa.uint64(), "row": pa.int64(), "rows": pa.int64()}
)
REQUESTS_SCHEMA = pa.schema(
    dict.fromkeys(("request", "least", "greatest"), pa.uint64()) | dict.fromkeys(("first", "last", "rows"), pa.int64())
)
ROW_KEYS_SCHEMA = pa.schema({"key": pa.uint64()})
_SENT = pa.schema({"key": pa.uint64(), "row": pa.int64()})
_REQUESTS, _ROWS = "requests.parquet", "rows.parquet"
_GREATEST = np.iinfo(np.int64).max
RunTasks = Callable[[Callable[[Any], Any], Sequence[Any], Sequence[int], str], Iterator[Any]]


Conflict = tuple[int | None, int]
"""Numbers of two rows of one request that disagree; the first is None where it lies in a file of days before."""


@dataclass
class RequestCounts:
    """Counts and conflicts of a log's requests.

    Attributes:
        count: Number of requests.
        conflicting_times: Number of requests with rows of several times.
        longest_microseconds: Greatest difference of times within a request.
        several_users: Number of requests with rows of several users.
        continued: Number of requests that began in files of earlier days.
        continued_rows: Number of their rows here.
        begin: Time of the first request that began here.
        earlier: Least time of a row that precedes all earlier rows of its request, None if there is none.
        times_conflict: Two rows of one request with different times. The second is the first such row of the log.
        users_conflict: The same for different users.
    """

    count: int = 0
    conflicting_times: int = 0
    longest_microseconds: int = 0
    several_users: int = 0
    continued: int = 0
    continued_rows: int = 0
    first_request_time: int = _GREATEST
    earlier: int | None = None
    times_conflict: Conflict | None = None
    users_conflict: Conflict | None = None

    def describe(self) -> dict[str, int]:
        """What a manifest says of them."""
        names = ("count", "conflicting_times", "longest_microseconds", "continued", "continued_rows")
        return {name: getattr(self, name) for name in names}


def find_requests(
    logs: Logs,
    reader: LogReader,
    parts: Sequence[LogPart],
    run: RunTasks,
    scratch: Path,
    time_overrides: Path,
    previous: Path | None = None,
    requests_dir: Path | None = None,
) -> RequestCounts:
    """What is known of the requests of a log in parts; one without a request column, whose requests are rows of one
    time, is not read.

    run: runs tasks; first_times: file for the rows whose time is not their request's, see `LogReader`; before: folder
    with the requests of the days before; kept: folder that gets all requests. Raises UserError for a bad file.
    """
    log, options, requests = logs.log, logs.options, RequestCounts()
    columns, split = log.schema.columns, log.schema.split
    if columns.request is None:
        return requests
    read = {columns.request, columns.user, columns.time, *([] if split is None else [split.column])}
    reader = replace(reader, uses={column: use for column, use in log.uses.items() if column in read})
    folder = scratch / "runs"
    folder.mkdir(parents=True)
    for _ in run(partial(_write_runs, folder, reader), parts, [part.rows for part in parts], "requests"):
        pass
    with open_database(scratch / "database", options.memory_gib, options.workers) as database:
        database.copy("runs", ds.dataset(folder, _RUNS, format="ipc"))
        _group(database, requests, previous)
        if requests.conflicting_times:
            # Without times a request's rows of several splits have several.
            _find_first_times(
                database, requests, time_overrides, options.on_conflicting_times == "error" or not columns.has_time
            )
        if requests.several_users:
            one_user = (
                "FROM runs JOIN (SELECT request, coalesce(before.least, mine.least) AS agreed FROM mine "
                "LEFT JOIN before USING (request)) USING (request)"
            )
            requests.users_conflict = _find_clash(database, "who", one_user)
        if requests_dir is not None:
            requests_dir.mkdir(exist_ok=True)
            database.write("FROM every ORDER BY request", requests_dir / _REQUESTS, REQUESTS_SCHEMA)
    shutil.rmtree(scratch)
    return requests


def _write_runs(folder: Path, reader: LogReader, part: LogPart) -> None:
    with pa.OSFile(str(folder / f"{part.start:012d}.arrow"), "wb") as file, pa.ipc.new_file(file, _RUNS) as writer:
        for rows in reader.read(part):
            writer.write_table(_runs_of(rows))


def _runs_of(rows: LogRows) -> pa.Table:
    number, time = rows.row_numbers, rows.times()
    request, user = rows.request_hashes(), rows.hashes([rows.schema.columns.user])
    begins = (request[1:] != request[:-1]) | (time[1:] != time[:-1]) | (user[1:] != user[:-1]) | (np.diff(number) > 1)
    start = np.flatnonzero(np.append(True, begins))
    counts = np.diff(np.append(start, len(rows)))
    return pa.table([request[start], time[start], user[start], number[start], counts], schema=_RUNS)


def _group(database: Database, requests: RequestCounts, previous: Path | None) -> None:
    database.run(
        "CREATE TABLE mine AS SELECT request, min(who) AS least, max(who) AS greatest, min(time) AS first, "
        "max(time) AS last, sum(rows)::BIGINT AS rows FROM runs GROUP BY request"
    )
    _read_kept(database, previous, _REQUESTS, REQUESTS_SCHEMA)
    # A row that is earlier than all of its request in the files before would change what these have become.
    requests.continued, requests.continued_rows = database.row(
        "SELECT count(*), coalesce(sum(mine.rows), 0)::BIGINT FROM mine JOIN before USING (request) "
        "WHERE mine.first >= before.first"
    )
    requests.first_request_time, requests.earlier = database.row(
        f"SELECT coalesce(min(mine.first), {_GREATEST}), min(mine.first) FILTER (before.first IS NOT NULL) "
        "FROM mine LEFT JOIN before USING (request) WHERE before.first IS NULL OR mine.first < before.first"
    )
    database.run(
        "CREATE TABLE every AS SELECT request, min(least) AS least, max(greatest) AS greatest, min(first) AS first, "
        "max(last) AS last, sum(rows)::BIGINT AS rows FROM (FROM mine UNION ALL FROM before) GROUP BY request"
    )
    requests.count, requests.conflicting_times, requests.several_users, requests.longest_microseconds = database.row(
        "SELECT count(*), count(*) FILTER (last > first), count(*) FILTER (greatest > least), "
        "coalesce(max(last - first), 0) FROM every"
    )


def _find_first_times(database: Database, requests: RequestCounts, path: Path, want_clash: bool) -> None:
    one_time = "FROM runs JOIN (SELECT request, first AS agreed FROM every WHERE last > first) USING (request)"
    moved = f"SELECT unnest(range(row, row + rows)) AS row, agreed {one_time} WHERE time <> agreed"
    path.parent.mkdir(exist_ok=True)
    schema = pa.schema({"row": pa.int64(), "time": pa.int64()})
    database.write(f"SELECT row, agreed AS time FROM ({moved}) ORDER BY row", path, schema)
    if want_clash:
        requests.times_conflict = _find_clash(database, "time", one_time)


def _find_clash(database: Database, column: str, runs: str) -> Conflict | None:
    """The first row that disagrees with its request, and the first that does not; None if no row does."""
    other, request = database.row(f'SELECT min(row), arg_min(request, row) {runs} WHERE "{column}" <> agreed')
    if other is None:
        return None
    (first,) = database.row(f'SELECT min(row) {runs} WHERE request = {request} AND "{column}" = agreed')
    return first, other


def _read_kept(database: Database, folder: Path | None, name: str, columns: pa.Schema) -> None:
    """Makes the table `before` of a kept file, empty without one. `request`, `least` and `greatest` are hashes of a
    request's id and of its users, `first` and `last` its times in microseconds; `key` is a hash of a row's request and
    candidate. Raises UserError for a file that is lost or damaged."""
    path = None if folder is None else folder / name
    try:
        database.copy("before", ds.dataset(path or columns.empty_table(), columns))
    except (OSError, pa.ArrowException, duckdb.Error) as error:
        raise UserError(
            f"'{folder}/{name}' is lost or damaged ({first_line(error)}): build the features anew"
        ) from None


def check_requests(log: Log, requests: RequestCounts) -> None:
    """Raises UserError where a request has several users, or several times where an example of that was looked for."""
    columns, split = log.schema.columns, log.schema.split
    if requests.users_conflict is not None:
        advice = (
            "a request is one user's: give each request an id of its own, or set columns.request_scope to user if ids "
            "are a user's own"
        )
        raise _clash(log, requests.users_conflict, columns.user, requests.several_users, advice)
    if requests.times_conflict is not None and split is not None:
        advice = "a request is ranked as a whole: give all its rows one split"
        raise _clash(log, requests.times_conflict, split.column, requests.conflicting_times, advice)
    if requests.times_conflict is not None:
        advice = "write the request's time into all its rows, or set data.on_conflicting_times to first"
        raise _clash(log, requests.times_conflict, columns.time, requests.conflicting_times, advice)


def _clash(log: Log, clash: Conflict, column: str, count: int, advice: str) -> UserError:
    first = "a row of the files before" if clash[0] is None else locate(log, clash[0])
    return UserError(
        f"{first} and {locate(log, clash[1])} are of one request (column '{log.schema.columns.request}') and differ "
        f"in column '{column}', as do rows of {count:,} request{'s' * (count > 1)}: {advice}"
    )


def locate(log: Log, row: int) -> str:
    """Where a row of a log stands, for messages."""
    for file in log.files:
        if row < file.rows:
            return f"row {row} of '{file.uri}'"
        row -= file.rows
    raise AssertionError("a row beyond the log")


def check_duplicates(
    logs: Logs, sent: Path, scratch: Path, excluded_rows: Path, previous: Path | None, requests_dir: Path | None
) -> bool:
    """Whether rows came before, in the same request: their numbers are then written to a file `excluded_rows` (see
    `LogReader`), and all others have to be counted again. Else rows are kept.

    sent: folder of Arrow files with the `key` and the number of each `row`; scratch: folder for a database; before:
    folder with the rows of the days before; kept: folder that gets all rows.

    Raises UserError where a row repeats an earlier one of these files.
    """
    options, log, columns = logs.options, logs.log, logs.schema.columns
    with open_database(scratch, options.memory_gib, options.workers) as database:
        database.copy("sent", ds.dataset(sent, _SENT, "ipc") if sent.is_dir() else ds.dataset(_SENT.empty_table()))
        _read_kept(database, previous, _ROWS, ROW_KEYS_SCHEMA)
        database.run(
            "CREATE TABLE known AS SELECT row FROM sent SEMI JOIN before USING (key)",
            "CREATE TABLE again AS SELECT key FROM sent GROUP BY key HAVING count(*) > 1",
        )
        count, row = database.row("SELECT count(*), min(row) FROM known")
        repeated, pair = database.row(
            "SELECT sum(rows - 1)::BIGINT, min(row(pair[2], pair[1])) FROM "
            "(SELECT count(*) AS rows, min(row, 2) AS pair FROM sent SEMI JOIN again USING (key) GROUP BY key)"
        )
        if count and options.on_duplicates == "error":
            such_as = f"such as {locate(log, row)}"
            say(f"left out: {count:,} rows of new files that came before, {such_as}; the first ones count")
            database.write("SELECT row FROM known ORDER BY row", excluded_rows, pa.schema({"row": pa.int64()}))
            return True
        if repeated is not None and options.on_duplicates == "error":
            names = f"'{columns.request}'" if columns.request else f"'{columns.user}', '{columns.time}'"
            if not columns.has_time and not columns.request:
                names = f"'{columns.user}', within a split,"
            raise UserError(
                f"{locate(log, pair[0])} repeats request and candidate (columns {names} and '{columns.candidate}') of "
                f"{locate(log, pair[1])}; {repeated:,} rows of the log do so: remove them, or set "
                "data.on_duplicates to "
                "keep if they are meant"
            )
        if requests_dir is not None:
            requests_dir.mkdir(parents=True, exist_ok=True)
            # Of rising numbers the differences are stored: some 5 bytes a row.
            packed: dict[str, Any] = {"use_dictionary": False, "column_encoding": {"key": "DELTA_BINARY_PACKED"}}
            every = "SELECT key FROM sent UNION ALL FROM before ORDER BY key"
            database.write(every, requests_dir / _ROWS, ROW_KEYS_SCHEMA, **packed)
    return False
