"""Metrics of tasks, over observed rows: of a binary one how its predictions rank rows, and how good they are as
probabilities; of a regression its errors.

GAUC is the mean AUC of groups with both classes, weighted by their observed rows (Zhou et al., 2018) or not. Rows that
have weights count by them. All are exact. In resamples of users, AUC and average precision over all rows are computed
from `MAX_BINS` bins where there are more predicted values than that, as if rows of one bin were ties, and corrected by
what that changes for the rows themselves (`BinnedRows`).
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
"""Takes numbers of positive and of negative rows by rising value, (B, ...) each, and gives (...) areas."""
_ROUNDING = 1e-12  # as a share of the mean square: what is left of equal labels
_LEAST_CHANCE = float(np.finfo(np.float32).eps)
_TINY = np.finfo(float).tiny
_DENSE_FROM = 0.05  # of all cells, from which share on a dense matrix is faster


class BinnedRows:
    """Weights of the rows of both classes by user and bin of the predicted value, and by value."""

    def __init__(self, sums: UserSums) -> None:
        assert sums.bins is not None  # of a binary task
        assert sums.counts is not None
        _, *self._by_value = counts_by_value(*(column.to_numpy() for column in sums.counts.columns))
        self._corrections: dict[AreaFunction, float] = {}
        both = [sums.bins[name].to_numpy() for name in ("label", "negative")]
        bins, place = np.unique(sums.bins["bin"].to_numpy(), return_inverse=True)
        shape, user = (len(bins), len(sums.users)), sums.index(sums.bins["user"])
        # Single precision has whole numbers of rows in a bin only, and up to a size.
        is_whole = all((class_weights == np.rint(class_weights)).all() for class_weights in both)
        is_small = is_whole and np.bincount(place, sum(both), len(bins)).max(initial=0) < 2**24
        is_dense = is_small and len(place) > _DENSE_FROM * shape[0] * shape[1]
        self._by_bin = []
        for class_weights in both:
            by_user = csr_matrix((class_weights, (place, user)), shape)
            by_user.eliminate_zeros()
            self._by_bin.append(by_user.astype(np.float32).toarray() if is_dense else by_user)

    def compute_area(self, area: AreaFunction, resamples: Resamples) -> np.ndarray:
        """(R,) an area; exact where all are drawn once."""
        counts = resamples.counts.astype(np.float32) if isinstance(self._by_bin[0], np.ndarray) else resamples.counts
        found = area(*((weights @ counts).astype(np.float64) for weights in self._by_bin))
        if area not in self._corrections:
            binned = area(*(np.asarray(weights.sum(axis=1), np.float64).ravel() for weights in self._by_bin))
            self._corrections[area] = float(area(*self._by_value) - binned)
        return np.clip(found + self._corrections[area], 0.0, 1.0)


def counts_by_value(
    values: np.ndarray, positives: np.ndarray, negatives: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct ones of N values, rising, with all positive and negative rows of each."""
    distinct, place = np.unique(values, return_inverse=True)
    return distinct, np.bincount(place, positives, len(distinct)), np.bincount(place, negatives, len(distinct))


def bin_edges(values: np.ndarray, positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """(B - 1,) the first value of each bin but the first, of (V,) rising values with numbers of rows.

    A bin for each value, if there are at most `MAX_BINS`; else bins of about equal shares of both classes, so that
    they are narrow where there are many rows of either class, however rare positive ones are.
    """
    if len(values) <= MAX_BINS:
        return values[1:]
    mass = positives / max(positives.sum(), _TINY) + negatives / max(negatives.sum(), _TINY)
    bins = assign_equal_mass_bins(np.arange(len(values)), mass, MAX_BINS)
    return values[1:][np.diff(bins) > 0]


def assign_equal_mass_bins(values: np.ndarray, mass: np.ndarray, bins: int) -> np.ndarray:
    """(N,) int64, the bin of each of N values of some mass: at most so many, of rising value and about equal mass.

    Equal values share a bin, and no bin is empty.
    """
    distinct, place = np.unique(values, return_inverse=True)
    each = np.bincount(place, mass, len(distinct))
    middle = np.cumsum(each) - 0.5 * each
    found = np.minimum((bins * middle / max(each.sum(), _TINY)).astype(np.int64), bins - 1)
    return np.unique(found, return_inverse=True)[1][place]


class Auc(Metric[TaskRows]):
    """Area under the ROC curve over all observed rows."""

    name, kinds, better, is_fraction = "auc", ("binary",), "higher", True

    def summarize(self, resamples: Resamples) -> np.ndarray:
        return resamples.sums.cached(BinnedRows).compute_area(auc_of_counts, resamples)


class AveragePrecision(Auc):
    """Area under the curve of precision by recall, in steps, over all observed rows."""

    name = "average_precision"

    def summarize(self, resamples: Resamples) -> np.ndarray:
        return resamples.sums.cached(BinnedRows).compute_area(average_precision_of_counts, resamples)


class Gauc(Ratio[TaskRows]):
    """Mean AUC within users, or within requests, weighted by their rows.

    by: `user` or `request`.
    """

    kinds, better, is_within_group, is_fraction = ("binary",), "higher", True, True

    def __init__(self, by: str) -> None:
        self.by, self.name = by, f"gauc_{by}"
        self.required_sums = (f"{by}_auc", f"{by}_auc_weight")

    def measure(self, rows: TaskRows) -> dict[str, np.ndarray]:
        """The groups of a single class and their rows; of the others, their rows by weight, and AUC x that."""
        group = getattr(rows, self.by)
        positives, negatives = rows.weight * rows.label, rows.weight * (1 - rows.label)
        count = int(group.max(initial=-1)) + 1
        auc = grouped_auc(group, rows.prediction, positives, negatives, count)
        both, weight = ~np.isnan(auc), np.bincount(group, rows.weight, count)
        sums = {
            f"single_class_{self.by}s": (~both).astype(np.int64),
            f"single_class_{self.by}_rows": np.where(both, 0, np.bincount(group, minlength=count)),
            f"{self.by}_auc_weight": np.where(both, weight, 0.0),
            f"{self.by}_auc": weight * np.nan_to_num(auc),
        }
        return rows.assign_to_first_rows(group, sums)

    def details(self, sums: UserSums, resamples: int) -> dict[str, Any]:
        """The users or requests that are left out."""
        single, rows = (int(sums.column(f"single_class_{self.by}{each}").sum()) for each in ("s", "_rows"))
        observed = sums.column("rows").sum()
        share = float(rows / observed) if observed else None
        return {f"single_class_{self.by}s": {"count": single, "fraction_of_rows": share}}


class Logloss(Ratio[TaskRows]):
    """Mean negative log likelihood of the labels, in nats.

    Probabilities are rounded to float32 and clipped to [eps, 1 - eps], eps being its machine precision, as scikit-learn
    clips. So they are if they come as float64: what is compared may not differ by the type of a file.
    """

    name, kinds, better, required_sums = "logloss", ("binary",), "lower", ("logloss", "weight")

    def measure(self, rows: TaskRows) -> dict[str, np.ndarray]:
        clipped = np.clip(rows.prediction.astype(np.float32).astype(np.float64), _LEAST_CHANCE, 1 - _LEAST_CHANCE)
        return {"logloss": -rows.weight * np.where(rows.label == 1, np.log(clipped), np.log1p(-clipped))}


class NormalizedEntropy(Metric[TaskRows]):
    """The logloss over the entropy of the base rate (He et al., 2014)."""

    name, kinds, better, required_sums = (
        "normalized_entropy",
        ("binary",),
        "lower",
        ("logloss", "label", "weight", "positives", "rows"),
    )

    def summarize(self, resamples: Resamples) -> np.ndarray:
        rate = ratio(resamples["label"], resamples["weight"])
        # Counts decide whether both labels are there. Two sums of the same weights differ by rounding.
        both = (resamples["positives"] > 0) & (resamples["positives"] < resamples["rows"]) & (rate > 0) & (rate < 1)
        inside = np.where(both, rate, 0.5)
        entropy = -inside * np.log(inside) - (1 - inside) * np.log1p(-inside)
        return ratio(ratio(resamples["logloss"], resamples["weight"]), np.where(both, entropy, 0.0))


class CalibrationRatio(Ratio[TaskRows]):
    """The sum of the predictions over the sum of the labels."""

    name, kinds, better, required_sums = "calibration", ("binary",), "one", ("prediction", "label")


class ExpectedCalibrationError(Metric[TaskRows]):
    """Mean over ten bins of equal mass, by weight, of |mean predicted - observed rate| (Naeini et al., 2015).

    Rows of one prediction share a bin. It has no interval, as resampling biases a mean of absolute values upward.
    """

    name, kinds, better, has_interval = "ece", ("binary",), "lower", False

    def summarize(self, resamples: Resamples) -> np.ndarray:
        place, columns = _equal_bins(resamples.sums)
        bins = {name: np.bincount(place, column)[:, None] for name, column in columns.items()}
        return ratio(np.abs(bins["prediction"] - bins["label"]).sum(axis=0), bins["weight"].sum(axis=0))

    def details(self, sums: UserSums, resamples: int) -> dict[str, Any]:
        """The bins, for a plot."""
        return {"calibration_bins": _calibration_bins(sums, resamples)}


def _equal_bins(sums: UserSums) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The bin of rising prediction and equal weight of each row of the table of bins, and that table's columns."""
    assert sums.bins is not None  # of a binary task
    names = ("rows", "positives", "label", "negative", "prediction")
    columns = {name: sums.bins[name].to_numpy().astype(np.float64) for name in names}
    columns["weight"] = columns["label"] + columns["negative"]
    return assign_equal_mass_bins(sums.bins["bin"].to_numpy(), columns["weight"], 10), columns


def _calibration_bins(sums: UserSums, resamples: int) -> list[dict[str, Any]]:
    """One dict a bin: `rows`, `weight`, `mean_predicted`, and `observed_rate` with its 95% interval `low` and `high`
    (None for a single user), which redraws users and leaves the bins where they are. Means are weighted.
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

    found = bootstrap(observed_rates, len(sums.users), resamples)
    return [
        {
            "rows": int(total["rows"][number]),
            "weight": float(total["weight"][number]),
            "mean_predicted": float(total["prediction"][number] / total["weight"][number]),
            "observed_rate": rate.value,
            "low": rate.low,
            "high": rate.high,
        }
        for number, rate in enumerate(found[place].interval(is_fraction=True) for place in range(count))
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
    """The coefficient of determination: 1 - mean squared error / variance of the labels."""

    name, kinds, better, required_sums = "r2", ("regression",), "higher", ("squared_error", "weight")

    def measure(self, rows: TaskRows) -> dict[str, np.ndarray]:
        """The label of the user's first row, `label_origin`, and the weighted sums of the distances from it,
        `label_distance`, and of their squares.

        The mean of squares less the square of the mean cancels where labels are large beside their deviation: for
        labels of 1.7e9 +- 100, float64 keeps nothing of it.
        """
        origin = rows.label[np.unique(rows.unit, return_index=True)[1]]
        distance = rows.label - origin[rows.unit]
        sums = {"label_distance": rows.weight * distance, "label_squares": rows.weight * distance**2}
        return sums | rows.assign_to_first_rows(rows.unit, {"label_origin": origin})

    def summarize(self, resamples: Resamples) -> np.ndarray:
        mean_squared_error = ratio(resamples["squared_error"], resamples["weight"])
        return 1 - ratio(mean_squared_error, resamples.sums.cached(_Spread).variance(resamples.counts))


class _Spread:
    """Variances of labels in resamples of users."""

    def __init__(self, sums: UserSums) -> None:
        weight, origin, distance, squares = (
            sums.column(name) for name in ("weight", "label_origin", "label_distance", "label_squares")
        )
        # About the label in the middle, which equal labels all are.
        moved = origin - np.sort(origin[weight > 0])[(weight > 0).sum() // 2] if weight.any() else origin
        self._sums = np.stack([weight, distance + moved * weight, squares + 2 * moved * distance + moved**2 * weight])

    def variance(self, counts: np.ndarray) -> np.ndarray:
        """(R,) float64 for `counts` (U, R) of each user; 0 where all labels are equal, NaN where there are none."""
        weight, distance, squares = self._sums @ counts
        mean_square = ratio(squares, weight)
        variance = mean_square - ratio(distance, weight) ** 2
        return np.where(variance <= _ROUNDING * mean_square, 0.0, variance)
