"""What decides which of several models is better: one number, named before anything is measured."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmoe_rec.auc import FEWEST
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.closed import ClosedSums
from mmoe_rec.evaluation.metrics.metric import Metric
from mmoe_rec.evaluation.metrics.registered import METRICS
from mmoe_rec.evaluation.metrics.resampling import Values

SCORE = "score"


@dataclass(frozen=True)
class Objective:
    """A metric of the score, or the mean of one over tasks.

    groups: `score`, or the tasks; better: which values are, higher or lower.
    """

    metric: str
    groups: tuple[str, ...]
    better: str

    @staticmethod
    def of(decide_by: str, sums: ClosedSums, tasks: Collection[str]) -> Objective | None:
        """That of a setting: a metric of tasks, such as `auc`, or of the score, such as `score.ndcg_at_10`.

        That of tasks is the mean over the `tasks` which have it and labels enough to judge by; where none has, R2 of
        the regressions, and None where there are none either. Raises UserError for what is no such metric.
        """
        metric = _asked(decide_by)
        if decide_by.startswith(f"{SCORE}."):
            return Objective(metric.name, (SCORE,), metric.better)
        for each in (metric, _asked("r2")):
            kinds = {task.name: task.kind for task in sums.tasks if task.kind in each.kinds}
            if judged := tuple(task for task in tasks if task in kinds and rarer(sums, task) >= FEWEST):
                return Objective(each.name, judged, each.better)
        return None

    @property
    def name(self) -> str:
        """In words."""
        if self.groups == (SCORE,):
            return f"{self.metric} of the score"
        return f"{'mean ' if len(self.groups) > 1 else ''}{self.metric} of {', '.join(self.groups)}"

    def of_values(self, values: Values) -> np.ndarray:
        """(R,) float64, of the values of all metrics."""
        return np.asarray(np.mean([values[group, self.metric] for group in self.groups], axis=0))


def check_objective(decide_by: str) -> None:
    """Raises UserError for a setting that names no metric by which models can be told apart."""
    _asked(decide_by)


def rarer(sums: ClosedSums, task: str) -> int:
    """How many rows have the rarer label of a binary task, or an observed label of a regression."""
    table = sums.tables[f"{task}.users"]
    rows = int(table["rows"].to_numpy().sum())
    if "positives" not in table.column_names:
        return rows
    positives = int(table["positives"].to_numpy().sum())
    return min(positives, rows - positives)


def _asked(decide_by: str) -> Metric[Any]:
    group, _, name = decide_by.rpartition(".")
    for metric in METRICS:
        is_of = SCORE in metric.kinds if group == SCORE else {"binary", "regression"} & set(metric.kinds)
        if metric.name == name and group in ("", SCORE) and is_of and metric.has_interval and metric.better != "one":
            return metric
    raise UserError(
        f"evaluation.decide_by is '{decide_by}'; expected a metric of tasks, such as auc, gauc_user or logloss, or "
        "one of the score, such as score.ndcg_at_10"
    )
