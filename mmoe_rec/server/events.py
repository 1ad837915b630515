"""`POST /events`: read a call within limits, check its rows as a feature build does, and append them to the journal.

A call contains rows of one log: the interaction log or an event log.
"""

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
from mmoe_rec.server.options import INTERNAL_ERROR, CallLimiter, HttpError, RefusalReason
from mmoe_rec.server.ranking_queue import JournalFollower
from mmoe_rec.server.server_metrics import Metrics
from mmoe_rec.settings.sections import Serving

EXAMPLE_BODY = '{"events": [{column: value, ...}, ...], "log": NAME}'
_THREADS = 4  # Number of calls whose rows are checked or written to disk at the same time.

MissingAttributes = dict[str, np.ndarray]
"""Attribute of users or candidates -> whether each of N rows omits the attribute, (N,) bool."""

_log = logging.getLogger(__name__)


class EventHandler:
    """Handler that adds the rows of a call to the journal, all or none."""

    def __init__(self, limits: Serving, journal: str, metrics: Metrics, follower: JournalFollower) -> None:
        """Open the journal.

        Args:
            limits: Limits of calls, from the section `serving` of the settings.
            journal: URL of the journal. It is created if it doesn't exist.
            metrics: Metrics of the worker.
            follower: Follower that ingests the journal into the current model.
        """
        self._limits, self._metrics, self._follower, self._journal = limits, metrics, follower, Journal(journal)
        self.limiter = CallLimiter(limits, "calls of /events")
        self._threads = ThreadPoolExecutor(_THREADS, "events")

    async def answer(self, request: Request) -> Response:
        """Answer a call once its rows are durable. Errors become error replies."""
        with self._metrics.timed("events"):
            refusals = self._metrics.events_refused.labels
            return await handle_call(lambda: self._accept(request), self.limiter, lambda reason: refusals(reason).inc())

    async def _accept(self, request: Request) -> bytes:
        """Append the rows of a call and return the reply. After a timeout, a started append still completes."""
        require_json(request)
        if names := request.query_params.keys():
            raise HttpError(400, f"/events has no query parameter {quoted(min(names))}", RefusalReason.BODY)
        body, limit = await read_body(request, self._limits), self._limits.call_timeout_seconds
        run = partial(asyncio.get_running_loop().run_in_executor, self._threads)
        try:
            async with asyncio.timeout(limit):
                log_name, table, missing = await run(self._check, body)
                if missing:
                    # Missing attributes get their latest values, so the model must have ingested all earlier events.
                    await self._follower.wait_for_end()
                return orjson.dumps(await run(self._append, log_name, table, missing))
        except TimeoutError:
            sentence = (
                f"/events: no answer within {limit:g} seconds (setting `serving.call_timeout_seconds`), but the rows "
                "may still be kept. Send the call again; events without event_id may count twice."
            )
            raise HttpError(503, sentence, RefusalReason.TOO_LONG, "TEMPORARILY_UNAVAILABLE", 1) from None

    def _check(self, body: bytes) -> tuple[str | None, pa.Table, MissingAttributes]:
        """Parse and check a body. Return the log's name (None: interaction log), its rows and missing attributes."""
        validator = self._follower.ingester.validator
        try:
            log_name, rows = _parse_body(parse_json(body, self._limits))
            table = validator.read_json(log_name, rows)
        except RequestError as error:
            raise HttpError(400, str(error), RefusalReason.BODY) from None
        return log_name, table, _missing_attributes(log_name, validator, table, rows)

    def _append(self, log_name: str | None, table: pa.Table, missing: MissingAttributes) -> dict[str, Any]:
        ingester = self._follower.ingester
        try:
            if missing:
                table = _fill_missing(ingester.ranker, table, missing)
            ignored = ingester.count_ignored(JournalRows(log_name, table).to_log_rows(ingester.schema).times())
            position = self._journal.append(make_batch(log_name, table, ingester.schema))
        except RequestError as error:
            raise HttpError(400, str(error), RefusalReason.BODY) from None
        except UserError as error:  # Such as a full disk.
            _log.error("%s", error)
            sentence = "events can't be stored; the server's log has the reason"
            raise HttpError(503, sentence, RefusalReason.DISK, INTERNAL_ERROR, 5) from None
        self._metrics.events.labels(log_name or "").inc(len(table))
        return {"accepted": len(table), "position": str(position)} | ({"ignored": ignored} if ignored else {})


def _parse_body(tree: Any) -> tuple[str | None, Any]:
    """Return the log's name (None: interaction log) and the rows of a body."""
    problem, log_name = None, tree.get("log") if isinstance(tree, dict) else None
    if not isinstance(tree, dict) or "events" not in tree:
        problem = f"the body must be an object such as {EXAMPLE_BODY}"
    elif unknown := tree.keys() - {"events", "log"}:
        problem = f"a call has no key {quoted(min(unknown))}. Valid keys are events and log."
    elif not isinstance(log_name, str | None):
        problem = "'log' must be the name of one log of events; leave it out for the interaction log"
    if problem is not None:
        raise HttpError(400, problem, RefusalReason.BODY)
    return log_name, tree["events"]


def _missing_attributes(
    log_name: str | None, validator: RowValidator, table: pa.Table, rows: Sequence[Mapping[str, Any]]
) -> MissingAttributes:
    """Find the attributes that rows omit. `table` and `rows` (parsed JSON objects) contain the same rows."""
    missing = {}
    for name in validator.optional_attributes if log_name is None else ():
        if name not in table.column_names:
            missing[name] = np.ones(len(table), bool)
        elif (omitted := np.array([name not in row for row in rows])).any():
            missing[name] = omitted
    return missing


def _fill_missing(ranker: Ranker, table: pa.Table, missing: MissingAttributes) -> pa.Table:
    """Fill missing attributes with the latest values of their user or candidate, because feature builds need them."""
    given = {name: table.column(name) for name in missing if name in table.column_names}
    filled = ranker.reader.fill_attributes(LogRows(table.drop_columns(list(given)), ranker.pipeline.schema)).table
    for name, column in given.items():
        latest = filled.column(name)
        dtype = latest.type if pt.is_null(column.type) else column.type
        values = pc.if_else(pa.array(missing[name]), latest.cast(dtype), column.cast(dtype))
        filled = filled.set_column(filled.column_names.index(name), name, values)
    return filled
