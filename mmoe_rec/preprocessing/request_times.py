"""The step `requests` of a feature build: give all rows of a request the same time.

The rows of a request may be in different parts of a log. Each part is therefore reduced to runs, which are consecutive
rows with the same request, time and user. A database groups the runs of all parts by request. All rows of a request get
the request's earliest time. A file lists the rows whose time changes (see `LogReader.time_overrides`).

The features include a record of all requests (`requests.parquet`) and hashes of all rows (`rows.parquet`), to recognize
further rows of old requests and repeated rows in later builds.
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
# Hash of the request's ID, least and greatest hash of its users, first and last time in microseconds, number of rows.
_REQUESTS_SCHEMA = pa.schema(
    dict.fromkeys(("request", "least", "greatest"), pa.uint64()) | dict.fromkeys(("first", "last", "rows"), pa.int64())
)
_ROW_KEYS_SCHEMA = pa.schema({"key": pa.uint64()})
_SENT = pa.schema({"key": pa.uint64(), "row": pa.int64()})
_REQUESTS, _ROWS = "requests.parquet", "rows.parquet"
_GREATEST = np.iinfo(np.int64).max
RunTasks = Callable[[Callable[[Any], Any], Sequence[Any], Sequence[int], str], Iterator[Any]]


Conflict = tuple[int | None, int]
"""Numbers of two rows of one request. The first number is None if its row is in an earlier file."""


@dataclass
class RequestCounts:
    """Counts and conflicts of a log's requests.

    Attributes:
        count: Number of requests, including requests in earlier files.
        conflicting_times: Number of requests with several times.
        longest_microseconds: Largest difference between the times of a request.
        several_users: Number of requests with several users.
        continued: Number of requests that began in earlier files.
        continued_rows: Number of rows of continued requests in the new files.
        first_request_time: Time of the first request that began in the new files, in microseconds.
        earlier: Earliest time of a new row before all old rows of its request, in microseconds. None without such rows.
        times_conflict: Two rows of one request with different times, None if there are none or they are allowed.
        users_conflict: Two rows of one request with different users, None if there are none.
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
        """Return the counts for the manifest of the features."""
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
    """Find the requests of a log, with their times and users.

    A log without a request column is not read. User and time define its requests, so there are no conflicts.

    Args:
        logs: Logs of the build.
        reader: Reader of the interaction log.
        parts: Parts of the interaction log.
        run: Function that runs tasks on the engine. It takes a function, its argument for each task, the number of rows
            of each task, and a description for the progress bar.
        scratch: Folder for temporary files.
        time_overrides: File to write for rows whose own time differs from the request's time, see `LogReader`.
        previous: Folder with the record of the requests in earlier files.
        requests_dir: Folder for the record of all requests. None writes no record.

    Raises:
        UserError: A file is bad.
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
            # In a plain table, the time of a row is the index of its split. Different times of a request then mean
            # several splits, which are never allowed.
            _find_first_times(
                database, requests, time_overrides, options.on_conflicting_times == "error" or not columns.has_time
            )
        if requests.several_users:
            one_user = (
                "FROM runs JOIN (SELECT request, coalesce(previous.least, current.least) AS agreed FROM current "
                "LEFT JOIN previous USING (request)) USING (request)"
            )
            requests.users_conflict = _find_conflict(database, "who", one_user)
        if requests_dir is not None:
            requests_dir.mkdir(exist_ok=True)
            database.write("FROM all_requests ORDER BY request", requests_dir / _REQUESTS, _REQUESTS_SCHEMA)
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
        "CREATE TABLE current AS SELECT request, min(who) AS least, max(who) AS greatest, min(time) AS first, "
        "max(time) AS last, sum(rows)::BIGINT AS rows FROM runs GROUP BY request"
    )
    _read_previous(database, previous, _REQUESTS, _REQUESTS_SCHEMA)
    # A new row that is earlier than all old rows of its request would change the request's time, but the old rows are
    # already encoded with their own first time. Such a request doesn't count as continued.
    requests.continued, requests.continued_rows = database.row(
        "SELECT count(*), coalesce(sum(current.rows), 0)::BIGINT FROM current JOIN previous USING (request) "
        "WHERE current.first >= previous.first"
    )
    requests.first_request_time, requests.earlier = database.row(
        f"SELECT coalesce(min(current.first), {_GREATEST}), min(current.first) FILTER (previous.first IS NOT NULL) "
        "FROM current LEFT JOIN previous USING (request) "
        "WHERE previous.first IS NULL OR current.first < previous.first"
    )
    database.run(
        "CREATE TABLE all_requests AS SELECT request, min(least) AS least, max(greatest) AS greatest, "
        "min(first) AS first, max(last) AS last, sum(rows)::BIGINT AS rows "
        "FROM (FROM current UNION ALL FROM previous) GROUP BY request"
    )
    requests.count, requests.conflicting_times, requests.several_users, requests.longest_microseconds = database.row(
        "SELECT count(*), count(*) FILTER (last > first), count(*) FILTER (greatest > least), "
        "coalesce(max(last - first), 0) FROM all_requests"
    )


def _find_first_times(database: Database, requests: RequestCounts, path: Path, find_conflict: bool) -> None:
    one_time = "FROM runs JOIN (SELECT request, first AS agreed FROM all_requests WHERE last > first) USING (request)"
    moved = f"SELECT unnest(range(row, row + rows)) AS row, agreed {one_time} WHERE time <> agreed"
    path.parent.mkdir(exist_ok=True)
    schema = pa.schema({"row": pa.int64(), "time": pa.int64()})
    database.write(f"SELECT row, agreed AS time FROM ({moved}) ORDER BY row", path, schema)
    if find_conflict:
        requests.times_conflict = _find_conflict(database, "time", one_time)


def _find_conflict(database: Database, column: str, runs: str) -> Conflict | None:
    """Return two rows of one request: the first with the request's value (`agreed`), and the first with another."""
    conflicting, request = database.row(f'SELECT min(row), arg_min(request, row) {runs} WHERE "{column}" <> agreed')
    if conflicting is None:
        return None
    (first,) = database.row(f'SELECT min(row) {runs} WHERE request = {request} AND "{column}" = agreed')
    return first, conflicting


def _read_previous(database: Database, folder: Path | None, name: str, columns: pa.Schema) -> None:
    """Load a record of earlier files into the table `previous`, which is empty without a folder."""
    path = None if folder is None else folder / name
    try:
        database.copy("previous", ds.dataset(path or columns.empty_table(), columns))
    except (OSError, pa.ArrowException, duckdb.Error) as error:
        raise UserError(
            f"'{folder}/{name}' is missing or damaged ({first_line(error)}). Build the features again."
        ) from None


def check_requests(log: Log, requests: RequestCounts) -> None:
    """Raise UserError if `find_requests` found a request with conflicting users, times or splits.

    Args:
        log: Interaction log.
        requests: Counts and conflicts of the log's requests.
    """
    columns, split = log.schema.columns, log.schema.split
    if requests.users_conflict is not None:
        advice = (
            "A request has one user: give every request its own id, or set columns.request_scope to user if ids are "
            "unique only for one user."
        )
        raise _conflict_error(log, requests.users_conflict, columns.user, requests.several_users, advice)
    if requests.times_conflict is not None:
        column = columns.time
        advice = "Write the request's time into all its rows, or set data.on_conflicting_times to first."
        if split is not None:
            column, advice = split.column, "A request is ranked as a whole: give all its rows one split."
        raise _conflict_error(log, requests.times_conflict, column, requests.conflicting_times, advice)


def _conflict_error(log: Log, conflict: Conflict, column: str, count: int, advice: str) -> UserError:
    first = "a row of an earlier file" if conflict[0] is None else _locate(log, conflict[0])
    return UserError(
        f"{first} and {_locate(log, conflict[1])} belong to one request (column '{log.schema.columns.request}') but "
        f"differ in column '{column}'. This affects {count:,} request{'s' * (count > 1)}. {advice}"
    )


def _locate(log: Log, row: int) -> str:
    """Return the file of a row and the row's position in this file, for messages."""
    for file in log.files:
        if row < file.rows:
            return f"row {row} of '{file.uri}'"
        row -= file.rows
    raise AssertionError("a row beyond the log")


def check_duplicates(
    logs: Logs, sent: Path, scratch: Path, excluded_rows: Path, previous: Path | None, requests_dir: Path | None
) -> bool:
    """Find rows that repeat the request and candidate of another row, unless the options allow them.

    If new rows repeat rows of earlier files, write the numbers of the new rows to `excluded_rows`. The logs must then
    be counted again without these rows.

    Args:
        logs: Logs of the build.
        sent: Folder of Arrow files with the hash (`key`) and the number (`row`) of each row.
        scratch: Folder for temporary files.
        excluded_rows: File to write, for `LogReader.excluded_rows`.
        previous: Folder with the hashes of the rows in earlier files.
        requests_dir: Folder for the hashes of all rows. None writes no hashes.

    Returns:
        Whether the logs must be counted again.

    Raises:
        UserError: A row repeats another row of the new files.
    """
    options, log, columns = logs.options, logs.log, logs.schema.columns
    with open_database(scratch, options.memory_gib, options.workers) as database:
        database.copy("sent", ds.dataset(sent, _SENT, "ipc") if sent.is_dir() else ds.dataset(_SENT.empty_table()))
        _read_previous(database, previous, _ROWS, _ROW_KEYS_SCHEMA)
        database.run(
            "CREATE TABLE excluded AS SELECT row FROM sent SEMI JOIN previous USING (key)",
            "CREATE TABLE repeated AS SELECT key FROM sent GROUP BY key HAVING count(*) > 1",
        )
        count, row = database.row("SELECT count(*), min(row) FROM excluded")
        repeated, pair = database.row(
            "SELECT sum(rows - 1)::BIGINT, min(row(pair[2], pair[1])) FROM "
            "(SELECT count(*) AS rows, min(row, 2) AS pair FROM sent SEMI JOIN repeated USING (key) GROUP BY key)"
        )
        if count and options.on_duplicates == "error":
            such_as = f"such as {_locate(log, row)}"
            say(f"skipped {count:,} rows of new files that repeat rows of earlier files, {such_as}")
            database.write("SELECT row FROM excluded ORDER BY row", excluded_rows, pa.schema({"row": pa.int64()}))
            return True
        if repeated is not None and options.on_duplicates == "error":
            names = f"'{columns.request}'" if columns.request else f"'{columns.user}', '{columns.time}'"
            if not columns.has_time and not columns.request:
                names = f"'{columns.user}', within a split,"
            raise UserError(
                f"{_locate(log, pair[0])} repeats request and candidate (columns {names} and '{columns.candidate}') of "
                f"{_locate(log, pair[1])}. The log has {repeated:,} such rows. Remove them, or set data.on_duplicates "
                "to keep if they are intended."
            )
        if requests_dir is not None:
            requests_dir.mkdir(parents=True, exist_ok=True)
            # Store the sorted hashes by their differences. This takes about 5 bytes a row instead of 8.
            packed: dict[str, Any] = {"use_dictionary": False, "column_encoding": {"key": "DELTA_BINARY_PACKED"}}
            all_keys = "SELECT key FROM sent UNION ALL FROM previous ORDER BY key"
            database.write(all_keys, requests_dir / _ROWS, _ROW_KEYS_SCHEMA, **packed)
    return False
