"""The answer to a request, with what it comes from and what is wrong with its time; scores of any rows as a table."""

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

_JAVASCRIPT_BITS = 53  # integers beyond lose digits in JavaScript, and events with such ids would belong to no request


@dataclass(frozen=True)
class Explanation:
    """What one candidate's predictions come from.

    uncalibrated, calibrated: task -> prediction before and after calibration; gates: task -> weight of each expert of
    the last level; counters: input -> value before it is standardised, null where it is missing; histories: feature ->
    ids, oldest first (null in the place of an id without a row of its own), null where there are none.
    """

    uncalibrated: dict[str, float]
    calibrated: dict[str, float]
    gates: dict[str, list[float]]
    counters: dict[str, float | None]
    histories: dict[str, list[int | None] | list[str | None] | None]


def new_request_id(integer: bool) -> int | str:
    """An id for a request that has none: a random integer from 1 to 2^53, or 32 hexadecimal digits."""
    return secrets.randbelow(2**_JAVASCRIPT_BITS) + 1 if integer else uuid.uuid4().hex


@dataclass(frozen=True, eq=False)
class RankedRequest:
    """A request of a pass.

    rows: of the whole pass; inputs: of its R requests, and of its N candidates, as `request_inputs` gives them; layout:
    of the model; number: of the request; first, end: its rows.
    """

    rows: RequestRows
    inputs: tuple[Inputs, Inputs]
    layout: Layout
    number: int
    first: int
    end: int

    @property
    def user(self) -> int | str:
        return self.rows.shared.column(self.rows.schema.columns.user)[self.number].as_py()


INTERNAL_FIELDS = ("unknown_ids", "ranked_request")
"""What a ranking holds for the server's metrics and its log of requests alone."""
_IF_THERE = ("explanations", "request_id")


@dataclass(frozen=True)
class Ranking:
    """Candidates, best first. Equal scores keep the request's order.

    Replies leave out the attributes that `INTERNAL_FIELDS` names.

    Attributes:
        candidates: Ids.
        scores: exp(sum of weight x log prediction).
        log_scores: The sums. They still differ if scores are too small or too large.
        predictions: Values by the names that `add_joint_predictions` gives.
        order: Positions of the candidates in the request.
        request_time: ISO time of the request.
        tables_as_of: ISO time of the last logged request that the model's tables know, None if the log has no times.
        warnings: Tasks without experts (`mmoe_rec.inference.scorer`) and doubts about its time (`check_request_time`).
        model: The artifact's `name` and `version` (`artifact_version`).
        explanations: An explanation of each candidate, if the request asked for them.
        unknown_ids: Number of unknown ids of `user` and `candidate`.
        request_id: The caller's own or a new one, if requests are logged.
        ranked_request: The request as the features read it (`RankedRequest`).
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
        """The ranking as JSON values, whose lists are its own; without explanations that nobody asked for, or an id."""
        tree = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in INTERNAL_FIELDS}
        if self.explanations is not None:
            tree["explanations"] = [dict(vars(each)) for each in self.explanations]
        return {name: each for name, each in tree.items() if each is not None or name not in _IF_THERE}


def build_explanations(
    scored: Scored, read: tuple[Mapping[str, Any], Mapping[str, Any]], tasks: Sequence[str], places: Sequence[int]
) -> list[Explanation]:
    """The explanations of a request's candidates, which lie at these places of a pass.

    scored, read: of the pass, read as `FeaturePipeline.explain` gives it.
    """
    assert scored.uncalibrated is not None
    assert scored.gates is not None
    chosen = np.array(places, np.int64)
    after, before = (each[chosen].astype(np.float64).tolist() for each in (scored.predictions, scored.uncalibrated))
    numbers, lists = ({name: each[chosen].tolist() for name, each in part.items()} for part in read)
    return [
        Explanation(
            uncalibrated=dict(zip(tasks, before[row], strict=True)),
            calibrated=dict(zip(tasks, after[row], strict=True)),
            gates=dict(zip(tasks, gates, strict=True)),
            counters={name: None if math.isnan(each[row]) else each[row] for name, each in numbers.items()},
            histories={name: each[row] for name, each in lists.items()},
        )
        for row, gates in enumerate(scored.gates[chosen].tolist())
    ]


def check_request_time(info: ArtifactInfo, updated_until: int, time: int) -> list[str]:
    """Return a sentence about a request's time that does not fit what counters and histories know, or none.

    Args:
        info: The model.
        updated_until: Time of the last event that counters and histories know, microseconds.
        time: Time of the request, microseconds.
    """
    if time <= tables_as_of_us(info):
        return [
            f"the request's time {iso_time(time)} is not after {info.tables_as_of}, as of which counters and "
            "histories answer: so they know its future, and predictions look better than they are"
        ]
    if info.stale_after_days is not None and time > updated_until + info.stale_after_days * MICROSECONDS_PER_DAY:
        return [
            f"the request's time {iso_time(time)} is more than {info.stale_after_days:g} days after "
            f"{iso_time(updated_until)}, up to which counters and histories count what happened: they are stale "
            "(setting "
            "`serving.stale_after_days`)"
        ]
    return []


ROW_NUMBER_COLUMN = (
    "row"  # the column of a scored row's number in its log, from 0, where nothing else tells it from others
)


def prediction_columns(layout: Layout) -> list[str]:
    """The columns of predictions, each task's and then each outcome's."""
    return [f"predicted_{name}" for name in (*(task.name for task in layout.tasks), *layout.joint_outcomes)]


def scored_table(rows: LogRows, values: np.ndarray, log_scores: np.ndarray, layout: Layout) -> pa.Table:
    """The keys of N rows (without candidates also their number `ROW_NUMBER_COLUMN`), their predictions (N, T), and
    `score` (N,)."""
    from mmoe_rec.model.score import add_joint_predictions, scores_from_log_scores  # which imports torch

    columns = {name: rows.column(name) for name in rows.schema.columns.names if rows.has_column(name)}
    if rows.has_column(NO_CANDIDATE):
        columns[ROW_NUMBER_COLUMN] = rows.column(NO_CANDIDATE)
    for name, each in zip(prediction_columns(layout), add_joint_predictions(values, layout).values(), strict=True):
        columns[name] = pa.array(each)
    columns["score"] = pa.array(scores_from_log_scores(log_scores))
    return pa.table(columns)
