"""What the log says of a period: its requests with their point-in-time features and scores, and what happened besides.

Counters and histories are looked up by the steps of a feature build, with the model's own encoders, so they are what
training and evaluation see. Nothing of a server or of a model's memories takes part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmoe_rec.errors import UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.jobs.score_files import ROWS_AT_A_TIME, known_rows
from mmoe_rec.live.duplicates import EVENT_ID
from mmoe_rec.live.logged_requests import hash_features
from mmoe_rec.log.checks import format_time
from mmoe_rec.log.columns import column_uses
from mmoe_rec.log.reader import EventRows
from mmoe_rec.log.rows import LogRows
from mmoe_rec.model.score import scores_from_logs
from mmoe_rec.point_in_time.join import in_window
from mmoe_rec.preprocessing.exchange import ResultReader, join_results, take
from mmoe_rec.preprocessing.logs import Logs
from mmoe_rec.preprocessing.steps import Steps, kept_reader, kept_results
from mmoe_rec.progress import bar
from mmoe_rec.settings.columns import EVENT

if TYPE_CHECKING:
    from mmoe_rec.inference.ranker import Ranker


@dataclass(frozen=True)
class LogEvents:
    """Events of one log in the order of their times: (N,) int64 microseconds, and a table with the log's columns.

    name: of the log of events, None for the interaction log.
    """

    name: str | None
    times: np.ndarray
    table: pa.Table


@dataclass(frozen=True)
class Period:
    """The rows of a period's requests, and the events of all logs.

    rows: with what counters and histories say of them, in the order of request time, request and place in the log;
    starts: (R + 1,) where each request's rows begin; times: (R,) microseconds; logs: events of the interaction log,
    which are the same rows, and of each named log.
    """

    rows: LogRows
    starts: np.ndarray
    times: np.ndarray
    logs: tuple[LogEvents, ...]


def read_period(logs: Logs, pipeline: FeaturePipeline, window: tuple[int, int], scratch: Path) -> Period:
    """The requests and events of a period, start <= time < end in microseconds.

    logs: as the model's features read them; pipeline: the model's, without memories; scratch: an empty folder.

    Raises UserError for a log that can't be read, and where no row was requested in the period, or none before it.
    """
    known, steps = scratch / "known", Steps(logs, {"replayed": window}, scratch / "steps")
    known.mkdir()
    with steps:
        counted = steps.count(statistics=False)
        _check(counted.rows["replayed"], counted.first[0], counted.last[0], window)
        memories = scratch / "steps" / "memories"
        memories.mkdir()
        steps.look_up(pipeline, memories, end=counted.last[0] + 1, training=None)
        steps.keep(known)
    logs = steps.logs  # without bad files, where those are skipped
    reader = kept_reader(known, logs.log)
    results = ResultReader(kept_results(known, logs.log), list(pipeline.key_groups))
    parts = [
        (numbers, LogRows(rows.table, pipeline.schema, rows.results))
        for part in steps.parts
        for numbers, rows in known_rows(reader, results, window, part)
    ]
    rows = _sort(parts)
    times, request = rows.times(), rows.request_hashes()
    first = np.append(True, (times[1:] != times[:-1]) | (request[1:] != request[:-1]))
    starts = np.append(np.flatnonzero(first), len(rows))
    interactions = _decode(rows.table.select(list(column_uses(pipeline.schema))), finite=True)
    happened = LogEvents(None, times, interactions), *(_read_events(log, window) for log in logs.events)
    for log in logs.all:
        log.check_unchanged()
    return Period(rows, starts, times[starts[:-1]], happened)


def _check(rows: int, first: int, last: int, window: tuple[int, int]) -> None:
    start, end = map(format_time, window)
    span = f"its requests lie from {format_time(first)} to {format_time(last)}"
    if not rows:
        raise UserError(f"no row of the log was requested from {start} to {end}: {span}; change --from and --to")
    if window[0] <= first:
        raise UserError(
            f"no row of the log was requested before {start}, so a server would begin with nothing: {span}; give a "
            "later day with --from"
        )


def _sort(parts: Sequence[tuple[np.ndarray, LogRows]]) -> LogRows:
    """All rows in the order of time, request and place in the log. parts: numbers of rows in the log, and the rows."""
    tables = [_decode(rows.table) for _, rows in parts]
    table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    results = {name: join_results([rows.results[name] for _, rows in parts]) for name in parts[0][1].results}
    rows = LogRows(table, parts[0][1].schema)
    order = np.lexsort((np.concatenate([numbers for numbers, _ in parts]), rows.request_hashes(), rows.times()))
    return LogRows(table.take(pa.array(order)), rows.schema, take(results, order))


def _decode(table: pa.Table, finite: bool = False) -> pa.Table:
    """Without dictionaries, which differ from part to part; finite: with null for each number that is none, as features
    read it and callers have to write it."""
    for place, each in enumerate(table.schema):
        values = table.column(place)
        if pa.types.is_dictionary(each.type):
            table = table.set_column(place, each.name, values.cast(each.type.value_type))
        elif finite and pa.types.is_floating(each.type):
            table = table.set_column(place, each.name, pc.if_else(pc.is_finite(values), values, None))
    return table


def _read_events(log: EventRows, window: tuple[int, int]) -> LogEvents:
    """The events of a named log in a period, under the names that they have in that log.

    They get an id by their place in the log, unless it has one, so that a batch may be sent again.
    """
    tables, first = list[pa.Table](), 0
    for rows in log.stream():
        table = rows.table.drop_columns([EVENT.label])
        table = table.rename_columns({log.schema.columns.time: log.reader.time})
        if EVENT_ID not in table.column_names:
            ids = [f"{log.name}:{number}" for number in range(first, first + len(rows))]
            table = table.append_column(EVENT_ID, pa.array(ids, pa.string()))
        first += len(rows)
        tables.append(_decode(table.filter(pa.array(in_window(rows.times(), window))), finite=True))
    table = pa.concat_tables(tables, promote_options="permissive").sort_by(log.reader.time).combine_chunks()
    return LogEvents(log.name, table[log.reader.time].cast(pa.int64()).to_numpy(), table)


def score_period(ranker: Ranker, rows: LogRows) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Digests by feature, (N,) int32, predictions (N, T) and scores (N,) float64, of rows that come with what counters
    and histories say of them."""
    from mmoe_rec.devices import limit_threads

    hashes, predictions, log_scores = list[dict[str, np.ndarray]](), [], []
    with limit_threads(1), bar() as progress:
        task = progress.add_task("offline scores", total=len(rows))
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            some = np.arange(start, min(start + ROWS_AT_A_TIME, len(rows)))
            piece = LogRows(rows.table.slice(start, len(some)), rows.schema, take(rows.results, some))
            completed = ranker.reader.completed(piece)
            inputs = ranker.pipeline.inputs(completed)
            hashes.append(hash_features(inputs.ids, inputs.dense, ranker.pipeline.layout))
            values, logs = ranker.score(completed)
            predictions.append(values)
            log_scores.append(logs)
            progress.advance(task, len(piece))
    together = {name: np.concatenate([each[name] for each in hashes]) for name in hashes[0]}
    return together, np.concatenate(predictions), scores_from_logs(np.concatenate(log_scores))
