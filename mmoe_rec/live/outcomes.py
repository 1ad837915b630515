"""Joins logged requests with events into rows of the interaction log, in a database that holds a bounded part of them:

    requests    candidates as they were logged     -> candidates: each once, of requests that are not written yet
    events_N    the events of each log, each once  -> the candidate that each belongs to
    labelled    candidates with their labels       -> Parquet files, by time

README.md says which event belongs to which candidate, and when a request is written.
"""

from __future__ import annotations

import time as clock
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.errors import UserError
from mmoe_rec.live import request_log as names
from mmoe_rec.live.outcome_files import BEGIN, JoinState, OutcomeSource, Runs, open_runs
from mmoe_rec.live.row_keys import EVENT_ID
from mmoe_rec.log.checks import BadFile, format_time
from mmoe_rec.log.columns import UTC_MICROSECONDS, column_uses
from mmoe_rec.log.database import open_database
from mmoe_rec.log.files import find_files, is_remote
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY, require_all
from mmoe_rec.log.values import columns_of
from mmoe_rec.progress import bar, say
from mmoe_rec.settings.columns import Use
from mmoe_rec.settings.outcomes import LabelSource, label_columns
from mmoe_rec.settings.sections import Settings, differences

ROWS_PER_FILE = 262_144
_LONGEST_REQUEST = MICROSECONDS_PER_DAY  # between the parts of a request that are logged apart
_LONGEST_REPEAT = 30 * MICROSECONDS_PER_DAY  # between an event and the same one sent again


@dataclass(frozen=True)
class JoinResult:
    """What a run did. folder: of the new files, None where there is nothing to add; rows: in them; until: time up to
    which requests are written, microseconds; counts: what there was -> how many."""

    folder: Path | None
    rows: int
    until: int
    counts: dict[str, int]
    left_out: list[str]


def join_outcomes(
    settings: Settings,
    requests: str,
    events: str | None,
    out: str | Path,
    *,
    until: int | None = None,
    now: int | None = None,
) -> JoinResult:
    """Adds the requests whose outcomes are known to an interaction log.

    requests: folder that `serve --log-requests` writes; events: folder with a folder for each of `outcomes.events`;
    others are at `data.events.NAME.path`; out: folder of the log; new, empty, or of runs before; until: time up to
    which all events are there, microseconds; None: the last event's of each log; now: later events are mistakes; None
    is the clock's time. Raises UserError where these don't fit each other; nothing is added then.
    """
    require_all(settings.schema_, "joining outcomes")
    sources = {"--requests": requests} | ({} if events is None else {"--events": events})
    with open_runs(out, sources) as runs:
        moment = int(clock.time() * 1e6) if now is None else now
        return _Run(settings, requests, events, runs, until, moment).run()


class _Run:
    """One run. requests, events: what is read; inputs: columns that features read; placement: of them, those that
    events or ranks say."""

    def __init__(
        self, settings: Settings, requests: str, events: str | None, runs: Runs, until: int | None, now: int
    ) -> None:
        self.settings, self.runs, self.given, self.now = settings, runs, until, now
        self.columns, self.outcomes, schema = settings.columns, settings.outcomes, settings.schema_
        for column, tasks in label_columns(schema).items():
            if column not in self.outcomes.labels:
                raise UserError(
                    f"outcomes.labels does not say where column '{column}' comes from, which task '{tasks[0]}' reads; "
                    f"add outcomes.labels.{column} with the log of events and within_days"
                )
        self.inputs, uses = schema.input_columns(), column_uses(schema)
        self.placement = [name for name, role in self.inputs.items() if role == "placement"]
        if self.outcomes.shown is None and (unknown := [name for name in self.placement if name != self.outcomes.rank]):
            raise UserError(
                f"features read column '{unknown[0]}' of role placement, but nothing says where candidates were shown: "
                "set outcomes.shown to a log of events with that column, or outcomes.rank to its name if it holds the "
                "rank in the reply"
            )
        self.requests = self._open_requests(
            requests, {name: uses[name] for name in self.inputs if name not in self.placement}
        )
        self.events = dict[str, OutcomeSource]()
        for name in dict.fromkeys(each.events for each in self.outcomes.windows):
            self.events[name] = self._open_events(name, events, {column: uses[column] for column in self.placement})
            self._check_types(name)
        self.before = runs.state()
        self.after = self.before.through
        self.counts: Counter[str] = Counter()
        self.tables = {name: f"events_{number}" for number, name in enumerate(self.events)}
        self.sources = [self.requests, *self.events.values()]
        self.by_user = [name for name in self.events if self.outcomes.events[name].request is None]

    def _open_requests(self, address: str, columns: dict[str, Use]) -> OutcomeSource:
        uses: dict[str, Use] = {names.REQUEST: "key", names.AT: "time", names.RANK: "number", names.SHARE: "number"}
        try:
            return OutcomeSource.open(self.settings, address, "--requests", columns | uses, self.columns.time)
        except BadFile as problem:
            raise BadFile(
                f"{problem}. Requests are as `serve --log-requests` wrote them, with the columns that the features of "
                "the ranking model read. The settings ask for others: move requests of other models away, or join with "
                "the settings of that model",
                problem.address,
            ) from None

    def _open_events(self, name: str, folder: str | None, placement: dict[str, Use]) -> OutcomeSource:
        section, given = self.outcomes.events[name], self.settings.data.events
        if folder is not None and (is_remote(folder) or Path(folder, name).exists()):
            address, setting = f"{folder.rstrip('/')}/{name}", "--events"
        elif name in given:
            address, setting = given[name].path, f"data.events.{name}.path"
        else:
            where = "give --events FOLDER with a" if folder is None else f"--events '{folder}' has no"
            raise UserError(
                f"{where} folder '{name}' of Parquet files; or say where they are in data.events.{name}.path"
            )
        uses: dict[str, Use] = dict.fromkeys(self._keys(name), "key")
        values = (each.value for each in self.outcomes.labels.values() if each.events == name)
        uses |= dict.fromkeys(filter(None, values), "number")
        if self.outcomes.shown is not None and self.outcomes.shown.events == name:
            uses |= placement
        if section.time in uses:
            raise UserError(f"column '{section.time}' of events '{name}' is the time and something else; add a column")
        if any(EVENT_ID in columns_of(file.address) for file in find_files(address, setting)):
            uses[EVENT_ID] = "key"
        return OutcomeSource.open(self.settings, address, setting, {**uses, section.time: "time"}, section.time)

    def _keys(self, name: str) -> dict[str, str]:
        """Columns by which events of a log are joined -> those of the requests."""
        keys = {self.columns.user: self.columns.user, self.columns.candidate: self.columns.candidate}
        request = self.outcomes.events[name].request
        return keys if request is None else {**keys, request: names.REQUEST}

    def _check_types(self, name: str) -> None:
        """Raises UserError where a column by which events are joined has another type than in the requests; one that is
        null everywhere gets the other's."""
        for mine, theirs in self._keys(name).items():
            one = self.events[name].types.setdefault(mine, self.requests.types.get(theirs, pa.int8()))
            other = self.requests.types.setdefault(theirs, one)
            if one != other:
                raise UserError(
                    f"column '{mine}' of events '{name}' holds {one}, and column '{theirs}' of the requests {other}: "
                    "no event would belong to any request; write both with one type"
                )

    def run(self) -> JoinResult:
        settings = self.outcomes.model_dump(mode="json")
        if self.before.settings and self.before.settings != settings:
            changes = (f"{name}: {old}, now {new}" for name, old, new in differences(self.before.settings, settings))
            say(f"note: earlier rows were joined by other settings of section outcomes ({'; '.join(changes)})")
        data, rows = self.settings.data, 0
        with (
            bar() as progress,
            open_database(self.runs.folder / ".database", data.memory_gib, data.workers) as database,
        ):
            self.database = database
            progress.add_task("joining", total=None)
            until = self._read_events()
            if until > self.after:
                self._find_candidates(until)
                self._find_labels(until)
                (rows,) = database.row(f"SELECT count(*) FROM labelled WHERE time <= {until}")
            if rows:
                files = {file.address: file.bytes for each in self.sources for file in each.files}
                with self.runs.add(JoinState(until, settings, files)) as made:
                    self._write(until, made)
        left_out = [each.reason for source in self.sources for each in source.left_out]
        folder = self.runs.next if rows else None
        return JoinResult(folder, rows, until if rows else self.after, dict(+self.counts), left_out)

    def _fill(self, table: str, source: OutcomeSource, start: int, late: str) -> None:
        """Makes a table of rows, of all that are later than `start`; counts those of new files that are no later than
        what is written as `late`."""

        def read() -> Iterator[pa.Table]:
            number = 0
            for file, rows in source.read(start):
                is_new = self.before.files.get(file.address) != file.bytes
                if isinstance(rows, int):
                    self.counts[late] += rows * is_new
                    continue
                numbers = pa.array(np.arange(number, number + len(rows)))
                more = [numbers, pa.array(np.full(len(rows), is_new))]
                yield pa.table([*rows.select(list(source.uses)).columns, *more], source.schema.names)
                number += len(rows)

        self.database.fill(table, source.schema, read())
        time = source.name(source.time)
        (rows,) = self.database.row(f"SELECT count(*) FROM {table} WHERE is_new AND {time} <= {self.after}")
        self.counts[late] += rows
        self.database.run(f"DELETE FROM {table} WHERE {time} IS NOT NULL AND {time} <= {start}")

    def _request(self, source: OutcomeSource, column: str) -> str:
        """The request in SQL: its user and its id."""
        return f"row({source.name(self.columns.user)}, {source.name(column)})"

    def _read_events(self) -> int:
        """Reads the events later than all that is written; gives the time up to which requests can be written."""
        ends = []
        for name, source in self.events.items():
            table, section = self.tables[name], self.outcomes.events[name]
            # An event that is sent again may lie in the time of a later request, if it does not name its own.
            looks_back = name in self.by_user and EVENT_ID in source.uses
            start = self.after - _LONGEST_REPEAT * looks_back
            self._fill("given", source, start, f"new events '{name}' of requests that were written before")
            keys = list(self._keys(name))
            lacking = " OR ".join(f"{source.name(each)} IS NULL" for each in (*keys, section.time))
            user, time, item = map(source.name, (self.columns.user, section.time, self.columns.candidate))
            first = user if section.request is None else self._request(source, section.request)
            event = source.name(EVENT_ID) if EVENT_ID in source.uses else "NULL"
            self.database.run(
                f"CREATE TABLE {table} AS SELECT *, {first} AS first, {item} AS item, {time} AS time FROM given "
                f"WHERE NOT ({lacking}) AND {time} <= {self.now} QUALIFY {time} > {self.after} AND ({event} IS NULL "
                f"OR row_number() OVER (PARTITION BY {user}, {event} ORDER BY {time}, number) = 1)"
            )
            null, future, rows = self.database.row(
                f"SELECT count(*) FILTER ({lacking}), "
                f"count(*) FILTER (NOT ({lacking}) AND {time} > {self.now}), count(*) FROM given "
                f"WHERE {time} IS NULL OR {time} > {self.after}"
            )
            count, last = self.database.row(f"SELECT count(*), max(time) FROM {table}")
            self.database.run("DROP TABLE given")
            self.counts[f"events '{name}' without {' or '.join(keys)}, or a time"] += null
            self.counts[f"events '{name}' in the future"] += future
            self.counts[f"events '{name}' that came again"] += rows - null - future - count
            complete = (BEGIN if last is None else last) if self.given is None else self.given
            window = max(each.microseconds for each in self.outcomes.windows if each.events == name)
            ends.append(complete - window)
        return min(ends) - round(self.outcomes.wait_days * MICROSECONDS_PER_DAY)

    def _find_candidates(self, until: int) -> None:
        """The candidates that were shown, with their request's first time; one that was logged again counts as it was
        in the last reply."""
        source, columns = self.requests, self.columns
        self._fill("requests", source, self.after - _LONGEST_REQUEST, "rows of requests that came too late")
        (share,) = self.database.row(f"SELECT min({source.name(names.SHARE)}) FROM requests")
        if self.by_user and share is not None and share < 1:
            raise UserError(
                f"a share of {share:g} of all requests was logged, so an event '{self.by_user[0]}' may come from one "
                f"that was not: name the column with the request's id in outcomes.events.{self.by_user[0]}.request, or "
                "log all requests with --log-share 1"
            )
        aliases = {"who": columns.user, "item": columns.candidate, "own": columns.time}
        aliases |= {"served": names.AT, "rank": names.RANK}
        chosen = ", ".join(f"{source.name(column)} AS {alias}" for alias, column in aliases.items())
        self.database.run(
            "CREATE TABLE candidates AS SELECT number, who, request, item, rank, own, start AS time FROM (SELECT *, "
            "min(own) OVER (PARTITION BY request) AS start, lead(item) OVER (PARTITION BY request ORDER BY item, "
            "served, rank DESC, number) AS later FROM "
            f"(SELECT number, {self._request(source, names.REQUEST)} AS request, {chosen} FROM requests)) "
            "WHERE later IS DISTINCT FROM item"
        )
        again, late = self.database.row(
            "SELECT (SELECT count(*) FROM requests) - count(*), "
            f"count(*) FILTER (time <= {self.after} AND own > {self.after}) FROM candidates"
        )
        self.counts["rows that were logged again"] += again
        self.counts["rows of requests that were written before"] += late
        self.database.run(f"DELETE FROM candidates WHERE time <= {self.after}")
        (before,) = self.database.row(f"SELECT count(*) FROM candidates WHERE time <= {until}")
        if (shown := self.outcomes.shown) is not None:
            placed = "".join(f", {self.events[shown.events].name(name)}" for name in self.placement)
            self.database.run(
                f"CREATE TABLE shown AS SELECT owner{placed} FROM ({self._query_owned(shown.events)}) "
                f"WHERE delay <= {shown.microseconds} "
                "QUALIFY row_number() OVER (PARTITION BY owner ORDER BY time, number) = 1",
                "DELETE FROM candidates WHERE number NOT IN (SELECT owner FROM shown)",
            )
        elif self.outcomes.top is not None:
            self.database.run(f"DELETE FROM candidates WHERE NOT coalesce(rank <= {self.outcomes.top}, false)")
        rows, requests, waiting = self.database.row(
            f"SELECT count(*) FILTER (time <= {until}), count(DISTINCT request) FILTER (time <= {until}), "
            f"count(DISTINCT request) FILTER (time > {until}) FROM candidates"
        )
        self.counts["rows that were not shown"] += before - rows
        self.counts["requests"], self.counts["requests that wait"] = requests, waiting

    def _query_owned(self, name: str) -> str:
        """A query for the events of a log that belong to a candidate, `owner`, with their `delay` after its request."""
        # Of candidates of one user, item and time the last one, whatever the order of the files.
        owners = (
            "(SELECT who, item, time, arg_max(number, row(request, rank, number)) AS number FROM candidates "
            "GROUP BY ALL)"
        )
        join, key = "ASOF JOIN", "who"
        if name not in self.by_user:
            join, key, owners = "JOIN", "request", "candidates"
            (early,) = self.database.row(
                f"SELECT count(*) FROM {self.tables[name]} e JOIN candidates c ON e.first = c.request "
                "AND e.item = c.item WHERE e.time < c.time"
            )
            self.counts.setdefault(f"events '{name}' earlier than their request", early)
            if self.columns.request_scope == "log":
                (others,) = self.database.row(
                    f"SELECT count(*) FROM {self.tables[name]} e "
                    "SEMI JOIN candidates c ON e.first[2] = c.request[2] AND e.item = c.item "
                    "ANTI JOIN candidates o ON e.first = o.request AND e.item = o.item"
                )
                self.counts.setdefault(f"events '{name}' of another user than their request's", others)
        return (
            f"SELECT e.*, c.number AS owner, e.time - c.time AS delay FROM {self.tables[name]} e {join} {owners} c "
            f"ON e.first = c.{key} AND e.item = c.item AND e.time >= c.time"
        )

    def _find_labels(self, until: int) -> None:
        """Labels of candidates, null where nothing is known."""
        labels = list(self.outcomes.labels.items())
        joins, values = [], []
        for name in dict.fromkeys(source.events for _, source in labels):
            mine = [(place, source) for place, (_, source) in enumerate(labels) if source.events == name]
            sums = ", ".join(self._combine(place, source) for place, source in mine)
            table = f"of_{self.tables[name]}"
            self.database.run(
                f"CREATE TABLE {table} AS SELECT owner, {sums} FROM ({self._query_owned(name)}) GROUP BY owner",
                f"DROP TABLE {self.tables[name]}",
            )
            joins.append(f"LEFT JOIN {table} ON {table}.owner = candidates.number")
        for place, (_, source) in enumerate(labels):
            otherwise = "NULL" if source.otherwise is None else f"'{source.otherwise!r}'"
            values.append(f"coalesce(l{place}, {otherwise}::DOUBLE) AS l{place}, coalesce(n{place}, 0) AS n{place}")
        self.database.run(
            f"CREATE TABLE labelled AS SELECT number, request, time, rank, {', '.join(values)} "
            f"FROM candidates {' '.join(joins)}"
        )
        for place, (name, _) in enumerate(labels):
            rows, wrong = self.database.row(
                f"SELECT count(*) FILTER (n{place} > 0 AND time <= {until}), "
                f"min(l{place}) FILTER (l{place} NOT IN (0, 1)) FROM labelled"
            )
            self.counts[f"rows with {name}"] += rows
            for task, about in self.settings.tasks.items():
                if wrong is not None and about.label == name and about.kind.is_binary:
                    raise UserError(
                        f"outcomes.labels.{name} gives {wrong:g}, but the label of the binary task '{task}' is 0 or 1: "
                        "name another column of values, leave `value` out, or make the task a regression"
                    )

    def _combine(self, place: int, source: LabelSource) -> str:
        """The label of a candidate, and the number of its events in the window; of events of one time, the one with the
        least value is the first."""
        inside = f"delay <= {source.microseconds}"
        label = f"{'sum' if source.combine == 'sum' else 'max'}(1.0::DOUBLE) FILTER ({inside})"
        if source.value is not None:
            value = self.events[source.events].name(source.value)
            label = {
                "first": f"arg_min({value}, row(time, {value}))",
                "last": f"arg_max({value}, row(time, {value}))",
                "sum": f"sum({value} ORDER BY time, {value})",
                "max": f"max({value})",
            }[source.combine]
            label += f" FILTER ({inside} AND NOT isnan({value}))"
        return f"{label} AS l{place}, count(*) FILTER ({inside}) AS n{place}"

    def _write(self, until: int, folder: Path) -> None:
        """Writes the rows of requests up to a time. A column of which no value is known is null, of any type."""
        columns, source, shown = self.columns, self.requests, self.outcomes.shown

        def logged(name: str) -> tuple[str, pa.DataType]:
            return f"r.{source.name(name)}", source.types.get(name, pa.null())

        chosen: dict[str, tuple[str, pa.DataType]] = {}  # column -> what it is
        if columns.request is not None:
            chosen[columns.request] = logged(names.REQUEST)
        for name in self.inputs:
            if name not in self.placement:
                chosen.setdefault(name, logged(name))
            elif shown is None:
                chosen[name] = "l.rank::BIGINT", pa.int64()
            else:
                events = self.events[shown.events]
                chosen[name] = f"s.{events.name(name)}", events.types.get(name, pa.null())
        chosen[columns.time] = "l.time", UTC_MICROSECONDS
        of_tasks = {task.label for task in self.settings.tasks.values()}
        for place, (name, label) in enumerate(self.outcomes.labels.items()):
            chosen[name] = f"l.l{place}", pa.float64() if label.value or name in of_tasks else pa.int64()
        if columns.sampling_rate is not None:
            chosen[columns.sampling_rate] = logged(names.SHARE)
        selected = ", ".join(f"{what} AS o{place}" for place, (what, _) in enumerate(chosen.values()))
        query = (
            f"SELECT {selected} FROM labelled l JOIN requests r ON r.number = l.number "
            f"{'JOIN shown s ON s.owner = l.number ' if shown else ''}WHERE l.time <= {until} "
            "ORDER BY l.time, l.request, l.rank, l.number"
        )
        schema = pa.schema({name: kind for name, (_, kind) in chosen.items()})
        for number, table in enumerate(self.database.read(query, ROWS_PER_FILE)):
            arrays = [
                pa.nulls(len(table)) if pa.types.is_null(field.type) else column.cast(field.type)
                for field, column in zip(schema, table.columns, strict=True)
            ]
            file = folder / f"part-{number:05d}.parquet"
            pq.write_table(pa.table(arrays, schema=schema), file, compression="zstd")


def describe(joined: JoinResult) -> Iterator[str]:
    """Lines for people."""
    if joined.folder is None:
        yield "nothing to add: no further request's outcomes are known yet"
    else:
        yield f"{joined.rows:,} rows of {joined.counts.get('requests', 0):,} requests up to {format_time(joined.until)}"
    for what, count in sorted(joined.counts.items()):
        if what != "requests":
            yield f"  {what}: {count:,}"
    for each in joined.left_out:
        yield f"left out: {each}"
    if joined.folder is not None:
        yield f"added: {joined.folder}"
