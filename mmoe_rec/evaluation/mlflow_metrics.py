"""The metrics of an evaluation as objects of MLflow, for those who call `mlflow.models.evaluate` on predictions.

MLflow calls each for itself; they are computed together, once for the same predictions. A metric has its `value`, and
the ends of its interval over users, `low` and `high`, where there are any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mmoe_rec.evaluation.metrics import metrics_of
from mmoe_rec.evaluation.summary import GroupSummary, summarise
from mmoe_rec.evaluation.sums import MeasuredTask, measure

if TYPE_CHECKING:
    from mlflow.models import EvaluationMetric

_TASK = "task"


def metrics_of_task(
    users: Any,
    requests: Any,
    *,
    kind: Literal["binary", "regression"] = "binary",
    weight: Any = None,
    resamples: int = 1000,
) -> list[EvaluationMetric]:
    """All metrics of one task's predictions.

    users, requests: (N,) integers or strings of the rows, in the order of the data that MLflow is given; weight: (N,)
    above 0, what each row counts; None is 1 each; resamples: of users, for the intervals; at least 1. Calling one
    raises UserError for rows of another number, or values that are no predictions or labels.
    """
    from mlflow.metrics import MetricValue
    from mlflow.models import make_metric

    of_rows = np.asarray(users), np.asarray(requests), None if weight is None else np.asarray(weight)
    last: list[tuple[np.ndarray, np.ndarray, GroupSummary]] = []  # of the predictions that were asked for last

    def summary_of(given: Any, targets: Any) -> GroupSummary:
        predictions, labels = (np.asarray(each, np.float64) for each in (given, targets))
        for before, known, summary in last:
            if np.array_equal(before, predictions) and np.array_equal(known, labels, equal_nan=True):
                return summary
        user, request, each = of_rows
        if len(predictions) == 1 < len(user):  # MLflow tries each metric on the first row
            user, request, each = user[:1], request[:1], None
        task = MeasuredTask(_TASK, kind)
        sums = measure([task], user, request, {_TASK: predictions}, {_TASK: labels}, score=predictions, weight=each)
        last[:] = [(predictions, labels, summarise(sums, resamples).tasks[_TASK])]
        return last[0][2]

    def compute(name: str) -> Callable[[Any, Any], MetricValue]:
        def computed(predictions: Any, targets: Any) -> MetricValue:
            ends = asdict(summary_of(predictions, targets).get(name))
            return MetricValue(aggregate_results={end: each for end, each in ends.items() if each is not None})

        computed.__name__ = name
        return computed

    return [
        make_metric(
            eval_fn=compute(metric.name),
            greater_is_better=metric.better != "lower",
            name=metric.name,
            metric_details=metric.label,
        )
        for metric in metrics_of(kind)
    ]
