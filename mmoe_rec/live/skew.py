"""Training-serving skew: the requests that a server has logged, beside the log's rows of the same requests.

A server logs for each feature a digest of the values that the model read. The same digests are computed here from the
log, point in time, by the steps of a feature build and the model's own encoders. Nothing of a server or of a model's
memories takes part. DuckDB joins both sides.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmoe_rec.atomic import write_text
from mmoe_rec.devices import limit_threads
from mmoe_rec.errors import RequestError, UserError, first_line
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.artifact import artifact_version, read_artifact
from mmoe_rec.inference.batch_scoring import read_window
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.live import request_log
from mmoe_rec.locks import write_lock
from mmoe_rec.log.checks import format_time, open_parquet
from mmoe_rec.log.database import Database, open_database
from mmoe_rec.log.files import find_files
from mmoe_rec.log.request_values import iso_time
from mmoe_rec.log.rows import LogRows, reject_plain_table
from mmoe_rec.model.score import add_joint_predictions, scores_from_log_scores
from mmoe_rec.preprocessing.build_inputs import Logs, open_model_logs
from mmoe_rec.preprocessing.build_steps import BuildSteps, open_reader, open_results
from mmoe_rec.preprocessing.look_up import ResultReader
from mmoe_rec.settings.schema import Schema
from mmoe_rec.settings.sections import Settings
from mmoe_rec.task_kinds.task_kind import MIN_LINEAR_PREDICTION
from mmoe_rec.tracking.registry import resolve_model

REPORT_FILE = "skew.json"
ABSOLUTE_TOLERANCE = 1e-5
"""Predictions and scores may differ by this, times their size above 1: libraries sum products in different orders."""
RELATIVE_TOLERANCE = 1e-3
"""Probabilities and scores may differ by this fraction of themselves at most, as small ones are never far apart."""
MAX_EXAMPLES = 3
_OF_REPLY = [
    request_log.AT,
    request_log.CANDIDATE_COUNT,
    request_log.REPLIED_COUNT,
    request_log.ARTIFACT,
    request_log.WEIGHTS,
]
# `reason` says why a logged row is not compared. A request ID may match a row of the log although the logged time lies
# outside of the period. Whole replies rank all candidates of their requests.
_JOIN = """
CREATE TABLE offline AS SELECT * FROM every QUALIFY row_number() OVER (PARTITION BY key ORDER BY number) = 1;
CREATE TABLE marked AS
    SELECT served.*, offline.number AS row, offline.request_key AS of_request,
        count(*) OVER (PARTITION BY served.request_key, served_at) < served_replied AS is_lost,
        NOT bool_or(served_replied <> served_candidates OR served_artifact IS DISTINCT FROM '{version}')
            OVER (PARTITION BY served.request_key) AS is_whole,
        CASE
            WHEN row IS NULL AND NOT served.moment BETWEEN {start} AND {end} - 1 THEN 'outside --from and --to'
            WHEN served_artifact IS DISTINCT FROM '{version}' THEN 'answered by other versions of the model'
            WHEN row IS NULL THEN 'not in the log'
        END AS reason
    FROM served LEFT JOIN offline USING (key);
CREATE TABLE matched AS SELECT * FROM marked WHERE reason IS NULL;
CREATE TABLE lacking AS
    SELECT number, request_key AS of_request, 'no reply with it is logged' AS why FROM offline
    WHERE request_key IN (SELECT of_request FROM matched WHERE is_whole) AND number NOT IN (SELECT row FROM matched);
INSERT INTO lacking
    SELECT min(row), of_request, 'the request log lacks rows of its reply' FROM matched
    WHERE is_lost AND of_request NOT IN (SELECT of_request FROM lacking) GROUP BY of_request;
"""
_BOTH = "FROM matched s JOIN offline o ON s.row = o.number"


def check_skew(
    settings: Settings, start: int, end: int, address: str, requests: Path, out: Path | None = None
) -> dict[str, Any]:
    """Compare logged requests with the log's rows of these requests.

    Args:
        settings: Settings of the log.
        start: First request time of the period, microseconds.
        end: End of the period, exclusive.
        address: URI of the model that has served, or its folder.
        requests: Folder of the request log.
        out: Folder for `skew.json`.

    Returns:
        The report, as `skew.json` holds it.

    Raises:
        UserError: The log, the model, the period or the logged requests can't be used.
    """
    if start >= end:
        raise UserError(f"--from {format_time(start)} is not before --to {format_time(end)}")
    reject_plain_table(settings.schema_, "a skew check")
    model = resolve_model(address, settings.tracking.resolved_uri).folder
    window, folder = (
        {"version": artifact_version(model), "start": start, "end": end},
        Path(settings.data.work_dir) / "skew",
    )
    weights = {task.name: task.score_weight for task in read_artifact(model).tasks if task.kind.is_linear}
    with write_lock(folder, "a skew check", "set `data.work_dir` to another folder"):
        shutil.rmtree(folder, ignore_errors=True)  # left by a killed check
        try:
            folder.mkdir(parents=True)
            pipeline = FeaturePipeline.load(model / "features", stores=False)
            served = read_request_log(requests, pipeline.schema)
            offline = score_offline(open_model_logs(settings, pipeline), model, (start, end), folder)
            with open_database(folder / "database", settings.data.memory_gib) as database:
                report = _compare(database, offline, served, pipeline.schema, window, weights)
        except RequestError as error:
            raise UserError(f"the model refuses a value of the log: {error}") from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    period = {"from": format_time(start), "to": format_time(end)}
    report = {"model": address, "model_version": window["version"], **period, **report}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / REPORT_FILE, json.dumps(report, indent=1, ensure_ascii=False, default=str))
    return report


def read_request_log(folder: Path, schema: Schema) -> pa.Table:
    """Read the files of a request log. Raises UserError where they can't be read, or lack a column."""
    columns, tables = schema.columns, list[pa.Table]()
    try:
        for file in find_files(str(folder), "--requests"):
            with open_parquet(file.uri) as parquet:
                tables.append(parquet.read())
        table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"the files in '{folder}' can't be read together: {first_line(error)}") from None
    _require(table, [request_log.REQUEST, *_OF_REPLY, columns.user, columns.candidate, columns.time])
    return table if columns.request is None else table.append_column(columns.request, table[request_log.REQUEST])


def _require(table: pa.Table, columns: list[str]) -> None:
    if lacking := [name for name in columns if name not in table.column_names]:
        told = f"--requests: the files have no column '{lacking[0]}'"
        raise UserError(f"{told}, which `mmoe-rec serve --log-requests` of this version writes")


def score_offline(logs: Logs, model: Path, window: tuple[int, int], scratch: Path) -> pa.Table:
    """Score the log's rows of a period, point in time.

    Args:
        logs: The logs as the model's features read them.
        model: Artifact folder.
        window: Start and end of the request times, microseconds, the end exclusive.
        scratch: An empty folder.

    Returns:
        A table with the IDs of rows, digests, predictions and scores under the names of the request log.

    Raises:
        UserError: The log can't be read, or no row was requested in the period, or none before it.
    """
    kept, steps = scratch / "kept", BuildSteps(logs, {"served": window}, scratch / "steps")
    stores, ranker, parts = scratch / "steps" / "memories", Ranker.load(model), list[pa.Table]()
    kept.mkdir()
    with steps:
        counted = steps.count(statistics=False)
        first, last = counted.first, counted.last
        if not counted.rows["served"] or window[0] <= first:
            raise UserError(
                "--from, --to: the period needs rows of the log in it and before it. The log has requests from "
                f"{format_time(first)} to {format_time(last)}. Change the period."
            )
        stores.mkdir()
        steps.look_up(ranker.pipeline, stores, end=last + 1, training=None)
        steps.move_results(kept)
    reader = open_reader(kept, steps.logs.log)
    results = ResultReader(open_results(kept, steps.logs.log), list(ranker.pipeline.key_groups))
    with limit_threads(1):
        for part in steps.parts:
            parts += [_score(ranker, rows) for rows in read_window(reader, results, window, part)]
    for log in steps.logs.all:
        log.check_unchanged()
    return pa.concat_tables(parts, promote_options="permissive").combine_chunks()


def _score(ranker: Ranker, rows: LogRows) -> pa.Table:
    """Compute digests, predictions and scores of rows that come with their counters and histories."""
    schema, layout = ranker.pipeline.schema, ranker.pipeline.layout
    fill_attributes, ids = ranker.reader.fill_attributes(LogRows(rows.table, schema, rows.results)), schema.columns
    inputs, (values, logs) = ranker.pipeline.inputs(fill_attributes), ranker.score(fill_attributes)
    read = [name for name in (ids.request, ids.user, ids.candidate, ids.time) if name is not None]
    columns: dict[str, Any] = {name: rows.column(name) for name in read}
    digests = request_log.hash_features(inputs.ids, inputs.dense, layout)
    columns |= {f"{request_log.DIGEST_PREFIX}{name}": digest for name, digest in digests.items()}
    columns |= {
        f"{request_log.PREDICTION_PREFIX}{name}": each
        for name, each in add_joint_predictions(values, ranker.layout).items()
    }
    return pa.table(columns | {request_log.SCORE: scores_from_log_scores(logs)})


def _fill(database: Database, name: str, table: pa.Table, schema: Schema, values: list[str], more: list[str]) -> None:
    """Make a table of one side: keys, IDs for people, and the values under numbered names."""
    rows, columns = LogRows(table, schema), schema.columns
    side = {"key": rows.row_hashes(), "request_key": rows.request_hashes(), "user_key": rows.hashes([columns.user])}
    side |= {"number": pa.array(range(len(table)), pa.int64()), "moment": rows.times()}
    for each, column in (("user", columns.user), ("candidate", columns.candidate), ("request", columns.request)):
        side |= {} if column is None else {each: table[column].cast(pa.string())}
    side |= {f"v{number}": table[value] for number, value in enumerate(values)} | {each: table[each] for each in more}
    filled = pa.table(side)
    database.create_table(name, filled.schema, [filled])


def _compare(
    database: Database,
    offline: pa.Table,
    served: pa.Table,
    schema: Schema,
    window: Mapping[str, Any],
    weights: Mapping[str, float],
) -> dict[str, Any]:
    """Join both sides and compare values; see `check_skew`."""
    values = [
        name
        for name in offline.column_names
        if name.startswith((request_log.DIGEST_PREFIX, request_log.PREDICTION_PREFIX, request_log.SCORE))
    ]
    _require(served, values)
    _fill(database, "every", offline, schema, values, [])
    _fill(database, "served", served, schema, values, _OF_REPLY)
    database.run(*_JOIN.format(**window).split(";")[:-1])
    why = "SELECT reason, count(*) FROM marked WHERE reason IS NOT NULL GROUP BY 1 ORDER BY 2"
    not_compared = {str(reason): int(rows) for reason, rows in database.rows(why)}
    rows, distinct = database.row("SELECT count(*), count(DISTINCT row) FROM matched")
    if not rows:
        told = f"--requests: none of {len(served):,} logged rows can be compared ({_list(not_compared)})"
        raise UserError(f"{told}. Give the period, the model and the log of these requests.")
    lacking, lost = database.row("SELECT count(*), count(*) FILTER (number IN (SELECT row FROM matched)) FROM lacking")
    found = _examples(database, "SELECT o.*, why FROM lacking JOIN offline o USING (number) ORDER BY number")
    compared = [_result("candidates", "reply", distinct + lacking - lost, lacking, None, found)]
    for name, key in ((schema.columns.user, "user_key"), (schema.columns.time, "moment")):
        if schema.columns.request is not None:
            compared.append(_compare_value(database, name, "column", f"s.{key} <> o.{key}", rows))
    for number, column in enumerate(values):
        mine, other, is_score = f"s.v{number}", f"o.v{number}", column == request_log.SCORE
        name = (
            "score"
            if is_score
            else column.removeprefix(request_log.DIGEST_PREFIX).removeprefix(request_log.PREDICTION_PREFIX)
        )
        if column.startswith(request_log.DIGEST_PREFIX):
            compared.append(_compare_value(database, name, "feature", f"{mine} IS DISTINCT FROM {other}", rows))
            continue
        other = f"{other}::DOUBLE * {_score_of_served(values, weights) if is_score else 1}"
        allowed = f"{ABSOLUTE_TOLERANCE} * greatest(1, abs({other}))"
        if is_score or name not in weights:
            allowed = f"least({allowed}, {RELATIVE_TOLERANCE} * {other})"
        is_wrong = f"NOT coalesce(abs({mine} - {other}) <= {allowed}, false)"
        if is_score:  # the caller's own weights change it
            is_wrong = f"s.{request_log.WEIGHTS} IS NULL AND {is_wrong}"
        compared.append(
            _compare_value(database, name, "score" if is_score else "prediction", is_wrong, rows, (mine, other))
        )
    mismatches, requests = sum(each["mismatches"] for each in compared), "SELECT count(DISTINCT request_key) FROM every"
    return {
        "requests": int(database.row(requests)[0]),
        "rows": len(offline),
        "logged_rows": len(served),
        "compared_rows": rows,
        "not_compared": not_compared,
        "rows_with_reply": distinct,
        "mismatches": mismatches,
        "values": compared,
    }


def _score_of_served(values: list[str], weights: Mapping[str, float]) -> str:
    """Return the factor by which the served regressions change the log's score. They are compared for themselves:
    rounding may change much of a small one, and so of the score."""
    factor = "1.0"
    for task, weight in weights.items():
        column = f"v{values.index(f'{request_log.PREDICTION_PREFIX}{task}')}::DOUBLE, {MIN_LINEAR_PREDICTION!r}"
        factor += f" * pow(greatest(s.{column}) / greatest(o.{column}), {weight!r})"
    return factor


def _compare_value(
    database: Database, name: str, kind: str, is_wrong: str, rows: int, sides: tuple[str, str] | None = None
) -> dict[str, Any]:
    """Compare one value, given SQL for a mismatch and for the numbers on both sides."""
    served, offline = sides or ("NULL::DOUBLE", "NULL::DOUBLE")
    wrong, largest = database.row(f"SELECT count(*) FILTER ({is_wrong}), max(abs({served} - {offline})) {_BOTH}")
    query = f"SELECT o.*, {served} AS mine, {offline} AS other {_BOTH} WHERE {is_wrong} ORDER BY o.number"
    return _result(name, kind, rows, wrong, largest, _examples(database, query) if wrong else [])


def _result(*values: Any) -> dict[str, Any]:
    """Name the values of one comparison. kind: feature, prediction, score, column or reply; largest: difference."""
    return dict(zip(("name", "kind", "compared", "mismatches", "largest", "examples"), values, strict=True))


def _examples(database: Database, query: str) -> list[dict[str, Any]]:
    """Describe the first rows of a query for people."""
    found = list[dict[str, Any]]()
    for row in database.table(f"{query} LIMIT {MAX_EXAMPLES}").to_pylist():
        moment, mine = iso_time(row["moment"]), row.get("mine")
        why = row.get("why") or ("" if mine is None else f"served {mine}, offline {row['other']}")
        request = row.get("request", f"{row['user']} at {moment}")
        found.append({"request": request, "candidate": row["candidate"], "time": moment, "why": why})
    return found


def _list(not_compared: Mapping[str, int]) -> str:
    return ", ".join(f"{rows:,} {why}" for why, rows in not_compared.items())


def describe(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a report for the terminal."""
    for value in sorted(report["values"], key=lambda value: -value["mismatches"]):
        if not value["mismatches"]:
            continue
        far = "" if value["largest"] is None else f", by {value['largest']:.3g} at most"
        yield f"{value['kind']} '{value['name']}' differs in {value['mismatches']:,} of {value['compared']:,} rows{far}"
        for each in value["examples"]:
            told = f"  request {each['request']}, candidate {each['candidate']}, at {each['time']}"
            yield told + (f": {each['why']}" if each["why"] else "")
    if not report["mismatches"]:
        yield (
            f"replies are whole, features are equal to the last bit, predictions and scores within "
            f"{ABSOLUTE_TOLERANCE:g}"
        )
    reasons = f". Not compared: {_list(report['not_compared'])}" if report["not_compared"] else ""
    yield f"{report['compared_rows']:,} of {report['logged_rows']:,} logged rows are compared{reasons}"
    requests, rows, replied = report["requests"], report["rows"], report["rows_with_reply"]
    yield f"{requests:,} requests with {rows:,} rows, {replied:,} of them logged: {report['mismatches']:,} mismatches"
