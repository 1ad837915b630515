"""Errors of a regression, over observed rows."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmoe_rec.evaluation.metrics.metric import Metric, Ratio, Resamples, TaskRows, UserSums, ratio

_ROUNDING = 1e-12  # as a share of the mean square: what is left of equal labels


class RootMeanSquaredError(Ratio[TaskRows]):
    """Root of the mean squared error."""

    name, kinds, better, totals = "rmse", ("regression",), "lower", ("squared_error", "weight")

    def measure(self, rows: TaskRows) -> dict[str, np.ndarray]:
        return {"squared_error": rows.weight * (rows.prediction - rows.label) ** 2}

    def summarise(self, drawn: Resamples) -> np.ndarray:
        return np.sqrt(super().summarise(drawn))


class MeanAbsoluteError(Ratio[TaskRows]):
    """Mean absolute error."""

    name, kinds, better, totals = "mae", ("regression",), "lower", ("absolute_error", "weight")

    def measure(self, rows: TaskRows) -> dict[str, np.ndarray]:
        return {"absolute_error": rows.weight * np.abs(rows.prediction - rows.label)}


class RSquared(Metric[TaskRows]):
    """The coefficient of determination: 1 - mean squared error / variance of the labels."""

    name, kinds, better, totals = "r2", ("regression",), "higher", ("squared_error", "weight")

    def measure(self, rows: TaskRows) -> dict[str, np.ndarray]:
        """The label of the user's first row, `label_origin`, and the weighted sums of the distances from it,
        `label_distance`, and of their squares.

        The mean of squares less the square of the mean cancels where labels are large beside their deviation: for
        labels of 1.7e9 +- 100, float64 keeps nothing of it.
        """
        origin = rows.label[np.unique(rows.unit, return_index=True)[1]]
        distance = rows.label - origin[rows.unit]
        sums = {"label_distance": rows.weight * distance, "label_squares": rows.weight * distance**2}
        return sums | rows.at_first_rows(rows.unit, {"label_origin": origin})

    def summarise(self, drawn: Resamples) -> np.ndarray:
        mean_squared_error = ratio(drawn["squared_error"], drawn["weight"])
        return 1 - ratio(mean_squared_error, drawn.sums.once(_Spread).variance(drawn.counts))

    def why_undefined(self, group: Mapping[str, Any]) -> str:
        return f"All {group['rows']:,} labels are equal: R2 is undefined."


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
