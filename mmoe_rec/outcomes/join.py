"""Joins logged requests with events, in steps that hold a part of the rows each:

    events         -> what is joined of them, to partitions of users through files; up to when they are known
    requests       -> rows to partitions of users, through files
    partitions     -> rows of the interaction log with their labels, to spans of time through files
    spans          -> Parquet files, by time

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
from mmoe_rec.log.checks import format_time
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY
from mmoe_rec.log.stand_ins import require_all
from mmoe_rec.outcomes.partition import KEY, ORDER, Partition, each_once, hash_of, sent_events
from mmoe_rec.outcomes.plan import Plan, plan_of
from mmoe_rec.outcomes.reading import Source, microseconds_of
from mmoe_rec.outcomes.runs import BEGIN, Runs, State, open_runs
from mmoe_rec.preprocessing.exchange import Exchange, partition_of
from mmoe_rec.progress import bar, say
from mmoe_rec.request_log import names
from mmoe_rec.settings.differences import differences
from mmoe_rec.settings.sections import Settings

ROWS_TOGETHER = 262_144
"""Rows of a partition, and of a file, on average."""
_MOST_PARTITIONS = 1_024
_SPAN = 60_000_000  # microseconds by which rows are counted to divide them by time
_LONGEST_REQUEST = MICROSECONDS_PER_DAY  # between the parts of a request that are logged apart
_REQUESTS, _JOINED = "requests", "joined"


@dataclass(frozen=True)
class Joined:
    """What a run did. folder: of the new files, None where there is nothing to add; rows: in them; until: time up to
    which requests are written, microseconds; told: what there was -> how many."""

    folder: Path | None
    rows: int
    until: int
    told: dict[str, int]
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
        plan = plan_of(settings, str(requests), None if events is None else str(events))
        return _Run(plan, runs, until, int(clock.time() * 1e6) if now is None else now).run()


class _Run:
    def __init__(self, plan: Plan, runs: Runs, until: int | None, now: int) -> None:
        self.plan, self.runs, self.given, self.now = plan, runs, until, now
        self.before = runs.state()
        self.told: Counter[str] = Counter()
        rows = sum(file.rows for each in self._sources for file in each.files)
        partitions = min(max(rows // ROWS_TOGETHER, 1), _MOST_PARTITIONS)
        self.exchange = Exchange(runs.work / "exchange", partitions)
        self.counts: Counter[int] = Counter()  # minute -> rows to be written

    @property
    def _sources(self) -> list[Source]:
        return [self.plan.requests, *(each.source for each in self.plan.events.values())]

    def run(self) -> Joined:
        settings = self.plan.outcomes.model_dump(mode="json")
        if self.before.settings and self.before.settings != settings:
            changed = (f"{name}: {old}, now {new}" for name, old, new in differences(self.before.settings, settings))
            say(f"note: earlier rows were joined by other settings of section outcomes ({'; '.join(changed)})")
        self.runs.begin()
        after = self.before.through
        with bar() as progress:
            until = self._send_events(after)
            if until <= after:
                return self._joined(None, 0, after)
            progress.add_task("requests", total=None)
            self._send_requests(after, until)
            spans = Spans.of(self.counts)
            joined = Exchange(self.runs.work / "spans", len(spans))
            partition = Partition(self.plan, after, until, self.told)
            for number in progress.track(range(self.exchange.receivers), description="outcomes"):
                self._join(partition, number, spans, joined)
            rows = sum(self._write(joined, number) for number in progress.track(range(len(spans)), description="rows"))
        if not rows:
            return self._joined(None, 0, after)
        state = State(until, settings, self._files())
        return self._joined(self.runs.commit(state), rows, until)

    def _send_events(self, after: int) -> int:
        """Sends the events later than a time; gives the time up to which requests can be written."""
        known = []
        for name, events in self.plan.events.items():
            last, turn, new = BEGIN, 0, self._new(events.source)
            late = f"new events '{name}' of requests that were written before"
            for file, batch in events.source.read(after):
                if isinstance(batch, int):
                    self.told[late] += batch * (file.address in new)
                    continue
                time = microseconds_of(batch[events.source.time].combine_chunks())
                last = max(last, int(time[time <= self.now].max(initial=BEGIN)))
                if file.address in new and after > BEGIN:
                    self.told[late] += int(((time <= after) & (time > BEGIN)).sum())
                sent, user = sent_events(batch, self.plan, name, self.told, after, self.now)
                receiver = partition_of(user, self.exchange.receivers)
                self.exchange.send(f"events.{name}", (0, turn), sent, receiver)
                turn += 1
            complete = min(last, self.now) if self.given is None else self.given
            known.append(complete - events.window)
        return min(known) - round(self.plan.outcomes.wait_days * MICROSECONDS_PER_DAY)

    def _send_requests(self, after: int, until: int) -> None:
        columns, source, new = self.plan.settings.columns, self.plan.requests, self._new(self.plan.requests)
        for turn, (file, batch) in enumerate(source.read(after - _LONGEST_REQUEST)):
            late = "rows of requests that came too late"
            if isinstance(batch, int):
                self.told[late] += batch * (file.address in new)
                continue
            self._check(batch)
            time = microseconds_of(batch[columns.time].combine_chunks())
            if file.address in new and after > BEGIN:
                self.told[late] += int((time <= after).sum())
            kept = time > after - _LONGEST_REQUEST
            inside = time[(time > after) & (time <= until)]
            for minute, rows in zip(*np.unique(inside // _SPAN, return_counts=True), strict=True):
                self.counts[int(minute)] += int(rows)
            sent = batch.filter(pa.array(kept))
            receiver = partition_of(hash_of(sent, columns.user), self.exchange.receivers)
            self.exchange.send(_REQUESTS, (0, turn), sent, receiver)

    def _check(self, batch: pa.Table) -> None:
        by_user = [name for name, each in self.plan.events.items() if each.settings.request is None]
        share = pc.min(batch[names.SHARE]).as_py()
        if by_user and share is not None and share < 1:
            raise UserError(
                f"a share of {share:g} of all requests was logged, so an event '{by_user[0]}' may come from one that "
                f"was not: name the column with the request's id in outcomes.events.{by_user[0]}.request, or log all "
                "requests with --log-share 1"
            )

    def _join(self, partition: Partition, number: int, spans: Spans, joined: Exchange) -> None:
        logged = self.exchange.receive_all(_REQUESTS, number)
        if logged is None:
            return
        found = self.plan.events
        events = {
            name: each_once(self.exchange.receive_all(f"events.{name}", number), self.told, name) for name in found
        }
        rows = partition.rows(logged, events)
        if len(rows):
            time = microseconds_of(rows[self.plan.settings.columns.time].combine_chunks())
            joined.send(_JOINED, (number, 0), rows, spans.holding(time))

    def _write(self, joined: Exchange, number: int) -> int:
        """Writes the rows of a span; gives their number."""
        table = joined.receive_all(_JOINED, number)
        if table is None:
            return 0
        time = microseconds_of(table[self.plan.settings.columns.time].combine_chunks())
        order = np.lexsort((table[ORDER].to_numpy(), table[KEY].to_numpy(), time))
        table = table.take(pa.array(order)).drop_columns([KEY, ORDER])
        for place, name in enumerate(table.column_names):
            kind = self._type(name)
            if kind is not None and pa.types.is_null(table[name].type):
                table = table.set_column(place, name, table[name].cast(kind))
        pq.write_table(table, self.runs.made / f"part-{number:05d}.parquet", compression="zstd")
        return len(table)

    def _type(self, name: str) -> pa.DataType | None:
        """The type of a column in all files, where it is known."""
        if name in self.plan.outcomes.labels:
            return pa.float64()
        return next((each.types[name] for each in self._sources if name in each.types), None)

    def _new(self, source: Source) -> set[str]:
        return {each.address for each in source.files if self.before.files.get(each.address) != each.bytes}

    def _files(self) -> dict[str, int]:
        return {file.address: file.bytes for each in self._sources for file in each.files}

    def _joined(self, folder: Path | None, rows: int, until: int) -> Joined:
        told = {what: many for what, many in self.told.items() if many}
        left_out = [each.reason for source in self._sources for each in source.left_out]
        return Joined(folder, rows, until, told, left_out)


@dataclass(frozen=True)
class Spans:
    """Spans of time that follow each other, with about as many rows each.

    starts: (S,) rising microseconds, the first of them before all times.
    """

    starts: np.ndarray

    @staticmethod
    def of(counts: Counter[int]) -> Spans:
        """Of minutes and the number of rows in each."""
        starts, rows = [BEGIN], 0
        for minute in sorted(counts):
            if rows >= ROWS_TOGETHER:
                starts.append(minute * _SPAN)
                rows = 0
            rows += counts[minute]
        return Spans(np.array(starts, np.int64))

    def __len__(self) -> int:
        return len(self.starts)

    def holding(self, times: np.ndarray) -> np.ndarray:
        """(N,) int64 the span of each time."""
        return np.searchsorted(self.starts, times, side="right") - 1


def about(joined: Joined) -> Iterator[str]:
    """Lines for people."""
    if joined.folder is None:
        yield "nothing to add: no further request's outcomes are known yet"
    else:
        yield f"{joined.rows:,} rows of {joined.told.get('requests', 0):,} requests up to {format_time(joined.until)}"
    for what, many in sorted(joined.told.items()):
        if what != "requests":
            yield f"  {what}: {many:,}"
    for each in joined.left_out:
        yield f"left out: {each}"
    if joined.folder is not None:
        yield f"added: {joined.folder}"
