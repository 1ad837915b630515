"""All metrics of an evaluation."""

from typing import Any

from mmoe_rec.evaluation.metrics.auc import Auc, GaucRequest, GaucUser
from mmoe_rec.evaluation.metrics.metric import Metric
from mmoe_rec.evaluation.metrics.probability import Calibration, ExpectedCalibrationError, Logloss, NormalisedEntropy
from mmoe_rec.evaluation.metrics.ranking import MeanReciprocalRank, Ndcg
from mmoe_rec.evaluation.metrics.regression import MeanAbsoluteError, RootMeanSquaredError, RSquared

METRICS: tuple[Metric[Any], ...] = (
    Auc(),
    GaucUser(),
    GaucRequest(),
    Logloss(),
    NormalisedEntropy(),
    Calibration(),
    ExpectedCalibrationError(),
    RootMeanSquaredError(),
    MeanAbsoluteError(),
    RSquared(),
    Ndcg(5),
    Ndcg(10),
    MeanReciprocalRank(),
)
"""In the order in which tables show them."""


def metrics_of(kind: str) -> list[Metric[Any]]:
    """Those of a task of this kind, or of the `score`, in the order in which a summary has them: losses come first,
    and what has no interval comes last.
    """
    found = [metric for metric in METRICS if kind in metric.kinds]
    return sorted(found, key=lambda metric: (not metric.has_interval, metric.better != "lower"))
