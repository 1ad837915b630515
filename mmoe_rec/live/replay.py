"""A replay: what a server read of each feature for a request, compared with what the log says of that request.

A server that logs requests keeps a digest for each feature of what the model read of each row. The same digests are
computed here from the log and its events, by the steps of a feature build: counters and histories are what was known
before the request, point in time, as training and evaluation see them. Nothing of a server or of a model's memories
takes part. Predictions and scores are compared too.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmoe_rec.atomic import write_text
from mmoe_rec.errors import StoppedError, UserError
from mmoe_rec.features.kinds.history import HistoryEncoder
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.artifact import read_artifact, version_of
from mmoe_rec.jobs.places import logs_for
from mmoe_rec.live import logged_requests as names
from mmoe_rec.live.replay_period import Period, read_period, score_period
from mmoe_rec.locks import writing
from mmoe_rec.log.checks import format_time
from mmoe_rec.log.files import find_files, open_file
from mmoe_rec.log.given import iso_time
from mmoe_rec.log.rows import LogRows, require_all
from mmoe_rec.model.score import add_outcomes
from mmoe_rec.point_in_time.arrays import SharedRagged
from mmoe_rec.progress import say
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking.registry import find_model

if TYPE_CHECKING:
    from mmoe_rec.inference.ranker import Ranker
    from mmoe_rec.live.replay_server import OwnServer

REPORT = "replay.json"
TOLERANCE = 1e-5
"""Predictions and scores may differ by this, times their size above 1: libraries sum products in different orders."""
RELATIVE_TOLERANCE = 1e-3
"""Probabilities, and scores made of these alone, may differ by this share of themselves at most, as small ones are
never far apart."""
EXAMPLES = 3


@dataclass(frozen=True)
class ReplayOptions:
    """What to replay.

    start, end: request times of the period, microseconds, the end exclusive; model: an address, or a folder; requests:
    a folder in which a server has logged them, None to feed the period to a server of the replay's own, of so many
    `workers`; ids_only: whether that one is sent ids and context alone; values: whether to show the values on both
    sides; keep: a folder for the report.
    """

    start: int
    end: int
    model: str
    requests: Path | None = None
    workers: int = 2
    ids_only: bool = False
    values: bool = False
    keep: Path | None = None


@dataclass(frozen=True)
class ValueComparison:
    """One thing that is compared in all rows.

    kind: feature, prediction or score; largest: greatest difference of numbers; examples: the first mismatches.
    """

    name: str
    kind: str
    compared: int
    mismatches: int
    largest: float | None
    examples: list[dict[str, Any]]


def replay(
    settings: Settings, options: ReplayOptions, between: Callable[[int, OwnServer], None] = lambda request, server: None
) -> dict[str, Any]:
    """Replays a period; gives what `replay.json` says.

    between: called before each request that is sent, with its number.

    Raises UserError for a log, a model, a period or logged requests that can't be used, and for a server that ends.
    """
    if options.start >= options.end:
        raise UserError(f"--from {format_time(options.start)} is not before --to {format_time(options.end)}")
    require_all(settings.schema_, "a replay")
    model = find_model(options.model, settings.tracking.address).folder
    read_artifact(model)  # which says what is wrong with a damaged one
    folder, began = Path(settings.data.work) / "replay", time.monotonic()
    with writing(folder, "a replay", "set `data.work` to another folder"):
        shutil.rmtree(folder, ignore_errors=True)  # what a killed one has left
        # SIGTERM ends a replay as Ctrl-C does, so that its server ends too.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            (folder / "offline").mkdir(parents=True)
            from mmoe_rec.inference.ranker import Ranker

            pipeline = FeaturePipeline.load(model / "features", memories=False)
            window = options.start, options.end
            period = read_period(logs_for(settings, pipeline), pipeline, window, folder / "offline")
            if options.requests is None:
                explanations = _feed_own_server(settings, options, model, period, folder, between)
                logged = read_logged(folder / "requests", period)
            else:
                explanations, logged = {}, read_logged(options.requests, period, version_of(model))
            values = compare(period, logged, Ranker.load(model), explanations if options.values else None)
        except KeyboardInterrupt:
            raise StoppedError("nothing of this replay is kept") from None
        finally:
            signal.signal(signal.SIGTERM, before)
            shutil.rmtree(folder, ignore_errors=True)
    report = {
        "model": options.model,
        "model_version": version_of(model),
        "from": format_time(options.start),
        "to": format_time(options.end),
        "ids_only": options.ids_only,
        "requests": len(period.times),
        "rows": len(period.rows),
        "logged_rows": len(logged),
        "events": {log.name: len(log.times) for log in period.logs[1:]},
        "seconds": round(time.monotonic() - began, 3),
        "compared": sum(each.compared for each in values),
        "mismatches": sum(each.mismatches for each in values),
        "values": [asdict(each) for each in values],
    }
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
        write_text(options.keep / REPORT, json.dumps(report, indent=1, ensure_ascii=False, default=str))
    return report


def _feed_own_server(
    settings: Settings,
    options: ReplayOptions,
    model: Path,
    period: Period,
    folder: Path,
    between: Callable[[int, OwnServer], None],
) -> dict[int, Any]:
    from mmoe_rec.live.refresh import make_tables
    from mmoe_rec.live.replay_server import CANDIDATES_AT_A_TIME, OwnServer, feed

    make_tables(model, settings, options.start, folder / "model")
    most = min(CANDIDATES_AT_A_TIME, read_artifact(model).max_candidates)
    words = ("--log-requests", str(folder / "requests"), "--log-share", "1", "--log-seconds", "1")
    with OwnServer(folder / "model", folder / "journal.db", folder / "server.log", options.workers, words) as server:
        return feed(period, server, most, options.ids_only, options.values, lambda request: between(request, server))


def read_logged(folder: Path, period: Period, version: str | None = None) -> pa.Table:
    """Requests of a period that a server has logged in a folder, with a column `row`: the number of the log's row.

    version: of the artifact that answered them, None for any. Notes say how many rows are left out, and why.

    Raises UserError where nothing is left.
    """
    import pandas as pd

    schema, tables = period.rows.schema, []
    for file in find_files(str(folder), "--requests"):
        with open_file(file.address) as opened:
            tables.append(pq.read_table(opened))
    table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    if names.REQUEST not in table.column_names:
        raise UserError(f"'{folder}' holds no requests that a server logged: column '{names.REQUEST}' is missing")
    time, request = table[schema.columns.time].cast(pa.int64()).to_numpy(), schema.columns.request
    table = table.filter(pa.array((time >= period.times[0]) & (time <= period.times[-1])))
    if version is not None:
        mine = pc.equal(table[names.ARTIFACT], version)
        if others := len(table) - (pc.sum(mine).as_py() or 0):
            say(f"note: {others:,} logged rows were answered by other versions of the model, and are left out")
        table = table.filter(mine)
    if request is not None:
        table = table.append_column(request, table[names.REQUEST])
    rows = pd.Index(period.rows.row_hashes())
    first = np.flatnonzero(~rows.duplicated())
    row = np.append(first, -1)[rows[first].get_indexer(LogRows(table, schema).row_hashes())]
    if unknown := int((row < 0).sum()):
        say(f"note: the log does not have {unknown:,} of {len(row):,} logged rows of the period, which are left out")
    if not (row >= 0).any():
        raise UserError(f"the log has none of the requests of the period that are logged in '{folder}'")
    return table.append_column("row", pa.array(row)).filter(pa.array(row >= 0))


def compare(
    period: Period, logged: pa.Table, ranker: Ranker, explanations: Mapping[int, Any] | None = None
) -> list[ValueComparison]:
    """What differs between logged requests and a period of the log, for each feature, prediction and the score.

    logged: as `read_logged` gives it; explanations: by row, as `feed` gives them, where examples are to show values.

    Raises UserError where another version of the server has logged them.
    """
    row, pipeline = logged["row"].to_numpy(), ranker.pipeline
    hashes, predictions, scores = score_period(ranker, period.rows)
    columns = [*(f"{names.DIGEST}{name}" for name in hashes), names.SCORE, names.WEIGHTS]
    if lacking := [each for each in columns if each not in logged.column_names]:
        raise UserError(f"the logged requests have no column '{lacking[0]}': another version of the server logged them")
    compared = []
    for name, mine in hashes.items():
        wrong = np.flatnonzero(logged[f"{names.DIGEST}{name}"].to_numpy() != mine[row])
        examples = []
        for place in wrong[:EXAMPLES].tolist():
            example, number = _describe_row(period, int(row[place])), int(row[place])
            if explanations is not None:
                example |= _show_values(
                    pipeline, name, logged.slice(place, 1), period, number, explanations.get(number)
                )
            examples.append(example)
        compared.append(ValueComparison(name, "feature", len(row), len(wrong), None, examples))
    regressions = {task.name for task in ranker.layout.tasks if task.kind != "binary"}
    own_weights = logged[names.WEIGHTS].is_valid().to_numpy()
    for name, values in {**add_outcomes(predictions, ranker.layout), "score": scores}.items():
        kind, column = ("score", names.SCORE) if name == "score" else ("prediction", f"{names.PREDICTED}{name}")
        served, offline = logged[column].to_numpy().astype(np.float64), values[row].astype(np.float64)
        difference, allowed = np.abs(served - offline), TOLERANCE * np.maximum(1.0, np.abs(offline))
        if not (regressions if name == "score" else regressions & {name}):
            allowed = np.minimum(allowed, RELATIVE_TOLERANCE * offline)
        wrong = np.flatnonzero(~(difference <= allowed) & ~(own_weights & (name == "score")))
        examples = [
            _describe_row(period, int(row[place])) | {"served": float(served[place]), "offline": float(offline[place])}
            for place in wrong[:EXAMPLES].tolist()
        ]
        largest = float(difference.max()) if np.isfinite(difference).all() else None
        compared.append(ValueComparison(name, kind, len(row), len(wrong), largest, examples))
    return compared


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
    explanation: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What a feature was for a row on both sides. Served, a counter or history is known by its explanation alone.

    logged: the row as it was served; number: of the row in the period.
    """
    encoder = pipeline.memory_encoders.get(feature)
    if encoder is None:
        sides = {"served": logged, "offline": period.rows.table.slice(number, 1)}
        columns = list(pipeline.schema.features[feature].reads())
        return {side: table.select(columns).to_pylist()[0] for side, table in sides.items()}
    served, offline = None, dict[str, Any]()
    for name in encoder.result_columns():
        result = period.rows.results[name]
        if isinstance(result, SharedRagged):
            assert isinstance(encoder, HistoryEncoder)
            offline[name] = encoder.vocabulary.decode(result.lists.take(result.number[[number]]).values) or None
        else:
            offline[name] = float(result[number])
    if explanation is not None and isinstance(encoder, HistoryEncoder):
        served = {feature: explanation["histories"][feature]}
    elif explanation is not None:
        numbers = {name: np.array([explanation["counters"][name]], float) for name in encoder.result_columns()}
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
            yield f"  request {example['request']}, candidate {example['candidate']}, at {example['time']}{sides}"
    if not report["mismatches"]:
        yield f"features are equal to the last bit, predictions and scores within {TOLERANCE:g}"
    yield (
        f"{report['requests']:,} requests with {report['rows']:,} rows, {report['logged_rows']:,} of them logged, in "
        f"{report['seconds']:,.0f} s: {report['compared']:,} values compared, {report['mismatches']:,} mismatches"
    )
