"""How sure a number is: the bootstrap over users, what few users make of it, and differences with their intervals.

Rows of one user are alike, so whole users are drawn with replacement, as many as there are (Efron and Tibshirani,
1993). A metric's interval is that of percentiles, or Student's where few users decide, and Jeffreys' of a share. Models
that are compared see the same draws, so what they have in common cancels; the interval of a difference is Student's.

The number of users counts for less where few of them have most of the rows, weight or positive labels. The effective
number is the least of two: by their sizes, (sum of sizes)^2 / sum of sizes^2 (Kish, 1965); and by their influence. A
user's influence d is the covariance of the number with how often the user is drawn (of a mean: the user's deviation /
the number of users). For U equal users of normal influence the mean of sum d^4 / (sum d^2)^2 is 3 (U - 1) / (U (U +
1)): the U that gives what is observed is the effective number.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from scipy.optimize import brentq
from scipy.stats import beta, gamma
from scipy.stats import t as student

from mmoe_rec.report.formatting import signed

Key = tuple[str, str]
Values = dict[Any, np.ndarray]
"""What is redrawn, such as (task or `score`, metric) -> (R,) float64"""

LEVEL, POWER = 0.05, 0.9
"""Chance that equal models are told apart; and that models are whose difference is called detectable."""
FEW_USERS = 30
"""Effective users, below which percentiles are too narrow."""
FEW_CHANGES = 100
"""Users whose predictions differ, up to which (and up to a fifth of all) they are rare, see `limit_by_changes`."""
LEAST_FREEDOM = 0.5
"""Degrees of freedom, below which an interval says nothing."""
_ENTRIES_AT_A_TIME = 2_000_000
_DEFINED_SHARE = 0.95
ROUNDING = 1e-9  # as a share of the values: a smaller difference is none
_INFLUENCE_OF_FOUR = 0.45  # sum d^4 / (sum d^2)^2 that four users give
_INDISTINCT = 2.0  # users: two or three who have all of the influence can't be told apart by it


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

    value, low, high: with its 95% interval; error: its standard error; effective_users: how many equal users would say
    as much; p: two-sided, p_corrected: by Holm's method, for all differences that are looked at; detectable: the size
    that nine of ten evaluations like this one would show.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    error: float | None = None
    effective_users: float | None = None
    p: float | None = None
    p_corrected: float | None = None
    detectable: float | None = None

    @property
    def is_significant(self) -> bool:
        """Whether the difference is shown after the correction."""
        return self.p_corrected is not None and self.p_corrected < LEVEL

    def shown(self) -> str:
        """Return the difference with its interval, if it has one."""
        value, *ends = signed(*(each for each in (self.value, self.low, self.high) if each is not None))
        return f"{value} ({' to '.join(ends)})" if ends else value


def draw_users(users: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Chunks (users, R) float64 of how often each user is drawn: `resamples` columns, each summing to `users`."""
    generator = np.random.default_rng(seed)
    at_a_time = int(np.clip(_ENTRIES_AT_A_TIME // users, 1, 128))
    for start in range(0, resamples, at_a_time):
        columns = min(at_a_time, resamples - start)
        drawn = generator.integers(users, size=(columns, users)) + users * np.arange(columns)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=columns * users).reshape(columns, users)
        yield np.ascontiguousarray(counts.T, dtype=np.float64)


def is_small_sample(effective: float, users: int) -> bool:
    """True if the effective number of users is low enough to warn."""
    return effective < min(FEW_USERS, users / 2)


def effective_sample_size(sizes: np.ndarray) -> float:
    """How many parts of equal size would say as much as parts of these sizes (Kish, 1965), 1 or more."""
    squares = float((sizes**2).sum())
    return float(sizes.sum()) ** 2 / squares if squares else 1.0


@dataclass(frozen=True)
class Resampled:
    """A number of U users. value: of all; redrawn: (R,) of the resamples; influence: (U,) of each user."""

    value: float
    redrawn: np.ndarray
    influence: np.ndarray

    @cached_property
    def defined(self) -> np.ndarray:
        """(D,) of the resamples, those in which it is defined."""
        return self.redrawn[np.isfinite(self.redrawn)]

    @property
    def effective_users(self) -> float:
        """How many users of equal influence would say as much: from 1 to U; U where nothing varies."""
        users, resamples = len(self.influence), len(self.defined)
        variance = float(self.defined.var()) if resamples else 0.0
        if not variance:
            return float(users)
        # Covariances of R resamples err by the deviation / sqrt(R), which adds to the fourth powers.
        noise = (6 + 3 * users / resamples) / resamples
        return min(float(users), _users_of(float((self.influence**4).sum()) / variance**2 - noise))

    def interval(self, effective: float = np.inf, is_share: bool = False) -> Interval:
        """The number with its 95% interval.

        effective: the effective number of users by their sizes; is_share: whether it is a share, or a mean of what lies
        between 0 and 1. There is none with a single user, or one who decides nearly alone, nor where the number is
        undefined in more than 5% of the resamples: the rest, from which others are left out, would be no fair sample.
        """
        if not np.isfinite(self.value):
            return UNDEFINED
        users = len(self.influence)
        effective = min(users, effective)
        if not self._is_fair(users) or effective - 1 < LEAST_FREEDOM:
            return Interval(self.value)
        if is_share:
            return self._share_interval(effective)
        if effective < FEW_USERS:
            reach = float(student.ppf(1 - LEVEL / 2, effective - 1)) * self._error(effective)
            return Interval(self.value, self.value - reach, self.value + reach)
        low, high = np.percentile(self.defined, [100 * LEVEL / 2, 100 * (1 - LEVEL / 2)])
        return Interval(self.value, float(low), float(high))

    def _share_interval(self, effective: float) -> Interval:
        """Jeffreys' (Brown, Cai and DasGupta, 2001) for as many trials as have this variance (Korn and Graubard, 1998).

        Where all users, or groups of them, agree, they are the trials.
        """
        value, error, trials = min(max(self.value, 0.0), 1.0), self._error(effective), effective
        if error > ROUNDING and 0 < value < 1:
            reach = error * student.ppf(1 - LEVEL / 2, effective - 1) / student.ppf(1 - LEVEL / 2, np.inf)
            trials = value * (1 - value) / reach**2
        low, high = beta.ppf([LEVEL / 2, 1 - LEVEL / 2], trials * value + 0.5, trials * (1 - value) + 0.5)
        return Interval(self.value, min(low, value) if value else 0.0, max(high, value) if value < 1 else 1.0)

    def error(self, effective: float, units: int | None = None) -> tuple[float | None, float]:
        """The standard error by the choice of users, None for too few resamples, and the effective number of users.

        effective: that by their sizes; units: how many of the U have rows, None for all.
        """
        if not self._is_fair(len(self.influence) if units is None else units):
            return None, effective
        effective = min(effective, self.effective_users)
        return self._error(effective), effective

    def _is_fair(self, users: int) -> bool:
        return users >= 2 and len(self.defined) >= _DEFINED_SHARE * len(self.redrawn)

    def _error(self, effective: float) -> float:
        """A bootstrap over U users underestimates the standard error by sqrt(U / (U - 1))."""
        return float(self.defined.std()) * (float(np.sqrt(effective / (effective - 1))) if effective > 1 else 1.0)


def _users_of(share: float) -> float:
    """How many equal users of normal influence give this sum d^4 / (sum d^2)^2."""
    if share <= 0:
        return np.inf
    if share <= _INFLUENCE_OF_FOUR:
        return ((3 - share) + float(np.sqrt((3 - share) ** 2 - 12 * share))) / (2 * share)
    return max(1.0, float(np.interp(share, [_INFLUENCE_OF_FOUR, 0.5, 1.0], [4.0, _INDISTINCT, 1.0])))


def resample(at: Callable[[np.ndarray], Values], users: int, resamples: int, seed: int = 0) -> dict[Any, Resampled]:
    """Numbers in resamples of users. What is compared is redrawn in one call, so that all see the same users.

    at: gives the numbers (R,) for counts (U, R) of how often users are drawn. Raises ValueError for no resample.
    """
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; expected at least 1")
    once = {key: float(value[0]) for key, value in at(np.ones((users, 1))).items()}
    redrawn: dict[Any, list[np.ndarray]] = {key: [] for key in once}
    sums = np.zeros((users, len(once)))
    for counts in draw_users(users, resamples, seed):
        values = at(counts)
        for key, value in values.items():
            redrawn[key].append(value)
        away = np.array([values[key] - whole for key, whole in once.items()])
        away[~np.isfinite(away)] = 0.0
        sums += (counts - 1) @ away.T
    return {
        key: Resampled(whole, np.concatenate(redrawn[key]), sums[:, place] / resamples)
        for place, (key, whole) in enumerate(once.items())
    }


def find_difference(
    mine: Resampled,
    other: Resampled,
    effective: float,
    units: int | None = None,
    besides: Sequence[tuple[float, float]] = (),
) -> Difference:
    """The difference of two models in one metric, by Student.

    effective, units: see `Resampled.error`; besides: what it errs by besides the choice of users, see `add_errors`.
    """
    rounding = rounding_of(mine.value, other.value)
    apart = Resampled(mine.value - other.value, mine.redrawn - other.redrawn, mine.influence - other.influence)
    if not np.isfinite(apart.value):
        return Difference(None)
    value = 0.0 if abs(apart.value) <= rounding else apart.value
    error, effective = apart.error(effective, units)
    freedom = effective - 1
    if error is None or (error > rounding and freedom < LEAST_FREEDOM):
        return Difference(value)
    if besides:
        error, freedom = add_errors([*besides, (0.0 if error <= rounding else error**2, freedom)])
    if error <= rounding:
        # A difference that does not vary rests on too few resamples, or users, to say how sure it is.
        return Difference(value) if value else Difference(value, value, value, 0.0, None, 1.0, None, 0.0)
    reach, extra = student.ppf([1 - LEVEL / 2, POWER], freedom)
    half, p = float(reach * error), float(2 * student.sf(abs(value) / error, freedom))
    detectable = float((reach + extra) * error)
    return Difference(value, value - half, value + half, error, freedom + 1, p, None, detectable)


def add_errors(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Standard error of a sum, and its degrees of freedom by Welch and Satterthwaite, infinite where nothing varies.

    parts: variance and degrees of freedom of each.
    """
    total = sum(variance for variance, _ in parts)
    if total == 0:
        return 0.0, np.inf
    return float(np.sqrt(total)), float(total**2 / sum(variance**2 / free for variance, free in parts if variance))


def limit_by_changes(apart: Difference, changes: np.ndarray) -> Difference:
    """A difference whose interval reaches no further than what few users' changes explain.

    changes: (K,) what each user whose predictions differ adds to it; for all others the models are the same. Users who
    lose, and those who gain, come as rare events do, each counting by its size, and one more might be as large as the
    largest seen: the intervals of both sums are those of weighted Poisson counts, by gamma distributions (Fay and
    Feuer, 1997; by mid-p: Fay and Kim, 2017), and make that of their difference (Zou and Donner, 2008). So the fewer
    users a change touches, the narrower it is. It holds 0 whatever was seen: it rules out losses, and shows no gain.
    """
    most = float(np.abs(changes).max())
    if not most or not np.isfinite(most):
        return apart
    gain, least_gain, most_gain = _sum_rare(np.maximum(changes, 0.0) / most)
    loss, least_loss, most_loss = _sum_rare(np.maximum(-changes, 0.0) / most)
    low = most * min(gain - loss - float(np.hypot(gain - least_gain, most_loss - loss)), 0.0)
    high = most * max(gain - loss + float(np.hypot(most_gain - gain, loss - least_loss)), 0.0)
    if apart.low is not None and apart.high is not None:
        low, high = max(low, apart.low), min(high, apart.high)
        if (low, high) == (apart.low, apart.high):
            return apart
    # How sure it is rests on no standard error.
    return replace(apart, low=low, high=high, error=None, detectable=None)


def _sum_rare(parts: np.ndarray) -> tuple[float, float, float]:
    """The sum of what rare events add, each from 0 to 1, and the ends of its interval."""
    total, squares = float(parts.sum()), float((parts**2).sum())
    above = gamma((total + 1) ** 2 / (squares + 1), scale=(squares + 1) / (total + 1))
    seen = gamma(total**2 / squares, scale=squares / total) if total else None

    def share(size: float) -> float:
        return float((1.0 if seen is None else seen.cdf(size)) + above.cdf(size)) / 2

    def end(at: float) -> float:
        return float(brentq(lambda size: share(size) - at, 0.0, above.ppf(1 - LEVEL / 4)))

    return total, 0.0 if seen is None else end(LEVEL / 2), end(1 - LEVEL / 2)


def rounding_of(*values: float) -> float:
    """Up to which size a difference of such values is none."""
    return ROUNDING * max(map(abs, values))


def level_after(tried: int) -> float:
    """The level of a decision after so many on the same rows, none of which promoted a model.

    Of two-sided levels LEVEL x 2 / (k (k + 1)), the half that errs in favour of the new model adds up to LEVEL over all
    k: so all decisions on the same rows together promote a model that is no better in at most that share of cases
    (alpha spending, Tian and Ramdas, 2021). One that did promote takes no part, as in Holm's method.
    """
    return LEVEL * 2 / ((tried + 1) * (tried + 2))


Tested = TypeVar("Tested", bound=Any)  # a frozen dataclass with `p`, None where nothing was tested, and `p_corrected`


def correct_all(tested: Sequence[Tested]) -> list[Tested]:
    """The same with `p_corrected` by Holm's method, for as many as have a p-value."""
    corrected = iter(correct_by_holm([each.p for each in tested if each.p is not None]))
    return [each if each.p is None else replace(each, p_corrected=next(corrected)) for each in tested]


def correct_by_holm(p: Sequence[float]) -> list[float]:
    """p-values of several tests, each corrected so that all together err as rarely as one (Holm, 1979)."""
    order = np.argsort(p, kind="stable")
    corrected = np.minimum(np.maximum.accumulate(np.asarray(p)[order] * np.arange(len(p), 0, -1)), 1.0)
    values = np.empty(len(p))
    values[order] = corrected
    return [float(each) for each in values]
