"""The bootstrap over users: what the metrics would have been had other users come (Efron and Tibshirani, 1993).

Rows of one user are alike, so intervals that resample rows are too narrow; whole users are drawn instead, with
replacement, as many as there are. The interval is that of percentiles; of few users, or where few have most of what a
metric is of, these are too narrow, and it is Student's.
"""

from collections.abc import Callable, Iterator, Mapping

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
