"""All metrics of an evaluation."""

from typing import Any

from mmoe_rec.evaluation.metrics import auc, probability, ranking, regression
from mmoe_rec.evaluation.metrics.metric import Metric

METRICS: tuple[Metric[Any], ...] = (
    auc.Auc(),
    auc.GaucUser(),
    auc.GaucRequest(),
    probability.Logloss(),
    probability.NormalisedEntropy(),
    probability.Calibration(),
    probability.ExpectedCalibrationError(),
    regression.RootMeanSquaredError(),
    regression.MeanAbsoluteError(),
    regression.RSquared(),
    ranking.Ndcg(5),
    ranking.Ndcg(10),
    ranking.MeanReciprocalRank(),
)
"""In the order in which tables show them."""


def metrics_of(kind: str) -> list[Metric[Any]]:
    """Those of a task of this kind, or of the `score`, in the order in which a summary has them: losses come first,
    and what has no interval comes last.
    """
    found = [metric for metric in METRICS if kind in metric.kinds]
    return sorted(found, key=lambda metric: (not metric.has_interval, metric.better != "lower"))
