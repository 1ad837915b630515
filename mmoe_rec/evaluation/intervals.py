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

from mmoe_rec.report.formatting import signed

Key = tuple[str, str]
Values = dict[Any, np.ndarray]
"""What is redrawn, such as (task or `score`, metric) -> (R,) float64"""

LEVEL = 0.05
"""Chance that equal models are told apart."""
FEW_USERS = 30
"""Effective users, below which percentiles are too narrow."""
LEAST_FREEDOM = 0.5
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

    def shown(self, digits: int = 4) -> str:
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
    error: float | None = None
    freedom: float | None = None
    p: float | None = None
    p_corrected: float | None = None

    @property
    def is_significant(self) -> bool:
        """Whether the difference is shown after the correction."""
        return self.p_corrected is not None and self.p_corrected < LEVEL

    @property
    def negated(self) -> "Difference":
        """The difference the other way round."""
        value, low, high = (None if each is None else 0.0 - each for each in (self.value, self.high, self.low))
        return replace(self, value=value, low=low, high=high)

    def shown(self) -> str:
        """Return the difference with its interval, if it has one."""
        if self.value is None:
            return "-"
        value, *ends = signed(*(each for each in (self.value, self.low, self.high) if each is not None))
        return f"{value} ({' to '.join(ends)})" if ends else value

    @property
    def once_corrected(self) -> str:
        """What explains a difference that is not shown, although 0 is outside of its interval."""
        outside = self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)
        return ", once corrected for the number of comparisons" if outside else ""


def draw_users(users: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
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
class Resampled:
    """A number. value: of all; redrawn: (R,) of the resamples; users: the effective number of users."""

    value: float
    redrawn: np.ndarray
    users: float

    def interval(self, is_share: bool = False) -> Interval:
        """The number with its 95% interval.

        is_share: whether it is a share, or a mean of what lies between 0 and 1. There is none with a single user, or
        one who decides nearly alone, nor where the number is undefined in more than 5% of the resamples: the rest, from
        which others are left out, would be no fair sample.
        """
        if not np.isfinite(self.value):
            return UNDEFINED
        error, freedom = self.error, self.users - 1
        if error is None or freedom < LEAST_FREEDOM:
            return Interval(self.value)
        if is_share:
            return self._share_interval(error)
        if self.users < FEW_USERS:
            reach = float(student.ppf(1 - LEVEL / 2, freedom)) * error
            return Interval(self.value, self.value - reach, self.value + reach)
        low, high = np.nanpercentile(self.redrawn, [100 * LEVEL / 2, 100 * (1 - LEVEL / 2)])
        return Interval(self.value, float(low), float(high))

    def _share_interval(self, error: float) -> Interval:
        """Jeffreys' (Brown, Cai and DasGupta, 2001) for as many trials as have this variance (Korn and Graubard, 1998).

        Where all users, or groups of them, agree, they are the trials.
        """
        value, trials = min(max(self.value, 0.0), 1.0), self.users
        if error > ROUNDING and 0 < value < 1:
            reach = error * student.ppf(1 - LEVEL / 2, trials - 1) / student.ppf(1 - LEVEL / 2, np.inf)
            trials = value * (1 - value) / reach**2
        low, high = beta.ppf([LEVEL / 2, 1 - LEVEL / 2], trials * value + 0.5, trials * (1 - value) + 0.5)
        return Interval(self.value, min(low, value) if value else 0.0, max(high, value) if value < 1 else 1.0)

    @property
    def error(self) -> float | None:
        """The standard error by the choice of users, None where too many resamples leave the number undefined.

        A bootstrap over U users underestimates it by sqrt(U / (U - 1)).
        """
        defined = self.redrawn[np.isfinite(self.redrawn)]
        if len(defined) < _DEFINED_SHARE * len(self.redrawn):
            return None
        return float(defined.std()) * (float(np.sqrt(self.users / (self.users - 1))) if self.users > 1 else 1.0)


def resample(at: Callable[[np.ndarray], Values], users: int, resamples: int, seed: int = 0) -> dict[Any, Resampled]:
    """Numbers in resamples of users. What is compared is redrawn in one call, so that all see the same users.

    at: gives the numbers (R,) for counts (U, R) of how often users are drawn; resamples: at least 1.
    """
    once, redrawn = at(np.ones((users, 1))), [at(counts) for counts in draw_users(users, resamples, seed)]
    return {
        key: Resampled(float(value[0]), np.concatenate([each[key] for each in redrawn]), users)
        for key, value in once.items()
    }


def find_difference(mine: Resampled, other: Resampled, besides: Sequence[tuple[float, float]] = ()) -> Difference:
    """The difference of two models in one metric, by Student.

    besides: what it errs by besides the choice of users, see `add_errors`.
    """
    rounding, users = rounding_of(mine.value, other.value), min(mine.users, other.users)
    apart = Resampled(mine.value - other.value, mine.redrawn - other.redrawn, users)
    if not np.isfinite(apart.value):
        return Difference(None)
    value, error, freedom = 0.0 if abs(apart.value) <= rounding else apart.value, apart.error, users - 1
    if error is None or (error > rounding and freedom < LEAST_FREEDOM):
        return Difference(value)
    if besides:
        error, freedom = add_errors([*besides, (0.0 if error <= rounding else error**2, freedom)])
    if error <= rounding:
        # A difference that does not vary rests on too few resamples, or users, to say how sure it is.
        return Difference(value) if value else Difference(value, value, value, 0.0, None, 1.0)
    half = float(student.ppf(1 - LEVEL / 2, freedom) * error)
    p = float(2 * student.sf(abs(value) / error, freedom))
    return Difference(value, value - half, value + half, error, freedom, p)


def add_errors(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Standard error of a sum, and its degrees of freedom by Welch and Satterthwaite, infinite where nothing varies.

    parts: variance and degrees of freedom of each.
    """
    total = sum(variance for variance, _ in parts)
    if total == 0:
        return 0.0, np.inf
    return float(np.sqrt(total)), float(total**2 / sum(variance**2 / free for variance, free in parts if variance))


def rounding_of(*values: float) -> float:
    """Up to which size a difference of such values is none."""
    return ROUNDING * max(map(abs, values))


Tested = TypeVar("Tested", bound=Any)  # a frozen dataclass with `p`, None where nothing was tested, and `p_corrected`


def correct_all(tested: Sequence[Tested]) -> list[Tested]:
    """The same with `p_corrected`, for as many as have a p-value, so that all together err as rarely as one.

    By Holm's method (1979).
    """
    known = sorted((place for place, each in enumerate(tested) if each.p is not None), key=lambda at: tested[at].p)
    corrected, least = list(tested), 0.0
    for number, place in enumerate(known):
        least = max(least, min(1.0, tested[place].p * (len(known) - number)))
        corrected[place] = replace(tested[place], p_corrected=least)
    return corrected
