"""How good the probabilities of a binary task are: as a loss, in sum, and in bins that hold equally many rows."""

from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from mmoe_rec.evaluation.intervals import Values, bootstrap, find_interval
from mmoe_rec.evaluation.metrics.auc import equal_mass, one_class
from mmoe_rec.evaluation.metrics.metric import Drawn, Metric, Ratio, TaskRows, UserSums, ratio

FINE_BINS = 50


class Logloss(Ratio[TaskRows]):
    """Mean negative log likelihood of the labels, in nats."""

    name, kinds, better, totals = "logloss", ("binary",), "lower", ("logloss", "weight")

    def measure(self, rows: TaskRows) -> dict[str, np.ndarray]:
        """`logloss`, of probabilities clipped as scikit-learn does."""
        clipped = np.clip(rows.prediction, rows.precision, 1 - rows.precision)
        return {"logloss": -rows.weight * np.where(rows.label == 1, np.log(clipped), np.log1p(-clipped))}


class NormalisedEntropy(Metric[TaskRows]):
    """The logloss over the entropy of the base rate (He et al., 2014)."""

    name, kinds, better, totals = "normalised_entropy", ("binary",), "lower", ("logloss", "label", "weight")
    why_undefined = one_class

    def summarise(self, drawn: Drawn) -> np.ndarray:
        entropy = _entropy(ratio(drawn["label"], drawn["weight"]))
        return ratio(ratio(drawn["logloss"], drawn["weight"]), entropy)


class CalibrationRatio(Ratio[TaskRows]):
    """The sum of the predictions over the sum of the labels."""

    name, kinds, better, totals = "calibration", ("binary",), "one", ("prediction", "label")
    why_undefined = one_class


class ExpectedCalibrationError(Metric[TaskRows]):
    """Mean over bins of equal mass, by weight, of |mean predicted - observed rate| (Naeini et al., 2015).

    It has no interval: it is a mean of absolute values, which resampling biases upward.
    """

    name, kinds, better, totals = "ece", ("binary",), "lower", ()
    has_interval = False

    def summarise(self, drawn: Drawn) -> np.ndarray:
        bins = drawn.sums.once(_Bins)
        weight, label, prediction = (each @ drawn.counts for each in (bins.weight, bins.label, bins.prediction))
        return ratio(np.abs(prediction - label).sum(axis=0), weight.sum(axis=0))

    def details(self, sums: UserSums, resamples: int, seed: int) -> dict[str, Any]:
        """The bins, for a plot; and how far rates deviate from probabilities, in finer ones."""
        bins = _calibration_bins(sums.once(_Bins), len(sums.users), resamples, seed)
        return {"calibration_bins": bins, "calibration_deviation": _deviation(sums)}


class _Bins:
    """Ten bins of rising prediction and equal mass.

    Rows of one prediction stay together, so masses differ where many rows share one, and there are fewer bins than ten
    where a single prediction holds more rows than a bin.

    Attributes:
        totals: `rows`, and the weighted `weight`, `label` and `prediction` -> (bins,) float64.
        weight, label, prediction: (bins, U), by user.
    """

    def __init__(self, sums: UserSums) -> None:
        bins = sums.bins
        assert bins is not None  # of a binary task
        columns = {name: bins[name].to_numpy() for name in ("rows", "label", "prediction")}
        columns["weight"] = columns["label"] + bins["negative"].to_numpy()
        place = equal_mass(bins["bin"].to_numpy(), columns["weight"], 10)
        used, user = int(place.max(initial=-1)) + 1, sums.index(bins["user"])
        self.totals = {name: np.bincount(place, each, used) for name, each in columns.items()}
        self.weight, self.label, self.prediction = (
            csr_matrix((columns[name], (place, user)), (used, len(sums.users)))
            for name in ("weight", "label", "prediction")
        )


def _deviation(sums: UserSums) -> dict[str, float]:
    """`squares`, the sum over `bins` of (positive rows - their expected number)^2 / its variance, which is about their
    number where the probabilities are right and rows independent; and `in_sum`, the deviation of the sum of all over
    its standard error. Rows count alike."""
    table = sums.bins
    assert table is not None  # of a binary task
    rows, positives, label, negative, prediction = (
        table[name].to_numpy().astype(np.float64) for name in ("rows", "positives", "label", "negative", "prediction")
    )
    place = equal_mass(table["bin"].to_numpy(), rows, FINE_BINS)
    mean = prediction / (label + negative)
    expected, variance = np.bincount(place, rows * mean), np.bincount(place, rows * mean * (1 - mean))
    apart, some = np.bincount(place, positives) - expected, variance > 0
    squares = float((apart[some] ** 2 / variance[some]).sum())
    in_sum = float(abs(apart.sum()) / np.sqrt(variance.sum())) if some.any() else 0.0
    return {"bins": int(some.sum()), "squares": squares, "in_sum": in_sum}


def _calibration_bins(bins: _Bins, users: int, resamples: int, seed: int) -> list[dict[str, Any]]:
    """One dict a bin: `rows`, `weight`, `mean_predicted`, and `observed_rate` with its 95% interval `low` and `high`
    (None for a single user), which redraws users and leaves the bins where they are. Means are weighted.
    """

    def observed_rates(counts: np.ndarray) -> Values:
        mass, label = bins.weight @ counts, bins.label @ counts
        return {("bin", str(i)): ratio(label[i], mass[i]) for i in range(len(mass))}

    total = bins.totals
    if not len(total["weight"]):
        return []
    resampled = bootstrap(observed_rates, users, resamples, seed)
    result = []
    for i, weight in enumerate(total["weight"]):
        rate = find_interval(total["label"][i] / weight, resampled["bin", str(i)], users)
        result.append(
            {
                "rows": int(total["rows"][i]),
                "weight": float(weight),
                "mean_predicted": float(total["prediction"][i] / weight),
                "observed_rate": rate.value,
                "low": rate.low,
                "high": rate.high,
            }
        )
    return result


def _entropy(rate: np.ndarray) -> np.ndarray:
    """(R,) float64 in nats; 0 for a rate of 0 or 1."""
    inside = np.where((rate > 0) & (rate < 1), rate, 0.5)
    entropy = -inside * np.log(inside) - (1 - inside) * np.log1p(-inside)
    return np.where(inside == rate, entropy, 0.0)
