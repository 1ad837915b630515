"""The answer to a request, and the scores of any rows as a table."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa

from mmoe_rec.features.layout import Layout
from mmoe_rec.log.rows import LogRows
from mmoe_rec.schema import Schema


@dataclass(frozen=True)
class Ranking:
    """Candidates, best first. Equal scores keep the request's order.

    candidates: ids; scores: exp(sum of weight x log prediction); predictions: name -> values, as `with_outcomes` gives;
    order: positions of the candidates in the request; request_time and tables_as_of: ISO times of the request and of
    the last logged request that the model's tables know; warnings: what went wrong with experts, see
    `mmoe_rec.serving.experts`.
    """

    candidates: list[int] | list[str]
    scores: list[float]
    predictions: dict[str, list[float]]
    order: list[int]
    request_time: str
    tables_as_of: str
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The ranking as JSON values, whose lists are its own."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


def key_columns(schema: Schema) -> list[str]:
    """The columns by which a scored row is told from others."""
    names = schema.columns
    return [name for name in (names.request, names.user, names.candidate, names.time) if name is not None]


def prediction_columns(layout: Layout) -> list[str]:
    """The columns of predictions, each task's and then each outcome's."""
    return [f"predicted_{name}" for name in (*(task.name for task in layout.tasks), *layout.outcomes)]


def scored_table(rows: LogRows, values: np.ndarray, log_scores: np.ndarray, layout: Layout) -> pa.Table:
    """The keys of N rows that they have, their predictions and `score`, as columns.

    values: (N, T) predictions; log_scores: (N,).
    """
    from mmoe_rec.model.score import from_logs, with_outcomes  # which imports torch

    columns = {name: rows.column(name) for name in key_columns(rows.schema) if rows.has(name)}
    for name, each in zip(prediction_columns(layout), with_outcomes(values, layout).values(), strict=True):
        columns[name] = pa.array(each)
    columns["score"] = pa.array(from_logs(log_scores))
    return pa.table(columns)
