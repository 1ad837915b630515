"""Errors of a regression, over observed rows.

R2 needs the spread of the labels, and the mean of squares less the square of the mean cancels: for labels of 1.7e9 +-
100, float64 keeps nothing of the deviation. Instead the sum of squares about the mean of each part is kept, which
merges by how far the means of the parts lie apart (Chan, Golub and LeVeque, 1983).
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from mmoe_rec.evaluation.metrics.metric import Drawn, Metric, Ratio, TaskRows, UserSums, ratio


class RootMeanSquaredError(Ratio[TaskRows]):
    """Root of the mean squared error."""

    name, kinds, better, totals = "rmse", ("regression",), "lower", ("squared_error", "weight")

    def measure(self, rows: TaskRows) -> dict[str, np.ndarray]:
        return {"squared_error": rows.weight * (rows.prediction - rows.label) ** 2}

    def summarise(self, drawn: Drawn) -> np.ndarray:
        return np.sqrt(super().summarise(drawn))


class MeanAbsoluteError(Ratio[TaskRows]):
    """Mean absolute error."""

    name, kinds, better, totals = "mae", ("regression",), "lower", ("absolute_error", "weight")

    def measure(self, rows: TaskRows) -> dict[str, np.ndarray]:
        return {"absolute_error": rows.weight * np.abs(rows.prediction - rows.label)}


class RSquared(Metric[TaskRows]):
    """The coefficient of determination: 1 - mean squared error / variance of the labels."""

    name, kinds, better, totals = "r2", ("regression",), "higher", ("squared_error", "weight")
    merged: Mapping[str, Literal["min", "max"]] = {"least_label": "min", "largest_label": "max"}

    def measure(self, rows: TaskRows) -> dict[str, np.ndarray]:
        """`label_spread`, the weighted squares about the mean label of the user; the least and the largest label."""
        spread = np.zeros(len(rows.label))  # one row has none: merging gives it to the user
        return {"label_spread": spread, "least_label": rows.label, "largest_label": rows.label}

    def before_merging(self, parts: pa.Table) -> pa.Table:
        """Spreads about the users' means instead of the parts' own: they add up to those of the users."""
        user = parts["user"].combine_chunks().dictionary_encode().indices.to_numpy()
        weight, label, spread = (parts[name].to_numpy() for name in ("weight", "label", "label_spread"))
        totals = np.bincount(user, weight)
        apart = label / weight - (np.bincount(user, label) / totals)[user]
        # The mean of a user is rounded: what that adds is taken off again.
        off = (np.bincount(user, weight * apart) / totals)[user]
        place = parts.column_names.index("label_spread")
        return parts.set_column(place, "label_spread", pa.array(spread + weight * (apart - off) ** 2))

    def summarise(self, drawn: Drawn) -> np.ndarray:
        mean_squared_error = ratio(drawn["squared_error"], drawn["weight"])
        return 1 - ratio(mean_squared_error, drawn.sums.once(_Spread).variance(drawn.counts))

    def why_undefined(self, group: Mapping[str, Any]) -> str:
        return f"All {group['rows']:,} labels are equal: R2 is undefined."


class _Spread:
    """Variances of labels in resamples of users."""

    def __init__(self, sums: UserSums) -> None:
        weight, label, spread = (sums.column(name) for name in ("weight", "label", "label_spread"))
        seen = weight > 0
        mean = label[seen].sum() / weight[seen].sum() if seen.any() else 0.0
        apart = np.divide(label, weight, out=np.full(len(weight), mean), where=seen) - mean
        self._sums = np.stack([weight, weight * apart, spread + weight * apart**2])
        self._least, self._largest = sums.column("least_label", np.inf), sums.column("largest_label", -np.inf)

    def variance(self, counts: np.ndarray) -> np.ndarray:
        """(R,) float64 for `counts` (U, R) of each user; 0 where all labels are equal, NaN where there are none."""
        weight, apart, squares = self._sums @ counts
        some = weight > 0
        mean = np.divide(apart, weight, out=np.zeros_like(weight), where=some)
        variance = np.divide(squares, weight, out=np.full_like(weight, np.nan), where=some) - mean**2
        drawn = counts > 0
        least = np.where(drawn, self._least[:, None], np.inf).min(0)
        largest = np.where(drawn, self._largest[:, None], -np.inf).max(0)
        # What is left of equal labels is rounding.
        return np.where(some & (least == largest), 0.0, variance)
