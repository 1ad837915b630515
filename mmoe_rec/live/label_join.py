"""Join logged requests with events into rows of the interaction log, in a DuckDB database of bounded memory.

README.md says which event belongs to which candidate, and when a request is written. The output is a folder with one
folder of files for each run, which appears whole or not at all:

    OUT/run-000001/part-00000.parquet      rows, by time
    OUT/run-000001/_state.json             up to when requests are written, and from which files
    OUT/.database/, OUT/.run-000002.*.tmp/ of a run that has not ended, or was killed; removed by the next one
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
_BEGIN = -(2**62)  # before all times
_LONGEST_REQUEST = MICROSECONDS_PER_DAY  # between the parts of a request that are logged apart
_LONGEST_REPEAT = 30 * MICROSECONDS_PER_DAY  # between an event and the same one sent again
_RUN, _LEFT = re.compile(r"run-\d{6}"), re.compile(r"\.database|\.run-\d{6}\..*\.tmp")
_STATE = "_state.json"
_CANDIDATES = """
CREATE TABLE candidates AS
    SELECT number, key, who, item, rank, start AS time FROM (
        SELECT number, row(who, request) AS key, who, item, rank,
            min(time) OVER (PARTITION BY who, request) AS start,
            row_number() OVER (PARTITION BY who, request, item ORDER BY served DESC, rank, number DESC) AS place
        FROM requests)
    WHERE place = 1
"""
"""The candidates with their request's first time. A candidate that was logged again is taken from the last reply."""


@dataclass(frozen=True)
class JoinResult:
    """The outcome of a run.

    Attributes:
        folder: Folder of the new files, None if there is nothing to add.
        rows: Number of rows in the new files.
        until: Time up to which requests are written, microseconds.
        counts: Number of rows, requests and events by what became of them.
        skipped: Reasons why files were left out.
    """

    folder: Path | None
    rows: int
    until: int
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
    """Add the requests whose outcomes are known to an interaction log.

    Args:
        settings: Settings of the log.
        requests: Folder that `serve --log-requests` writes.
        events: Folder with a folder for each of `labels.events`. Others are at `data.events.NAME.path`.
        out: Folder of the log, which is new, empty, or has joined outcomes.
        until: Time up to which all events are there, microseconds. By default the last event's of each log.
        now: Later events are mistakes. By default the clock's time.

    Raises:
        UserError: The arguments or files don't fit each other. Nothing is added.
    """
    reject_plain_table(settings.schema_, "joining outcomes")
    with _open_out(out, {"--requests": requests} | ({} if events is None else {"--events": events})) as folder:
        join = _Join(settings, requests, events, folder, int(clock.time() * 1e6) if now is None else now)
        data = settings.data
        with bar() as progress, open_database(folder / ".database", data.memory_gib, data.workers) as database:
            progress.add_task("joining", total=None)
            return join.run(database, until)


@contextmanager
def _open_out(folder: str | Path, sources: dict[str, str]) -> Iterator[Path]:
    """Lock an output folder and remove what a killed join has left there.

    Args:
        folder: The output folder.
        sources: Settings and the addresses that they give the join to read.

    Raises:
        UserError: The folder holds something else, lies within a source, or is in use.
    """
    if is_remote(str(folder)):
        raise UserError(f"--out '{folder}' must be a folder of this machine, or one mounted like one")
    real = Path(os.path.realpath(folder))
    for setting, source in sources.items():
        if source_includes(source, [real / "run-000001" / "part-00000.parquet"]):
            raise UserError(f"{setting} '{source}' takes in the files of --out '{folder}'; give a folder outside it")
    there = sorted(path.name for path in real.iterdir()) if real.is_dir() else [real.name] if real.exists() else []
    if other := [name for name in there if not _RUN.fullmatch(name) and not _LEFT.fullmatch(name)]:
        raise UserError(
            f"--out '{folder}' holds something else, such as '{other[0]}'; give a new or empty folder, or one with "
            "joined outcomes"
        )
    with write_lock(real, "a join of outcomes", "give another folder with --out"):
        real.mkdir(parents=True, exist_ok=True)
        for path in real.iterdir():
            if _LEFT.fullmatch(path.name):
                shutil.rmtree(path)
        yield real


@dataclass(frozen=True)
class _Source:
    """Files of logged requests, or of one log of events.

    Attributes:
        columns: Name in the database -> column of the files.
        uses: Columns of the files and the uses that they are read as.
        unit: Unit of integer times.
        types: Columns and their types. A column that is null everywhere has none.
    """

    columns: dict[str, str]
    uses: dict[str, ColumnUse]
    unit: str | None
    files: list[LogFile]
    types: dict[str, pa.DataType]
    skipped: list[SkippedFile]

    @staticmethod
    def open(settings: Settings, uri: str, setting: str, columns: dict[str, tuple[str, ColumnUse]]) -> "_Source":
        """Check the footers of all files. Raises UserError, as `Log` does."""
        unit, skip, uses = settings.columns.time_unit, settings.data.skip_bad_files, dict[str, ColumnUse]()
        for column, use in columns.values():
            if uses.setdefault(column, use) != use:
                raise UserError(f"column '{column}' of '{uri}' is needed as {uses[column]} and as {use}: add a column")
        files, types, skipped = check_files(find_files(uri, setting), uses, unit, skip, {})
        if not files:
            raise UserError(f"none of the files of '{uri}' can be used; the first: {skipped[0].reason}")
        return _Source({name: column for name, (column, _) in columns.items()}, uses, unit, files, types, skipped)

    def type_of(self, name: str) -> pa.DataType:
        """Return the type of a column, given its name in the database."""
        return self.types.get(self.columns[name], pa.null())

    @property
    def schema(self) -> pa.Schema:
        """Columns in the database, with times as microseconds, and any type where all values are null."""
        kinds = {
            name: pa.int64() if self.uses[column] == "time" else self.types.get(column, pa.int8())
            for name, column in self.columns.items()
        }
        return pa.schema(kinds | {"number": pa.int64()})

    def read(self, file: LogFile) -> Iterator[pa.Table]:
        """Read a file under the database's names. Raises BadFile."""
        piece = Piece(file.uri, tuple(range(len(file.row_group_sizes))), file.path_columns, file.rows)
        for _, table in read_piece(piece, self.uses, self.unit) if file.rows else ():
            yield pa.table({name: table[column] for name, column in self.columns.items()})


class _Join:
    """One run. In the database, `who`, `item`, `time` and `request` are the columns that tell to which candidate an
    event belongs, `i0`, `i1` inputs of the model, `p0`, `p1` columns of placement and `v0`, `v1` values of labels.

    Raises UserError where settings and files don't fit each other.
    """

    database: Database

    def __init__(self, settings: Settings, requests: str, events: str | None, folder: Path, now: int) -> None:
        self.settings, self.folder, self.now = settings, folder, now
        self.columns, self.labels, schema = settings.columns, settings.labels, settings.schema_
        for column, tasks in label_columns(schema).items():
            if column not in self.labels.sources:
                raise UserError(
                    f"labels.sources does not say where column '{column}' comes from, which task '{tasks[0]}' reads; "
                    f"add labels.sources.{column} with the log of events and attribution_days"
                )
        roles, self.uses = schema.input_columns(), column_uses(schema)
        self.inputs = [name for name, role in roles.items() if role != "placement"]
        self.placement = [name for name, role in roles.items() if role == "placement"]
        if self.labels.shown is None and (unknown := [name for name in self.placement if name != self.labels.rank]):
            raise UserError(
                f"features read column '{unknown[0]}' of role placement, but nothing says where candidates were shown: "
                "set labels.shown to a log of events with that column, or labels.rank to its name if it holds the "
                "rank in the reply"
            )
        self.requests = self._open_requests(requests)
        logs = dict.fromkeys(window.events for window in self.labels.windows)
        self.events = {name: self._open_events(name, events) for name in logs}
        self.tables = {name: f"events_{number}" for number, name in enumerate(logs)}
        self.by_user = [name for name in logs if self.labels.events[name].request is None]
        self.last_run = max((path.name for path in folder.iterdir() if _RUN.fullmatch(path.name)), default="run-000000")
        self.after, self.read_files = self._read_state()
        self.files, self.counts = dict[str, tuple[int, int]](), Counter[str]()

    def _open_requests(self, uri: str) -> _Source:
        columns = self.columns
        read: dict[str, tuple[str, ColumnUse]] = {
            "who": (columns.user, "key"), "item": (columns.candidate, "key"), "time": (columns.time, "time"),
            "request": (request_log.REQUEST, "key"), "served": (request_log.AT, "time"),
            "rank": (request_log.RANK, "number"),
            "share": (request_log.FRACTION, "number"),
        }  # fmt: skip
        read |= {f"i{number}": (name, self.uses[name]) for number, name in enumerate(self.inputs)}
        return _Source.open(self.settings, uri, "--requests", read)

    def _open_events(self, name: str, folder: str | None) -> _Source:
        section, given = self.labels.events[name], self.settings.data.events
        if folder is not None and (is_remote(folder) or Path(folder, name).exists()):
            uri, setting = f"{folder.rstrip('/')}/{name}", "--events"
        elif name in given:
            uri, setting = given[name].path, f"data.events.{name}.path"
        else:
            where = "give --events FOLDER with a" if folder is None else f"--events '{folder}' has no"
            raise UserError(
                f"{where} folder '{name}' of Parquet files; or say where they are in data.events.{name}.path"
            )
        read: dict[str, tuple[str, ColumnUse]] = {
            "who": (self.columns.user, "key"),
            "item": (self.columns.candidate, "key"),
        }
        if section.request is not None:
            read["request"] = section.request, "key"
        keys, read["time"] = [*read], (section.time, "time")
        for place, label in enumerate(self.labels.sources.values()):
            if label.events == name and label.value is not None:
                read[f"v{place}"] = label.value, "number"
        if self.labels.shown is not None and self.labels.shown.events == name:
            read |= {f"p{place}": (column, self.uses[column]) for place, column in enumerate(self.placement)}
        if any(EVENT_ID in read_column_names(file.uri) for file in find_files(uri, setting)):
            read["event_id"] = EVENT_ID, "key"
        source = _Source.open(self.settings, uri, setting, read)
        for key in keys:  # A key that is null everywhere gets the type that the other side has.
            mine, theirs = source.columns[key], self.requests.columns[key]
            one = source.types.setdefault(mine, self.requests.types.get(theirs, pa.int8()))
            if one != (other := self.requests.types.setdefault(theirs, one)):
                raise UserError(
                    f"column '{mine}' of events '{name}' holds {one}, and column '{theirs}' of the requests {other}: "
                    "no event would belong to any request; write both with one type"
                )
        return source

    def _read_state(self) -> tuple[int, dict[str, tuple[int, int]]]:
        """Return the time of the latest requests that earlier runs may have written, microseconds, and the files that
        they read: the size of each file, and the latest time of its rows."""
        path = self.folder / self.last_run / _STATE
        if not path.parent.exists():
            return _BEGIN, {}
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            return int(state["through"]), state["files"]
        except (OSError, ValueError, LookupError):
            raise UserError(f"'{path}' is missing or damaged: restore it, or join into another folder") from None

    def run(self, database: Database, given: int | None) -> JoinResult:
        """Add a folder of rows. given: see `join_labels.until`."""
        self.database, rows, folder = database, 0, self.folder / f"run-{int(self.last_run[-6:]) + 1:06d}"
        until = min(self._read_events(name, given) for name in self.events)
        until -= round(self.labels.wait_days * MICROSECONDS_PER_DAY)
        if until > self.after:
            self._find_candidates(until)
            self._find_labels(until)
            (rows,) = database.row(f"SELECT count(*) FROM labelled WHERE time <= {until}")
        if rows:
            with atomic_folder(folder) as made:
                self._write(until, made)
                state = json.dumps({"through": until, "files": self.files}, indent=1)
                (made / _STATE).write_text(state, encoding="utf-8")
        skipped = [file.reason for source in (self.requests, *self.events.values()) for file in source.skipped]
        return JoinResult(folder if rows else None, rows, until if rows else self.after, dict(+self.counts), skipped)

    def _fill(self, table: str, source: _Source, start: int, what: str) -> None:
        """Make a table of rows later than `start`, and count rows of new files whose time is written already."""

        def read() -> Iterator[pa.Table]:
            number = 0
            for file in source.files:
                size, last = self.read_files.get(file.uri, (None, _BEGIN))
                if (is_new := size != file.bytes) or last > start:
                    for rows in source.read(file):
                        times = rows["time"].cast(pa.int64())
                        last = max(last, pc.max(times).as_py() or _BEGIN)
                        if is_new:
                            late = pc.sum(pc.less_equal(times, self.after)).as_py() or 0
                            self.counts[f"{what} that came too late"] += late
                        yield rows.append_column("number", pa.array(np.arange(number, number + len(rows))))
                        number += len(rows)
                self.files[file.uri] = file.bytes, max(last, self.files.get(file.uri, (0, _BEGIN))[1])

        self.database.create_table(table, source.schema, read())
        self.database.run(f"DELETE FROM {table} WHERE time <= {start}")

    def _read_events(self, name: str, given: int | None) -> int:
        """Read the events of a log later than all that is written. Return the time up to which its windows ended."""
        source, table = self.events[name], self.tables[name]
        is_by_user, has_id = name in self.by_user, "event_id" in source.columns
        # An event that is sent again may lie in the time of a later request, if it does not name its own.
        start = self.after - _LONGEST_REPEAT * (is_by_user and has_id)
        self._fill("given", source, start, f"events '{name}'")
        keys = ["who", "item", "time", *([] if is_by_user else ["request"])]
        is_new = f"AND time > {self.after}"
        if has_id:
            is_first = "row_number() OVER (PARTITION BY who, event_id ORDER BY time, number) = 1"
            is_new = f"QUALIFY time > {self.after} AND (event_id IS NULL OR {is_first})"
        self.database.run(
            f"CREATE TABLE {table} AS SELECT *, {'who' if is_by_user else 'row(who, request)'} AS key FROM given "
            f"WHERE {' AND '.join(f'{key} IS NOT NULL' for key in keys)} AND time <= {self.now} {is_new}"
        )
        (rows,) = self.database.row(f"SELECT count(*) FROM given WHERE time IS NULL OR time > {self.after}")
        count, last = self.database.row(f"SELECT count(*), max(time) FROM {table}")
        self.database.run("DROP TABLE given")
        columns = ", ".join(source.columns[key] for key in keys)
        self.counts[f"events '{name}' that came again, lie in the future or lack a value of {columns}"] = rows - count
        complete = (_BEGIN if last is None else last) if given is None else given
        return complete - max(window.length_us for window in self.labels.windows if window.events == name)

    def _find_candidates(self, until: int) -> None:
        """Make the table of candidates that were shown."""
        self._fill("requests", self.requests, self.after - _LONGEST_REQUEST, "rows of requests")
        (share,) = self.database.row("SELECT min(share) FROM requests")
        if self.by_user and share is not None and share < 1:
            raise UserError(
                f"a share of {share:g} of all requests was logged, so an event '{self.by_user[0]}' may come from one "
                f"that was not: name the column with the request's id in labels.events.{self.by_user[0]}.request, or "
                "log all requests with --log-fraction 1"
            )
        self.database.run(_CANDIDATES, f"DELETE FROM candidates WHERE time <= {self.after}")
        if (shown := self.labels.shown) is not None:
            self.database.run(
                f"CREATE TABLE shown AS SELECT * FROM ({self._query_owned(shown.events)}) "
                f"WHERE delay <= {shown.length_us} "
                "QUALIFY row_number() OVER (PARTITION BY owner ORDER BY time, number) = 1",
                "DELETE FROM candidates WHERE number NOT IN (SELECT owner FROM shown)",
            )
        elif self.labels.top is not None:
            self.database.run(f"DELETE FROM candidates WHERE NOT coalesce(rank <= {self.labels.top}, false)")
        self.counts["requests"], self.counts["requests that wait"] = self.database.row(
            f"SELECT count(DISTINCT key) FILTER (time <= {until}), count(DISTINCT key) FILTER (time > {until}) "
            "FROM candidates"
        )

    def _query_owned(self, name: str) -> str:
        """Return a query for the events that belong to a candidate, `owner`, with their `delay` after its request."""
        join, owners = "JOIN", "candidates"
        if name in self.by_user:  # Of candidates of one user, item and time the last one, in any order of the files.
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
        """Make the table of candidates with labels `l0`, `l1`, and the numbers `n0`, `n1` of events in the windows."""
        labels, values = list(enumerate(self.labels.sources.items())), list[str]()
        query = "candidates"
        for name, table in self.tables.items():
            mine = ", ".join(_combine(place, label) for place, (_, label) in labels if label.events == name)
            if mine:
                owned = f"SELECT owner, {mine} FROM ({self._query_owned(name)}) GROUP BY owner"
                query += f" LEFT JOIN ({owned}) of_{table} ON of_{table}.owner = candidates.number"
        for place, (_, label) in labels:
            otherwise = "NULL" if label.default is None else f"'{label.default!r}'"
            values.append(f"coalesce(l{place}, {otherwise}::DOUBLE) AS l{place}, coalesce(n{place}, 0) AS n{place}")
        self.database.run(
            "CREATE TABLE labelled AS SELECT candidates.number, candidates.key, candidates.time, candidates.rank, "
            f"{', '.join(values)} FROM {query}"
        )
        for place, (name, _) in labels:
            self.counts[f"rows with {name}"], wrong = self.database.row(
                f"SELECT count(*) FILTER (n{place} > 0 AND time <= {until}), "
                f"min(l{place}) FILTER (l{place} NOT IN (0, 1)) FROM labelled"
            )
            for task, about in self.settings.tasks.items():
                if wrong is not None and about.label == name and about.kind.is_binary:
                    raise UserError(
                        f"labels.sources.{name} gives {wrong:g}, but the label of the binary task '{task}' is 0 or 1: "
                        "name another column of values, leave `value` out, or make the task a regression"
                    )

    def _write(self, until: int, folder: Path) -> None:
        """Write the rows of requests up to a time. A column of which no value is known is null, of any type."""
        columns, shown = self.columns, self.labels.shown
        chosen: dict[str, tuple[str, pa.DataType]] = {}  # SQL and type of each column
        if columns.request is not None:
            chosen[columns.request] = "r.request", self.requests.type_of("request")
        for number, name in enumerate(self.inputs):
            chosen.setdefault(name, (f"r.i{number}", self.requests.type_of(f"i{number}")))
        for place, name in enumerate(self.placement):
            chosen[name] = "l.rank::BIGINT", pa.int64()
            if shown is not None:
                chosen[name] = f"s.p{place}", self.events[shown.events].type_of(f"p{place}")
        chosen[columns.time] = "l.time", UTC_MICROSECONDS
        of_tasks = {task.label for task in self.settings.tasks.values()}
        for place, (name, label) in enumerate(self.labels.sources.items()):
            chosen[name] = f"l.l{place}", pa.float64() if label.value or name in of_tasks else pa.int64()
        if columns.sampling_rate is not None:
            chosen[columns.sampling_rate] = "r.share", pa.float64()
        query = (
            f"SELECT {', '.join(f'{value} AS o{place}' for place, (value, _) in enumerate(chosen.values()))} "
            "FROM labelled l JOIN requests r ON r.number = l.number "
            f"{'JOIN shown s ON s.owner = l.number ' if shown else ''}WHERE l.time <= {until} "
            "ORDER BY l.time, l.key, l.rank, l.number"
        )
        schema = pa.schema({name: kind for name, (_, kind) in chosen.items()})
        for number, table in enumerate(self.database.read(query, ROWS_PER_FILE)):
            arrays = [
                pa.nulls(len(table)) if pa.types.is_null(kind) else column.cast(kind)
                for kind, column in zip(schema.types, table.columns, strict=True)
            ]
            file = folder / f"part-{number:05d}.parquet"
            pq.write_table(pa.table(arrays, schema=schema), file, compression="zstd")


def _combine(place: int, label: LabelSource) -> str:
    """Return SQL for a candidate's label, and for the number of its events in the window.

    Of events of one time, the one with the least value is the first.
    """
    inside, value = f"delay <= {label.length_us}", "1.0::DOUBLE"
    if label.value is not None:
        value = f"v{place}"
        inside += f" AND NOT isnan({value})"
    combined = {
        "first": f"arg_min({value}, row(time, {value}))",
        "last": f"arg_max({value}, row(time, {value}))",
        "sum": f"sum({value} ORDER BY time, {value})",
        "max": f"max({value})",
    }[label.combine]
    return f"{combined} FILTER ({inside}) AS l{place}, count(*) FILTER (delay <= {label.length_us}) AS n{place}"


def describe(joined: JoinResult) -> Iterator[str]:
    """Yield the lines of a result for the terminal."""
    if joined.folder is None:
        yield "nothing to add: no further request's outcomes are known yet"
    else:
        yield f"{joined.rows:,} rows of {joined.counts.get('requests', 0):,} requests up to {format_time(joined.until)}"
    for what, count in sorted(joined.counts.items()):
        if what != "requests":
            yield f"  {what}: {count:,}"
    for reason in joined.skipped:
        yield f"left out: {reason}"
    if joined.folder is not None:
        yield f"added: {joined.folder}"
