"""One request has one time: the first step of a build finds requests whose rows have several, and their first.

A request's rows may lie in any parts of a log. So each part sends (request, time, user) of its rows, once for
consecutive rows that agree, to a partition by the hash of the request's id. A partition holds what it knows of each
request, and never more of the rows than a part sent: a request may have most of a log's rows. Where a request has
several times, it sends (row, first time) to blocks of rows, and whoever reads these gets the request's time instead of
the rows' own. What is known of requests is kept with the features, so that rows in a later day's files are recognised.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmoe_rec.log.checks import BadFile
from mmoe_rec.log.parts import LogPart, Noticed
from mmoe_rec.log.reader import ROWS_PER_PART, Log, LogReader
from mmoe_rec.log.rows import LogRows
from mmoe_rec.preprocessing.exchange import Exchange, partition_of
from mmoe_rec.preprocessing.request_summaries import RequestSummaries, RequestWriter, read_requests
from mmoe_rec.preprocessing.results import Blocks

RUNS, FIRST_TIMES = "runs", "first_times"
_GREATEST = np.iinfo(np.int64).max
Run = Callable[[Callable[[Any], Any], Sequence[Any], Sequence[int], str], Iterator[Any]]


@dataclass(frozen=True)
class RequestsJob:
    """What the tasks of this step share.

    runs: exchange of rows by request; first_times: exchange of those whose time is not their request's, by block of
    rows; before: folder with the requests of the days before, or None; kept: folder that gets all requests, or None;
    one_time: whether an example of several times is wanted.
    """

    runs: Exchange
    first_times: Exchange
    blocks: Blocks
    before: Path | None
    kept: Path | None
    one_time: bool


@dataclass(frozen=True)
class Clash:
    """Numbers of two rows of one request that disagree; `first` is None where it lies in a file of days before."""

    first: int | None
    other: int


@dataclass
class Requests:
    """What is known of a log's requests; partitions are merged in any order.

    count: requests; several_times, several_users: those with rows of several times or users; moved: rows whose own time
    is not their request's; longest: greatest difference of times within a request, microseconds; continued,
    continued_rows: requests of days before that have rows here; begin: time of the first request that is none of them;
    times_clash, users_clash: two rows that disagree, the second being the first such row; bad: files that can't
    be read.
    """

    count: int = 0
    several_times: int = 0
    moved: int = 0
    longest: int = 0
    several_users: int = 0
    continued: int = 0
    continued_rows: int = 0
    begin: int = _GREATEST
    times_clash: Clash | None = None
    users_clash: Clash | None = None
    bad: list[BadFile] = field(default_factory=list)

    def add(self, summaries: RequestSummaries) -> None:
        """Counts requests."""
        self.count += len(summaries)
        self.several_times += int(summaries.several_times.sum())
        self.several_users += int((summaries.greatest > summaries.least).sum())
        self.longest = max(self.longest, int((summaries.last - summaries.first).max(initial=0)))

    def describe(self) -> dict[str, int]:
        """What a manifest says of them."""
        return {
            "count": self.count,
            "several_times": self.several_times,
            "longest_microseconds": self.longest,
            "continued": self.continued,
            "continued_rows": self.continued_rows,
        }

    def merge(self, other: Requests) -> None:
        """Adds what is known of other requests."""
        for name in ("count", "several_times", "moved", "several_users", "continued", "continued_rows"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest, self.begin = max(self.longest, other.longest), min(self.begin, other.begin)
        self.times_clash = _first_clash(self.times_clash, other.times_clash)
        self.users_clash = _first_clash(self.users_clash, other.users_clash)
        self.bad += other.bad


def _first_clash(one: Clash | None, other: Clash | None) -> Clash | None:
    return min(filter(None, (one, other)), key=lambda clash: clash.other, default=None)


@dataclass(frozen=True)
class OneTimeReader:
    """Reads parts of an interaction log with the request's time in all rows of a request; small and picklable."""

    reader: LogReader
    first_times: Exchange
    blocks: Blocks

    def read(self, part: LogPart, noticed: Noticed | None = None) -> Iterator[LogRows]:
        """As `LogReader.read`."""
        row, loaded = part.start, (-1, np.empty(0, np.int64), np.empty(0, np.int64))
        for rows in self.reader.read(part, noticed):
            times = None
            first_block, last_block = self.blocks.holding(np.array([row, row + len(rows) - 1]))
            for block in range(first_block, last_block + 1):
                if loaded[0] != block:
                    loaded = block, *self._moved(block)
                _, moved, time = loaded
                inside = (moved >= row) & (moved < row + len(rows))
                if inside.any():
                    times = rows.times().copy() if times is None else times
                    times[moved[inside] - row] = time[inside]
            yield rows if times is None else rows.with_times(times)
            row += len(rows)

    def _moved(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        table = self.first_times.receive_all(FIRST_TIMES, block)
        if table is None:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        return table["row"].to_numpy(), table["time"].to_numpy()


def find_requests(job: RequestsJob, log: Log, parts: Sequence[LogPart], run: Run) -> Requests:
    """What is known of a log's requests, with bad files if there are any; `run` runs tasks.

    Nothing is read of a log without a request column, whose requests are rows of one time.
    """
    columns, found = log.schema.columns, Requests()
    if columns.request is None:
        return found
    split = log.schema.split
    read = {columns.request, columns.user, columns.time, *([] if split is None else [split.column])}
    reader = replace(log.reader, uses={column: use for column, use in log.uses.items() if column in read})
    sizes = [part.rows for part in parts]
    for bad in run(partial(_send_runs, job.runs, reader), parts, sizes, "requests"):
        found.bad += bad
    if not found.bad:
        if job.kept is not None:
            shutil.rmtree(job.kept, ignore_errors=True)
            job.kept.mkdir()
        partitions = range(job.runs.receivers)
        for part in run(partial(_find, job), partitions, [1] * len(partitions), "times of requests"):
            found.merge(part)
        shutil.rmtree(job.runs.folder, ignore_errors=True)
    return found


def _send_runs(runs: Exchange, reader: LogReader, part: LogPart) -> list[BadFile]:
    """Sends a part's rows, many at a time: a part may be larger than usual, as a row group is never divided."""
    row, turn, waiting, rows_waiting, noticed = part.start, 0, [], 0, Noticed()
    for rows in reader.read(part, noticed):
        if noticed.bad:
            continue
        waiting.append(_runs_of(rows, row))
        row, rows_waiting = row + len(rows), rows_waiting + len(rows)
        if rows_waiting >= ROWS_PER_PART:
            _send(runs, (part.start, turn), waiting)
            turn, waiting, rows_waiting = turn + 1, [], 0
    if not noticed.bad:
        _send(runs, (part.start, turn), waiting)
    return noticed.bad


def _send(runs: Exchange, sender: tuple[int, int], tables: Sequence[pa.Table]) -> None:
    if tables:
        table = pa.concat_tables(tables)
        runs.send(RUNS, sender, table, partition_of(table["request"].to_numpy(), runs.receivers))


def _runs_of(rows: LogRows, first_row: int) -> pa.Table:
    request, user, time = rows.request_hashes(), rows.hashes([rows.schema.columns.user]), rows.times()
    begins = np.append(True, (request[1:] != request[:-1]) | (time[1:] != time[:-1]) | (user[1:] != user[:-1]))
    start = np.flatnonzero(begins)
    columns = {"request": request, "time": time, "user": user}
    return pa.table(
        {
            **{name: values[start] for name, values in columns.items()},
            "row": first_row + start,
            "rows": np.diff(np.append(start, len(rows))),
        }
    )


def _find(job: RequestsJob, partition: int) -> Requests:
    """Finds out about a partition's requests, sends first times, and keeps the requests."""
    summaries, found = _summaries(job.runs, partition), Requests()
    one_user = summaries.least.copy()
    continued = np.zeros(len(summaries), bool)
    with RequestWriter(job.kept, partition) as kept:
        for before in read_requests(job.before, partition, job.runs.receivers):
            place = summaries.place(before.request) if len(summaries) else np.zeros(len(before), np.int64)
            again = summaries.request[place] == before.request if len(summaries) else np.zeros(len(before), bool)
            mine, theirs, place = summaries.take(place[again]), before.take(np.flatnonzero(again)), place[again]
            # A row that is earlier than all of its request in the files before would change what these have become.
            continued[place] = mine.first >= theirs.first
            one_user[place] = theirs.least
            summaries.first[place] = np.minimum(mine.first, theirs.first)
            summaries.last[place] = np.maximum(mine.last, theirs.last)
            summaries.least[place] = np.minimum(mine.least, theirs.least)
            summaries.greatest[place] = np.maximum(mine.greatest, theirs.greatest)
            others = before.take(np.flatnonzero(~again))
            kept.write(others)
            found.add(others)
        kept.write(summaries)
    found.add(summaries)
    found.continued, found.continued_rows = int(continued.sum()), int(summaries.rows[continued].sum())
    found.begin = int(summaries.first[~continued].min(initial=_GREATEST))
    if summaries.several_times.any():
        found.moved = _send_first_times(job, partition, summaries)
        if job.one_time:
            found.times_clash = _clash(job.runs, partition, summaries, "time", summaries.first)
    if (summaries.greatest > summaries.least).any():
        found.users_clash = _clash(job.runs, partition, summaries, "user", one_user)
    return found


def _summaries(runs: Exchange, partition: int) -> RequestSummaries:
    summaries, waiting = RequestSummaries.none(), []
    for table in runs.receive(RUNS, partition):
        waiting.append(RequestSummaries.of_runs(table))
        if sum(map(len, waiting)) > max(len(summaries), ROWS_PER_PART):
            summaries, waiting = summaries.merged(waiting), []
    return summaries.merged(waiting)


def _send_first_times(job: RequestsJob, partition: int, summaries: RequestSummaries) -> int:
    """Sends each row whose time is not its request's; gives their number."""
    moved, turn, waiting = 0, 0, 0
    tables: list[pa.Table] = []

    def send() -> None:
        nonlocal turn, waiting
        if tables:
            table = pa.concat_tables(tables)
            job.first_times.send(FIRST_TIMES, (partition, turn), table, job.blocks.holding(table["row"].to_numpy()))
            tables.clear()
            turn, waiting = turn + 1, 0

    for table in job.runs.receive(RUNS, partition):
        first = summaries.first[summaries.place(table["request"].to_numpy())]
        wrong = np.flatnonzero(table["time"].to_numpy() != first)
        if len(wrong):
            rows = table["rows"].to_numpy()[wrong]
            within = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
            row = np.repeat(table["row"].to_numpy()[wrong], rows) + within
            tables.append(pa.table({"row": row, "time": np.repeat(first[wrong], rows)}))
            waiting, moved = waiting + len(row), moved + len(row)
            if waiting >= ROWS_PER_PART:
                send()
    send()
    return moved


def _clash(
    runs: Exchange, partition: int, summaries: RequestSummaries, column: str, agreed: np.ndarray
) -> Clash | None:
    """The first row that disagrees with its request, and the first that does not; None if no row does.

    agreed: (R,) the value of each request.
    """
    other, request = _GREATEST, np.uint64(0)
    for table in runs.receive(RUNS, partition):
        requests = table["request"].to_numpy()
        wrong = np.flatnonzero(table[column].to_numpy() != agreed[summaries.place(requests)])
        rows = table["row"].to_numpy()[wrong]
        if rows.min(initial=_GREATEST) < other:
            other, request = int(rows.min()), requests[wrong[rows.argmin()]]
    if other == _GREATEST:
        return None
    first = _GREATEST
    value = agreed[summaries.place(np.array([request]))[0]]
    for table in runs.receive(RUNS, partition):
        right = (table["request"].to_numpy() == request) & (table[column].to_numpy() == value)
        first = min(first, int(table["row"].to_numpy()[right].min(initial=_GREATEST)))
    return Clash(None if first == _GREATEST else first, other)
