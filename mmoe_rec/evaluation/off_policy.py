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

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from mmoe_rec.evaluation.intervals import UNDEFINED, Interval, Values, effective_sample_size, resample
from mmoe_rec.evaluation.sums import units_of

CAPS = (None, 100.0, 30.0, 10.0, 3.0, 1.0)
"""Largest weights that are tried; None is all as they are."""
_SURELY = 2.0  # times the reach of a 95% interval, so that a log with support is hardly ever refused
LEAST_EFFECTIVE = 100.0
"""Effective rows, below which there is no estimate."""
FEW_ROWS, FEW_EFFECTIVE_ROWS, ONE_USER, NO_SUPPORT = "few rows", "few effective rows", "one user", "no support"
"""Why there is no estimate."""


@dataclass(frozen=True)
class LoggedChoices:
    """N rows, each of something that was shown. users: (N,); propensity, target: (N,) probabilities with which the
    policy that logged and the one that is asked for choose it; label: (N,), NaN where unobserved; predicted, expected:
    (N,), what a model expects of what was shown, and of the target's choices; None for no doubly robust estimate."""

    users: pa.Array
    propensity: np.ndarray
    target: np.ndarray
    label: np.ndarray
    predicted: np.ndarray | None = None
    expected: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> LoggedChoices:
        """Those of the rows whose numbers are given."""
        model = (None if each is None else each[rows] for each in (self.predicted, self.expected))
        users = self.users.take(pa.array(rows))
        return LoggedChoices(users, self.propensity[rows], self.target[rows], self.label[rows], *model)


@dataclass(frozen=True)
class CappedEstimate:
    """Estimates with weights clipped at a cap. clipped: share of the weight that the cap takes away; effective_rows:
    (sum of w)^2 / sum of w^2; doubly_robust: None without a model."""

    cap: float | None
    clipped: float
    effective_rows: float
    snips: Interval
    doubly_robust: Interval | None


@dataclass(frozen=True)
class PolicyEstimate:
    """The mean label under the target policy.

    rows: with an observed label; logged: the mean label as it was logged; mean_weight: has to be 1; apart: the doubly
    robust estimate less SNIPS, with all weights as they are; estimates: one for each cap, none where refused; refusal:
    why there is no estimate, a constant of this module.
    """

    rows: int
    without_label: int
    refusal: str | None
    users: int = 0
    logged: Interval = UNDEFINED
    mean_weight: Interval = UNDEFINED
    effective_rows: float = 0.0
    apart: Interval = UNDEFINED
    estimates: tuple[CappedEstimate, ...] = ()


def estimate(choices: LoggedChoices, resamples: int) -> PolicyEstimate:
    """Estimates the mean label under the target policy, or says why that is not possible."""
    known = choices.take(np.flatnonzero(~np.isnan(choices.label)))
    rows = len(known.label)
    without_label = len(choices.label) - rows
    if not rows:
        return PolicyEstimate(0, without_label, FEW_ROWS)
    weight = known.target / known.propensity
    clipped = {cap: weight if cap is None else np.minimum(weight, cap) for cap in CAPS}
    units, keys = units_of(known.users)
    sums = {cap: _sums(known, each, units, len(keys)) for cap, each in clipped.items()}

    def at(counts: np.ndarray) -> Values:
        return {(cap, name): each for cap, of in sums.items() for name, each in _estimates(of @ counts).items()}

    # The effective number of units is that by their rows or their weights, whichever is less.
    sizes = {cap: min(effective_sample_size(of[0]), effective_sample_size(of[2])) for cap, of in sums.items()}
    shares = ("logged", "snips") if ((known.label >= 0) & (known.label <= 1)).all() else ()
    resampled = resample(at, len(keys), resamples)
    values = {key: each.interval(sizes[key[0]], key[1] in shares) for key, each in resampled.items()}
    mean, apart = values[None, "weight"], values.get((None, "apart"), UNDEFINED)
    effective = effective_sample_size(weight) if weight.any() else 0.0
    refusal = find_refusal(rows, effective, mean)
    users, logged = len(known.users.unique()), values[None, "logged"]
    told = PolicyEstimate(rows, without_label, refusal, users, logged, mean, effective, apart)
    if refusal is not None:
        return told
    estimates = (
        CappedEstimate(
            cap,
            float(1 - each.sum() / weight.sum()),
            effective_sample_size(each),
            values[cap, "snips"],
            values.get((cap, "doubly_robust")),
        )
        for cap, each in clipped.items()
    )
    return replace(told, estimates=tuple(estimates))


def find_refusal(rows: int, effective: float, mean: Interval) -> str | None:
    """Why there is no estimate. effective: number of rows; mean: of the weights."""
    if rows < LEAST_EFFECTIVE:
        return FEW_ROWS
    if effective < LEAST_EFFECTIVE:
        return FEW_EFFECTIVE_ROWS
    if mean.low is None:
        return ONE_USER
    return NO_SUPPORT if is_far(mean, 1.0) else None


def is_far(interval: Interval, value: float) -> bool:
    """Whether a value lies so far outside that chance hardly explains it."""
    if interval.value is None or interval.low is None or interval.high is None:
        return False
    reach = max(interval.high - interval.value, interval.value - interval.low)
    return abs(interval.value - value) > _SURELY * reach


def _sums(shown: LoggedChoices, weight: np.ndarray, units: np.ndarray, count: int) -> np.ndarray:
    """(S, U) sums by unit: rows, labels, weights, weighted labels, weighted errors of the model, expectations."""
    columns = [np.ones(len(weight)), shown.label, weight, weight * shown.label]
    if shown.predicted is not None and shown.expected is not None:
        columns += [weight * (shown.label - shown.predicted), shown.expected]
    return np.stack([np.bincount(units, each, count) for each in columns])


def _estimates(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Name -> (R,) from sums (S, R)."""
    rows, labels, weights, weighted, *model = sums
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {"logged": labels / rows, "weight": weights / rows, "snips": weighted / weights}
        if model:
            found["doubly_robust"] = model[1] / rows + model[0] / weights
            found["apart"] = found["doubly_robust"] - found["snips"]
    return found
