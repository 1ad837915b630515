"""A model that is fed a period of its log, and learns, ranks and logs as a server's worker does."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.ranking import Ranking
from mmoe_rec.inference.request_reader import REQUEST_KEYS
from mmoe_rec.live.journal import Journal
from mmoe_rec.live.journal_rows import make_batch
from mmoe_rec.live.request_log import LoggedReply, write_log_file
from mmoe_rec.log.columns import column_uses
from mmoe_rec.log.reader import EventLogFiles, Log
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time.join import in_window
from mmoe_rec.server.models import EventIngester
from mmoe_rec.settings.log_columns import EVENT_TASK
from tests.server.asking import as_json

EVENTS_AT_A_TIME = 50


@dataclass(frozen=True)
class Period:
    """Rows of a period's requests in the order of time, and the events of all logs.

    starts: (R + 1,) where each request's rows begin; times: (R,) microseconds; logs: name (None for the interaction
    log), times and table of each log.
    """

    rows: LogRows
    starts: np.ndarray
    times: np.ndarray
    logs: list[tuple[str | None, np.ndarray, pa.Table]]


def read_period(log: Log, window: tuple[int, int]) -> Period:
    """The requests and events of a period, start <= time < end in microseconds."""
    table = _joined([rows.filter(in_window(rows.times(), window)).table for rows in log.stream()])
    rows = LogRows(table, log.schema)
    table = table.take(pa.array(np.lexsort((rows.request_hashes(), rows.times()))))
    rows = LogRows(table, log.schema)
    times, request = rows.times(), rows.request_hashes()
    first = np.append(True, (times[1:] != times[:-1]) | (request[1:] != request[:-1]))
    starts = np.append(np.flatnonzero(first), len(rows))
    logs: list[tuple[str | None, np.ndarray, pa.Table]] = [(None, times, table.select(list(column_uses(log.schema))))]
    for name in log.schema.events:
        events = EventLogFiles(name, log)
        tables = [
            event.filter(in_window(event.times(), window))
            .table.drop_columns([EVENT_TASK.label])
            .rename_columns({events.schema.columns.time: events.reader.time})
            for event in events.stream()
        ]
        actual = _joined(tables).sort_by(events.reader.time)
        logs.append((name, actual[events.reader.time].cast(pa.int64()).to_numpy(), actual))
    return Period(rows, starts, times[starts[:-1]], logs)


def _joined(tables: Sequence[pa.Table]) -> pa.Table:
    """Without dictionaries, which differ from part to part, and with null for each number that is none."""
    plain = []
    for table in tables:
        for place, item in enumerate(table.schema):
            values = table.column(place)
            if pa.types.is_dictionary(item.type):
                table = table.set_column(place, item.name, values.cast(item.type.value_type))  # noqa: PLW2901
            elif pa.types.is_floating(item.type):
                numbers = pc.if_else(pc.is_finite(values), values, None)
                table = table.set_column(place, item.name, numbers)  # noqa: PLW2901
        plain.append(table)
    return pa.concat_tables(plain, promote_options="permissive").combine_chunks()


class FedModel:
    """A model in this process. model: an artifact folder; folder: gets the journal, and the logged requests in
    `requests`."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.ranker, self.requests = Ranker.load(model), folder / "requests"
        self.ranker.keep_inputs = True
        self.requests.mkdir()
        address = f"sqlite:///{folder / 'journal.db'}"
        Journal(address).close()
        self._ingester = EventIngester(self.ranker, address)
        self.logged: list[pa.Table] = []

    def send(self, table: pa.Table, log: str | None) -> None:
        """Accepts events of the interaction log (None), or of a named log, and learns them."""
        checked = self._ingester.validator.read_json(log, as_json(table))
        self._ingester.journal.append(make_batch(log, checked, self._ingester.schema))
        self._ingester.catch_up()

    def rank(self, request: dict[str, Any]) -> None:
        """Ranks and logs a request."""
        ranking: Ranking = self.ranker.rank(**json.loads(json.dumps(request)))
        self.logged.append(LoggedReply(ranking, None, None, None, 1.0, time.time_ns() // 1_000).to_table())

    def write(self) -> None:
        """Writes the requests that it has logged."""
        write_log_file(self.requests, pa.concat_tables(self.logged, promote_options="default"))


def feed(period: Period, model: FedModel, most: int) -> None:
    """Feeds a period's events and requests in the order of time to a model.

    Before a request, all events that happened earlier are learnt. What is of the same instant comes later: nothing sees
    its own instant. A row of the interaction log comes with all its labels, though some mature later: the model has to
    hide them until then. most: candidates of a call.
    """
    sent = [0] * len(period.logs)
    for number, instant in enumerate(period.times.tolist()):
        for place, (name, times, table) in enumerate(period.logs):
            until = int(np.searchsorted(times, instant))
            for start in range(sent[place], until, EVENTS_AT_A_TIME):
                model.send(table.slice(start, min(EVENTS_AT_A_TIME, until - start)), name)
            sent[place] = until
        first, end = period.starts[number : number + 2].tolist()
        for start in range(first, end, most):
            model.rank(_build_request(period, start, min(start + most, end)))


def _build_request(period: Period, start: int, end: int) -> dict[str, Any]:
    """A request for the rows of a period from one number to another; user and context are those of the first."""
    schema, table = period.rows.schema, period.rows.table
    parts: dict[str, dict[str, Any]] = {part: {} for part in REQUEST_KEYS.values()}
    for name, role in schema.input_columns().items():
        if role in REQUEST_KEYS:
            rows = table[name].slice(start, end - start if role == "candidate" else 1)
            values = [row.isoformat() if hasattr(row, "isoformat") else row for row in rows.to_pylist()]
            parts[REQUEST_KEYS[role]][name] = values if role == "candidate" else values[0]
    if schema.columns.request is not None:
        parts["context"][schema.columns.request] = table[schema.columns.request][start].as_py()
    return parts
