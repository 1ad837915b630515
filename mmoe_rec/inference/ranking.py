"""Answers to requests (rankings, explanations, warnings about request times), and tables of scored rows."""

from __future__ import annotations

import math
import secrets
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from mmoe_rec.features.encoder import Inputs
from mmoe_rec.features.layout import Layout
from mmoe_rec.inference.artifact import ArtifactInfo, tables_as_of_us
from mmoe_rec.log.request_values import iso_time
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY, LogRows, RequestRows
from mmoe_rec.settings.log_columns import NO_CANDIDATE

if TYPE_CHECKING:
    from mmoe_rec.inference.scorer import Scored

# JavaScript clients round larger integers, so their events would have the ID of no request.
_JAVASCRIPT_BITS = 53


@dataclass(frozen=True)
class Explanation:
    """Values that explain one candidate's predictions.

    Attributes:
        uncalibrated: Prediction before calibration, by task.
        calibrated: Prediction after calibration, by task.
        gates: Weight of each expert of the last level of experts, by task.
        counters: Counter values before standardization, by output such as `user_product_log_sum`. None if missing.
        histories: IDs by history, oldest first. An ID outside the vocabulary is None, and so is a missing history.
    """

    uncalibrated: dict[str, float]
    calibrated: dict[str, float]
    gates: dict[str, list[float]]
    counters: dict[str, float | None]
    histories: dict[str, list[int | None] | list[str | None] | None]


def new_request_id(integer: bool) -> int | str:
    """Return a request ID: a random integer from 1 to 2^53 if `integer`, else 32 hexadecimal digits."""
    return secrets.randbelow(2**_JAVASCRIPT_BITS) + 1 if integer else uuid.uuid4().hex


@dataclass(frozen=True, eq=False)
class RankedRequest:
    """A request's features, as part of the batch of requests in which it was ranked.

    Attributes:
        rows: Rows of the whole batch.
        inputs: Features of the batch's R requests and N candidates, as `FeaturePipeline.request_inputs` returns them.
        layout: Layout of the model.
        number: Index of the request in the batch.
        first: Index of the request's first row.
        end: Index after the request's last row.
    """

    rows: RequestRows
    inputs: tuple[Inputs, Inputs]
    layout: Layout
    number: int
    first: int
    end: int

    @property
    def user(self) -> int | str:
        """ID of the user."""
        return self.rows.shared.column(self.rows.schema.columns.user)[self.number].as_py()


INTERNAL_FIELDS = ("unknown_ids", "ranked_request")
"""Fields that only the server's metrics and request log use."""
_OPTIONAL_FIELDS = ("explanations", "request_id")


@dataclass(frozen=True)
class Ranking:
    """Candidates of a request, best first. Equal scores keep the request's order.

    Attributes:
        candidates: IDs of the candidates.
        scores: exp(sum of weight x log prediction).
        log_scores: Logarithms of the scores, for scores that are too small or too large for a float.
        predictions: Predictions by task, and by `CONDITION_and_TASK` for tasks with `conditional_on`: the probability
            of both labels (see `add_joint_predictions`).
        order: Index that each candidate had in the request, from 0.
        request_time: ISO time of the request.
        tables_as_of: ISO time of the last logged request in the model's tables. None if the log has no times.
        warnings: Sentences about tasks without a usable expert, and about the request's time.
        model: The artifact's `name` and `version` (`artifact_version`).
        explanations: An explanation for each candidate, if the request asked for explanations.
        unknown_ids: Number of IDs that neither the tables nor live events contain, by key (`user`, `candidate`).
        request_id: The caller's ID or a new one, if requests are logged.
        ranked_request: The request as the features read it (`RankedRequest`), if requests are logged.
    """

    candidates: list[int] | list[str]
    scores: list[float]
    log_scores: list[float]
    predictions: dict[str, list[float]]
    order: list[int]
    request_time: str
    tables_as_of: str | None
    warnings: list[str] = field(default_factory=list)
    model: dict[str, str] = field(default_factory=dict)
    explanations: list[Explanation] | None = None
    unknown_ids: dict[str, int] = field(default_factory=dict)
    request_id: int | str | None = None
    ranked_request: Any = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the ranking as JSON values, without `INTERNAL_FIELDS` and absent explanations and request IDs."""
        names = [attribute.name for attribute in fields(self) if attribute.name not in INTERNAL_FIELDS]
        tree = {name: getattr(self, name) for name in names}
        if self.explanations is not None:
            tree["explanations"] = [dict(vars(explanation)) for explanation in self.explanations]
        return {name: value for name, value in tree.items() if value is not None or name not in _OPTIONAL_FIELDS}


def build_explanations(
    scored: Scored, inputs: tuple[Mapping[str, Any], Mapping[str, Any]], tasks: Sequence[str], rows: Sequence[int]
) -> list[Explanation]:
    """Build the explanations of a request's candidates.

    Args:
        scored: Results of the whole batch, scored with `explain`.
        inputs: Counters and histories of the whole batch, as `FeaturePipeline.explain` returns them.
        tasks: Names of the tasks.
        rows: Rows of the candidates in the batch.
    """
    assert scored.uncalibrated is not None
    assert scored.gates is not None
    row_numbers = np.array(rows, np.int64)
    calibrated, uncalibrated = (
        values[row_numbers].astype(np.float64).tolist() for values in (scored.predictions, scored.uncalibrated)
    )
    numbers, lists = ({name: values[row_numbers].tolist() for name, values in group.items()} for group in inputs)
    return [
        Explanation(
            uncalibrated=dict(zip(tasks, uncalibrated[row], strict=True)),
            calibrated=dict(zip(tasks, calibrated[row], strict=True)),
            gates=dict(zip(tasks, gates, strict=True)),
            counters={name: None if math.isnan(values[row]) else values[row] for name, values in numbers.items()},
            histories={name: values[row] for name, values in lists.items()},
        )
        for row, gates in enumerate(scored.gates[row_numbers].tolist())
    ]


def check_request_time(info: ArtifactInfo, updated_until: int, time: int) -> list[str]:
    """Return a warning if counters and histories include a request's future or are stale, else an empty list.

    Args:
        info: Metadata of the model.
        updated_until: Time of the last event that counters and histories include, in microseconds.
        time: Time of the request, in microseconds.
    """
    if time <= tables_as_of_us(info):
        return [
            f"the request's time {iso_time(time)} is not after {info.tables_as_of}, the end of the data in "
            "counters and histories. They include its future, so predictions look better than they are."
        ]
    if info.stale_after_days is not None and time > updated_until + info.stale_after_days * MICROSECONDS_PER_DAY:
        return [
            f"the request's time {iso_time(time)} is more than {info.stale_after_days:g} days after "
            f"{iso_time(updated_until)}, the last event in counters and histories: they are stale "
            "(setting `serving.stale_after_days`)"
        ]
    return []


# Column with a row's number in its log, from 0. It identifies the rows of a log without candidate IDs.
ROW_NUMBER_COLUMN = "row"


def prediction_columns(layout: Layout) -> list[str]:
    """Return the names of prediction columns in a scored table, first of tasks and then of joint outcomes."""
    return [f"predicted_{name}" for name in (*(task.name for task in layout.tasks), *layout.joint_outcomes)]


def scored_table(rows: LogRows, values: np.ndarray, log_scores: np.ndarray, layout: Layout) -> pa.Table:
    """Build a table with the keys, predictions and scores of N rows.

    Args:
        rows: Rows with the key columns. In a log without candidate IDs, `ROW_NUMBER_COLUMN` is a key.
        values: Predictions, (N, T).
        log_scores: Log scores, (N,).
        layout: Names of tasks and joint outcomes.
    """
    from mmoe_rec.model.score import add_joint_predictions, scores_from_log_scores  # Imports torch.

    columns = {name: rows.column(name) for name in rows.schema.columns.names if rows.has_column(name)}
    if rows.has_column(NO_CANDIDATE):
        columns[ROW_NUMBER_COLUMN] = rows.column(NO_CANDIDATE)
    predictions = map(pa.array, add_joint_predictions(values, layout).values())
    columns |= zip(prediction_columns(layout), predictions, strict=True)
    columns["score"] = pa.array(scores_from_log_scores(log_scores))
    return pa.table(columns)
