"""All metrics of an evaluation."""

from __future__ import annotations

from typing import Any

from mmoe_rec.evaluation.metrics import auc, catalogue, probability, ranking, regression
from mmoe_rec.evaluation.metrics.metric import Metric

CUTOFFS = (5, 10)
"""Of metrics of the first rows of a list."""

METRICS: tuple[Metric[Any], ...] = (
    auc.Auc(),
    auc.AveragePrecision(),
    auc.GaucUser(),
    auc.GaucUserUnweighted(),
    auc.GaucRequest(),
    auc.GaucRequestUnweighted(),
    probability.Logloss(),
    probability.NormalisedEntropy(),
    probability.CalibrationRatio(),
    probability.ExpectedCalibrationError(),
    regression.RootMeanSquaredError(),
    regression.MeanAbsoluteError(),
    regression.RSquared(),
    *ranking.list_metrics(CUTOFFS),
)
"""In the order in which tables show them."""


CATALOGUE_METRICS = tuple(catalogue.catalogue_metrics(CUTOFFS))
"""Of all requests together, where candidates are known."""


def metrics_of(kind: str) -> list[Metric[Any]]:
    """Those of a task of this kind, or of the `score`, in the order in which a summary has them: losses come first,
    and what has no interval comes last.
    """
    found = [metric for metric in METRICS if kind in metric.kinds]
    return sorted(found, key=lambda metric: (not metric.has_interval, metric.better != "lower"))
