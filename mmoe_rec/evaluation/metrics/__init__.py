"""All metrics of an evaluation: a new one is a class in `tasks` or `ranking`, and a line here."""

from typing import Any

from mmoe_rec.evaluation.metrics import lists as ranking
from mmoe_rec.evaluation.metrics import tasks
from mmoe_rec.evaluation.metrics.metric import Metric

CUTOFFS = (5, 10)
"""How many rows of a list metrics of its first rows take."""

METRICS: tuple[Metric[Any], ...] = (
    tasks.Auc(),
    tasks.AveragePrecision(),
    tasks.Gauc("user"),
    tasks.Gauc("request"),
    tasks.Logloss(),
    tasks.NormalisedEntropy(),
    tasks.CalibrationRatio(),
    tasks.ExpectedCalibrationError(),
    tasks.RootMeanSquaredError(),
    tasks.MeanAbsoluteError(),
    tasks.RSquared(),
    *ranking.list_metrics(CUTOFFS),
)
"""All metrics of tasks and of the score, in the order in which tables show them."""

CATALOGUE_METRICS = tuple(
    ranking.CatalogueMetric(metric, "lower" if metric is ranking.gini else "higher", cutoff, cutoff == max(CUTOFFS))
    for metric in (ranking.coverage, ranking.gini, ranking.novelty)
    for cutoff in CUTOFFS
)
"""Metrics of all requests together, where candidates are known."""


def metrics_of(kind: str) -> list[Metric[Any]]:
    """Those of tasks of this kind, or of the `score`, in a summary's order: losses first, what has no interval last."""
    found = [metric for metric in METRICS if metric.is_of(kind)]
    return sorted(found, key=lambda metric: (not metric.has_interval, metric.better != "lower"))
