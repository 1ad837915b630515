"""Intervals of metrics and of differences between models, by a bootstrap over users.

Rows of one user are correlated, so the bootstrap draws whole users with replacement. A resample draws as many users as
there are (Efron and Tibshirani, 1993).

The interval of a metric consists of percentiles of the resampled values, with two exceptions. Fractions, such as AUC,
have Jeffreys' interval. If few users have most of the weight, other metrics have Student's t interval.

Differences between models have Student's t interval. All models are measured on the same resamples, so the variation
that models share cancels in a difference.

Users of unequal size give less information than as many users of equal size. The effective number of users is
(sum of sizes)^2 / sum of sizes^2 (Kish, 1965). The size of a user is the number of rows, weight or positive labels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from scipy.stats import beta
from scipy.stats import t as student

from mmoe_rec.report.formatting import format_signed

MetricKey = tuple[str, str]
Replicates = dict[Any, np.ndarray]
"""Resampled numbers, such as (task or `score`, metric) -> (R,) float64."""

ALPHA = 0.05
"""Significance level: the probability that equal models are found to differ."""
FEW_USERS = 30
"""Effective number of users below which percentile intervals are too narrow."""
MIN_DEGREES_OF_FREEDOM = 0.5
"""Degrees of freedom (effective number of users - 1) below which an interval would be meaningless."""
_ENTRIES_PER_CHUNK = 2_000_000
_MIN_DEFINED_FRACTION = 0.95
ROUNDING = 1e-9  # relative difference of two values up to which it counts as a rounding error


@dataclass(frozen=True)
class Interval:
    """Metric with its 95% interval. Fields are None if the metric is undefined or has no interval."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def format(self, digits: int = 4) -> str:
        """Format the metric with its interval, if it has one, with `digits` decimals."""
        if self.value is None:
            return "-"
        ends = "" if self.low is None else f" ({self.low:.{digits}f} to {self.high:.{digits}f})"
        return f"{self.value:.{digits}f}{ends}"


UNDEFINED = Interval(None)
"""An undefined metric."""


@dataclass(frozen=True)
class Difference:
    """Difference of two models in one metric. Fields are None if the difference is undefined or has no interval.

    Attributes:
        value: Metric of the first model minus metric of the second model.
        low: Lower end of the 95% interval.
        high: Upper end of the 95% interval.
        standard_error: Standard error of the difference.
        degrees_of_freedom: Degrees of freedom of the standard error.
        p_value: Two-sided p-value.
        corrected_p_value: p-value corrected for the number of comparisons, None before `holm_correct`.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    standard_error: float | None = None
    degrees_of_freedom: float | None = None
    p_value: float | None = None
    corrected_p_value: float | None = None

    @property
    def is_significant(self) -> bool:
        """Whether the corrected p-value is below `ALPHA`."""
        return self.corrected_p_value is not None and self.corrected_p_value < ALPHA

    @property
    def negated(self) -> "Difference":
        """Difference with the models swapped."""
        value, low, high = (None if number is None else 0.0 - number for number in (self.value, self.high, self.low))
        return replace(self, value=value, low=low, high=high)

    def format(self) -> str:
        """Format the difference with its interval, if it has one."""
        if self.value is None:
            return "-"
        value, *ends = format_signed(*(number for number in (self.value, self.low, self.high) if number is not None))
        return f"{value} ({' to '.join(ends)})" if ends else value

    @property
    def correction_note(self) -> str:
        """Note for an insignificant difference. Empty if it is insignificant even without the correction."""
        outside = self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)
        return ", once corrected for the number of comparisons" if outside else ""


def draw_user_counts(users: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Draw users with replacement, in chunks of R resamples to save memory.

    Args:
        users: Number of users.
        resamples: Number of resamples.
        seed: Seed of the draws.

    Yields:
        How often each resample draws each user, shape (users, R) float64. Each column sums to `users`.
    """
    generator = np.random.default_rng(seed)
    at_a_time = int(np.clip(_ENTRIES_PER_CHUNK // users, 1, 128))
    for start in range(0, resamples, at_a_time):
        columns = min(at_a_time, resamples - start)
        drawn = generator.integers(users, size=(columns, users)) + users * np.arange(columns)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=columns * users).reshape(columns, users)
        yield np.ascontiguousarray(counts.T, dtype=np.float64)


def effective_sample_size(sizes: np.ndarray) -> float:
    """Return how many users of equal size give as much information as users of these sizes (Kish, 1965).

    The result is 1 if all sizes are 0.
    """
    squares = float((sizes**2).sum())
    return float(sizes.sum()) ** 2 / squares if squares else 1.0


@dataclass(frozen=True)
class Estimate:
    """Number with its bootstrap replicates.

    Attributes:
        value: Value for all users.
        replicates: Values in R resamples, shape (R,). NaN if undefined.
        effective_users: Effective number of users (see `effective_sample_size`).
    """

    value: float
    replicates: np.ndarray
    effective_users: float

    def interval(self, is_fraction: bool = False) -> Interval:
        """Return the number with its 95% interval.

        There is no interval for a single user, or if one user has nearly all of the weight. Neither is there one if the
        number is undefined in more than 5% of the resamples, because the remaining resamples are a biased selection.

        Args:
            is_fraction: Whether the number is a fraction, or a mean of values between 0 and 1.
        """
        if not np.isfinite(self.value):
            return UNDEFINED
        standard_error, freedom = self.standard_error, self.effective_users - 1
        if standard_error is None or freedom < MIN_DEGREES_OF_FREEDOM:
            return Interval(self.value)
        if is_fraction:
            return self._fraction_interval(standard_error)
        if self.effective_users < FEW_USERS:
            reach = float(student.ppf(1 - ALPHA / 2, freedom)) * standard_error
            return Interval(self.value, self.value - reach, self.value + reach)
        low, high = np.nanpercentile(self.replicates, [100 * ALPHA / 2, 100 * (1 - ALPHA / 2)])
        return Interval(self.value, float(low), float(high))

    def _fraction_interval(self, standard_error: float) -> Interval:
        """Return Jeffreys' interval of a binomial proportion (Brown, Cai and DasGupta, 2001).

        The number of binomial trials is chosen such that the proportion has the bootstrap's standard error (Korn and
        Graubard, 1998). If the value is the same for all users, the standard error is 0, and the number of trials is
        the effective number of users.
        """
        value, trials = min(max(self.value, 0.0), 1.0), self.effective_users
        if standard_error > ROUNDING and 0 < value < 1:
            reach = standard_error * student.ppf(1 - ALPHA / 2, trials - 1) / student.ppf(1 - ALPHA / 2, np.inf)
            trials = value * (1 - value) / reach**2
        low, high = beta.ppf([ALPHA / 2, 1 - ALPHA / 2], trials * value + 0.5, trials * (1 - value) + 0.5)
        return Interval(self.value, min(low, value) if value else 0.0, max(high, value) if value < 1 else 1.0)

    @property
    def standard_error(self) -> float | None:
        """Standard error of the metric over samples of users, None if it is undefined in too many resamples.

        The standard deviation of a bootstrap over U users is too small by the factor sqrt((U - 1) / U). The result is
        corrected for it, with the effective number of users as U.
        """
        defined = self.replicates[np.isfinite(self.replicates)]
        if len(defined) < _MIN_DEFINED_FRACTION * len(self.replicates):
            return None
        return float(defined.std()) * (
            float(np.sqrt(self.effective_users / (self.effective_users - 1))) if self.effective_users > 1 else 1.0
        )


def bootstrap(
    compute: Callable[[np.ndarray], Replicates], users: int, resamples: int, seed: int = 0
) -> dict[Any, Estimate]:
    """Estimate numbers with bootstrap replicates over users.

    All numbers of one call use the same resamples. Compute numbers that you want to compare in one call.

    Args:
        compute: Function from counts (U, R), how often each of R resamples draws each user, to numbers (R,) by key.
        users: Number of users U.
        resamples: Number of resamples, at least 1.
        seed: Seed of the draws.

    Returns:
        Estimates by the keys that `compute` returns, with U effective users.
    """
    point = compute(np.ones((users, 1)))
    replicates = [compute(counts) for counts in draw_user_counts(users, resamples, seed)]
    return {
        key: Estimate(float(value[0]), np.concatenate([replicate[key] for replicate in replicates]), users)
        for key, value in point.items()
    }


def compute_difference(
    mine: Estimate, other: Estimate, extra_variances: Sequence[tuple[float, float]] = ()
) -> Difference:
    """Compute the difference `mine` - `other` of two models in one metric, with Student's interval.

    Args:
        mine: Estimate of the model.
        other: Estimate of the reference model.
        extra_variances: Variances from other sources than the sample of users, such as the runs of a training. Each
            is a pair of variance and degrees of freedom, see `combine_variances`.
    """
    tolerance = rounding_tolerance(mine.value, other.value)
    effective_users = min(mine.effective_users, other.effective_users)
    difference = Estimate(mine.value - other.value, mine.replicates - other.replicates, effective_users)
    if not np.isfinite(difference.value):
        return Difference(None)
    value = 0.0 if abs(difference.value) <= tolerance else difference.value
    standard_error = difference.standard_error
    freedom = effective_users - 1
    if standard_error is None or (standard_error > tolerance and freedom < MIN_DEGREES_OF_FREEDOM):
        return Difference(value)
    if extra_variances:
        standard_error, freedom = combine_variances(
            [*extra_variances, (0.0 if standard_error <= tolerance else standard_error**2, freedom)]
        )
    if standard_error <= tolerance:
        # If a nonzero difference is the same in all resamples, there are too few resamples or users for an interval.
        return Difference(value) if value else Difference(value, value, value, 0.0, None, 1.0)
    half_width = float(student.ppf(1 - ALPHA / 2, freedom) * standard_error)
    p = float(2 * student.sf(abs(value) / standard_error, freedom))
    return Difference(value, value - half_width, value + half_width, standard_error, freedom, p)


def combine_variances(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Combine the variances of independent parts of a sum, with degrees of freedom by Welch and Satterthwaite.

    Args:
        parts: Pairs of variance and degrees of freedom.

    Returns:
        Standard error of the sum, and degrees of freedom, infinite if nothing varies.
    """
    total = sum(variance for variance, _ in parts)
    if total == 0:
        return 0.0, np.inf
    return float(np.sqrt(total)), float(
        total**2 / sum(variance**2 / freedom for variance, freedom in parts if variance)
    )


def rounding_tolerance(*values: float) -> float:
    """Return the largest difference between values of this size that counts as a rounding error."""
    return ROUNDING * max(map(abs, values))


Tested = TypeVar(
    "Tested", bound=Any
)  # a frozen dataclass with `p_value`, None where nothing was tested, and `corrected_p_value`


def holm_correct(tested: Sequence[Tested]) -> list[Tested]:
    """Return copies of the items with `corrected_p_value` set where there is a p-value, by Holm's method (1979)."""
    order = sorted(
        (index for index, item in enumerate(tested) if item.p_value is not None),
        key=lambda index: tested[index].p_value,
    )
    corrected, corrected_p_value = list(tested), 0.0
    for rank, index in enumerate(order):
        corrected_p_value = max(corrected_p_value, min(1.0, tested[index].p_value * (len(order) - rank)))
        corrected[index] = replace(tested[index], corrected_p_value=corrected_p_value)
    return corrected
