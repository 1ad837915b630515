"""Joins logged requests with events into rows of the interaction log, in a database that holds a bounded part of them:

    requests    candidates as they were logged     -> candidates: each once, of requests that are not written yet
    events_N    the events of each log, each once  -> the candidate that each belongs to
    labelled    candidates with their labels       -> Parquet files, by time

An event belongs to the last row of its key at or before its time. Where events carry the request's id, a key is a
request's candidate, and there is one row; else it is a user's candidate, and of several requests that could claim the
event the last one before it does. Then the window decides whether it counts.

A request is written once all its windows have ended and what happened in them is known: its time is at most that of
the last event of each log, less the log's longest window, less `outcomes.wait_days`. So a log of events that stands
still keeps requests waiting, instead of making zeros of what is not known. Later requests wait for the next run, which
only reads what can be later than all that was written.
"""

from __future__ import annotations

import time as clock
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmoe_rec.errors import UserError
from mmoe_rec.live import logged_requests as names
from mmoe_rec.live.outcome_files import BEGIN, EVENT_ID, Events, Plan, Runs, Source, State, open_plan, open_runs
from mmoe_rec.log.checks import format_time
from mmoe_rec.log.columns import UTC_MICROSECONDS
from mmoe_rec.log.database import open_database
from mmoe_rec.log.hashing import combine, hash_column
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY
from mmoe_rec.log.stand_ins import require_all
from mmoe_rec.progress import bar, say
from mmoe_rec.settings.outcomes import LabelSource
from mmoe_rec.settings.sections import Settings, differences

ROWS_PER_FILE = 262_144
_LONGEST_REQUEST = MICROSECONDS_PER_DAY  # between the parts of a request that are logged apart
_NEVER = np.iinfo(np.int64).min


@dataclass(frozen=True)
class Joined:
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
) -> Joined:
    """Adds the requests whose outcomes are known to an interaction log.

    Args:
        requests: folder that `serve --log-requests` writes.
        events: folder with a folder for each of `outcomes.events`; others are at `data.events.NAME.path`.
        out: folder of the log; new, empty, or of runs before.
        until: time up to which all events are there, microseconds; None: the last event's of each log.
        now: later events are mistakes; None is the clock's time.

    Raises:
        UserError: settings, files or the output folder don't fit each other; nothing is added then.
    """
    require_all(settings.schema_, "joining outcomes")
    sources = {"--requests": str(requests)} | ({} if events is None else {"--events": str(events)})
    with open_runs(Path(out), sources) as runs:
        plan = open_plan(settings, str(requests), None if events is None else str(events))
        return _Run(plan, runs, until, int(clock.time() * 1e6) if now is None else now).run()


class _Run:
    def __init__(self, plan: Plan, runs: Runs, until: int | None, now: int) -> None:
        self.plan, self.runs, self.given, self.now = plan, runs, until, now
        self.columns, self.outcomes = plan.settings.columns, plan.settings.outcomes
        self.before = runs.state()
        self.after = self.before.through
        self.counts: Counter[str] = Counter()
        self.tables = {name: f"events_{number}" for number, name in enumerate(plan.events)}
        self.inputs = [name for name in plan.requests.uses if name not in (self.columns.time, names.AT, names.RANK)]

    @property
    def _sources(self) -> list[Source]:
        return [self.plan.requests, *(each.source for each in self.plan.events.values())]

    def run(self) -> Joined:
        settings = self.outcomes.model_dump(mode="json")
        if self.before.settings and self.before.settings != settings:
            changes = (f"{name}: {old}, now {new}" for name, old, new in differences(self.before.settings, settings))
            say(f"note: earlier rows were joined by other settings of section outcomes ({'; '.join(changes)})")
        self.runs.begin()
        data, rows = self.plan.settings.data, 0
        with bar() as progress, open_database(self.runs.work / "database", data.memory_gib, data.workers) as database:
            self.progress, self.database = progress, database
            progress.add_task("joining", total=None)
            until = self._read_events()
            if until > self.after:
                self._read_requests()
                self._find_candidates(until)
                self._find_labels(until)
                rows = self._write(until)
        if not rows:
            return self._joined(None, 0, self.after)
        files = {file.address: file.bytes for each in self._sources for file in each.files}
        return self._joined(self.runs.commit(State(until, settings, files)), rows, until)

    def _joined(self, folder: Path | None, rows: int, until: int) -> Joined:
        counts = {what: count for what, count in self.counts.items() if count}
        return Joined(folder, rows, until, counts, [each.reason for s in self._sources for each in s.left_out])

    def _read_events(self) -> int:
        """Reads the events later than all that is written; gives the time up to which requests can be written."""
        ends = []
        for name, events in self.plan.events.items():
            table, fields = self.tables[name], dict.fromkeys(("who", "first", "item"), pa.uint64())
            fields |= {"number": pa.int64(), "time": pa.int64(), "id": pa.uint64()}
            payload = {f"c{place}": events.source.type_of(each) for place, each in enumerate(events.payload)}
            rows = self.database.fill("given", pa.schema(fields | payload), self._event_tables(name, events))
            self.database.run(
                f"CREATE TABLE {table} AS SELECT * FROM given QUALIFY id IS NULL "
                "OR row_number() OVER (PARTITION BY who, id ORDER BY time, number) = 1",
                "DROP TABLE given",
            )
            count, last = self.database.row(f"SELECT count(*), max(time) FROM {table}")
            self.counts[f"events '{name}' that came again"] += rows - count
            complete = (BEGIN if last is None else last) if self.given is None else self.given
            ends.append(complete - events.window)
        return min(ends) - round(self.outcomes.wait_days * MICROSECONDS_PER_DAY)

    def _event_tables(self, name: str, events: Events) -> Iterator[pa.Table]:
        """Events without those that lack an id or a time, lie in the future, or are no later than what is written."""
        columns, section = self.columns, events.settings
        keys = [columns.user, columns.candidate, *([section.request] if section.request else [])]
        late = f"new events '{name}' of requests that were written before"
        number = 0
        for batch, time in self._read(events.source, self.after, late):
            null = np.zeros(len(batch), bool)
            for each in (*keys, section.time):
                null |= batch[each].combine_chunks().is_null().to_numpy(zero_copy_only=False)
            future = ~null & (time > self.now)
            self.counts[f"events '{name}' without {' or '.join(keys)}, or a time"] += int(null.sum())
            self.counts[f"events '{name}' in the future"] += int(future.sum())
            keep = ~null & ~future & (time > self.after)
            some, who = batch.filter(pa.array(keep)), _hash(batch, columns.user)[keep]
            made = {
                "who": who,
                "first": who if section.request is None else self._request(some, section.request),
                "item": _hash(some, columns.candidate),
                "number": number + np.flatnonzero(keep),
                "time": time[keep],
                "id": pa.nulls(len(some), pa.uint64()),
            }
            if events.has_ids:
                made["id"] = pa.array(_hash(some, EVENT_ID), mask=pc.is_null(some[EVENT_ID]).to_numpy())
            made |= {f"c{place}": some[each] for place, each in enumerate(events.payload)}
            number += len(batch)
            yield pa.table(made)

    def _read_requests(self) -> None:
        fields = dict.fromkeys(("who", "request", "item"), pa.uint64())
        fields |= dict.fromkeys(("number", "own", "served"), pa.int64()) | {"rank": pa.float64()}
        payload = {f"c{place}": self.plan.requests.type_of(each) for place, each in enumerate(self.inputs)}
        self.database.fill("requests", pa.schema(fields | payload), self._request_tables())

    def _request_tables(self) -> Iterator[pa.Table]:
        number, start = 0, self.after - _LONGEST_REQUEST
        for batch, time in self._read(self.plan.requests, start, "rows of requests that came too late"):
            self._check_share(batch)
            some = batch.filter(pa.array(time > start))
            made = {
                "who": _hash(some, self.columns.user),
                "request": self._request(some, names.REQUEST),
                "item": _hash(some, self.columns.candidate),
                "number": number + np.flatnonzero(time > start),
                "own": time[time > start],
                "served": _microseconds(some[names.AT]),
                "rank": some[names.RANK],
            }
            number += len(batch)
            yield pa.table(made | {f"c{place}": some[each] for place, each in enumerate(self.inputs)})

    def _read(self, source: Source, start: int, late: str) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """Rows that may be later than `start`, and their times, (N,) int64; counts rows of new files that are not later
        than what is written as `late`."""
        for file, batch in source.read(start):
            is_new = self.before.files.get(file.address) != file.bytes
            if isinstance(batch, int):
                self.counts[late] += batch * is_new
                continue
            time = _microseconds(batch[source.time])
            if is_new and self.after > BEGIN:
                self.counts[late] += int(((time <= self.after) & (time > BEGIN)).sum())
            yield batch, time

    def _request(self, table: pa.Table, column: str) -> np.ndarray:
        """(N,) uint64 hash of the request's id, and of the user where ids are a user's own."""
        request = _hash(table, column)
        return combine([_hash(table, self.columns.user), request]) if self.columns.request_scope == "user" else request

    def _check_share(self, batch: pa.Table) -> None:
        by_user = [name for name, each in self.plan.events.items() if each.settings.request is None]
        share = pc.min(batch[names.SHARE]).as_py()
        if by_user and share is not None and share < 1:
            raise UserError(
                f"a share of {share:g} of all requests was logged, so an event '{by_user[0]}' may come from one that "
                f"was not: name the column with the request's id in outcomes.events.{by_user[0]}.request, or log all "
                "requests with --log-share 1"
            )

    def _find_candidates(self, until: int) -> None:
        """The candidates that were shown, with their request's first time; one that was logged again counts as it was
        in the last reply."""
        self.database.run(
            "CREATE TABLE candidates AS SELECT number, who, request, item, rank, own, start AS time FROM (SELECT *, "
            "min(own) OVER (PARTITION BY request) AS start, lead(item) OVER (PARTITION BY request ORDER BY item, "
            "served, rank DESC, number) AS later FROM requests) WHERE later IS DISTINCT FROM item"
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
            self._find_last_of_users()
            placed = "".join(f", {self._placed(name)}" for name in self.plan.placement)
            self.database.run(
                f"CREATE TABLE shown AS SELECT owner{placed} FROM ({self._owned(shown.events)}) "
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

    def _placed(self, column: str) -> str:
        assert self.outcomes.shown is not None
        return f"c{self.plan.events[self.outcomes.shown.events].payload.index(column)}"

    def _find_last_of_users(self) -> None:
        """Of candidates of one user, item and time the last one, whatever the order of the files."""
        if any(each.settings.request is None for each in self.plan.events.values()):
            self.database.run(
                "CREATE OR REPLACE TABLE of_users AS SELECT who, item, time, "
                "arg_max(number, row(request, rank, number)) AS number FROM candidates GROUP BY ALL"
            )

    def _owned(self, name: str) -> str:
        """A query for the events of a log that belong to a candidate, `owner`, with their `delay` after its request."""
        by_user = self.plan.events[name].settings.request is None
        owners, key = ("of_users", "who") if by_user else ("candidates", "request")
        same = f"FROM {self.tables[name]} e {{}} {owners} c ON e.first = c.{key} AND e.item = c.item"
        if not by_user:
            (early,) = self.database.row(f"SELECT count(*) {same.format('JOIN')} WHERE e.time < c.time")
            self.counts[f"events '{name}' earlier than their request"] += early
        join = same.format("ASOF JOIN" if by_user else "JOIN")
        return f"SELECT e.*, c.number AS owner, e.time - c.time AS delay {join} AND e.time >= c.time"

    def _find_labels(self, until: int) -> None:
        """Labels of candidates, null where nothing is known."""
        self._find_last_of_users()
        labels = list(self.outcomes.labels.items())
        joins, values = [], []
        for name in dict.fromkeys(source.events for _, source in labels):
            mine = [(place, source) for place, (_, source) in enumerate(labels) if source.events == name]
            sums = ", ".join(self._combine(place, source) for place, source in mine)
            table = f"of_{self.tables[name]}"
            self.database.run(
                f"CREATE TABLE {table} AS SELECT owner, {sums} FROM ({self._owned(name)}) GROUP BY owner",
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
            for task, about in self.plan.settings.tasks.items():
                if wrong is not None and about.label == name and about.kind == "binary":
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
            value = f"c{self.plan.events[source.events].payload.index(source.value)}"
            label = {
                "first": f"arg_min({value}, row(time, {value}))",
                "last": f"arg_max({value}, row(time, {value}))",
                "sum": f"sum({value} ORDER BY time, {value})",
                "max": f"max({value})",
            }[source.combine]
            label += f" FILTER ({inside} AND NOT isnan({value}))"
        return f"{label} AS l{place}, count(*) FILTER ({inside}) AS n{place}"

    def _write(self, until: int) -> int:
        """Writes the rows of requests up to a time; gives their number."""
        columns, placed = self.columns, self.outcomes.shown is not None
        made: dict[str, str] = {}  # column -> what it is
        if columns.request is not None:
            made[columns.request] = f"r.c{self.inputs.index(names.REQUEST)}"
        for name in self.plan.inputs:
            if name not in self.plan.placement:
                made.setdefault(name, f"r.c{self.inputs.index(name)}" if name in self.inputs else "r.own")
            else:
                made.setdefault(name, f"s.{self._placed(name)}" if placed else "r.rank::BIGINT")
        made[columns.time] = "l.time"
        made |= {name: f"l.l{place}" for place, name in enumerate(self.outcomes.labels)}
        if columns.sampling_rate is not None:
            made[columns.sampling_rate] = f"r.c{self.inputs.index(names.SHARE)}"
        chosen = ", ".join(f"{what} AS o{place}" for place, what in enumerate(made.values()))
        shown = "JOIN shown s ON s.owner = l.number " if placed else ""
        query = (
            f"SELECT {chosen} FROM labelled l JOIN requests r ON r.number = l.number {shown}WHERE l.time <= {until} "
            "ORDER BY l.time, l.request, l.rank, l.number"
        )
        schema, rows = pa.schema({name: self._type(name) for name in made}), 0
        for number, table in enumerate(self.database.read(query, ROWS_PER_FILE)):
            arrays = [
                pa.nulls(len(table)) if pa.types.is_null(field.type) else column.cast(field.type)
                for field, column in zip(schema, table.columns, strict=True)
            ]
            file = self.runs.made / f"part-{number:05d}.parquet"
            pq.write_table(pa.table(arrays, schema=schema), file, compression="zstd")
            rows += len(table)
        return rows

    def _type(self, name: str) -> pa.DataType:
        """The type of a column in all files; null for one that no value is known of."""
        if name in self.outcomes.labels:
            of_a_task = any(task.label == name for task in self.plan.settings.tasks.values())
            return pa.float64() if of_a_task or self.outcomes.labels[name].value else pa.int64()
        if name == self.columns.time:
            return UTC_MICROSECONDS
        if name == self.outcomes.rank:
            return pa.int64()
        name = {self.columns.request: names.REQUEST, self.columns.sampling_rate: names.SHARE}.get(name, name)
        return next((each.types[name] for each in self._sources if name in each.types), pa.null())


def _hash(table: pa.Table, column: str) -> np.ndarray:
    """(N,) uint64 hashes of a column."""
    return hash_column(table[column].combine_chunks())


def _microseconds(column: pa.ChunkedArray) -> np.ndarray:
    """(N,) int64 of a column of times, the least int64 where null."""
    if pa.types.is_null(column.type):
        return np.full(len(column), _NEVER)
    return column.cast(pa.int64()).fill_null(_NEVER).to_numpy()


def about(joined: Joined) -> Iterator[str]:
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
