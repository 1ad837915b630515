"""Results of evaluations as the files have them, which tests read by the documented keys."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mmoe_rec.evaluation import comparison, summary
from mmoe_rec.evaluation.results_report import comparison_to_dict, summary_to_dict
from mmoe_rec.evaluation.sums import EvaluationSums, MeasuredTask, PredictedRows
from mmoe_rec.settings.sections import Evaluation


def measure(
    tasks: Sequence[MeasuredTask],
    users: Any,
    requests: Any,
    predictions: Mapping[str, Any],
    labels: Mapping[str, Any],
    *,
    score: Any,
    weight: Any = None,
    candidates: Any = None,
    grouped: bool | None = None,
) -> EvaluationSums:
    """The sums of rows, with ids of NumPy."""
    ids = [None if item is None else pa.array(item) for item in (users, requests, candidates)]
    return PredictedRows(tuple(tasks), *ids, predictions, labels, np.asarray(score), weight).sum(grouped)


def summarize(*arguments: Any, **options: Any) -> dict[str, Any]:
    return summary_to_dict(summary.summarize(*arguments, **options))


def intervals(summary: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, float]]:
    """Group and metric -> value, low and high."""
    groups = {**summary["tasks"], "score": summary["score"]}
    return {
        (name, metric): value
        for name, group in groups.items()
        for metric, value in group.items()
        if isinstance(value, dict) and "low" in value
    }


def compare(
    sums: Mapping[str, EvaluationSums], model: str, tasks: Sequence[str] = (), resamples: int = 20
) -> dict[str, Any]:
    """tasks: those that decide, by their AUC."""
    models = {name: summary.MeasuredModel(item, summary.summarize(item, 1)) for name, item in sums.items()}
    compared = comparison.compare(models, model, tasks, Evaluation().model_copy(update={"resamples": resamples}))
    return comparison_to_dict(compared)
