"""The ratio of two means over the same runs, with an interval."""

from __future__ import annotations

import numpy as np
from scipy import stats


def ratio_of_means(part: np.ndarray, whole: np.ndarray) -> dict[str, float | None]:
    """mean(part) / mean(whole) of (N,) paired float64 values: `value`, and `low` and `high` of its 95% interval.

    Fieller (1954): the interval holds each ratio r for which part - r x whole has a mean that is not other than 0 by a
    two-sided t-test. It is not bounded where mean(whole) itself may be 0: all three are None then.
    """
    runs = len(whole)
    limit = stats.t.ppf(0.975, runs - 1) ** 2 / runs
    (part_variance, covariance), (_, whole_variance) = np.cov(part, whole)
    # a r^2 - 2 b r + c <= 0
    a = whole.mean() ** 2 - limit * whole_variance
    b = part.mean() * whole.mean() - limit * covariance
    c = part.mean() ** 2 - limit * part_variance
    if a <= 0:
        return {"value": None, "low": None, "high": None}
    half = max(b * b - a * c, 0.0) ** 0.5
    return {
        "value": float(part.mean() / whole.mean()),
        "low": float((b - half) / a),
        "high": float((b + half) / a),
    }
