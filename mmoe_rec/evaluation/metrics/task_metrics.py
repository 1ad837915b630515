"""Metrics of tasks over observed rows: ranking and calibration of binary tasks, and errors of regressions.

GAUC is the mean AUC of groups (users or requests) with both classes, weighted by their observed rows (Zhou et al.,
2018). If rows have weights, a row contributes to each metric in proportion to its weight.

The value of each metric is exact. Only AUC and average precision in resamples are approximations, if there are more
than `MAX_BINS` different predictions. Predictions are then binned, and rows of one bin count as ties. Each resampled
value is shifted by the difference between the exact and the binned value of all rows (`BinnedRows`).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from mmoe_rec.auc import auc_of_counts, average_precision_of_counts, grouped_auc
from mmoe_rec.evaluation.intervals import Replicates, bootstrap
from mmoe_rec.evaluation.metrics.metric import Metric, Ratio, Resamples, TaskRows, UserSums, ratio

MAX_BINS = 4_096
AreaFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Function that computes the area under a curve, shape (...).

The arguments are the weights of positive and of negative rows in B bins of rising prediction, (B, ...) each.
"""
_ROUNDING = 1e-12  # variance, as a fraction of the mean square, up to which labels count as equal
_MIN_PROBABILITY = float(np.finfo(np.float32).eps)
_TINY = np.finfo(float).tiny
_DENSE_FROM = 0.05  # fraction of nonzero cells from which a dense matrix is faster


class BinnedRows:
    """Weights of a binary task's rows, from which areas under curves are computed in resamples of users.

    Areas in resamples use the weights of positive and of negative rows by user and bin of the prediction. Exact areas
    of all rows use the weights by predicted value.
    """

    def __init__(self, sums: UserSums) -> None:
        assert sums.bins is not None  # only binary tasks have bins
        assert sums.counts is not None
        _, *self._by_value = counts_by_value(*(column.to_numpy() for column in sums.counts.columns))
        self._corrections: dict[AreaFunction, float] = {}
        both_classes = [sums.bins[name].to_numpy() for name in ("label", "negative")]
        bins, bin_index = np.unique(sums.bins["bin"].to_numpy(), return_inverse=True)
        shape, user = (len(bins), len(sums.users)), sums.index(sums.bins["user"])
        # A dense matrix is stored in single precision, which is exact only for whole numbers below 2^24.
        is_whole = all((class_weights == np.rint(class_weights)).all() for class_weights in both_classes)
        is_small = is_whole and np.bincount(bin_index, sum(both_classes), len(bins)).max(initial=0) < 2**24
        is_dense = is_small and len(bin_index) > _DENSE_FROM * shape[0] * shape[1]
        self._by_bin = []
        for class_weights in both_classes:
            by_user = csr_matrix((class_weights, (bin_index, user)), shape)
            by_user.eliminate_zeros()
            self._by_bin.append(by_user.astype(np.float32).toarray() if is_dense else by_user)

    def compute_area(self, area: AreaFunction, resamples: Resamples) -> np.ndarray:
        """Compute an area in resamples. The area is exact in a resample that draws each user once.

        Args:
            area: Function that computes the area.
            resamples: R resamples of users.

        Returns:
            Areas, shape (R,).
        """
        counts = resamples.counts.astype(np.float32) if isinstance(self._by_bin[0], np.ndarray) else resamples.counts
        areas = area(*((weights @ counts).astype(np.float64) for weights in self._by_bin))
        if area not in self._corrections:
            binned = area(*(np.asarray(weights.sum(axis=1), np.float64).ravel() for weights in self._by_bin))
            self._corrections[area] = float(area(*self._by_value) - binned)
        return np.clip(areas + self._corrections[area], 0.0, 1.0)


def counts_by_value(
    values: np.ndarray, positives: np.ndarray, negatives: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Add up the weights of rows with equal predicted values.

    Args:
        values: Predicted value of each row, shape (N,).
        positives: Weight of each row, 0 for negative rows, shape (N,).
        negatives: Weight of each row, 0 for positive rows, shape (N,).

    Returns:
        V rising distinct values, and the total weights of positive and of negative rows of each value, all (V,).
    """
    distinct, index = np.unique(values, return_inverse=True)
    return distinct, np.bincount(index, positives, len(distinct)), np.bincount(index, negatives, len(distinct))


def bin_edges(values: np.ndarray, positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """Return edges of bins of predicted values.

    Each value has a bin of its own if there are at most `MAX_BINS` values. Otherwise the sum of a bin's fraction of all
    positive rows and its fraction of all negative rows is about equal in all bins. Bins are therefore narrow wherever a
    class has many rows, however rare positive rows are.

    Args:
        values: Distinct predicted values in rising order, shape (V,).
        positives: Total weight of positive rows of each value, shape (V,).
        negatives: Total weight of negative rows of each value, shape (V,).

    Returns:
        First value of each of the B bins except for the first bin, shape (B - 1,).
    """
    if len(values) <= MAX_BINS:
        return values[1:]
    mass = positives / max(positives.sum(), _TINY) + negatives / max(negatives.sum(), _TINY)
    bins = _assign_equal_mass_bins(np.arange(len(values)), mass, MAX_BINS)
    return values[1:][np.diff(bins) > 0]


def _assign_equal_mass_bins(values: np.ndarray, mass: np.ndarray, bins: int) -> np.ndarray:
    """Return the bin of each of N values, (N,) int64. Bins have rising values and about equal sums of `mass` (N,).

    Equal values share a bin, and no bin is empty.
    """
    distinct, index = np.unique(values, return_inverse=True)
    mass_by_value = np.bincount(index, mass, len(distinct))
    middle = np.cumsum(mass_by_value) - 0.5 * mass_by_value
    bin_of_value = np.minimum((bins * middle / max(mass_by_value.sum(), _TINY)).astype(np.int64), bins - 1)
    return np.unique(bin_of_value, return_inverse=True)[1][index]


class Auc(Metric[TaskRows]):
    """Area under the ROC curve over all observed rows."""

    name, kinds, better, is_fraction = "auc", ("binary",), "higher", True

    def summarize(self, resamples: Resamples) -> np.ndarray:
        return resamples.sums.cached(BinnedRows).compute_area(auc_of_counts, resamples)


class AveragePrecision(Auc):
    """Area under the precision-recall curve, without interpolation, over all observed rows."""

    name = "average_precision"

    def summarize(self, resamples: Resamples) -> np.ndarray:
        return resamples.sums.cached(BinnedRows).compute_area(average_precision_of_counts, resamples)


class Gauc(Ratio[TaskRows]):
    """Mean AUC within users or requests (`by`), weighted by the weight of their rows."""

    kinds, better, is_within_group, is_fraction = ("binary",), "higher", True, True

    def __init__(self, by: str) -> None:
        self.by, self.name = by, f"gauc_{by}"
        self.required_sums = (f"{by}_auc", f"{by}_auc_weight")

    def measure(self, rows: TaskRows) -> dict[str, np.ndarray]:
        """Return numerator and denominator of the weighted mean AUC, and counts of groups that the mean leaves out.

        A user or request with both classes contributes AUC x weight and its weight. A single class gives no AUC, so
        the user or request and its rows are only counted.
        """
        group = getattr(rows, self.by)
        positives, negatives = rows.weight * rows.label, rows.weight * (1 - rows.label)
        count = int(group.max(initial=-1)) + 1
        auc = grouped_auc(group, rows.prediction, positives, negatives, count)
        has_both_classes, weight = ~np.isnan(auc), np.bincount(group, rows.weight, count)
        sums = {
            f"single_class_{self.by}s": (~has_both_classes).astype(np.int64),
            f"single_class_{self.by}_rows": np.where(has_both_classes, 0, np.bincount(group, minlength=count)),
            f"{self.by}_auc_weight": np.where(has_both_classes, weight, 0.0),
            f"{self.by}_auc": weight * np.nan_to_num(auc),
        }
        return rows.assign_to_first_rows(group, sums)

    def details(self, sums: UserSums, resamples: int) -> dict[str, Any]:
        """Return the number of users or requests that the metric leaves out, and the fraction of rows in them.

        Args:
            sums: Sums of the users.
            resamples: Not used.
        """
        single, rows = (int(sums.column(f"single_class_{self.by}{suffix}").sum()) for suffix in ("s", "_rows"))
        observed = sums.column("rows").sum()
        fraction = float(rows / observed) if observed else None
        return {f"single_class_{self.by}s": {"count": single, "fraction_of_rows": fraction}}


class Logloss(Ratio[TaskRows]):
    """Mean negative log likelihood of the labels, in nats.

    Probabilities are rounded to float32 and clipped to [eps, 1 - eps] with float32's machine precision, as scikit-learn
    does. Probabilities in float64 are rounded too, so that the type in a file doesn't change a comparison.
    """

    name, kinds, better, required_sums = "logloss", ("binary",), "lower", ("logloss", "weight")

    def measure(self, rows: TaskRows) -> dict[str, np.ndarray]:
        clipped = np.clip(rows.prediction.astype(np.float32).astype(np.float64), _MIN_PROBABILITY, 1 - _MIN_PROBABILITY)
        return {"logloss": -rows.weight * np.where(rows.label == 1, np.log(clipped), np.log1p(-clipped))}


class NormalizedEntropy(Metric[TaskRows]):
    """Log loss divided by the entropy of the base rate (He et al., 2014)."""

    name = "normalized_entropy"
    kinds = ("binary",)
    better = "lower"
    required_sums = ("logloss", "label", "weight", "positives", "rows")

    def summarize(self, resamples: Resamples) -> np.ndarray:
        rate = ratio(resamples["label"], resamples["weight"])
        # Counts show whether both labels occur. Weighted sums can't show it, because they have rounding errors.
        has_both_classes = (
            (resamples["positives"] > 0) & (resamples["positives"] < resamples["rows"]) & (rate > 0) & (rate < 1)
        )
        inside = np.where(has_both_classes, rate, 0.5)
        entropy = -inside * np.log(inside) - (1 - inside) * np.log1p(-inside)
        return ratio(ratio(resamples["logloss"], resamples["weight"]), np.where(has_both_classes, entropy, 0.0))


class CalibrationRatio(Ratio[TaskRows]):
    """Sum of the predictions divided by the sum of the labels."""

    name, kinds, better, required_sums = "calibration", ("binary",), "one", ("prediction", "label")


class ExpectedCalibrationError(Metric[TaskRows]):
    """Mean of |mean predicted - observed rate| over ten bins of equal weight (Naeini et al., 2015).

    Rows with equal predictions share a bin. There is no interval, because resampling biases a mean of absolute values
    upward.
    """

    name, kinds, better, has_interval = "ece", ("binary",), "lower", False

    def summarize(self, resamples: Resamples) -> np.ndarray:
        bin_index, columns = _equal_bins(resamples.sums)
        bins = {name: np.bincount(bin_index, column)[:, None] for name, column in columns.items()}
        return ratio(np.abs(bins["prediction"] - bins["label"]).sum(axis=0), bins["weight"].sum(axis=0))

    def details(self, sums: UserSums, resamples: int) -> dict[str, Any]:
        """Return the bins for a calibration plot.

        Args:
            sums: Sums of the users.
            resamples: Number of resamples for intervals of observed rates.
        """
        return {"calibration_bins": _calibration_bins(sums, resamples)}


def _equal_bins(sums: UserSums) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Merge the bins of the table `TASK.bins` into ten bins of equal weight.

    Returns:
        Number of the merged bin for each row of the table, and the columns of the table by name.
    """
    assert sums.bins is not None  # only binary tasks have bins
    names = ("rows", "positives", "label", "negative", "prediction")
    columns = {name: sums.bins[name].to_numpy().astype(np.float64) for name in names}
    columns["weight"] = columns["label"] + columns["negative"]
    return _assign_equal_mass_bins(sums.bins["bin"].to_numpy(), columns["weight"], 10), columns


def _calibration_bins(sums: UserSums, resamples: int) -> list[dict[str, Any]]:
    """Return mean prediction and observed rate of each bin, with a 95% interval of the rate (None for a single user).

    The interval resamples users in fixed bins. Means and rates are weighted by the weights of the rows.
    """
    place, columns = _equal_bins(sums)
    if not len(place):
        return []
    assert sums.bins is not None
    total = {name: np.bincount(place, column) for name, column in columns.items()}
    count, user = len(total["weight"]), sums.index(sums.bins["user"])
    weight, label = (csr_matrix((columns[key], (place, user)), (count, len(sums.users))) for key in ("weight", "label"))

    def observed_rates(counts: np.ndarray) -> Replicates:
        return dict(enumerate(ratio(label @ counts, weight @ counts)))

    rates = bootstrap(observed_rates, len(sums.users), resamples)
    return [
        {
            "rows": int(total["rows"][number]),
            "weight": float(total["weight"][number]),
            "mean_predicted": float(total["prediction"][number] / total["weight"][number]),
            "observed_rate": rate.value,
            "low": rate.low,
            "high": rate.high,
        }
        for number, rate in enumerate(rates[place].interval(is_fraction=True) for place in range(count))
    ]


class RootMeanSquaredError(Ratio[TaskRows]):
    """Root of the mean squared error."""

    name, kinds, better, required_sums = "rmse", ("regression",), "lower", ("squared_error", "weight")

    def measure(self, rows: TaskRows) -> dict[str, np.ndarray]:
        return {"squared_error": rows.weight * (rows.prediction - rows.label) ** 2}

    def summarize(self, resamples: Resamples) -> np.ndarray:
        return np.sqrt(super().summarize(resamples))


class MeanAbsoluteError(Ratio[TaskRows]):
    """Mean absolute error."""

    name, kinds, better, required_sums = "mae", ("regression",), "lower", ("absolute_error", "weight")

    def measure(self, rows: TaskRows) -> dict[str, np.ndarray]:
        return {"absolute_error": rows.weight * np.abs(rows.prediction - rows.label)}


class RSquared(Metric[TaskRows]):
    """Coefficient of determination: 1 - mean squared error / variance of the labels."""

    name, kinds, better, required_sums = "r2", ("regression",), "higher", ("squared_error", "weight")

    def measure(self, rows: TaskRows) -> dict[str, np.ndarray]:
        """Return contributions from which the variance of labels is computed without loss of precision.

        They are weighted distances and squared distances of labels from the label of the unit's first row, and this
        label. From sums of labels and of squared labels, the mean of squares minus the square of the mean would have
        no correct digit if labels are large compared with their standard deviation, such as 1.7e9 +- 100.
        """
        origin = rows.label[np.unique(rows.unit, return_index=True)[1]]
        distance = rows.label - origin[rows.unit]
        sums = {"label_distance": rows.weight * distance, "label_squares": rows.weight * distance**2}
        return sums | rows.assign_to_first_rows(rows.unit, {"label_origin": origin})

    def summarize(self, resamples: Resamples) -> np.ndarray:
        mean_squared_error = ratio(resamples["squared_error"], resamples["weight"])
        return 1 - ratio(mean_squared_error, resamples.sums.cached(_Spread).variance(resamples.counts))


class _Spread:
    """Sums from which variances of labels in resamples of users are computed."""

    def __init__(self, sums: UserSums) -> None:
        weight, origin, distance, squares = (
            sums.column(name) for name in ("weight", "label_origin", "label_distance", "label_squares")
        )
        # Move the origin to the median label, so that equal labels give exact zeros.
        moved = origin - np.sort(origin[weight > 0])[(weight > 0).sum() // 2] if weight.any() else origin
        self._sums = np.stack([weight, distance + moved * weight, squares + 2 * moved * distance + moved**2 * weight])

    def variance(self, counts: np.ndarray) -> np.ndarray:
        """Return the variance of the labels in each of R resamples, shape (R,). `counts` has shape (U, R).

        The variance is exactly 0 if all labels are equal, and NaN if there are no labels.
        """
        weight, distance, squares = self._sums @ counts
        mean_square = ratio(squares, weight)
        variance = mean_square - ratio(distance, weight) ** 2
        return np.where(variance <= _ROUNDING * mean_square, 0.0, variance)
