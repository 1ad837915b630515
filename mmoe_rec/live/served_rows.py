"""What a server read and predicted for each row of its requests, as it logged them, beside what the log says of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from mmoe_rec.errors import UserError, first_line
from mmoe_rec.features.kinds.history import HistoryEncoder
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.ranking import Explanation, prediction_columns
from mmoe_rec.live import request_log as names
from mmoe_rec.log.checks import open_parquet
from mmoe_rec.log.files import find_files
from mmoe_rec.log.given import iso_time
from mmoe_rec.log.rows import LogRows
from mmoe_rec.model.score import SMALLEST_VALUE
from mmoe_rec.point_in_time.arrays import SharedRagged
from mmoe_rec.point_in_time.join import in_window

TOLERANCE = 1e-5
"""Predictions and scores may differ by this, times their size above 1: libraries sum products in different orders."""
RELATIVE_TOLERANCE = 1e-3
"""Probabilities and scores may differ by this share of themselves at most, as small ones are never far apart."""
EXAMPLES = 3
_WHOLE = "whole"  # column of logged requests: whether all replies to the request rank all of its candidates
_LOST = "lost"  # column of logged requests: whether the request log lacks rows of the reply


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
    named log; weights: of regressions in the score; window: start and end of the period, microseconds, the end
    exclusive.
    """

    rows: LogRows
    starts: np.ndarray
    times: np.ndarray
    logs: tuple[LogEvents, ...]
    weights: Mapping[str, float]
    window: tuple[int, int]


@dataclass(frozen=True)
class ValueComparison:
    """One thing that is compared in all rows.

    kind: feature, prediction, score, column or reply; largest: greatest difference of numbers; examples: the first
    mismatches.
    """

    name: str
    kind: str
    compared: int
    mismatches: int
    largest: float | None
    examples: list[dict[str, Any]]


def read_logged(folder: Path, period: Period, version: str | None = None) -> tuple[pa.Table, dict[str, Any]]:
    """Match the rows that a server has logged in a folder with the rows of a period of the log.

    Args:
        folder: Folder of the request log.
        period: Period of the log.
        version: Version of the artifact whose replies are compared, None for any.

    Returns:
        The matched rows, with the number of the log's row in the column `row`; and counts for the report. Each logged
        row is either matched or counted in `not_compared`.

    Raises:
        UserError: The files can't be read, or no row is matched.
    """
    schema, tables = period.rows.schema, []
    try:
        for file in find_files(str(folder), "--requests"):
            with open_parquet(file.address) as parquet:
                tables.append(parquet.read())
        table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"the files in '{folder}' can't be read together: {first_line(error)}") from None
    of_reply = [names.AT, names.CANDIDATES, names.REPLIED, names.ARTIFACT]
    read = [names.REQUEST, *of_reply, names.RANK, names.SCORE]
    read += [schema.columns.user, schema.columns.candidate, schema.columns.time]
    if lacking := [name for name in read if name not in table.column_names]:
        raise UserError(
            f"'{folder}' has no column '{lacking[0]}', which `mmoe-rec serve --log-requests` of this version writes"
        )
    if schema.columns.request is not None:
        table = table.append_column(schema.columns.request, table[names.REQUEST])
    logged, replies = LogRows(table, schema), table.select(of_reply).to_pandas()
    replies["request"] = logged.request_hashes()
    count = replies.groupby(["request", names.AT])[names.AT].transform("size")
    is_other = replies[names.ARTIFACT] != (version or replies[names.ARTIFACT])
    is_part = (replies[names.REPLIED] != replies[names.CANDIDATES]) | is_other
    is_part = is_part.groupby(replies["request"]).transform("any")
    rows = pd.Index(period.rows.row_hashes())
    first = np.flatnonzero(~rows.duplicated())
    row = np.append(first, -1)[rows[first].get_indexer(logged.row_hashes())]
    # A request id may match a row of the period although the logged time lies outside of it.
    outside = (row < 0) & ~in_window(logged.times(), period.window)
    of_others = is_other.to_numpy() & ~outside
    reasons = {
        "outside --from and --to": outside,
        "answered by other versions of the model": of_others,
        "not in the log": (row < 0) & ~outside & ~of_others,
    }
    not_compared = {why: int(each.sum()) for why, each in reasons.items() if each.any()}
    kept = (row >= 0) & ~of_others
    if not kept.any():
        raise UserError(
            f"--requests {folder}: none of {len(row):,} logged rows can be compared ({_list_reasons(not_compared)}). "
            "Give the period, the model and the log of these requests."
        )
    columns = {"row": row, _WHOLE: ~is_part, _LOST: count < replies[names.REPLIED]}
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    counts = {
        "logged_rows": len(row),
        "compared_rows": int(kept.sum()),
        "not_compared": not_compared,
        "rows_with_reply": len(np.unique(row[kept])),
    }
    return table.filter(pa.array(kept)), counts


def _list_reasons(not_compared: Mapping[str, int]) -> str:
    return ", ".join(f"{rows:,} {why}" for why, rows in not_compared.items())


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
    row, table, layout = logged["row"].to_numpy(), period.rows.table, pipeline.layout
    read = {each.feature for each in layout.ids if not each.placement}
    read |= {each.feature for each in layout.dense if not each.placement}
    values = [(f"{names.DIGEST}{each}", "feature", each) for each in sorted(read)]
    values += [(f"served_{each}", "prediction", each.removeprefix("predicted_")) for each in prediction_columns(layout)]
    values.append((names.SCORE, "score", "score"))
    if lacking := {names.WEIGHTS, *(column for column, *_ in values)} - {*logged.column_names}:
        told = f"the logged requests have no column '{min(lacking)}': another version of the server logged them"
        raise UserError(told)
    compared = [_compare_candidates(period, logged, wrong_replies), *_compare_requests(period, logged)]
    for column, kind, name in values:
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
    # Where the log does not say which row a reply lost, the reply is named by one of its other rows.
    lost = np.unique(row[logged[_LOST].to_numpy()])
    lost = lost[~np.isin(request[lost], request[lacking])]
    lost = lost[np.unique(request[lost], return_index=True)[1]].tolist()
    why = dict.fromkeys(lost, "the request log lacks rows of its reply")
    why |= {**dict.fromkeys(lacking, "no reply with it is logged"), **(wrong_replies or {})}
    examples = [_describe_row(period, number) | {"why": why[number]} for number in sorted(why)[:EXAMPLES]]
    return ValueComparison("candidates", "reply", int((must | np.isin(rows, row)).sum()), len(why), None, examples)


def _compare_requests(period: Period, logged: pa.Table) -> list[ValueComparison]:
    """Compare the user and the time of rows that request ids matched. Without ids, rows are matched by both."""
    columns, row, compared = period.rows.schema.columns, logged["row"].to_numpy(), []
    served = LogRows(logged, period.rows.schema)
    for name in () if columns.request is None else (columns.user, columns.time):
        sides = [each.times() if name == columns.time else each.hashes([name]) for each in (served, period.rows)]
        wrong = np.flatnonzero(sides[0] != sides[1][row])
        told = [(int(row[place]), logged[name][place].as_py()) for place in wrong[:EXAMPLES].tolist()]
        examples = [_describe_row(period, number) | {"why": f"the request log has {value}"} for number, value in told]
        compared.append(ValueComparison(name, "column", len(row), len(wrong), None, examples))
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
    told: dict[str, Any] = {} if explanation is None else {**explanation.counters, **explanation.histories}
    offline: dict[str, Any] = {}
    for name in encoder.result_columns():
        result = period.rows.results[name]
        if isinstance(result, SharedRagged):
            assert isinstance(encoder, HistoryEncoder)
            offline[name] = encoder.words(name, result.lists.take(result.number[[number]]).values) or None
            continue
        offline[name] = float(result[number])
        if told:
            told[name] = float(encoder.exchanged(name, np.array([told[name]], float))[0])
    return {"served": {name: told[name] for name in offline} if told else None, "offline": offline}


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
    reasons = f". Not compared: {_list_reasons(report['not_compared'])}" if report["not_compared"] else ""
    yield f"{report['compared_rows']:,} of {report['logged_rows']:,} logged rows are compared{reasons}"
    requests, rows, replied = report["requests"], report["rows"], report["rows_with_reply"]
    yield (
        f"{requests:,} requests with {rows:,} rows, {replied:,} of them logged, in {report['seconds']:,.0f} s: "
        f"{report['compared']:,} values compared, {report['mismatches']:,} mismatches"
    )
