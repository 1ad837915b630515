"""Training-serving skew: compare the requests that a server has logged with the log's rows of the same requests.

For each feature, a server logs a digest (hash) of the values that the model read. This module computes the same digests
offline, with the steps of a feature build and the model's own encoders. It recomputes counters and histories from the
log as of each request, to find errors in the served ones. DuckDB joins the served and the offline rows.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
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
from mmoe_rec.preprocessing.look_up import COMPARED_GROUP, ResultReader
from mmoe_rec.settings.schema import Schema
from mmoe_rec.settings.sections import Settings
from mmoe_rec.task_kinds.task_kind import MIN_LINEAR_PREDICTION
from mmoe_rec.tracking.registry import resolve_model

REPORT_FILE = "skew.json"
ABSOLUTE_TOLERANCE = 1e-5
"""Limit on the absolute difference of two values, or the relative difference above 1. Small differences are normal."""
RELATIVE_TOLERANCE = 1e-3
"""Second limit for probabilities and scores, as a fraction of the value. The first is too loose for small values."""
MAX_EXAMPLES = 3
_REPLY_COLUMNS = [
    request_log.AT,
    request_log.CANDIDATE_COUNT,
    request_log.REPLIED_COUNT,
    request_log.ARTIFACT,
    request_log.WEIGHTS,
]


class SkipReason(StrEnum):
    """Why a logged row is not compared."""

    OUTSIDE_PERIOD = "outside_period"
    OTHER_VERSION = "other_version"
    NOT_IN_LOG = "not_in_log"


class ValueKind(StrEnum):
    """Kind of a compared value."""

    REPLY = "reply"
    COLUMN = "column"
    FEATURE = "feature"
    PREDICTION = "prediction"
    SCORE = "score"


_SKIP_DESCRIPTIONS = {
    SkipReason.OUTSIDE_PERIOD: "outside --from and --to",
    SkipReason.OTHER_VERSION: "answered by other versions of the model",
    SkipReason.NOT_IN_LOG: "not in the log",
}
# Tables of the comparison:
#
# - `offline`: the log's rows in the period, without repetitions.
# - `marked`: all served rows. `reason` says why a row can't be compared. A served row with a time outside the period is
#   still compared if its request ID matches a row of the log.
# - `matched`: the served rows that can be compared.
# - `missing`: rows of the log that no logged reply contains, although the replies to their request contain all
#   candidates. Also one row of the log for each request whose reply was logged only in part.
_JOIN = f"""
CREATE TABLE offline AS SELECT * FROM log_rows QUALIFY row_number() OVER (PARTITION BY key ORDER BY number) = 1;
CREATE TABLE marked AS
    SELECT served.*, offline.number AS row, offline.request_key AS log_request,
        count(*) OVER (PARTITION BY served.request_key, served_at) < served_replied AS has_lost_rows,
        NOT bool_or(served_replied <> served_candidates OR served_artifact IS DISTINCT FROM '{{version}}')
            OVER (PARTITION BY served.request_key) AS is_complete,
        CASE
            WHEN row IS NULL AND NOT served.time_us BETWEEN {{start}} AND {{end}} - 1
                THEN '{SkipReason.OUTSIDE_PERIOD}'
            WHEN served_artifact IS DISTINCT FROM '{{version}}' THEN '{SkipReason.OTHER_VERSION}'
            WHEN row IS NULL THEN '{SkipReason.NOT_IN_LOG}'
        END AS reason
    FROM served LEFT JOIN offline USING (key);
CREATE TABLE matched AS SELECT * FROM marked WHERE reason IS NULL;
CREATE TABLE missing AS
    SELECT number, request_key AS log_request, 'no logged reply has it' AS why FROM offline
    WHERE request_key IN (SELECT log_request FROM matched WHERE is_complete)
        AND number NOT IN (SELECT row FROM matched);
INSERT INTO missing
    SELECT min(row), log_request, 'the request log lacks rows of its reply' FROM matched
    WHERE has_lost_rows AND log_request NOT IN (SELECT log_request FROM missing) GROUP BY log_request;
"""
_BOTH = "FROM matched s JOIN offline o ON s.row = o.number"


@dataclass(frozen=True)
class _Comparison:
    """Comparison of one value between logged requests and the log, as an entry of the report."""

    name: str  # Name of the feature, task or column.
    kind: ValueKind
    compared: int  # Number of compared rows.
    mismatches: int
    largest: float | None  # Largest absolute difference. None for values that aren't numbers.
    examples: list[dict[str, Any]]


def check_skew(
    settings: Settings, start: int, end: int, model_uri: str, requests: Path, out: Path | None = None
) -> dict[str, Any]:
    """Compare logged requests with the log's rows of these requests.

    Args:
        settings: Settings with the log.
        start: First request time of the period, microseconds.
        end: End of the period, exclusive.
        model_uri: URI or folder of the model that ranked the requests.
        requests: Folder of the request log.
        out: Folder for `skew.json`. None writes no file.

    Returns:
        The report, with the content of `skew.json`.

    Raises:
        UserError: The log, the model, the period or the logged requests can't be used.
    """
    if start >= end:
        raise UserError(f"--from {format_time(start)} is not before --to {format_time(end)}")
    reject_plain_table(settings.schema_, "a skew check")
    model = resolve_model(model_uri, settings.tracking.resolved_uri).folder
    window = {"version": artifact_version(model), "start": start, "end": end}
    folder = Path(settings.data.work_dir) / "skew"
    weights = {task.name: task.score_weight for task in read_artifact(model).tasks if task.kind.is_linear}
    with write_lock(folder, "a skew check", "set `data.work_dir` to another folder"):
        shutil.rmtree(folder, ignore_errors=True)  # An earlier check that was killed may have left files.
        try:
            folder.mkdir(parents=True)
            pipeline = FeaturePipeline.load(model / "features", stores=False)
            served = _read_request_log(requests, pipeline.schema)
            offline = _score_offline(open_model_logs(settings, pipeline), model, (start, end), folder)
            with open_database(folder / "database", settings.data.memory_gib) as database:
                report = _compare(database, offline, served, pipeline.schema, window, weights)
        except RequestError as error:
            raise UserError(f"the model refuses a value of the log: {error}") from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    period = {"from": format_time(start), "to": format_time(end)}
    report = {"model": model_uri, "model_version": window["version"], **period, **report}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / REPORT_FILE, json.dumps(report, indent=1, ensure_ascii=False, default=str))
    return report


def _read_request_log(folder: Path, schema: Schema) -> pa.Table:
    """Read the files of a request log. Copy the request IDs to the schema's request column, if the schema has one."""
    columns, tables = schema.columns, list[pa.Table]()
    try:
        for file in find_files(str(folder), "--requests"):
            with open_parquet(file.uri) as parquet:
                tables.append(parquet.read())
        table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"the files in '{folder}' can't be read together: {first_line(error)}") from None
    _require_columns(table, [request_log.REQUEST, *_REPLY_COLUMNS, columns.user, columns.candidate, columns.time])
    return table if columns.request is None else table.append_column(columns.request, table[request_log.REQUEST])


def _require_columns(table: pa.Table, columns: list[str]) -> None:
    if missing := [name for name in columns if name not in table.column_names]:
        problem = f"--requests: the files have no column '{missing[0]}'"
        raise UserError(f"{problem}, which `mmoe-rec serve --log-requests` of this version writes")


def _score_offline(logs: Logs, model: Path, window: tuple[int, int], scratch: Path) -> pa.Table:
    """Score the log's rows with request times in the `window` (start and exclusive end), with features as of that time.

    The result has the same columns of IDs, digests, predictions and scores as the request log.
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
    results = ResultReader(open_results(kept, steps.logs.log), [*ranker.pipeline.key_groups, COMPARED_GROUP])
    with limit_threads(1):
        for part in steps.parts:
            parts += [_score(ranker, rows) for rows in read_window(reader, results, window, part)]
    for log in steps.logs.all:
        log.check_unchanged()
    return pa.concat_tables(parts, promote_options="permissive").combine_chunks()


def _score(ranker: Ranker, rows: LogRows) -> pa.Table:
    """Compute digests, predictions and scores of rows that already have their counters and histories."""
    schema, layout = ranker.pipeline.schema, ranker.pipeline.layout
    filled_rows, ids = ranker.reader.fill_attributes(LogRows(rows.table, schema, rows.results)), schema.columns
    inputs, (values, log_scores) = ranker.pipeline.inputs(filled_rows), ranker.score(filled_rows)
    id_columns = [name for name in (ids.request, ids.user, ids.candidate, ids.time) if name is not None]
    columns: dict[str, Any] = {name: rows.column(name) for name in id_columns}
    digests = request_log.hash_features(inputs.ids, inputs.dense, layout)
    columns |= {f"{request_log.DIGEST_PREFIX}{name}": digest for name, digest in digests.items()}
    predictions = add_joint_predictions(values, ranker.layout)
    columns |= {f"{request_log.PREDICTION_PREFIX}{name}": prediction for name, prediction in predictions.items()}
    return pa.table(columns | {request_log.SCORE: scores_from_log_scores(log_scores)})


def _create_side(
    database: Database, name: str, table: pa.Table, schema: Schema, values: list[str], more: list[str]
) -> None:
    """Create the table of served or offline rows. Columns `values` become `v0`, `v1` ...; `more` keep their names."""
    rows, columns = LogRows(table, schema), schema.columns
    side = {"key": rows.row_hashes(), "request_key": rows.request_hashes(), "user_key": rows.hashes([columns.user])}
    side |= {"number": pa.array(range(len(table)), pa.int64()), "time_us": rows.times()}
    for role, column in (("user", columns.user), ("candidate", columns.candidate), ("request", columns.request)):
        side |= {} if column is None else {role: table[column].cast(pa.string())}
    side |= {f"v{index}": table[value] for index, value in enumerate(values)} | {name: table[name] for name in more}
    side_table = pa.table(side)
    database.create_table(name, side_table.schema, [side_table])


def _compare(
    database: Database,
    offline: pa.Table,
    served: pa.Table,
    schema: Schema,
    window: Mapping[str, Any],
    weights: Mapping[str, float],
) -> dict[str, Any]:
    """Join served and offline rows, and compare their values (see `check_skew`)."""
    prefixes = request_log.DIGEST_PREFIX, request_log.PREDICTION_PREFIX, request_log.SCORE
    values = [name for name in offline.column_names if name.startswith(prefixes)]
    _require_columns(served, values)
    _create_side(database, "log_rows", offline, schema, values, [])
    _create_side(database, "served", served, schema, values, _REPLY_COLUMNS)
    database.run(*_JOIN.format(**window).split(";")[:-1])
    query = "SELECT reason, count(*) FROM marked WHERE reason IS NOT NULL GROUP BY 1 ORDER BY 2"
    not_compared = {str(reason): int(rows) for reason, rows in database.rows(query)}
    rows, distinct = database.row("SELECT count(*), count(DISTINCT row) FROM matched")
    if not rows:
        problem = f"--requests: none of {len(served):,} logged rows can be compared ({_list_reasons(not_compared)})"
        raise UserError(f"{problem}. Use the period, the model and the log of these requests.")
    missing, lost = database.row("SELECT count(*), count(*) FILTER (number IN (SELECT row FROM matched)) FROM missing")
    examples = _examples(database, "SELECT o.*, why FROM missing JOIN offline o USING (number) ORDER BY number")
    compared = [_Comparison("candidates", ValueKind.REPLY, distinct + missing - lost, missing, None, examples)]
    for name, key in ((schema.columns.user, "user_key"), (schema.columns.time, "time_us")):
        if schema.columns.request is not None:
            compared.append(_compare_value(database, name, ValueKind.COLUMN, f"s.{key} <> o.{key}", rows))
    for index, column in enumerate(values):
        served_value, offline_value, is_score = f"s.v{index}", f"o.v{index}", column == request_log.SCORE
        name = column.removeprefix(request_log.DIGEST_PREFIX).removeprefix(request_log.PREDICTION_PREFIX)
        if column.startswith(request_log.DIGEST_PREFIX):
            differs = f"{served_value} IS DISTINCT FROM {offline_value}"
            compared.append(_compare_value(database, name, ValueKind.FEATURE, differs, rows))
            continue
        offline_value = f"{offline_value}::DOUBLE * {_regression_factor(values, weights) if is_score else 1}"
        allowed = f"{ABSOLUTE_TOLERANCE} * greatest(1, abs({offline_value}))"
        if is_score or name not in weights:
            allowed = f"least({allowed}, {RELATIVE_TOLERANCE} * {offline_value})"
        differs = f"NOT coalesce(abs({served_value} - {offline_value}) <= {allowed}, false)"
        name, kind = ("score", ValueKind.SCORE) if is_score else (name, ValueKind.PREDICTION)
        if is_score:  # Scores can't be compared if the request had its own task weights.
            differs = f"s.{request_log.WEIGHTS} IS NULL AND {differs}"
        compared.append(_compare_value(database, name, kind, differs, rows, (served_value, offline_value)))
    (requests,) = database.row("SELECT count(DISTINCT request_key) FROM log_rows")
    return {
        "requests": requests,
        "rows": len(offline),
        "logged_rows": len(served),
        "compared_rows": rows,
        "not_compared": not_compared,
        "rows_with_reply": distinct,
        "mismatches": sum(comparison.mismatches for comparison in compared),
        "values": [asdict(comparison) for comparison in compared],
    }


def _regression_factor(values: list[str], weights: Mapping[str, float]) -> str:
    """Return SQL for a factor that replaces the regression predictions in an offline score by the served ones.

    The score is a product of powers of predictions. Rounding may change a small regression prediction, and so the
    score, by a large factor. Regression predictions are compared separately.
    """
    factor = "1.0"
    for task, weight in weights.items():
        column = f"v{values.index(f'{request_log.PREDICTION_PREFIX}{task}')}::DOUBLE, {MIN_LINEAR_PREDICTION!r}"
        factor += f" * pow(greatest(s.{column}) / greatest(o.{column}), {weight!r})"
    return factor


def _compare_value(
    database: Database, name: str, kind: ValueKind, differs: str, rows: int, numbers: tuple[str, str] | None = None
) -> _Comparison:
    """Compare the served and the offline value of one column in all matched rows.

    `differs` is an SQL condition for rows with different values. `numbers` are SQL expressions of the served and the
    offline number, None if the values aren't numbers.
    """
    served, offline = numbers or ("NULL::DOUBLE", "NULL::DOUBLE")
    mismatches, largest = database.row(f"SELECT count(*) FILTER ({differs}), max(abs({served} - {offline})) {_BOTH}")
    query = f"SELECT o.*, {served} AS served, {offline} AS offline {_BOTH} WHERE {differs} ORDER BY o.number"
    examples = _examples(database, query) if mismatches else []
    return _Comparison(name, kind, rows, mismatches, largest, examples)


def _examples(database: Database, query: str) -> list[dict[str, Any]]:
    """Describe the first `MAX_EXAMPLES` rows of a query, for the report."""
    examples = list[dict[str, Any]]()
    for row in database.table(f"{query} LIMIT {MAX_EXAMPLES}").to_pylist():
        time, served = iso_time(row["time_us"]), row.get("served")
        why = row.get("why") or ("" if served is None else f"served {served}, offline {row['offline']}")
        request = row.get("request", f"{row['user']} at {time}")
        examples.append({"request": request, "candidate": row["candidate"], "time": time, "why": why})
    return examples


def _list_reasons(not_compared: Mapping[str, int]) -> str:
    return ", ".join(f"{rows:,} {_SKIP_DESCRIPTIONS[SkipReason(reason)]}" for reason, rows in not_compared.items())


def describe(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that `check-skew` prints."""
    for value in sorted(report["values"], key=lambda value: -value["mismatches"]):
        if not value["mismatches"]:
            continue
        largest = "" if value["largest"] is None else f", by {value['largest']:.3g} at most"
        rows = f"{value['mismatches']:,} of {value['compared']:,} rows{largest}"
        yield f"{value['kind']} '{value['name']}' differs in {rows}"
        for example in value["examples"]:
            line = f"  request {example['request']}, candidate {example['candidate']}, at {example['time']}"
            yield line + (f": {example['why']}" if example["why"] else "")
    if not report["mismatches"]:
        agreement = f"predictions and scores agree within {ABSOLUTE_TOLERANCE:g}"
        yield f"replies are complete, features are identical, {agreement}"
    reasons = f". Not compared: {_list_reasons(report['not_compared'])}" if report["not_compared"] else ""
    yield f"{report['compared_rows']:,} of {report['logged_rows']:,} logged rows are compared{reasons}"
    requests, rows, replied = report["requests"], report["rows"], report["rows_with_reply"]
    yield f"{requests:,} requests with {rows:,} rows, {replied:,} of them logged: {report['mismatches']:,} mismatches"
