"""All metrics of an evaluation.

To add a metric, write a class in `task_metrics` or `ranking_metrics`, and add it to `METRICS`.
"""

from typing import Any

from mmoe_rec.evaluation.metrics import ranking_metrics as ranking
from mmoe_rec.evaluation.metrics import task_metrics
from mmoe_rec.evaluation.metrics.metric import Metric

CUTOFFS = (5, 10)
"""Values of K for metrics of the first K rows, such as NDCG@K."""

METRICS: tuple[Metric[Any], ...] = (
    task_metrics.Auc(),
    task_metrics.AveragePrecision(),
    task_metrics.Gauc("user"),
    task_metrics.Gauc("request"),
    task_metrics.Logloss(),
    task_metrics.NormalizedEntropy(),
    task_metrics.CalibrationRatio(),
    task_metrics.ExpectedCalibrationError(),
    task_metrics.RootMeanSquaredError(),
    task_metrics.MeanAbsoluteError(),
    task_metrics.RSquared(),
    *ranking.make_ranking_metrics(CUTOFFS),
)
"""All metrics of tasks and of the score, in the order in which tables show them."""

CATALOG_METRICS = tuple(
    ranking.CatalogMetric(metric, "lower" if metric is ranking.gini else "higher", cutoff, cutoff == max(CUTOFFS))
    for metric in (ranking.coverage, ranking.gini, ranking.novelty)
    for cutoff in CUTOFFS
)
"""Metrics of the candidates that all requests show together. They need candidate IDs."""


def metrics_for_kind(kind: str) -> list[Metric[Any]]:
    """Return the metrics of a task kind or of `score`: first metrics to minimize, last metrics without intervals."""
    metrics = [metric for metric in METRICS if metric.applies_to(kind)]
    return sorted(metrics, key=lambda metric: (not metric.has_interval, metric.better != "lower"))
