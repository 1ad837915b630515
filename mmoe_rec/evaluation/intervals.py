"""How sure a number is: the bootstrap over users, and differences of models with their intervals.

Rows of one user are alike, so whole users are drawn with replacement, as many as there are (Efron and Tibshirani,
1993). A metric's interval is that of percentiles, or Student's where few users decide, and Jeffreys' of a share. Models
that are compared see the same draws, so what they have in common cancels; the interval of a difference is Student's.

The number of users counts for less where few of them have most of the rows, weight or positive labels. The effective
number is (sum of sizes)^2 / sum of sizes^2 (Kish, 1965).
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
"""What is redrawn, such as (task or `score`, metric) -> (R,) float64"""

ALPHA = 0.05
"""Chance that equal models are told apart."""
FEW_USERS = 30
"""Effective users, below which percentiles are too narrow."""
MIN_DEGREES_OF_FREEDOM = 0.5
"""Degrees of freedom, below which an interval says nothing."""
_ENTRIES_AT_A_TIME = 2_000_000
_DEFINED_SHARE = 0.95
ROUNDING = 1e-9  # as a share of the values: a smaller difference is none


@dataclass(frozen=True)
class Interval:
    """A metric with the ends of its 95% interval; None where it is undefined, or has no interval."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def format(self, digits: int = 4) -> str:
        """Return the metric with its interval, if it has one."""
        if self.value is None:
            return "-"
        ends = "" if self.low is None else f" ({self.low:.{digits}f} to {self.high:.{digits}f})"
        return f"{self.value:.{digits}f}{ends}"


UNDEFINED = Interval(None)
"""What can't be computed."""


@dataclass(frozen=True)
class Difference:
    """A difference of two models in one metric; None where it is undefined, or has no interval.

    value, low, high: with its 95% interval; error, freedom: its standard error, and the degrees of freedom; p:
    two-sided, p_corrected: by Holm's method, for all differences that are looked at.
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
        """Whether the difference is shown after the correction."""
        return self.corrected_p_value is not None and self.corrected_p_value < ALPHA

    @property
    def negated(self) -> "Difference":
        """The difference the other way round."""
        value, low, high = (None if each is None else 0.0 - each for each in (self.value, self.high, self.low))
        return replace(self, value=value, low=low, high=high)

    def format(self) -> str:
        """Return the difference with its interval, if it has one."""
        if self.value is None:
            return "-"
        value, *ends = format_signed(*(each for each in (self.value, self.low, self.high) if each is not None))
        return f"{value} ({' to '.join(ends)})" if ends else value

    @property
    def correction_note(self) -> str:
        """What explains a difference that is not shown, although 0 is outside of its interval."""
        outside = self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)
        return ", once corrected for the number of comparisons" if outside else ""


def draw_user_counts(users: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Chunks (users, R) float64 of how often each user is drawn: `resamples` columns, each summing to `users`."""
    generator = np.random.default_rng(seed)
    at_a_time = int(np.clip(_ENTRIES_AT_A_TIME // users, 1, 128))
    for start in range(0, resamples, at_a_time):
        columns = min(at_a_time, resamples - start)
        drawn = generator.integers(users, size=(columns, users)) + users * np.arange(columns)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=columns * users).reshape(columns, users)
        yield np.ascontiguousarray(counts.T, dtype=np.float64)


def effective_sample_size(sizes: np.ndarray) -> float:
    """How many parts of equal size would say as much as parts of these sizes (Kish, 1965), 1 or more."""
    squares = float((sizes**2).sum())
    return float(sizes.sum()) ** 2 / squares if squares else 1.0


@dataclass(frozen=True)
class Estimate:
    """A number. value: of all; redrawn: (R,) of the resamples; users: the effective number of users."""

    value: float
    replicates: np.ndarray
    effective_users: float

    def interval(self, is_fraction: bool = False) -> Interval:
        """The number with its 95% interval.

        is_fraction: whether it is a share, or a mean of what lies between 0 and 1. There is none with a single user, or
        one who decides nearly alone, nor where the number is undefined in more than 5% of the resamples: the rest, from
        which others are left out, would be no fair sample.
        """
        if not np.isfinite(self.value):
            return UNDEFINED
        standard_error, freedom = self.standard_error, self.effective_users - 1
        if standard_error is None or freedom < MIN_DEGREES_OF_FREEDOM:
            return Interval(self.value)
        if is_fraction:
            return self._share_interval(standard_error)
        if self.effective_users < FEW_USERS:
            reach = float(student.ppf(1 - ALPHA / 2, freedom)) * standard_error
            return Interval(self.value, self.value - reach, self.value + reach)
        low, high = np.nanpercentile(self.replicates, [100 * ALPHA / 2, 100 * (1 - ALPHA / 2)])
        return Interval(self.value, float(low), float(high))

    def _share_interval(self, standard_error: float) -> Interval:
        """Jeffreys' (Brown, Cai and DasGupta, 2001) for as many trials as have this variance (Korn and Graubard, 1998).

        Where all users, or groups of them, agree, they are the trials.
        """
        value, trials = min(max(self.value, 0.0), 1.0), self.effective_users
        if standard_error > ROUNDING and 0 < value < 1:
            reach = standard_error * student.ppf(1 - ALPHA / 2, trials - 1) / student.ppf(1 - ALPHA / 2, np.inf)
            trials = value * (1 - value) / reach**2
        low, high = beta.ppf([ALPHA / 2, 1 - ALPHA / 2], trials * value + 0.5, trials * (1 - value) + 0.5)
        return Interval(self.value, min(low, value) if value else 0.0, max(high, value) if value < 1 else 1.0)

    @property
    def standard_error(self) -> float | None:
        """The standard error by the choice of users, None where too many resamples leave the number undefined.

        A bootstrap over U users underestimates it by sqrt(U / (U - 1)).
        """
        defined = self.replicates[np.isfinite(self.replicates)]
        if len(defined) < _DEFINED_SHARE * len(self.replicates):
            return None
        return float(defined.std()) * (
            float(np.sqrt(self.effective_users / (self.effective_users - 1))) if self.effective_users > 1 else 1.0
        )


def bootstrap(
    compute: Callable[[np.ndarray], Replicates], users: int, resamples: int, seed: int = 0
) -> dict[Any, Estimate]:
    """Numbers in resamples of users. What is compared is redrawn in one call, so that all see the same users.

    compute: gives the numbers (R,) for counts (U, R) of how often users are drawn; resamples: at least 1.
    """
    once, replicates = (
        compute(np.ones((users, 1))),
        [compute(counts) for counts in draw_user_counts(users, resamples, seed)],
    )
    return {
        key: Estimate(float(value[0]), np.concatenate([each[key] for each in replicates]), users)
        for key, value in once.items()
    }


def compute_difference(
    mine: Estimate, other: Estimate, extra_variances: Sequence[tuple[float, float]] = ()
) -> Difference:
    """The difference of two models in one metric, by Student.

    extra_variances: what it errs by besides the choice of users, see `combine_variances`.
    """
    rounding, effective_users = (
        rounding_tolerance(mine.value, other.value),
        min(mine.effective_users, other.effective_users),
    )
    apart = Estimate(mine.value - other.value, mine.replicates - other.replicates, effective_users)
    if not np.isfinite(apart.value):
        return Difference(None)
    value, standard_error, freedom = (
        0.0 if abs(apart.value) <= rounding else apart.value,
        apart.standard_error,
        effective_users - 1,
    )
    if standard_error is None or (standard_error > rounding and freedom < MIN_DEGREES_OF_FREEDOM):
        return Difference(value)
    if extra_variances:
        standard_error, freedom = combine_variances(
            [*extra_variances, (0.0 if standard_error <= rounding else standard_error**2, freedom)]
        )
    if standard_error <= rounding:
        # A difference that does not vary rests on too few resamples, or users, to say how sure it is.
        return Difference(value) if value else Difference(value, value, value, 0.0, None, 1.0)
    half = float(student.ppf(1 - ALPHA / 2, freedom) * standard_error)
    p = float(2 * student.sf(abs(value) / standard_error, freedom))
    return Difference(value, value - half, value + half, standard_error, freedom, p)


def combine_variances(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Standard error of a sum, and its degrees of freedom by Welch and Satterthwaite, infinite where nothing varies.

    parts: variance and degrees of freedom of each.
    """
    total = sum(variance for variance, _ in parts)
    if total == 0:
        return 0.0, np.inf
    return float(np.sqrt(total)), float(total**2 / sum(variance**2 / free for variance, free in parts if variance))


def rounding_tolerance(*values: float) -> float:
    """Up to which size a difference of such values is none."""
    return ROUNDING * max(map(abs, values))


Tested = TypeVar(
    "Tested", bound=Any
)  # a frozen dataclass with `p_value`, None where nothing was tested, and `corrected_p_value`


def holm_correct(tested: Sequence[Tested]) -> list[Tested]:
    """The same with `corrected_p_value`, for as many as have a p-value, so that all together err as rarely as one.

    By Holm's method (1979).
    """
    known = sorted(
        (place for place, each in enumerate(tested) if each.p_value is not None), key=lambda at: tested[at].p_value
    )
    corrected, least = list(tested), 0.0
    for number, place in enumerate(known):
        least = max(least, min(1.0, tested[place].p_value * (len(known) - number)))
        corrected[place] = replace(tested[place], corrected_p_value=least)
    return corrected
