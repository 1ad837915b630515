"""The metrics of an evaluation as objects of MLflow, for those who call `mlflow.models.evaluate` on predictions:

    frame = pandas.read_parquet("predictions")
    mlflow.models.evaluate(
        data=frame, predictions="predicted_bought", targets="label_bought",
        extra_metrics=metrics_of_task(frame["user"], frame["request"]),
    )

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
    from mlflow.metrics import MetricValue
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

    Args:
        users, requests: (N,) integers or strings of the rows, in the order of the data that MLflow is given.
        kind: of the task.
        weight: (N,) above 0, what each row counts; None is 1 each.
        resamples: of users, for the intervals; at least 1.

    Calling one raises UserError for rows of another number, or values that are no predictions or labels.
    """
    from mlflow.models import make_metric

    computed = _Computed(users, requests, kind, weight, resamples)
    return [
        make_metric(
            eval_fn=computed.of(metric.name),
            greater_is_better=metric.better != "lower",
            name=metric.name,
            metric_details=metric.label,
        )
        for metric in metrics_of(kind)
    ]


class _Computed:
    """The summary of the predictions that were asked for last."""

    def __init__(self, users: Any, requests: Any, kind: str, weight: Any, resamples: int) -> None:
        self._task = MeasuredTask(_TASK, kind, 1.0)  # type: ignore[arg-type]
        self._rows = (np.asarray(users), np.asarray(requests), None if weight is None else np.asarray(weight))
        self._resamples = resamples
        self._last: tuple[np.ndarray, np.ndarray, GroupSummary] | None = None

    def of(self, name: str) -> Callable[[Any, Any], MetricValue]:
        """What computes the metric of that name of predictions and targets, (N,) each."""

        def computed(predictions: Any, targets: Any) -> MetricValue:
            from mlflow.metrics import MetricValue

            given = np.asarray(predictions)
            given = given if given.dtype == np.float32 else given.astype(np.float64)  # its precision tells what 0 is
            ends = asdict(self._summary(given, np.asarray(targets, np.float64)).get(name))
            return MetricValue(aggregate_results={end: each for end, each in ends.items() if each is not None})

        computed.__name__ = name
        return computed

    def _summary(self, predictions: np.ndarray, targets: np.ndarray) -> GroupSummary:
        last = self._last
        if last is None or not (
            np.array_equal(last[0], predictions) and np.array_equal(last[1], targets, equal_nan=True)
        ):
            users, requests, weight = self._rows
            if len(predictions) == 1 < len(users):  # MLflow tries each metric on the first row
                users, requests, weight = users[:1], requests[:1], None
            given, labels = {_TASK: predictions}, {_TASK: targets}
            sums = measure([self._task], users, requests, given, labels, score=predictions, weight=weight)
            last = self._last = predictions, targets, summarise(sums, self._resamples).tasks[_TASK]
        return last[2]
