"""Feeds a period through a server in the order of time: before a request is sent, all that happened earlier has been.

What is of the same instant may come in any order: nothing sees its own instant. A row of the interaction log is sent
with all its labels right after its request, though some mature later: the server has to hide them until then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from mmoe_rec.inference.requests.columns import PARTS
from mmoe_rec.jobs.replay.client import Accepted, Client
from mmoe_rec.jobs.replay.comparing import Comparison, Served
from mmoe_rec.jobs.replay.offline import Happened, Period
from mmoe_rec.point_in_time.arrays import one_array
from mmoe_rec.progress import bar
from mmoe_rec.settings.schema import Schema

ROWS_AT_A_TIME = 2_000
"""Events of a batch, at most."""
CANDIDATES_AT_A_TIME = 500
"""Candidates of a call, at most: explained ones count ten times in the server's limits, and what is said of one does
not depend on the others."""
_BYTES_AT_A_TIME = 2 * 2**20


@dataclass(frozen=True)
class Batches:
    """Events of one log in order; log: None for the interaction log."""

    log: str | None
    tables: tuple[pa.Table, ...]


@dataclass(frozen=True)
class Step:
    """Events that happened before an instant, then the requests of that instant, by their numbers in the period."""

    events: tuple[Batches, ...]
    requests: range


def steps(period: Period) -> Iterator[Step]:
    """The period in order; the last step has no requests."""
    logs = [period.interactions, *period.events]
    sent = [0] * len(logs)

    def before(time: int | None) -> tuple[Batches, ...]:
        found = []
        for place, log in enumerate(logs):
            end = len(log.times) if time is None else int(np.searchsorted(log.times, time))
            if end > sent[place]:
                found.append(Batches(log.name, tuple(_tables(log, sent[place], end))))
                sent[place] = end
        return tuple(found)

    instants, first = np.unique(period.times, return_index=True)
    ends = np.append(first[1:], len(period.times))
    for time, start, end in zip(instants.tolist(), first.tolist(), ends.tolist(), strict=True):
        yield Step(before(time), range(start, end))
    yield Step(before(None), range(0))


def _tables(log: Happened, start: int, end: int) -> Iterator[pa.Table]:
    while start < end:
        size = min(ROWS_AT_A_TIME, end - start)
        while size > 1 and log.between(start, start + size).nbytes > _BYTES_AT_A_TIME:
            size //= 2
        yield log.between(start, start + size)
        start += size


@dataclass(frozen=True)
class Part:
    """Candidates of a request that are asked for in one call: the rows of a period from one number to another."""

    start: int
    end: int


class Requests:
    """Makes calls of a period's rows, as a caller would send them.

    ids_only: whether attributes of users and candidates are left out, so that the server takes the latest it knows;
    most: candidates of a call.
    """

    def __init__(self, period: Period, schema: Schema, ids_only: bool = False, most: int = CANDIDATES_AT_A_TIME):
        columns = schema.columns
        ids = {columns.user, columns.candidate}
        roles = schema.input_columns().items()
        sent = {name: of for name, of in roles if not ids_only or of == "context" or name in ids}
        keys = {"user": columns.user, "candidate": columns.candidate}
        self._left_out = {name: keys[of] for name, of in roles if of in keys and name not in sent}
        self._sent = {part: [name for name, of in sent.items() if of == role] for role, part in PARTS.items()}
        self._period, self._most = period, most
        self.table = period.rows.table

    def parts(self, requests: range) -> list[Part]:
        """The calls of these requests."""
        found = []
        for number in requests:
            start, end = self._period.starts[number : number + 2].tolist()
            found += [Part(at, min(at + self._most, end)) for at in range(start, end, self._most)]
        return found

    def body(self, part: Part) -> dict[str, Any]:
        """A request; user and context are those of its first row."""
        size = part.end - part.start
        first = {name: _json(self.table[name].slice(part.start, 1))[0] for name in self._of_requests}
        return {
            "user": {name: first[name] for name in self._sent["user"]},
            "context": {name: first[name] for name in self._sent["context"]},
            "candidates": {name: _json(self.table[name].slice(part.start, size)) for name in self._sent["candidates"]},
        }

    @property
    def _of_requests(self) -> list[str]:
        return [*self._sent["user"], *self._sent["context"]]

    def differing(self) -> dict[str, int]:
        """Column of the user or the context -> requests whose rows hold several values of it, of which one is sent."""
        of = np.repeat(np.arange(len(self._period.times)), np.diff(self._period.starts))
        found = {}
        for column in self._of_requests:
            codes = _codes(self.table[column])
            differs = (codes[1:] != codes[:-1]) & (of[1:] == of[:-1])
            if requests := len(np.unique(of[1:][differs])):
                found[column] = requests
        return found

    def changed(self) -> dict[str, tuple[str, int]]:
        """Attribute that requests leave out -> the column of its ids, and how many rows hold another value of it than
        the row of the same id before, which is the one that a server knows."""
        found = {}
        for column, ids in self._left_out.items():
            order = np.argsort(keys := _codes(self.table[ids]), kind="stable")  # rows are in the order of time
            keys, codes = keys[order], _codes(self.table[column])[order]
            if rows := int(np.sum((keys[1:] == keys[:-1]) & (codes[1:] != codes[:-1]))):
                found[column] = ids, rows
        return found


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """(N,) int64, equal where values are."""
    values = one_array(column)
    if pa.types.is_nested(values.type):
        return np.unique([repr(each) for each in values.to_pylist()], return_inverse=True)[1]
    if pa.types.is_null(values.type):
        return np.zeros(len(values), np.int64)
    return values.dictionary_encode("encode").indices.to_numpy().astype(np.int64)


def _json(column: pa.ChunkedArray) -> list[Any]:
    """Values as JSON has them: times as ISO 8601, what is no number as null."""
    return [_value(each) for each in column.to_pylist()]


def _value(value: Any) -> Any:
    if isinstance(value, list):
        return [_value(each) for each in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value.isoformat() if hasattr(value, "isoformat") else value


@dataclass
class Feeder:
    """Feeds steps to a server and compares what comes back.

    workers: calls at a time, of requests of one instant, or of events of several logs; between: called before each step
    with its number, which tests use to kill; sent: what the server said of the events.
    """

    client: Client
    requests: Requests
    comparison: Comparison
    workers: int = 2
    between: Callable[[int], None] | None = None
    sent: Accepted = field(default_factory=Accepted)

    def feed(self, steps: Sequence[Step] | Iterator[Step], rows: int) -> None:
        """Sends all. rows: that are requested, for the progress bar.

        Raises UserError where the server does not answer, or refuses something.
        """
        with ThreadPoolExecutor(self.workers, "asking") as pool, bar("{task.fields[speed]}") as progress:
            task = progress.add_task("replaying", total=rows, speed="")
            for number, step in enumerate(steps):
                if self.between is not None:
                    self.between(number)
                for replies in pool.map(self._send, step.events):
                    for reply in replies:
                        self.sent.add(reply)
                parts = self.requests.parts(step.requests)
                for part, served in zip(parts, pool.map(partial(self._ask, self.sent.position), parts), strict=True):
                    self.comparison.add(part.start, served)
                    progress.advance(task, part.end - part.start)
                speed = progress.tasks[task].speed
                progress.update(task, speed="" if speed is None else f"{speed:,.0f} rows/s")

    def _send(self, batches: Batches) -> list[dict[str, Any]]:
        return [self.client.send(table, batches.log) for table in batches.tables]

    def _ask(self, after: str | None, part: Part) -> Served:
        return Served.of(self.client.rank(self.requests.body(part), after))
