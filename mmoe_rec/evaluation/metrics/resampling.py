"""The bootstrap over users: what the metrics would have been had other users come (Efron and Tibshirani, 1993).

Rows of one user are alike, so intervals that resample rows are too narrow; whole users are drawn instead, with
replacement, as many as there are.
"""

from collections.abc import Callable, Iterator

import numpy as np

Values = dict[tuple[str, str], np.ndarray]
"""(task or `score`, metric) -> (R,) float64"""

_ENTRIES_AT_A_TIME = 2_000_000
_DEFINED_SHARE = 0.95


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
    at: Callable[[np.ndarray], Values], users: int, resamples: int, seed: int
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Task or `score` -> metric -> its value, that of every user counted once, with its interval.

    Raises:
        ValueError: no resample is asked for.
    """
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; expected at least 1")
    replicates = replicate(at, users, resamples, seed)
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for (name, metric), value in at(np.ones((users, 1))).items():
        found.setdefault(name, {})[metric] = with_interval(value[0], replicates[name, metric], users)
    return found


def defined_well(defined: np.ndarray, resamples: int, users: int) -> bool:
    """Whether the values of those resamples in which a metric is defined are a fair sample, so that it has an
    interval."""
    return users >= 2 and len(defined) >= _DEFINED_SHARE * resamples


def with_interval(value: float, replicates: np.ndarray, users: int) -> dict[str, float | None]:
    """A metric with its 95% percentile interval: `value`, `low`, `high`; None where undefined.

    There is no interval with a single user, nor when the metric is undefined in more than 5% of the resamples: the rest
    would not be a fair sample. Resamples in which it is undefined are otherwise left out.
    """
    if not np.isfinite(value):
        return {"value": None, "low": None, "high": None}
    defined = replicates[np.isfinite(replicates)]
    if not defined_well(defined, len(replicates), users):
        return {"value": float(value), "low": None, "high": None}
    low, high = np.percentile(defined, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}
