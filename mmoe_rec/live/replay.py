"""A replay: what a server read of each feature for a request, compared with what the log says of that request.

A server logs a digest for each feature of what the model read of each row. The same digests are computed here from the
log, by the steps of a feature build and the model's own encoders; nothing of a server or of a model's memories takes
part. mmoe_rec/server/README.md says what else is compared.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmoe_rec.atomic import write_text
from mmoe_rec.errors import RequestError, StoppedError, UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.artifact import read_artifact, version_of
from mmoe_rec.inference.ranking import Explanation, Ranking
from mmoe_rec.inference.reader import PARTS
from mmoe_rec.jobs.places import logs_for
from mmoe_rec.jobs.score_files import known_rows
from mmoe_rec.live import request_log as names
from mmoe_rec.live.journal import Journal
from mmoe_rec.live.journal_rows import make_batch
from mmoe_rec.live.request_log import Record, hash_features, write_file
from mmoe_rec.live.served_rows import LogEvents, Period, compare, read_logged
from mmoe_rec.locks import writing
from mmoe_rec.log.checks import format_time
from mmoe_rec.log.columns import column_uses
from mmoe_rec.log.reader import EventRows
from mmoe_rec.log.rows import LogRows, require_all
from mmoe_rec.model.score import add_outcomes, scores_from_logs
from mmoe_rec.point_in_time.join import in_window
from mmoe_rec.preprocessing.exchange import ResultReader, join_results, take
from mmoe_rec.preprocessing.logs import Logs
from mmoe_rec.preprocessing.steps import Steps, kept_reader, kept_results
from mmoe_rec.progress import bar
from mmoe_rec.settings.columns import EVENT
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking.registry import find_model

if TYPE_CHECKING:
    from mmoe_rec.inference.ranker import Ranker

REPORT = "replay.json"
EVENTS_AT_A_TIME = 2_000
"""Events of a batch, at most."""
CANDIDATES_AT_A_TIME = 500
"""Candidates of a call, at most."""
_REQUESTS_OF_A_FILE = 1_000


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

    start, end: request times of the period, microseconds, the end exclusive; address: of the model, or its folder;
    requests: folder in which a server has logged them; None to feed the period to the model in this process; ids_only:
    whether that one is sent ids and context alone; values: whether to show the values on both sides; keep: a folder for
    the report. Raises UserError where the log, the model, the period or the logged requests can't be used, and
    StoppedError at Ctrl-C.
    """
    if start >= end:
        raise UserError(f"--from {format_time(start)} is not before --to {format_time(end)}")
    require_all(settings.schema_, "a replay")
    model = find_model(address, settings.tracking.address).folder
    read_artifact(model)  # Reading says what is wrong with a damaged one.
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
                explanations, wrong = feed(period, live, ids_only, values)
                live.write()
                logged, counts = read_logged(live.requests, period)
            else:
                explanations, wrong = {}, None
                logged, counts = read_logged(requests, period, version_of(model))
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
        **counts,
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


def read_period(logs: Logs, model: Path, window: tuple[int, int], scratch: Path) -> Period:
    """The requests and events of a period, start <= time < end in microseconds.

    logs: as the model's features read them; model: an artifact folder; scratch: an empty folder.

    Raises UserError for a log that can't be read, and where no row was requested in the period, or none before it.
    """
    from mmoe_rec.devices import limit_threads
    from mmoe_rec.inference.ranker import Ranker

    kept, steps = scratch / "kept", Steps(logs, {"replayed": window}, scratch / "steps")
    ranker = Ranker.load(model)
    kept.mkdir()
    with steps:
        counted = steps.count(statistics=False)
        _check(counted.rows["replayed"], counted.first[0], counted.last[0], window)
        memories = scratch / "steps" / "memories"
        memories.mkdir()
        steps.look_up(ranker.pipeline, memories, end=counted.last[0] + 1, training=None)
        steps.keep(kept)
    logs = steps.logs  # without bad files, where those are skipped
    reader = kept_reader(kept, logs.log)
    results = ResultReader(kept_results(kept, logs.log), list(ranker.pipeline.key_groups))
    parts = list[LogRows]()
    with limit_threads(1), bar() as progress:
        task = progress.add_task("offline scores", total=counted.rows["replayed"])
        for part in steps.parts:
            for rows in known_rows(reader, results, window, part):
                parts.append(_score(ranker, LogRows(rows.table, ranker.pipeline.schema, rows.results)))
                progress.advance(task, len(rows))
    table = pa.concat_tables([each.table for each in parts], promote_options="permissive").combine_chunks()
    known = {name: join_results([each.results[name] for each in parts]) for name in parts[0].results}
    rows = LogRows(table, ranker.pipeline.schema)
    order = np.lexsort((rows.request_hashes(), rows.times()))  # which keeps the log's order within a request
    rows = LogRows(table.take(pa.array(order)), rows.schema, take(known, order))
    times, request = rows.times(), rows.request_hashes()
    first = np.append(True, (times[1:] != times[:-1]) | (request[1:] != request[:-1]))
    starts = np.append(np.flatnonzero(first), len(rows))
    interactions = rows.table.select(list(column_uses(rows.schema)))
    happened = LogEvents(None, times, interactions), *(_read_events(log, window) for log in logs.events)
    for log in logs.all:
        log.check_unchanged()
    weights = {task.name: task.score_weight for task in ranker.layout.tasks if task.kind != "binary"}
    return Period(rows, starts, times[starts[:-1]], happened, weights, window)


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


def _decode(table: pa.Table) -> pa.Table:
    """Without dictionaries, which differ from part to part, and with null for each number that is none, as features
    read it and callers have to write it."""
    for place, each in enumerate(table.schema):
        values = table.column(place)
        if pa.types.is_dictionary(each.type):
            table = table.set_column(place, each.name, values.cast(each.type.value_type))
        elif pa.types.is_floating(each.type):
            table = table.set_column(place, each.name, pc.if_else(pc.is_finite(values), values, None))
    return table


def _read_events(log: EventRows, window: tuple[int, int]) -> LogEvents:
    """The events of a named log in a period, under the names that they have in that log."""
    tables = list[pa.Table]()
    for rows in log.stream():
        table = rows.table.filter(pa.array(in_window(rows.times(), window))).drop_columns([EVENT.label])
        tables.append(_decode(table.rename_columns({log.schema.columns.time: log.reader.time})))
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
        self._logged: list[pa.Table] = []

    def send(self, table: pa.Table, log: str | None) -> None:
        """Accepts events of the interaction log (None), or of a named log, and learns them."""
        checked = self._learning.checks.read_table(log, table)
        self._learning.journal.append(make_batch(log, checked, self._learning.schema))
        self._learning.catch_up()

    def rank(self, request: dict[str, Any], explain: bool) -> Ranking:
        """Ranks and logs a request."""
        ranking = self.ranker.rank(**json.loads(json.dumps(request)), explain=explain)
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
    most = min(most, model.ranker.about.max_candidates)
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
            values = [each.isoformat() if hasattr(each, "isoformat") else each for each in rows.to_pylist()]
            parts[PARTS[role]][name] = values if role == "candidate" else values[0]
    if schema.columns.request is not None:
        parts["context"][schema.columns.request] = table[schema.columns.request][start].as_py()
    return parts
