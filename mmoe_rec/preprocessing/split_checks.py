"""Checks of what a log holds as a whole, before a model is trained on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from mmoe_rec.errors import UserError
from mmoe_rec.log.checks import format_time
from mmoe_rec.log.database import open_database
from mmoe_rec.log.files import takes_in
from mmoe_rec.log.reader import ROWS_PER_PART, Log
from mmoe_rec.point_in_time.join import Window
from mmoe_rec.preprocessing.count import LogCounts
from mmoe_rec.preprocessing.logs import Logs
from mmoe_rec.preprocessing.requests import KEPT_ROWS, Clash, Requests, read_kept
from mmoe_rec.preprocessing.splits import SplitCounts
from mmoe_rec.progress import say
from mmoe_rec.settings.log_columns import SplitColumn
from mmoe_rec.settings.schema import Schema

# One of each kind of Parquet file that is written to `data.work`.
_SERVED = ("features/serving", "model/features", "refreshed/model/features")
_WRITTEN = (
    *(f"{folder}/{name}" for folder in _SERVED for name in ("latest.user.parquet", "x.memory/part-00000.parquet")),
    "features/counts/x.parquet",
    "features/encoded/train/part-00000.parquet",
    "features/requests/part-00000.parquet",
    "evaluation/encoded/test/part-00000.parquet",
    "champion/validation/part-00000.parquet",
)

_YEAR = 365 * 86_400_000_000


def check_apart(log_source: str, schema: Schema, work: Path) -> None:
    """Raises UserError where a log would read what is written to the folder `work`."""
    sources = {"data.log": log_source} | {f"data.events.{name}.path": each.path for name, each in schema.events.items()}
    for setting, source in sources.items():
        if takes_in(source, [work / each for each in _WRITTEN]):
            raise UserError(
                f"`{setting}` '{source}' takes in what is written to `data.work` '{work}': it would be read as rows of "
                "the log; set `data.work` to a folder that lies outside"
            )


def check_times(log: Log, counted: LogCounts) -> None:
    """Raise UserError if some times are in 1970 and others are not, as they have different units."""
    if counted.first < _YEAR and counted.last > 20 * _YEAR:
        raise UserError(
            f"column '{log.schema.columns.time}' of the log '{log.source}' goes from {format_time(counted.first)} to "
            f"{format_time(counted.last)}. Write all times in one unit, the one in columns.time_unit."
        )


def check_requests(log: Log, requests: Requests) -> None:
    """Raises UserError where a request has several users, or several times where an example of that was looked for."""
    columns, split = log.schema.columns, log.schema.split
    if requests.users_clash is not None:
        advice = (
            "a request is one user's: give each request an id of its own, or set columns.request_scope to user if ids "
            "are a user's own"
        )
        raise _clash(log, requests.users_clash, columns.user, requests.several_users, advice)
    if requests.times_clash is not None and split is not None:
        advice = "a request is ranked as a whole: give all its rows one split"
        raise _clash(log, requests.times_clash, split.column, requests.several_times, advice)
    if requests.times_clash is not None:
        advice = "write the request's time into all its rows, or set data.several_times to first"
        raise _clash(log, requests.times_clash, columns.time, requests.several_times, advice)


def _clash(log: Log, clash: Clash, column: str, count: int, advice: str) -> UserError:
    first = "a row of the files before" if clash[0] is None else place(log, clash[0])
    return UserError(
        f"{first} and {place(log, clash[1])} are of one request (column '{log.schema.columns.request}') and differ "
        f"in column '{column}', as do rows of {count:,} request{'s' * (count > 1)}: {advice}"
    )


def place(log: Log, row: int) -> str:
    """Where a row of a log stands, for messages."""
    for file in log.files:
        if row < file.rows:
            return f"row {row} of '{file.address}'"
        row -= file.rows
    raise AssertionError("a row beyond the log")


def check_splits(counted: LogCounts, windows: Mapping[str, Window], log: str, split: SplitColumn | None = None) -> None:
    """Raises UserError where a split has no rows. split: the column that says it, None where times do."""
    for name in windows:
        if counted.rows[name] == 0 and split is not None:
            listed = ", ".join(map(repr, split.values[name]))
            raise UserError(
                f"the {name} split is empty: no row of the log '{log}' has {listed} in column '{split.column}'; "
                f"list its values under split.{name}"
            )
        if counted.rows[name] == 0:
            raise UserError(
                f"the {name} split is empty: the log '{log}' has requests from {format_time(counted.first)} to "
                f"{format_time(counted.last)}; set `split.train_end`, `split.validation_end` and `split.test_end` "
                "inside that span (and `columns.time_unit`, if these times are wrong)"
            )


def empty_split(split: str, folder: Path) -> str:
    """The sentence on features that have no rows of a split, which only an extension leaves behind."""
    return (
        f"the features in '{folder}' have no {split} rows: days were added to them, so only the new rows are encoded, "
        "and none of these lies in that split. Set `split` around the requests of the next new files before you add "
        "them with --extend, or set another `data.work`, where features are built anew from all files of the log"
    )


def check_classes(schema: Schema, counts: SplitCounts) -> None:
    """Raises UserError where a task has nothing to learn from in the training rows."""
    for name, task in schema.tasks.items():
        observed, positive = counts.observed[name], counts.label_sum[name]
        if observed == 0:
            reasons = [f"column '{task.label}' is null in all training rows"]
            if task.observed_when is not None:
                reasons.append(f"column '{task.observed_when.column}' never equals {task.observed_when.equals!r}")
            if task.given is not None:
                reasons.append(f"task '{task.given}' never happened where it has a value")
            if task.matures_after_days:
                reasons.append(f"no label had matured by split.train_end, {task.matures_after_days:g} days after it")
            raise UserError(
                f"task '{name}' has no observed label in training: {', or '.join(reasons)}; "
                "give it labels, train on a longer period, or remove the task"
            )
        if task.kind.is_binary and positive in (0, observed):
            raise UserError(
                f"task '{name}' has one class in training: all {observed} observed labels in column '{task.label}' "
                f"are {positive / observed:g}; a task needs both 0 and 1, so train on a longer period or remove it"
            )


def check_duplicates(
    logs: Logs, sent: Path, scratch: Path, repeats: Path, before: Path | None, kept: Path | None
) -> bool:
    """Whether rows came before, in the same request with the same labels: their numbers are then written to a file
    `repeats` (see `LogReader`), and all others have to be counted again. Else rows are kept.

    sent: folder of Arrow files with the `key` and the number of each `row`, and a hash of its `labels`; scratch: folder
    for a database; before: folder with the rows of the days before; kept: folder that gets all rows.

    Raises UserError where a row repeats an earlier one of these files, or one of before with other labels.
    """
    options, log, columns = logs.options, logs.log, logs.schema.columns
    with open_database(scratch, options.memory_gib, options.workers) as database:
        database.copy("sent", ds.dataset(sent, format="ipc"))
        database.fill("before", KEPT_ROWS, read_kept(before, KEPT_ROWS))
        database.run(
            "CREATE TABLE known AS SELECT row, bool_or(sent.labels = before.labels) AS same FROM sent "
            "JOIN before USING (key) GROUP BY row",
            "CREATE TABLE again AS SELECT key FROM sent GROUP BY key HAVING count(*) > 1",
        )
        count, row, others, other = database.row(
            "SELECT count(*), min(row), count(*) FILTER (NOT same), min(row) FILTER (NOT same) FROM known"
        )
        repeated, pair = database.row(
            "SELECT sum(rows - 1)::BIGINT, min(row(pair[2], pair[1])) FROM "
            "(SELECT count(*) AS rows, min(row, 2) AS pair FROM sent SEMI JOIN again USING (key) GROUP BY key)"
        )
        if count and options.duplicates == "error":
            if others:
                raise UserError(
                    f"{place(log, other)} repeats request and candidate of a row that came before, with other labels; "
                    f"{others:,} rows of new files do so: remove them, or set data.duplicates to keep if they are meant"
                )
            say(f"left out: {count:,} rows of new files that came before, such as {place(log, row)}; they count once")
            with pq.ParquetWriter(repeats, pa.schema({"row": pa.int64()})) as writer:
                for table in database.read("SELECT row FROM known ORDER BY row", ROWS_PER_PART):
                    writer.write_table(table)
            return True
        if repeated is not None and options.duplicates == "error":
            names = f"'{columns.request}'" if columns.request else f"'{columns.user}', '{columns.time}'"
            if not columns.has_time and not columns.request:
                names = f"'{columns.user}', within a split,"
            raise UserError(
                f"{place(log, pair[0])} repeats request and candidate (columns {names} and '{columns.candidate}') of "
                f"{place(log, pair[1])}; {repeated:,} rows of the log do so: remove them, or set data.duplicates to "
                "keep if they are meant"
            )
        if kept is not None:
            kept.mkdir(parents=True)
            every = "SELECT key, labels FROM sent UNION ALL FROM before ORDER BY key"
            # Of rising numbers the differences are stored: some 5 bytes a row.
            packed: dict[str, Any] = {"use_dictionary": ["labels"], "column_encoding": {"key": "DELTA_BINARY_PACKED"}}
            for number, table in enumerate(database.read(every, ROWS_PER_PART)):
                pq.write_table(table, kept / f"part-{number:05d}.parquet", compression="zstd", **packed)
    return False
