"""A replay: what a server read of each feature for a request, compared with what the log says of that request.

A server that logs requests keeps a digest for each feature of what the model read of each row. The same digests are
computed here from the log and its events, by the steps of a feature build and with the model's own encoders: counters
and histories are what was known before the request, point in time, as training and evaluation see them. Nothing of a
server or of a model's memories takes part. Predictions and scores are compared too, and whether replies rank all
candidates that they were asked for.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmoe_rec.atomic import write_text
from mmoe_rec.errors import RequestError, StoppedError, UserError
from mmoe_rec.features.kinds.history import HistoryEncoder
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.artifact import read_artifact, version_of
from mmoe_rec.inference.ranking import Explanation, Ranking, prediction_columns
from mmoe_rec.inference.reader import PARTS
from mmoe_rec.jobs.places import logs_for
from mmoe_rec.jobs.score_files import known_rows
from mmoe_rec.live import request_log as names
from mmoe_rec.live.event_rows import RowChecks
from mmoe_rec.live.journal import Batch, Journal
from mmoe_rec.live.request_log import Record, RequestLog, hash_features, write_file
from mmoe_rec.locks import writing
from mmoe_rec.log.checks import format_time
from mmoe_rec.log.columns import column_uses
from mmoe_rec.log.files import find_files, open_file
from mmoe_rec.log.given import iso_time
from mmoe_rec.log.reader import EventRows
from mmoe_rec.log.rows import LogRows, require_all
from mmoe_rec.model.score import SMALLEST_VALUE, add_outcomes, scores_from_logs
from mmoe_rec.point_in_time.arrays import SharedRagged
from mmoe_rec.point_in_time.join import in_window
from mmoe_rec.preprocessing.exchange import ResultReader, join_results, take
from mmoe_rec.preprocessing.logs import Logs
from mmoe_rec.preprocessing.steps import Steps, kept_reader, kept_results
from mmoe_rec.progress import bar, say
from mmoe_rec.settings.columns import EVENT
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking.registry import find_model

if TYPE_CHECKING:
    from mmoe_rec.inference.ranker import Ranker

REPORT = "replay.json"
TOLERANCE = 1e-5
"""Predictions and scores may differ by this, times their size above 1: libraries sum products in different orders."""
RELATIVE_TOLERANCE = 1e-3
"""Probabilities and scores may differ by this share of themselves at most, as small ones are never far apart."""
EXAMPLES = 3
EVENTS_AT_A_TIME = 2_000
"""Events of a batch, at most."""
CANDIDATES_AT_A_TIME = 500
"""Candidates of a call, at most."""
_REQUESTS_OF_A_FILE = 1_000
_WHOLE = "whole"  # column of logged requests: whether all replies to the request are there, with all candidates


@dataclass(frozen=True)
class ValueComparison:
    """One thing that is compared in all rows.

    kind: feature, prediction, score or reply; largest: greatest difference of numbers; examples: the first mismatches.
    """

    name: str
    kind: str
    compared: int
    mismatches: int
    largest: float | None
    examples: list[dict[str, Any]]


def replay(
    settings: Settings,
    start: int,
    end: int,
    address: str,
    requests: Path | None = None,
    *,
    ids_only: bool = False,
    values: bool = False,
    keep: Path | None = None,
) -> dict[str, Any]:
    """Replays a period; gives what `replay.json` says.

    Args:
        start, end: request times of the period, microseconds, the end exclusive.
        address: of the model, or its folder.
        requests: folder in which a server has logged them; None to feed the period to the model in this process.
        ids_only: whether that one is sent ids and context alone.
        values: whether to show the values on both sides.
        keep: a folder for the report.

    Raises:
        UserError: the log, the model, the period or the logged requests can't be used.
        StoppedError: Ctrl-C.
    """
    if start >= end:
        raise UserError(f"--from {format_time(start)} is not before --to {format_time(end)}")
    require_all(settings.schema_, "a replay")
    model = find_model(address, settings.tracking.address).folder
    read_artifact(model)  # which says what is wrong with a damaged one
    folder, began = Path(settings.data.work) / "replay", time.monotonic()
    with writing(folder, "a replay", "set `data.work` to another folder"):
        shutil.rmtree(folder, ignore_errors=True)  # what a killed one has left
        try:
            (folder / "offline").mkdir(parents=True)
            from mmoe_rec.live.refresh import renew_tables

            pipeline = FeaturePipeline.load(model / "features", memories=False)
            period = read_period(logs_for(settings, pipeline), model, (start, end), folder / "offline")
            if requests is None:
                renew_tables(model, settings, folder / "model", until=start)
                live = LiveModel(folder / "model", folder)
                most = min(CANDIDATES_AT_A_TIME, live.ranker.about.max_candidates)
                explanations, wrong = feed(period, live, ids_only, values, most)
                live.write()
                logged = read_logged(live.requests, period)
            else:
                explanations, wrong, logged = {}, None, read_logged(requests, period, version_of(model))
            compared = compare(period, logged, pipeline, explanations if values else None, wrong)
        except RequestError as error:
            raise UserError(f"the model refuses what the log holds: {error}") from None
        except KeyboardInterrupt:
            raise StoppedError("nothing of this replay is kept") from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    report = {
        "model": address,
        "model_version": version_of(model),
        "from": format_time(start),
        "to": format_time(end),
        "ids_only": ids_only,
        "requests": len(period.times),
        "rows": len(period.rows),
        "logged_rows": len(logged),
        "events": {log.name: len(log.times) for log in period.logs[1:]},
        "seconds": round(time.monotonic() - began, 3),
        "compared": sum(each.compared for each in compared),
        "mismatches": sum(each.mismatches for each in compared),
        "values": [asdict(each) for each in compared],
    }
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        write_text(keep / REPORT, json.dumps(report, indent=1, ensure_ascii=False, default=str))
    return report


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

    rows: with what counters and histories say of them, in the order of request time, request and place in the log, and
    with digests, predictions and scores under the names of the log of requests; starts: (R + 1,) where each request's
    rows begin; times: (R,) microseconds; logs: events of the interaction log, which are the same rows, and of each
    named log; weights: of regressions in the score.
    """

    rows: LogRows
    starts: np.ndarray
    times: np.ndarray
    logs: tuple[LogEvents, ...]
    weights: Mapping[str, float]


def read_period(logs: Logs, model: Path, window: tuple[int, int], scratch: Path) -> Period:
    """The requests and events of a period, start <= time < end in microseconds.

    logs: as the model's features read them; model: an artifact folder; scratch: an empty folder.

    Raises UserError for a log that can't be read, and where no row was requested in the period, or none before it.
    """
    from mmoe_rec.devices import limit_threads
    from mmoe_rec.inference.ranker import Ranker

    kept, steps = scratch / "kept", Steps(logs, {"replayed": window}, scratch / "steps")
    pipeline, ranker = FeaturePipeline.load(model / "features", memories=False), Ranker.load(model)
    kept.mkdir()
    with steps:
        counted = steps.count(statistics=False)
        _check(counted.rows["replayed"], counted.first[0], counted.last[0], window)
        memories = scratch / "steps" / "memories"
        memories.mkdir()
        steps.look_up(pipeline, memories, end=counted.last[0] + 1, training=None)
        steps.keep(kept)
    logs = steps.logs  # without bad files, where those are skipped
    reader = kept_reader(kept, logs.log)
    results = ResultReader(kept_results(kept, logs.log), list(pipeline.key_groups))
    parts, numbers = list[LogRows](), list[np.ndarray]()
    with limit_threads(1), bar() as progress:
        task = progress.add_task("offline scores", total=counted.rows["replayed"])
        for part in steps.parts:
            for places, rows in known_rows(reader, results, window, part):
                parts.append(_score(ranker, LogRows(rows.table, pipeline.schema, rows.results)))
                numbers.append(places)
                progress.advance(task, len(places))
    table = pa.concat_tables([each.table for each in parts], promote_options="permissive").combine_chunks()
    rows = LogRows(table, pipeline.schema)
    order = np.lexsort((np.concatenate(numbers), rows.request_hashes(), rows.times()))
    known = {name: join_results([each.results[name] for each in parts]) for name in parts[0].results}
    rows = LogRows(table.take(pa.array(order)), rows.schema, take(known, order))
    times, request = rows.times(), rows.request_hashes()
    first = np.append(True, (times[1:] != times[:-1]) | (request[1:] != request[:-1]))
    starts = np.append(np.flatnonzero(first), len(rows))
    interactions = _decode(rows.table.select(list(column_uses(pipeline.schema))), finite=True)
    happened = LogEvents(None, times, interactions), *(_read_events(log, window) for log in logs.events)
    for log in logs.all:
        log.check_unchanged()
    weights = {task.name: task.score_weight for task in ranker.layout.tasks if task.kind != "binary"}
    return Period(rows, starts, times[starts[:-1]], happened, weights)


def _check(rows: int, first: int, last: int, window: tuple[int, int]) -> None:
    start, end = map(format_time, window)
    span = f"the log has requests from {format_time(first)} to {format_time(last)}"
    if not rows:
        raise UserError(f"no row of the log was requested from {start} to {end}: {span}; change --from and --to")
    if window[0] <= first:
        raise UserError(
            f"no row of the log was requested before {start}, so a server would begin with nothing: {span}; give a "
            "later day with --from"
        )


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
    """The events of a named log in a period, under the names that they have in that log."""
    tables = list[pa.Table]()
    for rows in log.stream():
        table = rows.table.filter(pa.array(in_window(rows.times(), window))).drop_columns([EVENT.label])
        tables.append(_decode(table.rename_columns({log.schema.columns.time: log.reader.time}), finite=True))
    table = pa.concat_tables(tables, promote_options="permissive").sort_by(log.reader.time).combine_chunks()
    return LogEvents(log.name, table[log.reader.time].cast(pa.int64()).to_numpy(), table)


def _score(ranker: Ranker, rows: LogRows) -> LogRows:
    """Rows that come with what counters and histories say of them, and their digests, predictions and scores."""
    completed = ranker.reader.completed(rows)
    inputs, (values, logs) = ranker.pipeline.inputs(completed), ranker.score(completed)
    digests = hash_features(inputs.ids, inputs.dense, ranker.pipeline.layout)
    columns = {f"{names.DIGEST}{name}": each for name, each in digests.items()}
    columns |= {f"{names.PREDICTED}{name}": each for name, each in add_outcomes(values, ranker.layout).items()}
    table = _decode(rows.table)
    columns[names.SCORE] = scores_from_logs(logs)
    names.refuse_own(table.column_names, columns)
    for name, each in columns.items():
        table = table.append_column(name, pa.array(each))
    return LogRows(table, rows.schema, rows.results)


class LiveModel:
    """A model in this process that learns events from a journal, ranks and logs as a server's worker does.

    model: an artifact folder; folder: gets the journal, and the logged requests in `requests`.
    """

    def __init__(self, model: Path, folder: Path) -> None:
        from mmoe_rec.inference.ranker import Ranker
        from mmoe_rec.live.learning import Learning

        self.ranker, self.requests = Ranker.load(model), folder / "requests"
        self.ranker.keeps_seen = True
        self.requests.mkdir()
        address = f"sqlite:///{folder / 'journal.db'}"
        Journal(address).close()
        self._learning = Learning(self.ranker, address, model / "features")
        self._checks = RowChecks(self.ranker.pipeline)
        self._logged: list[pa.Table] = []

    def send(self, table: pa.Table, log: str | None) -> None:
        """Accepts events of the interaction log (None), or of a named log, and learns them."""
        checked = self._checks.read_table(log, table)
        self._learning.journal.append(Batch(log, time.time_ns() // 1_000, checked))
        self._learning.catch_up()

    def rank(self, request: dict[str, Any], explain: bool) -> Ranking:
        """Ranks and logs a request."""
        ranking = self.ranker.rank(**json.loads(json.dumps(request)), explain=explain)
        ranking = replace(ranking, request_id=RequestLog.id_of(ranking.seen))
        self._logged.append(Record(ranking, None, None, None, 1.0, time.time_ns() // 1_000).table())
        if len(self._logged) >= _REQUESTS_OF_A_FILE:
            self.write()
        return ranking

    def write(self) -> None:
        """Writes what it has logged so far."""
        if self._logged:
            write_file(self.requests, pa.concat_tables(self._logged, promote_options="default"))
            self._logged = []


def feed(
    period: Period, model: LiveModel, ids_only: bool = False, explain: bool = False, most: int = CANDIDATES_AT_A_TIME
) -> tuple[dict[int, Explanation], dict[int, str]]:
    """Feeds a period's events and requests in the order of time to a model; gives explanations, and what is wrong with
    replies, by numbers of rows.

    Before a request, all events that happened earlier are learnt. What is of the same instant comes later: nothing sees
    its own instant. A row of the interaction log comes with all its labels, though some mature later: the model has to
    hide them until then. ids_only: leave out attributes of users and candidates; most: candidates of a call.
    """
    explanations, wrong, sent = dict[int, Explanation](), dict[int, str](), [0] * len(period.logs)
    encoders, candidate = model.ranker.pipeline.memory_encoders.values(), period.rows.schema.columns.candidate
    explained = {name for encoder in encoders for name in encoder.result_columns()} if explain else None
    with bar() as progress:
        task = progress.add_task("replaying", total=len(period.rows))
        for number, instant in enumerate(period.times.tolist()):
            for place, log in enumerate(period.logs):
                until = int(np.searchsorted(log.times, instant))
                for start in range(sent[place], until, EVENTS_AT_A_TIME):
                    model.send(log.table.slice(start, min(EVENTS_AT_A_TIME, until - start)), log.name)
                sent[place] = until
            first, end = period.starts[number : number + 2].tolist()
            for start in range(first, end, most):
                request = _build_request(period, start, min(start + most, end), ids_only)
                ranking, asked = model.rank(request, explain), request["candidates"][candidate]
                if why := _check_reply(ranking, asked, explained):
                    wrong |= dict.fromkeys(range(start, start + len(asked)), why)
                elif explain:
                    assert ranking.explanations is not None
                    rows = (start + each for each in ranking.order)
                    explanations.update(zip(rows, ranking.explanations, strict=True))
            progress.advance(task, end - first)
    return explanations, wrong


def _check_reply(ranking: Ranking, asked: list[Any], explained: set[str] | None) -> str | None:
    """What is wrong with a reply that was to rank candidates, and to explain each by these counters and histories, None
    for nothing."""
    lists = (ranking.candidates, ranking.scores, *ranking.predictions.values())
    told = [{*each.counters, *each.histories} for each in ranking.explanations or ()]
    if sorted(ranking.order) != list(range(len(asked))) or any(len(each) != len(asked) for each in lists):
        return f"the reply ranks {len(ranking.order):,} candidates of {len(asked):,}"
    if ranking.candidates != [asked[place] for place in ranking.order]:
        return "the reply names candidates in the place of others"
    if ranking.scores != sorted(ranking.scores, reverse=True):
        return "the reply does not rank by its scores"
    if explained is not None and (len(told) != len(asked) or any(explained - each for each in told)):
        return f"the reply explains {len(told):,} candidates of {len(asked):,}, or lacks a counter or history"
    return None


def _build_request(period: Period, start: int, end: int, ids_only: bool) -> dict[str, Any]:
    """A request for the rows of a period from one number to another; user and context are those of the first."""
    schema, table = period.rows.schema, period.rows.table
    ids = {schema.columns.user, schema.columns.candidate}
    parts: dict[str, dict[str, Any]] = {part: {} for part in PARTS.values()}
    for name, role in schema.input_columns().items():
        if role in PARTS and (not ids_only or role == "context" or name in ids):
            rows = table[name].slice(start, end - start if role == "candidate" else 1)
            values = [_to_json(each) for each in rows.to_pylist()]
            parts[PARTS[role]][name] = values if role == "candidate" else values[0]
    if schema.columns.request is not None:
        parts["context"][schema.columns.request] = table[schema.columns.request][start].as_py()
    return parts


def _to_json(value: Any) -> Any:
    """Times as ISO 8601, what is no number as null."""
    if isinstance(value, list):
        return [_to_json(each) for each in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value.isoformat() if hasattr(value, "isoformat") else value


def read_logged(folder: Path, period: Period, version: str | None = None) -> pa.Table:
    """Requests of a period that a server has logged in a folder, with a column `row`, the number of the log's row, and
    one that says whether all replies to the request are there, with all candidates.

    version: of the artifact that answered them, None for any. Notes say how many rows are left out, and why.

    Raises UserError where nothing is left.
    """
    schema, tables = period.rows.schema, []
    for file in find_files(str(folder), "--requests"):
        with open_file(file.address) as opened:
            tables.append(pq.read_table(opened))
    table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    read = (names.REQUEST, names.AT, names.RANK, names.SCORE, names.CANDIDATES, names.ARTIFACT)
    if lacking := [name for name in read if name not in table.column_names]:
        raise UserError(f"'{folder}' holds no requests that a server logged: column '{lacking[0]}' is missing")
    time, request = table[schema.columns.time].cast(pa.int64()).to_numpy(), schema.columns.request
    table = table.filter(pa.array((time >= period.times[0]) & (time <= period.times[-1])))
    if request is not None:
        table = table.append_column(request, table[names.REQUEST])
    replies = table.select(read[1:]).to_pandas()
    replies["request"] = LogRows(table, schema).request_hashes()
    count = replies.groupby(["request", names.AT])[names.AT].transform("size")
    is_part = (count != replies[names.CANDIDATES]) | (replies[names.ARTIFACT] != (version or replies[names.ARTIFACT]))
    is_part = is_part.groupby(replies["request"]).transform("any")
    table = table.append_column(_WHOLE, pa.array(~is_part))
    if version is not None:
        mine = pc.equal(table[names.ARTIFACT], version)
        if others := len(table) - (pc.sum(mine).as_py() or 0):
            say(f"note: {others:,} logged rows were answered by other versions of the model, and are left out")
        table = table.filter(mine)
    rows = pd.Index(period.rows.row_hashes())
    first = np.flatnonzero(~rows.duplicated())
    row = np.append(first, -1)[rows[first].get_indexer(LogRows(table, schema).row_hashes())]
    if unknown := int((row < 0).sum()):
        say(f"note: the log does not have {unknown:,} of {len(row):,} logged rows of the period, which are left out")
    if not (row >= 0).any():
        raise UserError(f"the log has none of the requests of the period that are logged in '{folder}'")
    return table.append_column("row", pa.array(row)).filter(pa.array(row >= 0))


def compare(
    period: Period,
    logged: pa.Table,
    pipeline: FeaturePipeline,
    explanations: Mapping[int, Explanation] | None = None,
    wrong_replies: Mapping[int, str] | None = None,
) -> list[ValueComparison]:
    """What differs between logged requests (of `read_logged`) and a period of the log, for each feature, prediction and
    the score, and for the candidates of replies. explanations: by row, where examples are to show values;
    wrong_replies: by row, where all requests of the period were asked: none may be lacking then.

    Raises UserError where another version of the server has logged them.
    """
    row, table, compared = logged["row"].to_numpy(), period.rows.table, list[ValueComparison]()
    layout = pipeline.layout
    features = {each.feature for each in layout.ids if not each.placement}
    features |= {each.feature for each in layout.dense if not each.placement}
    columns = {f"{names.DIGEST}{each}": "feature" for each in sorted(features)}
    columns |= {f"served_{each}": "prediction" for each in prediction_columns(layout)} | {names.SCORE: "score"}
    if lacking := {*columns, names.WEIGHTS} - {*logged.column_names}:
        told = f"the logged requests have no column '{min(lacking)}': another version of the server logged them"
        raise UserError(told)
    compared.append(_compare_candidates(period, logged, wrong_replies))
    for column, kind in columns.items():
        name = column.removeprefix(names.DIGEST).removeprefix(names.PREDICTED) if kind != "score" else kind
        served, offline, largest = logged[column].to_numpy(), table[column].to_numpy()[row], None
        is_wrong = served != offline
        if kind != "feature":
            served, offline = served.astype(np.float64), offline.astype(np.float64)
            if kind == "score":
                offline = _score_of_served(offline, logged, period, row)
            difference, allowed = np.abs(served - offline), TOLERANCE * np.maximum(1.0, np.abs(offline))
            if kind == "score" or name not in period.weights:
                allowed = np.minimum(allowed, RELATIVE_TOLERANCE * offline)
            is_wrong = ~(difference <= allowed)
            largest = float(difference.max()) if np.isfinite(difference).all() else None
        if kind == "score":  # which the caller's own weights change
            is_wrong &= logged[names.WEIGHTS].is_null().to_numpy()
        wrong, examples = np.flatnonzero(is_wrong), []
        for place in wrong[:EXAMPLES].tolist():
            example = _describe_row(period, number := int(row[place]))
            if kind != "feature":
                example |= {"served": float(served[place]), "offline": float(offline[place])}
            elif explanations is not None:
                told_of = explanations.get(number)
                example |= _show_values(pipeline, name, logged.slice(place, 1), period, number, told_of)
            examples.append(example)
        compared.append(ValueComparison(name, kind, len(row), len(wrong), largest, examples))
    return compared


def _score_of_served(scores: np.ndarray, logged: pa.Table, period: Period, row: np.ndarray) -> np.ndarray:
    """(M,) scores of the log's rows, but with the served values of regressions, which are compared for themselves: what
    rounding does to a small one may be much of it, and so of the score."""
    for task, weight in period.weights.items():
        served, offline = (
            np.maximum(table[f"{names.PREDICTED}{task}"].to_numpy().astype(np.float64), SMALLEST_VALUE)
            for table in (logged, period.rows.table)
        )
        scores = scores * (served / offline[row]) ** weight
    return scores


def _compare_candidates(period: Period, logged: pa.Table, wrong_replies: Mapping[int, str] | None) -> ValueComparison:
    """The candidates of the log that replies lack, or do not rank and explain as they were asked to."""
    row, rows = logged["row"].to_numpy(), np.arange(len(period.rows))
    request = np.searchsorted(period.starts, rows, "right")
    must = np.isin(request, request[row[logged[_WHOLE].to_numpy()]]) | (wrong_replies is not None)
    must &= ~pd.Index(period.rows.row_hashes()).duplicated()
    lacking = rows[must & ~np.isin(rows, row)].tolist()
    why = {**dict.fromkeys(lacking, "no reply with it is logged"), **(wrong_replies or {})}
    examples = [_describe_row(period, number) | {"why": why[number]} for number in sorted(why)[:EXAMPLES]]
    return ValueComparison("candidates", "reply", int((must | np.isin(rows, row)).sum()), len(why), None, examples)


def _describe_row(period: Period, number: int) -> dict[str, Any]:
    """The request and the candidate of a row of the period."""
    table, columns = period.rows.table, period.rows.schema.columns
    user, candidate = (table[name][number].as_py() for name in (columns.user, columns.candidate))
    moment = iso_time(table[columns.time][number].value)
    request = f"{user} at {moment}" if columns.request is None else table[columns.request][number].as_py()
    return {"request": request, "user": user, "candidate": candidate, "time": moment}


def _show_values(
    pipeline: FeaturePipeline,
    feature: str,
    logged: pa.Table,
    period: Period,
    number: int,
    explanation: Explanation | None,
) -> dict[str, Any]:
    """What a feature was for a row on both sides. Served, a counter or history is known by its explanation alone.

    logged: the row as it was served; number: of the row in the period.
    """
    encoder = pipeline.memory_encoders.get(feature)
    if encoder is None:
        sides = {"served": logged, "offline": period.rows.table.slice(number, 1)}
        columns = list(pipeline.schema.features[feature].reads())
        return {side: table.select(columns).to_pylist()[0] for side, table in sides.items()}
    served: dict[str, Any] | None = None
    offline: dict[str, Any] = {}
    for name in encoder.result_columns():
        result = period.rows.results[name]
        if isinstance(result, SharedRagged):
            assert isinstance(encoder, HistoryEncoder)
            offline[name] = encoder.vocabulary.decode(result.lists.take(result.number[[number]]).values) or None
        else:
            offline[name] = float(result[number])
    if explanation is not None and isinstance(encoder, HistoryEncoder):
        served = {feature: explanation.histories[feature]}
    elif explanation is not None:
        numbers = {name: np.array([explanation.counters[name]], float) for name in encoder.result_columns()}
        served = {name: float(encoder.exchanged(name, each)[0]) for name, each in numbers.items()}
    return {"served": served, "offline": offline}


def describe(report: Mapping[str, Any]) -> Iterator[str]:
    """A report as lines of text: what differs, where first, and by how much."""
    for each in sorted(report["values"], key=lambda each: -each["mismatches"]):
        if not each["mismatches"]:
            continue
        far = "" if each["largest"] is None else f", by {each['largest']:.3g} at most"
        yield (f"{each['kind']} '{each['name']}' differs in {each['mismatches']:,} of {each['compared']:,} rows{far}")
        for example in each["examples"]:
            sides = f": served {example['served']}, offline {example['offline']}" if "served" in example else ""
            sides += f": {example['why']}" if "why" in example else ""
            yield f"  request {example['request']}, candidate {example['candidate']}, at {example['time']}{sides}"
    if not report["mismatches"]:
        yield f"replies are whole, features are equal to the last bit, predictions and scores within {TOLERANCE:g}"
    yield (
        f"{report['requests']:,} requests with {report['rows']:,} rows, {report['logged_rows']:,} of them logged, in "
        f"{report['seconds']:,.0f} s: {report['compared']:,} values compared, {report['mismatches']:,} mismatches"
    )
