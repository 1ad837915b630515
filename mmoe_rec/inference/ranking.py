"""The answer to a request, and the scores of any rows as a table."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa

from mmoe_rec.features.layout import Layout
from mmoe_rec.log.rows import LogRows
from mmoe_rec.settings.columns import NO_CANDIDATE
from mmoe_rec.settings.schema import Schema


@dataclass(frozen=True)
class Explanation:
    """What one candidate's predictions come from.

    uncalibrated, calibrated: task -> prediction before and after calibration; gates: task -> weight of each expert of
    the last level; counters: input -> value before it is standardised, null where it is missing; histories: feature ->
    ids, oldest first (null in the place of an id without a row of its own), null where there are none; as_of: counter
    or history -> ISO time as of which its memory answered: the request's, or a later one where the memory has dropped
    what was known then. What the request gives itself has none.
    """

    uncalibrated: dict[str, float]
    calibrated: dict[str, float]
    gates: dict[str, list[float]]
    counters: dict[str, float | None]
    histories: dict[str, list[int | None] | list[str | None] | None]
    as_of: dict[str, str]


UNSENT = ("unknown_ids", "seen", "journal_position")
"""What a ranking holds for the server's metrics and its log of requests alone."""
_IF_THERE = ("explanations", "request_id")


@dataclass(frozen=True)
class Ranking:
    """Candidates, best first. Equal scores keep the request's order.

    candidates: ids; scores: exp(sum of weight x log prediction); predictions: name -> values, as `add_outcomes` gives;
    order: positions of the candidates in the request; request_time and tables_as_of: ISO times of the request and of
    the last logged request that the model's tables know, None where the log has no times; warnings: what went wrong
    with experts, see `mmoe_rec.inference.experts`, and what is wrong with the request's time, see
    `mmoe_rec.inference.freshness`; model: the artifact's `name` and `version` (see `version_of`); explanations: of each
    candidate, where they were asked for; unknown_ids: how many ids of the request's `user` and `candidate`s the model
    knows nothing of, which replies leave out; request_id: the caller's own, or the one that the server gave, where it
    logs requests; seen: what features saw of the request, see `mmoe_rec.live.logged_requests`, and journal_position: up
    to where of the server's journal the model knew events, which replies leave out.
    """

    candidates: list[int] | list[str]
    scores: list[float]
    predictions: dict[str, list[float]]
    order: list[int]
    request_time: str
    tables_as_of: str | None
    warnings: list[str] = field(default_factory=list)
    model: dict[str, str] = field(default_factory=dict)
    explanations: list[Explanation] | None = None
    unknown_ids: dict[str, int] = field(default_factory=dict)
    request_id: int | str | None = None
    seen: Any = field(default=None, compare=False, repr=False)
    journal_position: str | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The ranking as JSON values, whose lists are its own; without explanations that nobody asked for, or an id."""
        tree = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in UNSENT}
        if self.explanations is not None:
            tree["explanations"] = [dict(vars(each)) for each in self.explanations]
        return {name: each for name, each in tree.items() if each is not None or name not in _IF_THERE}


ROW = "row"
"""The column of a scored row's number in its log, from 0, where nothing else tells it from others."""


def key_columns(schema: Schema) -> list[str]:
    """The columns by which a scored row is told from others."""
    return list(schema.columns.names)


def prediction_columns(layout: Layout) -> list[str]:
    """The columns of predictions, each task's and then each outcome's."""
    return [f"predicted_{name}" for name in (*(task.name for task in layout.tasks), *layout.outcomes)]


def scored_table(rows: LogRows, values: np.ndarray, log_scores: np.ndarray, layout: Layout) -> pa.Table:
    """The keys of N rows that they have (without candidates also their number `ROW`), their predictions and `score`, as
    columns.

    values: (N, T) predictions; log_scores: (N,).
    """
    from mmoe_rec.model.score import add_outcomes, scores_from_logs  # which imports torch

    columns = {name: rows.column(name) for name in key_columns(rows.schema) if rows.has(name)}
    if rows.has(NO_CANDIDATE):
        columns[ROW] = rows.column(NO_CANDIDATE)
    for name, each in zip(prediction_columns(layout), add_outcomes(values, layout).values(), strict=True):
        columns[name] = pa.array(each)
    columns["score"] = pa.array(scores_from_logs(log_scores))
    return pa.table(columns)
