"""Join logged requests with events into labeled rows of the interaction log, in a DuckDB database of bounded memory.

docs/how-to/train-on-served-requests.md explains how events are attributed to candidates. Each run of the join adds a
complete folder to the output folder OUT, or none:

    OUT/run-000001/part-00000.parquet      rows, sorted by time
    OUT/run-000001/_state.json             time up to which requests are written, and the files that were read
    OUT/.database/, OUT/.run-000002.*.tmp/ leftovers of a killed run, which the next run removes
"""

import json
import os
import re
import shutil
import time as clock
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmoe_rec.atomic import atomic_folder
from mmoe_rec.errors import UserError
from mmoe_rec.live import request_log
from mmoe_rec.live.journal_rows import EVENT_ID
from mmoe_rec.locks import write_lock
from mmoe_rec.log.checks import LogFile, SkippedFile, check_files, format_time, read_column_names
from mmoe_rec.log.columns import UTC_MICROSECONDS, column_uses
from mmoe_rec.log.database import Database, open_database
from mmoe_rec.log.files import find_files, is_remote, source_includes
from mmoe_rec.log.reader import Piece, read_piece
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY, reject_plain_table
from mmoe_rec.progress import bar
from mmoe_rec.settings.label_rules import LabelSource, label_columns
from mmoe_rec.settings.log_columns import ColumnUse
from mmoe_rec.settings.sections import Settings

ROWS_PER_FILE = 262_144
_BEGIN = -(2**62)  # A time before all times in the data.
# A request may be logged in parts, at different times. Parts further apart than this may become separate requests.
_MAX_REQUEST_SPAN_US = MICROSECONDS_PER_DAY
# Resent events are recognized by their ID up to this long after the original.
_MAX_RESEND_DELAY_US = 30 * MICROSECONDS_PER_DAY
_RUN, _UNFINISHED = re.compile(r"run-\d{6}"), re.compile(r"\.database|\.run-\d{6}\..*\.tmp")
_STATE = "_state.json"
_CANDIDATES = """
CREATE TABLE candidates AS
    SELECT number, key, who, item, rank, start AS time FROM (
        SELECT number, row(who, request) AS key, who, item, rank,
            min(time) OVER (PARTITION BY who, request) AS start,
            row_number() OVER (PARTITION BY who, request, item ORDER BY served DESC, rank, number DESC) AS copy
        FROM requests)
    WHERE copy = 1
"""
"""Query that creates the table of candidates. The time of a request is the time of its first logged row. If a candidate
of a request was logged twice, the row of the last reply is kept."""


@dataclass(frozen=True)
class JoinResult:
    """Result of one join.

    Attributes:
        folder: Folder with the new files, None if no rows were added.
        rows: Number of rows added.
        until: Time up to which requests are written, in microseconds.
        requests: Number of requests added.
        waiting: Number of requests after `until`, whose labels aren't final yet.
        counts: Description for the user -> number of rows with a label, or of dropped rows or events.
        skipped: Reason for each skipped file.
    """

    folder: Path | None
    rows: int
    until: int
    requests: int
    waiting: int
    counts: dict[str, int]
    skipped: list[str]


def join_labels(
    settings: Settings,
    requests: str,
    events: str | None,
    out: str | Path,
    *,
    until: int | None = None,
    now: int | None = None,
) -> JoinResult:
    """Append all new requests with final labels to an interaction log.

    Labels are final once their attribution windows have passed and all events of the windows have arrived.

    Args:
        settings: Settings of the ranking model that served the requests.
        requests: URI of the folder that `serve --log-requests` writes.
        events: URI of a folder with one subfolder for each entry of `labels.events`. An entry without a subfolder is
            read from `data.events.NAME.path`.
        out: Folder of the interaction log. It must be new, empty or written by earlier joins.
        until: Time up to which all events have arrived, in microseconds. None assumes the time of the last event of
            each event log.
        now: Current time in microseconds. Events with later times are wrong and ignored. None reads the clock.

    Returns:
        The numbers of added and waiting requests, and of dropped events.

    Raises:
        UserError: The settings, requests, events or output folder are inconsistent. No rows are added.
    """
    reject_plain_table(settings.schema_, "join-labels")
    with _open_out(out, {"--requests": requests} | ({} if events is None else {"--events": events})) as folder:
        join = _Join(settings, requests, events, folder, int(clock.time() * 1e6) if now is None else now)
        data = settings.data
        with bar() as progress, open_database(folder / ".database", data.memory_gib, data.workers) as database:
            progress.add_task("joining", total=None)
            return join.run(database, until)


@contextmanager
def _open_out(folder: str | Path, sources: dict[str, str]) -> Iterator[Path]:
    """Lock the output folder and remove the files of killed runs.

    Raises UserError if the folder has files that no join wrote, lies within one of the `sources`, or is in use.
    """
    if is_remote(str(folder)):
        raise UserError(f"--out '{folder}' must be a local or mounted folder")
    real_folder = Path(os.path.realpath(folder))
    for setting, source in sources.items():
        if source_includes(source, [real_folder / "run-000001" / "part-00000.parquet"]):
            raise UserError(f"{setting} '{source}' includes the files of --out '{folder}'; give another --out")
    names = [real_folder.name] if real_folder.exists() else []
    if real_folder.is_dir():
        names = sorted(path.name for path in real_folder.iterdir())
    if foreign := [name for name in names if not _RUN.fullmatch(name) and not _UNFINISHED.fullmatch(name)]:
        raise UserError(
            f"--out '{folder}' has files of other programs, such as '{foreign[0]}'; give a new or empty folder, or the "
            "folder of an earlier join"
        )
    with write_lock(real_folder, "a join of outcomes", "give another folder with --out"):
        real_folder.mkdir(parents=True, exist_ok=True)
        for path in real_folder.iterdir():
            if _UNFINISHED.fullmatch(path.name):
                shutil.rmtree(path)
        yield real_folder


@dataclass(frozen=True)
class _Source:
    """Files of logged requests, or of one event log.

    Attributes:
        columns: Column name in the database -> column of the files.
        uses: Column of the files -> how its values are used, for instance as a key or a number.
        unit: Unit of times that are integers. None if the settings name none.
        files: Files to read.
        types: Column of the files -> type. A column with only nulls is missing here.
        skipped: Files that can't be read, with the reasons.
    """

    columns: dict[str, str]
    uses: dict[str, ColumnUse]
    unit: str | None
    files: list[LogFile]
    types: dict[str, pa.DataType]
    skipped: list[SkippedFile]

    @staticmethod
    def open(settings: Settings, uri: str, setting: str, columns: dict[str, tuple[str, ColumnUse]]) -> "_Source":
        """Find the files at `uri` and check their columns. Raise UserError if types differ or no file is usable."""
        unit, skip, uses = settings.columns.time_unit, settings.data.skip_bad_files, dict[str, ColumnUse]()
        for column, use in columns.values():
            if uses.setdefault(column, use) != use:
                raise UserError(f"column '{column}' of '{uri}' is needed as {uses[column]} and as {use}: add a column")
        files, types, skipped = check_files(find_files(uri, setting), uses, unit, skip, {})
        if not files:
            raise UserError(f"none of the files of '{uri}' can be used; the first: {skipped[0].reason}")
        return _Source({name: column for name, (column, _) in columns.items()}, uses, unit, files, types, skipped)

    def type_of(self, name: str) -> pa.DataType:
        """Return the type of a column, given the column's name in the database."""
        return self.types.get(self.columns[name], pa.null())

    @property
    def schema(self) -> pa.Schema:
        """Schema of the database table: times in microseconds, and an arbitrary type for columns with only nulls."""
        types = {
            name: pa.int64() if self.uses[column] == "time" else self.types.get(column, pa.int8())
            for name, column in self.columns.items()
        }
        return pa.schema(types | {"number": pa.int64()})

    def read(self, file: LogFile) -> Iterator[pa.Table]:
        """Read a file under the database's column names. Raise BadFile if the file can't be read."""
        piece = Piece(file.uri, tuple(range(len(file.row_group_sizes))), file.path_columns, file.rows)
        for _, table in read_piece(piece, self.uses, self.unit) if file.rows else ():
            yield pa.table({name: table[column] for name, column in self.columns.items()})


class _Join:
    """State and steps of one join.

    Columns of the database: `who` (user), `item` (candidate), `time` and `request` attribute events to candidates. The
    model's inputs have the names `i0`, `i1` and so on. Placement columns begin with `p`, and label values with `v`.
    """

    database: Database

    def __init__(self, settings: Settings, requests: str, events: str | None, folder: Path, now: int) -> None:
        self.settings, self.folder, self.now = settings, folder, now
        self.columns, self.labels, schema = settings.columns, settings.labels, settings.schema_
        for column, tasks in label_columns(schema).items():
            if column not in self.labels.sources:
                raise UserError(
                    f"labels.sources has no source for column '{column}', which task '{tasks[0]}' reads. Add "
                    f"labels.sources.{column} with the event log and attribution_days."
                )
        roles, self.uses = schema.input_columns(), column_uses(schema)
        self.inputs = [name for name, role in roles.items() if role != "placement"]
        self.placement = [name for name, role in roles.items() if role == "placement"]
        if self.labels.shown is None and (unexplained := [name for name in self.placement if name != self.labels.rank]):
            raise UserError(
                f"features read column '{unexplained[0]}' of role placement, but the settings don't say where "
                "candidates were shown. Set labels.shown to an event log with that column. If the column is the rank "
                "in the reply, set labels.rank to the column."
            )
        self.requests = self._open_requests(requests)
        logs = dict.fromkeys(window.events for window in self.labels.windows)
        self.events = {name: self._open_events(name, events) for name in logs}
        self.tables = {name: f"events_{number}" for number, name in enumerate(logs)}
        self.logs_without_request = [name for name in logs if self.labels.events[name].request is None]
        self.last_run = max((path.name for path in folder.iterdir() if _RUN.fullmatch(path.name)), default="run-000000")
        self.written_until, self.read_files = self._read_state()
        self.files, self.counts = dict[str, tuple[int, int]](), Counter[str]()
        self.request_count = self.waiting_count = 0

    def _open_requests(self, uri: str) -> _Source:
        columns = self.columns
        columns_and_uses: dict[str, tuple[str, ColumnUse]] = {
            "who": (columns.user, "key"), "item": (columns.candidate, "key"), "time": (columns.time, "time"),
            "request": (request_log.REQUEST, "key"), "served": (request_log.AT, "time"),
            "rank": (request_log.RANK, "number"), "fraction": (request_log.FRACTION, "number"),
        }  # fmt: skip
        columns_and_uses |= {f"i{index}": (name, self.uses[name]) for index, name in enumerate(self.inputs)}
        return _Source.open(self.settings, uri, "--requests", columns_and_uses)

    def _open_events(self, name: str, folder: str | None) -> _Source:
        """Open one event log, from its subfolder of `--events` or from the settings."""
        section, data_events = self.labels.events[name], self.settings.data.events
        if folder is not None and (is_remote(folder) or Path(folder, name).exists()):
            uri, setting = f"{folder.rstrip('/')}/{name}", "--events"
        elif name in data_events:
            uri, setting = data_events[name].path, f"data.events.{name}.path"
        else:
            problem = "give --events FOLDER with a" if folder is None else f"--events '{folder}' has no"
            hint = f"Or set data.events.{name}.path to the folder."
            raise UserError(f"{problem} folder '{name}' of Parquet files. {hint}")
        columns_and_uses: dict[str, tuple[str, ColumnUse]] = {
            "who": (self.columns.user, "key"),
            "item": (self.columns.candidate, "key"),
        }
        if section.request is not None:
            columns_and_uses["request"] = section.request, "key"
        keys, columns_and_uses["time"] = [*columns_and_uses], (section.time, "time")
        for index, label in enumerate(self.labels.sources.values()):
            if label.events == name and label.value is not None:
                columns_and_uses[f"v{index}"] = label.value, "number"
        if self.labels.shown is not None and self.labels.shown.events == name:
            for index, column in enumerate(self.placement):
                columns_and_uses[f"p{index}"] = column, self.uses[column]
        if any(EVENT_ID in read_column_names(file.uri) for file in find_files(uri, setting)):
            columns_and_uses["event_id"] = EVENT_ID, "key"
        source = _Source.open(self.settings, uri, setting, columns_and_uses)
        for key in keys:  # A key column with only nulls gets the type of the column that it is joined with.
            event_column, request_column = source.columns[key], self.requests.columns[key]
            event_type = source.types.setdefault(event_column, self.requests.types.get(request_column, pa.int8()))
            if event_type != (request_type := self.requests.types.setdefault(request_column, event_type)):
                raise UserError(
                    f"column '{event_column}' of events '{name}' contains {event_type}, but column '{request_column}' "
                    f"of the requests contains {request_type}. Write both with one type."
                )
        return source

    def _read_state(self) -> tuple[int, dict[str, tuple[int, int]]]:
        """Return the time up to which earlier runs wrote requests, and the size and latest time of each file read."""
        path = self.folder / self.last_run / _STATE
        if not path.parent.exists():
            return _BEGIN, {}
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            return int(state["through"]), state["files"]
        except (OSError, ValueError, LookupError):
            raise UserError(f"'{path}' is missing or damaged: restore it, or join into another folder") from None

    def run(self, database: Database, until_option: int | None) -> JoinResult:
        """Read new events and requests, label the candidates and write complete requests."""
        self.database, rows, folder = database, 0, self.folder / f"run-{int(self.last_run[-6:]) + 1:06d}"
        until = min(self._read_events(name, until_option) for name in self.events)
        until -= round(self.labels.wait_days * MICROSECONDS_PER_DAY)
        if until > self.written_until:
            self._find_candidates(until)
            self._find_labels(until)
            (rows,) = database.row(f"SELECT count(*) FROM labeled WHERE time <= {until}")
        if rows:
            with atomic_folder(folder) as new_folder:
                self._write(until, new_folder)
                state = json.dumps({"through": until, "files": self.files}, indent=1)
                (new_folder / _STATE).write_text(state, encoding="utf-8")
        skipped = [file.reason for source in (self.requests, *self.events.values()) for file in source.skipped]
        last_time, counts = until if rows else self.written_until, dict(+self.counts)
        new_requests = self.request_count, self.waiting_count
        return JoinResult(folder if rows else None, rows, last_time, *new_requests, counts, skipped)

    def _load(self, table: str, source: _Source, start: int, description: str) -> None:
        """Create a table of the source's rows later than `start`. Count rows of new files that come too late."""

        def read() -> Iterator[pa.Table]:
            number = 0
            for file in source.files:
                size, last = self.read_files.get(file.uri, (None, _BEGIN))
                if (is_new := size != file.bytes) or last > start:
                    for rows in source.read(file):
                        times = rows["time"].cast(pa.int64())
                        last = max(last, pc.max(times).as_py() or _BEGIN)
                        if is_new:
                            late = pc.sum(pc.less_equal(times, self.written_until)).as_py() or 0
                            self.counts[f"{description} that came too late"] += late
                        yield rows.append_column("number", pa.array(np.arange(number, number + len(rows))))
                        number += len(rows)
                self.files[file.uri] = file.bytes, max(last, self.files.get(file.uri, (0, _BEGIN))[1])

        self.database.create_table(table, source.schema, read())
        self.database.run(f"DELETE FROM {table} WHERE time <= {start}")

    def _read_events(self, name: str, until_option: int | None) -> int:
        """Read the new events of a log. Return the latest request time whose attribution windows are complete."""
        source, table = self.events[name], self.tables[name]
        is_by_user, has_id = name in self.logs_without_request, "event_id" in source.columns
        # If events don't name their request, a copy of an event that was sent again could be attributed to a later
        # request. Read back to the earliest possible original, so that copies are recognized by their event ID.
        start = self.written_until - _MAX_RESEND_DELAY_US * (is_by_user and has_id)
        self._load("loaded", source, start, f"events '{name}'")
        keys = ["who", "item", "time", *([] if is_by_user else ["request"])]
        is_new = f"AND time > {self.written_until}"
        if has_id:
            is_first = "row_number() OVER (PARTITION BY who, event_id ORDER BY time, number) = 1"
            is_new = f"QUALIFY time > {self.written_until} AND (event_id IS NULL OR {is_first})"
        self.database.run(
            f"CREATE TABLE {table} AS SELECT *, {'who' if is_by_user else 'row(who, request)'} AS key FROM loaded "
            f"WHERE {' AND '.join(f'{key} IS NOT NULL' for key in keys)} AND time <= {self.now} {is_new}"
        )
        (rows,) = self.database.row(f"SELECT count(*) FROM loaded WHERE time IS NULL OR time > {self.written_until}")
        count, last = self.database.row(f"SELECT count(*), max(time) FROM {table}")
        self.database.run("DROP TABLE loaded")
        columns = ", ".join(source.columns[key] for key in keys)
        unusable = f"events '{name}' that are duplicates, are in the future or lack a value of {columns}"
        self.counts[unusable] = rows - count
        complete_until = (_BEGIN if last is None else last) if until_option is None else until_option
        return complete_until - max(window.length_us for window in self.labels.windows if window.events == name)

    def _find_candidates(self, until: int) -> None:
        """Create the table of candidates, of only the shown ones if `labels.shown` or `labels.top` is set."""
        self._load("requests", self.requests, self.written_until - _MAX_REQUEST_SPAN_US, "rows of requests")
        (fraction,) = self.database.row("SELECT min(fraction) FROM requests")
        if self.logs_without_request and fraction is not None and fraction < 1:
            log = self.logs_without_request[0]
            raise UserError(
                f"a fraction of {fraction:g} of all requests was logged, so an event '{log}' may come from a request "
                f"that was not. Name the column with the request's ID in labels.events.{log}.request, or log all "
                "requests with --log-fraction 1."
            )
        self.database.run(_CANDIDATES, f"DELETE FROM candidates WHERE time <= {self.written_until}")
        if (shown := self.labels.shown) is not None:
            self.database.run(
                f"CREATE TABLE shown AS SELECT * FROM ({self._attribution_query(shown.events)}) "
                f"WHERE delay <= {shown.length_us} "
                "QUALIFY row_number() OVER (PARTITION BY owner ORDER BY time, number) = 1",
                "DELETE FROM candidates WHERE number NOT IN (SELECT owner FROM shown)",
            )
        elif self.labels.top is not None:
            self.database.run(f"DELETE FROM candidates WHERE NOT coalesce(rank <= {self.labels.top}, false)")
        self.request_count, self.waiting_count = self.database.row(
            f"SELECT count(DISTINCT key) FILTER (time <= {until}), count(DISTINCT key) FILTER (time > {until}) "
            "FROM candidates"
        )

    def _attribution_query(self, name: str) -> str:
        """Return a query for the events of a log that can be attributed to a candidate, with two more columns.

        `owner` is the candidate's `number`, and `delay` the time from its request to the event in microseconds.
        """
        join, owners = "JOIN", "candidates"
        # A user can have two requests at the same time. Pick one by a rule that doesn't depend on the order of files.
        if name in self.logs_without_request:
            join = "ASOF JOIN"
            owners = (
                "(SELECT who AS key, item, time, arg_max(number, row(candidates.key, rank, number)) AS number "
                "FROM candidates GROUP BY who, item, time)"
            )
        return (
            f"SELECT e.*, c.number AS owner, e.time - c.time AS delay FROM {self.tables[name]} e {join} {owners} c "
            "ON e.key = c.key AND e.item = c.item AND e.time >= c.time"
        )

    def _find_labels(self, until: int) -> None:
        """Create the table of candidates with labels, and count the labeled rows that `_write` will write.

        The first label has the columns `l0` (the label) and `n0` (the number of events in its attribution window).

        Args:
            until: Last request time to count, in microseconds. The table has the candidates of later requests too.
        """
        labels, selected = list(enumerate(self.labels.sources.items())), list[str]()
        query = "candidates"
        for name, table in self.tables.items():
            log_labels = [(index, label) for index, (_, label) in labels if label.events == name]
            if log_labels:
                aggregates = ", ".join(_label_aggregates(index, label) for index, label in log_labels)
                labeled = f"SELECT owner, {aggregates} FROM ({self._attribution_query(name)}) GROUP BY owner"
                query += f" LEFT JOIN ({labeled}) of_{table} ON of_{table}.owner = candidates.number"
        for index, (_, label) in labels:
            default = "NULL" if label.default is None else f"'{label.default!r}'"
            selected.append(f"coalesce(l{index}, {default}::DOUBLE) AS l{index}, coalesce(n{index}, 0) AS n{index}")
        self.database.run(
            "CREATE TABLE labeled AS SELECT candidates.number, candidates.key, candidates.time, candidates.rank, "
            f"{', '.join(selected)} FROM {query}"
        )
        for index, (column, _) in labels:
            self.counts[f"rows with {column}"], not_binary = self.database.row(
                f"SELECT count(*) FILTER (n{index} > 0 AND time <= {until}), "
                f"min(l{index}) FILTER (l{index} NOT IN (0, 1)) FROM labeled"
            )
            for task_name, task in self.settings.tasks.items():
                if not_binary is not None and task.label == column and task.kind.is_binary:
                    raise UserError(
                        f"labels.sources.{column} gives {not_binary:g}, but the label of the binary task '{task_name}' "
                        "is 0 or 1: name another column of values, leave `value` out, or make the task a regression"
                    )

    def _write(self, until: int, folder: Path) -> None:
        """Write the requests up to `until` as Parquet files. A column without any value gets Arrow's null type."""
        columns, shown = self.columns, self.labels.shown
        outputs: dict[str, tuple[str, pa.DataType]] = {}  # Column -> SQL expression and Arrow type.
        if columns.request is not None:
            outputs[columns.request] = "r.request", self.requests.type_of("request")
        for index, name in enumerate(self.inputs):
            outputs.setdefault(name, (f"r.i{index}", self.requests.type_of(f"i{index}")))
        for index, name in enumerate(self.placement):
            outputs[name] = "l.rank::BIGINT", pa.int64()
            if shown is not None:
                outputs[name] = f"s.p{index}", self.events[shown.events].type_of(f"p{index}")
        outputs[columns.time] = "l.time", UTC_MICROSECONDS
        task_labels = {task.label for task in self.settings.tasks.values()}
        for index, (name, label) in enumerate(self.labels.sources.items()):
            outputs[name] = f"l.l{index}", pa.float64() if label.value or name in task_labels else pa.int64()
        if columns.sampling_rate is not None:
            outputs[columns.sampling_rate] = "r.fraction", pa.float64()
        selected = ", ".join(f"{expression} AS o{index}" for index, (expression, _) in enumerate(outputs.values()))
        query = (
            f"SELECT {selected} FROM labeled l JOIN requests r ON r.number = l.number "
            f"{'JOIN shown s ON s.owner = l.number ' if shown else ''}WHERE l.time <= {until} "
            "ORDER BY l.time, l.key, l.rank, l.number"
        )
        schema = pa.schema({name: dtype for name, (_, dtype) in outputs.items()})
        for file_number, table in enumerate(self.database.read(query, ROWS_PER_FILE)):
            arrays = [
                pa.nulls(len(table)) if pa.types.is_null(dtype) else column.cast(dtype)
                for dtype, column in zip(schema.types, table.columns, strict=True)
            ]
            file = folder / f"part-{file_number:05d}.parquet"
            pq.write_table(pa.table(arrays, schema=schema), file, compression="zstd")


def _label_aggregates(index: int, label: LabelSource) -> str:
    """Return SQL for a candidate's label and the number of the candidate's events in the attribution window."""
    in_window, value = f"delay <= {label.length_us}", "1.0::DOUBLE"
    condition = in_window
    if label.value is not None:
        value = f"v{index}"
        condition += f" AND NOT isnan({value})"
    aggregate = {  # Events with equal times are ordered by value, so that the order of files doesn't matter.
        "first": f"arg_min({value}, row(time, {value}))",
        "last": f"arg_max({value}, row(time, {value}))",
        "sum": f"sum({value} ORDER BY time, {value})",
        "max": f"max({value})",
    }[label.combine]
    return f"{aggregate} FILTER ({condition}) AS l{index}, count(*) FILTER ({in_window}) AS n{index}"


def describe(result: JoinResult) -> Iterator[str]:
    """Yield the lines that `join-labels` prints."""
    if result.folder is None:
        yield "no new rows: the labels of later requests are not final yet"
    else:
        yield f"{result.rows:,} rows of {result.requests:,} requests up to {format_time(result.until)}"
    counts = result.counts | ({"requests whose labels are not final yet": result.waiting} if result.waiting else {})
    for description, count in sorted(counts.items()):
        yield f"  {description}: {count:,}"
    for reason in result.skipped:
        yield f"skipped: {reason}"
    if result.folder is not None:
        yield f"added: {result.folder}"
