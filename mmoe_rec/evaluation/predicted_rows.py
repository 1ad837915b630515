"""Rows with predictions and labels: the one kind of rows that metrics are computed from, whoever predicted them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from mmoe_rec.evaluation.summary import MeasuredModel, summarise
from mmoe_rec.evaluation.sums import EvaluationSums, MeasuredTask, measure

RowsBySlice = Mapping[str, Mapping[str, np.ndarray]]
"""What rows are sliced by -> name of the slice -> (n,) numbers of the rows in the slice"""


@dataclass(frozen=True)
class PredictedRows:
    """N rows of any order, with the predictions of a model or of another system.

    Attributes:
        tasks: Predicted tasks; their weights say what a row is worth.
        users: (N,) ids.
        requests: (N,) ids.
        candidates: (N,) ids, None if unknown.
        predictions: Task name -> (N,) values.
        labels: Task name -> (N,) values, NaN where unobserved.
        score: (N,) ranking score, higher is better.
        weight: (N,) weights of the rows, None if all rows count alike.
    """

    tasks: tuple[MeasuredTask, ...]
    users: pa.Array
    requests: pa.Array
    candidates: pa.Array | None
    predictions: Mapping[str, np.ndarray]
    labels: Mapping[str, np.ndarray]
    score: np.ndarray
    weight: np.ndarray | None = None

    def sum(self, grouped: bool | None = None) -> EvaluationSums:
        """Sum what all metrics need, by user or group of users; see `measure`."""
        return measure(
            self.tasks,
            self.users,
            self.requests,
            self.predictions,
            self.labels,
            score=self.score,
            weight=self.weight,
            candidates=self.candidates,
            grouped=grouped,
        )

    def take(self, rows: np.ndarray) -> PredictedRows:
        """Select rows by their numbers."""
        return replace(
            self,
            users=self.users.take(rows),
            requests=self.requests.take(rows),
            candidates=None if self.candidates is None else self.candidates.take(rows),
            predictions={name: values[rows] for name, values in self.predictions.items()},
            labels={name: values[rows] for name, values in self.labels.items()},
            score=self.score[rows],
            weight=None if self.weight is None else self.weight[rows],
        )

    def measure(
        self,
        resamples: int,
        slices: RowsBySlice | None = None,
        facts: Mapping[str, Any] | None = None,
        **about: Any,
    ) -> MeasuredModel:
        """Compute all metrics with their intervals, and the sums of each slice.

        Args:
            resamples: Number of bootstrap resamples of users.
            slices: Parts of the rows to measure too.
            facts: Further entries of `metrics.json`.
            about: Further attributes of the `MeasuredModel`.

        Raises:
            UserError: A value is wrong; see `measure`.
        """
        sums = self.sum()
        grouped = sums.users > len(sums.tables["ranking"])
        of_slices = {
            (by, name): self.take(rows).sum(grouped)
            for by, named in (slices or {}).items()
            for name, rows in named.items()
        }
        summary = replace(summarise(sums, resamples), facts=dict(facts or {}))
        return MeasuredModel(sums, summary, slices=of_slices, **about)
