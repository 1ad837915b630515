"""What another policy would have gained, from rows that a policy with known probabilities has chosen.

SNIPS, the self-normalised estimate by inverse propensities (Swaminathan and Joachims, 2015), weighs each row by how
much more often the target policy chooses what was shown than the one that logged it did: w = target / propensity. The
doubly robust estimate (Dudik, Langford and Li, 2011; self-normalised) corrects what a model expects of the target by
the weighted error of the model on what was shown. Weights above a cap are clipped to it, which trades variance for
bias.

There is no estimate without support: where the log can't have shown what the target shows, weights don't average 1; and
where few rows have nearly all of the weight, these decide alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mmoe_rec.evaluation.intervals import user_counts, with_interval
from mmoe_rec.evaluation.metrics.metric import alike
from mmoe_rec.evaluation.sums import units_of

CAPS = (None, 100.0, 30.0, 10.0, 3.0, 1.0)
"""Largest weights that are tried; None is all as they are."""
_SURELY = 2.0  # times the reach of a 95% interval, so that a log with support is hardly ever refused
LEAST_EFFECTIVE = 100.0
"""Rows of equal weight that would tell as much, below which there is no estimate."""


@dataclass(frozen=True)
class Shown:
    """N rows, each of something that was shown. users: (N,); propensity, target: (N,) probabilities with which the
    policy that logged and the one that is asked for choose it; label: (N,), NaN where unobserved; predicted, expected:
    (N,), what a model expects of what was shown, and of the target's choices; None for no doubly robust estimate."""

    users: pa.Array
    propensity: np.ndarray
    target: np.ndarray
    label: np.ndarray
    predicted: np.ndarray | None = None
    expected: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> Shown:
        """Those of the rows whose numbers are given."""
        model = (None if each is None else each[rows] for each in (self.predicted, self.expected))
        users = self.users.take(pa.array(rows))
        return Shown(users, self.propensity[rows], self.target[rows], self.label[rows], *model)


def estimate(shown: Shown, resamples: int, seed: int = 0) -> dict[str, Any]:
    """Estimates of the mean label under the target policy.

    Returns:
        `rows` with an observed label, those `without_label`, and their `users`; `logged`, the mean label as it was
        logged; `mean_weight`, with its interval, which has to hold 1; `effective_rows`, (sum of w)^2 / sum of w^2;
        `refused`, a sentence, or None; and where it is None, `warnings`, sentences, and `estimates`: one for each cap,
        with `cap`, `clipped` (share of the weight that the cap takes away), `effective_rows`, `snips`, and
        `doubly_robust` where there is a model. All but counts and shares are `value`, `low`, `high`.
    """
    known = shown.take(np.flatnonzero(~np.isnan(shown.label)))
    rows = len(known.label)
    told: dict[str, Any] = {"rows": rows, "without_label": len(shown.label) - rows, "refused": None}
    if not rows:
        return {**told, "refused": "no row has an observed label"}
    weight = known.target / known.propensity
    units, count = units_of(known.users)
    sums = {None: _sums(known, weight, units, count)} | {
        cap: _sums(known, np.minimum(weight, cap), units, count) for cap in CAPS if cap is not None
    }
    values = _values(sums, resamples, seed, count)
    told |= {
        "users": len(known.users.unique()),
        "logged": values[None]["logged"],
        "mean_weight": values[None]["weight"],
    }
    told["effective_rows"] = _effective(weight)
    told["refused"] = _refusal(told)
    if told["refused"] is None:
        told["warnings"] = list(_warnings(values[None]))
        told["estimates"] = [
            {
                "cap": cap,
                "clipped": 0.0 if cap is None else float(1 - np.minimum(weight, cap).sum() / weight.sum()),
                "effective_rows": _effective(weight if cap is None else np.minimum(weight, cap)),
                **{name: each for name, each in values[cap].items() if name in ("snips", "doubly_robust")},
            }
            for cap in CAPS
        ]
    return told


def _warnings(values: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What is suspicious of the estimates with all weights as they are."""
    mean, apart = values["weight"], values.get("apart")
    if not mean["low"] <= 1 <= mean["high"]:
        what = f"target / propensity is {mean['value']:.3f} on average ({mean['low']:.3f} to {mean['high']:.3f})"
        if mean["value"] < 1:
            most = f"up to {1 - mean['low']:.0%} of what the target chooses may never have been shown"
            yield f"{what}, below 1: {most}, and the estimates say nothing of it"
        else:
            yield f"{what}, above 1: these may not be the probabilities of the two policies' choices"
    if apart is not None and apart["low"] is not None:
        reach = _SURELY * max(apart["high"] - apart["value"], apart["value"] - apart["low"])
        if abs(apart["value"]) > reach:
            yield (
                f"the doubly robust estimate is {abs(apart['value']):.4f} {'above' if apart['value'] > 0 else 'below'} "
                "SNIPS, by more than chance explains: what the model expects may be of another policy than the "
                "target, or of other rows"
            )


def _refusal(told: Mapping[str, Any]) -> str | None:
    mean = told["mean_weight"]
    if mean["value"] == 0 or told["effective_rows"] == 0:
        return "the target policy never chooses what was shown"
    if told["rows"] < LEAST_EFFECTIVE:
        return f"{told['rows']:,} rows have a label, and {LEAST_EFFECTIVE:g} are needed"
    if told["effective_rows"] < LEAST_EFFECTIVE:
        return (
            f"{told['rows']:,} rows tell as much as {told['effective_rows']:,.0f} of equal weight, and "
            f"{LEAST_EFFECTIVE:g} are needed: the target chooses mostly what was hardly ever shown"
        )
    if mean["low"] is None:
        return "the rows are of one user, or one user has nearly all of the weight, so there is no interval"
    value, reach = mean["value"], _SURELY * max(mean["high"] - mean["value"], mean["value"] - mean["low"])
    if abs(value - 1) > reach:
        return (
            f"target / propensity is {value:.3f} on average ({mean['low']:.3f} to {mean['high']:.3f}) and has to be 1: "
            "the log never shows some of what the target chooses, or these are not the probabilities of its choices"
        )
    return None


def _sums(shown: Shown, weight: np.ndarray, units: np.ndarray, count: int) -> np.ndarray:
    """(S, U) sums by unit: rows, labels, weights, weighted labels, weighted errors of the model, expectations."""
    columns: Sequence[np.ndarray] = (np.ones(len(weight)), shown.label, weight, weight * shown.label)
    if shown.predicted is not None and shown.expected is not None:
        columns = [*columns, weight * (shown.label - shown.predicted), shown.expected]
    return np.stack([np.bincount(units, each, count) for each in columns])


def _values(
    sums: Mapping[float | None, np.ndarray], resamples: int, seed: int, units: int
) -> dict[float | None, dict[str, dict[str, float | None]]]:
    once = {cap: _at(each, np.ones((units, 1))) for cap, each in sums.items()}
    redrawn: dict[float | None, dict[str, list[np.ndarray]]]
    redrawn = {cap: {name: [] for name in each} for cap, each in once.items()}
    for counts in user_counts(units, resamples, seed):
        for cap, each in sums.items():
            for name, values in _at(each, counts).items():
                redrawn[cap][name].append(values)
    return {
        cap: {
            name: with_interval(float(value[0]), np.concatenate(redrawn[cap][name]), units, _alike(sums[cap]))
            for name, value in each.items()
        }
        for cap, each in once.items()
    }


def _at(sums: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    rows, labels, weights, weighted, *model = sums @ counts
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {"logged": labels / rows, "weight": weights / rows, "snips": weighted / weights}
        if model:
            found["doubly_robust"] = model[1] / rows + model[0] / weights
            found["apart"] = found["doubly_robust"] - found["snips"]
    return found


def _alike(sums: np.ndarray) -> float:
    """How many users alike would tell as much, by their rows or their weights, whichever is less. sums: of `_sums`."""
    return min(alike(sums[0]), alike(sums[2]))


def _effective(weight: np.ndarray) -> float:
    return alike(weight) if weight.any() else 0.0
