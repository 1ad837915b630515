"""`POST /events`: read within limits, checked as a build checks a log, on disk before it is acknowledged."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt
from starlette.requests import Request
from starlette.responses import Response

from mmoe_rec.errors import RequestError, UserError, quoted
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.live.journal import Journal
from mmoe_rec.live.journal_rows import JournalRows, RowValidator, make_batch
from mmoe_rec.log.rows import LogRows
from mmoe_rec.server.invocations import handle_call, parse_json, read_body, require_json
from mmoe_rec.server.options import INTERNAL_ERROR, CallLimiter, HttpError
from mmoe_rec.server.ranking_queue import JournalFollower
from mmoe_rec.server.server_metrics import Metrics
from mmoe_rec.settings.sections import Serving

EXAMPLE_BODY = '{"events": [{column: value, ...}, ...], "log": NAME}'
_THREADS = 4  # bodies that are checked, or wait for the disk, at a time

MissingAttributes = dict[str, np.ndarray]
"""Attributes of users and candidates that rows leave out, each with (N,) bool in which rows."""

_log = logging.getLogger(__name__)


class EventHandler:
    """Takes events into a journal: all rows of a call, or none."""

    def __init__(self, limits: Serving, journal: str, metrics: Metrics, follower: JournalFollower) -> None:
        self._limits, self._metrics, self._follower = limits, metrics, follower
        self._journal = Journal(journal)
        self.limiter = CallLimiter(self._limits, "calls of /events")
        self._threads = ThreadPoolExecutor(_THREADS, "events")

    async def answer(self, request: Request) -> Response:
        """The reply to a call, whatever is wrong with it: an acknowledgement once its rows are on disk."""
        with self._metrics.timed("events"):
            refused = self._metrics.events_refused.labels
            return await handle_call(lambda: self._accept(request), self.limiter, lambda reason: refused(reason).inc())

    async def _accept(self, request: Request) -> bytes:
        """Append the rows of a call within its time. An append that has begun by then goes on."""
        require_json(request)
        if strange := request.query_params.keys():
            raise HttpError(400, f"/events has no query parameter {quoted(min(strange))}", "body")
        body, limit = await read_body(request, self._limits), self._limits.call_timeout_seconds
        run = partial(asyncio.get_running_loop().run_in_executor, self._threads)
        try:
            async with asyncio.timeout(limit):
                log_name, table, lacking = await run(self._check, body)
                if lacking:
                    await self._follower.wait_for_end()  # what was acknowledged before may say what it lacks
                return orjson.dumps(await run(self._append, log_name, table, lacking))
        except TimeoutError:
            sentence = f"/events: no answer within {limit:g} seconds (setting `serving.call_timeout_seconds`)"
            told = f"{sentence}, but the rows may still be kept. Send the call again"
            told += "; events without event_id may count twice."
            raise HttpError(503, told, "too_long", "TEMPORARILY_UNAVAILABLE", 1) from None

    def _check(self, body: bytes) -> tuple[str | None, pa.Table, MissingAttributes]:
        """The log of events that rows are of, the rows, and what they lack."""
        validator = self._follower.ingester.validator
        try:
            log, rows = _rows_in(parse_json(body, self._limits))
            table = validator.read_json(log, rows)
        except RequestError as error:
            raise HttpError(400, str(error), "body") from None
        return log, table, _lacking(log, validator, table, rows)

    def _append(self, log_name: str | None, table: pa.Table, lacking: MissingAttributes) -> dict[str, Any]:
        ingester = self._follower.ingester
        try:
            if lacking:
                table = _completed(ingester.ranker, table, lacking)
            ignored = ingester.count_ignored(JournalRows(log_name, table).rows(ingester.schema).times())
            position = self._journal.append(make_batch(log_name, table, ingester.schema))
        except RequestError as error:
            raise HttpError(400, str(error), "body") from None
        except UserError as error:  # such as a full disk
            _log.error("%s", error)
            raise HttpError(503, "events can't be kept; the log says why", "disk", INTERNAL_ERROR, 5) from None
        self._metrics.events.labels(log_name or "").inc(len(table))
        return {"accepted": len(table), "position": str(position)} | ({"ignored": ignored} if ignored else {})


def _rows_in(tree: Any) -> tuple[str | None, Any]:
    """The log and the rows that a body names."""
    problem, named = None, tree.get("log") if isinstance(tree, dict) else None
    if not isinstance(tree, dict) or "events" not in tree:
        problem = f"the body must be an object such as {EXAMPLE_BODY}"
    elif unknown := tree.keys() - {"events", "log"}:
        problem = f"a call has no key {quoted(min(unknown))}; valid are events and log"
    elif not isinstance(named, str | None):
        problem = "'log' must be the name of one log of events; leave it out for the interaction log"
    if problem is not None:
        raise HttpError(400, problem, "body")
    return named, tree["events"]


def _lacking(
    log_name: str | None, validator: RowValidator, table: pa.Table, rows: Sequence[Mapping[str, Any]]
) -> MissingAttributes:
    """The attributes that rows leave out. rows: as JSON gave them, where each may leave out others."""
    lacking = {}
    for name in validator.optional_attributes if log_name is None else ():
        if name not in table.column_names:
            lacking[name] = np.ones(len(table), bool)
        elif (left := np.array([name not in row for row in rows])).any():
            lacking[name] = left
    return lacking


def _completed(ranker: Ranker, table: pa.Table, lacking: MissingAttributes) -> pa.Table:
    """Rows with the attributes that they leave out, as these are known: the journal says all that a build reads."""
    given = {name: table.column(name) for name in lacking if name in table.column_names}
    known = ranker.reader.fill_attributes(LogRows(table.drop_columns(list(given)), ranker.pipeline.schema)).table
    for name, column in given.items():
        theirs = known.column(name)
        kind = theirs.type if pt.is_null(column.type) else column.type
        both = pc.if_else(pa.array(lacking[name]), theirs.cast(kind), column.cast(kind))
        known = known.set_column(known.column_names.index(name), name, both)
    return known
