"""The bootstrap over users: what the metrics would have been had other users come (Efron and Tibshirani, 1993).

Rows of one user are alike, so intervals that resample rows are too narrow; whole users are drawn instead, with
replacement, as many as there are. The interval is that of percentiles; of few users, or where few have most of what a
metric is of, these are too narrow, and it is Student's.


How many users tell what a difference is, judged by how much each of them moves it.

A resample draws a user more often or less, and a metric moves with it: their covariance over the resamples is the
user's influence d (for a mean over users, its deviation / their number). Where U users tell alike, with normal
influence, the mean of sum d^4 / (sum d^2)^2 is 3 (U - 1) / (U (U + 1)); the U that would give what was found is the
effective number. It falls where few users have most rows, most of the weight, or nearly all positive labels, and is
what Student's degrees of freedom are counted from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.stats import t as student

Values = dict[tuple[str, str], np.ndarray]
"""(task or `score`, metric) -> (R,) float64"""

_ENTRIES_AT_A_TIME = 2_000_000
_DEFINED_SHARE = 0.95
FEW_USERS = 30
"""Alike, below which percentiles are too narrow."""
LEAST_FREEDOM = 0.5
"""Degrees of freedom, below which an interval is no news."""


def user_counts(users: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Chunks (users, R) float64 of how often each user is drawn: `resamples` columns, each summing to `users`."""
    generator = np.random.default_rng(seed)
    at_a_time = int(np.clip(_ENTRIES_AT_A_TIME // users, 1, 128))
    for start in range(0, resamples, at_a_time):
        columns = min(at_a_time, resamples - start)
        drawn = generator.integers(users, size=(columns, users)) + users * np.arange(columns)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=columns * users).reshape(columns, users)
        yield np.ascontiguousarray(counts.T, dtype=np.float64)


def replicate(at: Callable[[np.ndarray], Values], users: int, resamples: int, seed: int) -> Values:
    """The values of `at(counts)` in every resample, (resamples,) each."""
    chunks = [at(counts) for counts in user_counts(users, resamples, seed)]
    return {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}


def intervals(
    at: Callable[[np.ndarray], Values],
    users: int,
    resamples: int,
    seed: int,
    effective: Mapping[tuple[str, str], float],
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Task or `score` -> metric -> its value, that of every user counted once, with its interval.

    effective: of each, how many users alike would tell as much.

    Raises:
        ValueError: no resample is asked for.
    """
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; expected at least 1")
    replicates = replicate(at, users, resamples, seed)
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for (name, metric), value in at(np.ones((users, 1))).items():
        found.setdefault(name, {})[metric] = with_interval(
            value[0], replicates[name, metric], users, effective[name, metric]
        )
    return found


def defined_well(defined: np.ndarray, resamples: int, users: int) -> bool:
    """Whether the values of those resamples in which a metric is defined are a fair sample, so that it has an
    interval."""
    return users >= 2 and len(defined) >= _DEFINED_SHARE * resamples


def are_few(effective: float, users: int) -> bool:
    """Whether so few users alike tell as much as those there are that one has to know of it."""
    return effective < min(FEW_USERS, users / 2)


def of_few(effective: float) -> float:
    """By which the deviation of what so many users tell is too small, as it is that from what these very users tell."""
    return float(np.sqrt(effective / (effective - 1))) if effective > 1 else 1.0


def with_interval(
    value: float, replicates: np.ndarray, users: int, effective: float | None = None
) -> dict[str, float | None]:
    """A metric with its 95% interval: `value`, `low`, `high`; None where undefined.

    effective: how many users alike would tell as much; None is all. There is no interval with a single user, or one who
    decides nearly alone, nor when the metric is undefined in more than 5% of the resamples: the rest
    would not be a fair sample. Resamples in which it is undefined are otherwise left out.
    """
    if not np.isfinite(value):
        return {"value": None, "low": None, "high": None}
    defined = replicates[np.isfinite(replicates)]
    if not defined_well(defined, len(replicates), users):
        return {"value": float(value), "low": None, "high": None}
    effective = users if effective is None else min(users, effective)
    if effective - 1 < LEAST_FREEDOM:
        return {"value": float(value), "low": None, "high": None}
    if effective < FEW_USERS:
        reach = float(student.ppf(0.975, effective - 1)) * float(defined.std()) * of_few(effective)
        return {"value": float(value), "low": float(value) - reach, "high": float(value) + reach}
    low, high = np.percentile(defined, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}


Key = tuple[str, str]
_FEW = 0.45  # what four users give
_ALONE = 2.0  # users, where two or three have all of the influence, who can't be told apart by it


@dataclass(frozen=True)
class Resampled:
    """A number of U users. value: of all; redrawn: (R,) of the resamples; influence: (U,) of each user."""

    value: float
    redrawn: np.ndarray
    influence: np.ndarray

    def less(self, other: Resampled) -> Resampled:
        """The difference from another one in the same resamples."""
        return Resampled(self.value - other.value, self.redrawn - other.redrawn, self.influence - other.influence)

    @cached_property
    def defined(self) -> np.ndarray:
        """(D,) of the resamples, those in which it is."""
        return self.redrawn[np.isfinite(self.redrawn)]

    @property
    def effective_users(self) -> float:
        """From 1 to U; U where nothing varies."""
        users, resamples = len(self.influence), len(self.defined)
        variance = float(self.defined.var()) if resamples else 0.0
        if not variance:
            return float(users)
        # Covariances of R resamples err by the deviation / sqrt(R), which adds to the fourth powers.
        noise = (6 + 3 * users / resamples) / resamples
        return min(float(users), _users_of(float((self.influence**4).sum()) / variance**2 - noise))

    def error(self, effective: float, units: int | None = None) -> tuple[float | None, float]:
        """The standard error from the choice of users, None where too few resamples are defined, and how many users
        alike would tell as much.

        effective: how many would by their sizes; units: how many of the U have rows, None for all.
        """
        if not defined_well(self.defined, len(self.redrawn), len(self.influence) if units is None else units):
            return None, effective
        effective = min(effective, self.effective_users)
        return float(self.defined.std()) * of_few(effective), effective


def _users_of(share: float) -> float:
    """How many users alike, of normal influence, give this sum d^4 / (sum d^2)^2."""
    if share <= 0:
        return np.inf
    if share <= _FEW:
        return ((3 - share) + float(np.sqrt((3 - share) ** 2 - 12 * share))) / (2 * share)
    return max(1.0, float(np.interp(share, [_FEW, 0.5, 1.0], [4.0, _ALONE, 1.0])))


class Resampling:
    """Values of metrics in resamples, which are added some at a time. once: those of all users."""

    def __init__(self, once: Values, users: int) -> None:
        self._once = {key: float(value[0]) for key, value in once.items()}
        self._redrawn: dict[Key, list[np.ndarray]] = {key: [] for key in once}
        self._sums = np.zeros((users, len(once)))

    def add(self, counts: np.ndarray, values: Values) -> None:
        """Values (R,) of resamples that draw the users `counts` (U, R) times."""
        for key, value in values.items():
            self._redrawn[key].append(value)
        away = np.array([values[key] - once for key, once in self._once.items()])
        away[~np.isfinite(away)] = 0.0
        self._sums += (counts - 1) @ away.T

    def found(self) -> Mapping[Key, Resampled]:
        """All that was added."""
        redrawn = {key: np.concatenate(each) for key, each in self._redrawn.items()}
        return {
            key: Resampled(once, redrawn[key], self._sums[:, place] / len(redrawn[key]))
            for place, (key, once) in enumerate(self._once.items())
        }
