"""What each of many changes of a setting is worth, from trainings in which several are made at once.

A training with another seed differs by as much as most changes are worth. Where each training makes a drawn part of
all changes, every training tells of every change: a linear regression of the metric on what was changed (a screening
design: Plackett and Burman, 1946) uses all N trainings for each of K changes, where trying one after the other uses
N / K of them. It takes several changes to be worth the sum of what each is worth, which holds near the setting that is
changed; so few are made at once, and what is taken together is tried by itself at the end.

An effect errs by the trainings, with the variance of the residuals, and by the choice of users, by the bootstrap of the
same weighted sum of trainings over redrawn users. The interval is Student's, as in `mmoe_rec.evaluation.trainings`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmoe_rec.evaluation.intervals import Difference, Resampled, correct_all, find_difference

DRAWS = 50
"""Designs of which the one is taken that tells most."""
SHARES = (1 / 3, 1 / 4, 1 / 5)
"""Of trainings that take a change, where one, two, or three and more exclude each other."""


def draw_design(exclusive: Sequence[Sequence[int]], changes: int, trainings: int, seed: int) -> np.ndarray:
    """(N, K) bool, which of K changes each of N trainings makes; as many trainings make each, as far as they can.

    exclusive: numbers of the changes in groups, of which a training makes one at most; a change in none is never made.
    """
    generator = np.random.default_rng(seed)

    def draw() -> np.ndarray:
        design = np.zeros((trainings, changes), bool)
        for group in exclusive:
            each = max(1, round(trainings * SHARES[min(len(group), len(SHARES)) - 1]))
            made = np.repeat(np.asarray(group), each)[:trainings]
            places = generator.permutation(trainings)[: len(made)]
            design[places, made] = True
        return design

    def error(design: np.ndarray) -> float:
        x = _with_mean(design)
        return float(np.trace(np.linalg.inv(x.T @ x + 1e-6 * np.eye(x.shape[1]))))

    return min((draw() for _ in range(DRAWS)), key=error)


def estimate_effects(design: np.ndarray, measured: Sequence[Resampled], effective: float) -> list[Difference]:
    """What each of K changes adds to a metric, with p-values corrected for their number.

    design: (N, K) which changes each training makes; measured: the metric of each, by the same redrawn users;
    effective: number of users by their sizes. What the trainings don't tell apart is a difference without a value;
    where no training is left to say how sure the values are, they have no intervals.
    """
    x = _with_mean(np.asarray(design, np.float64))
    values = np.array([each.value for each in measured])
    solve = np.linalg.pinv(x)
    freedom = len(x) - int(np.linalg.matrix_rank(x))
    residual = values - x @ (solve @ values)
    noise = float(residual @ residual) / freedom if freedom else 0.0
    base, found = _weigh(solve[0], measured), []
    for row in np.eye(x.shape[1])[1:]:
        if not np.allclose(row @ solve @ x, row, atol=1e-8):
            found.append(Difference(None))
            continue
        weights = row @ solve
        changed = _weigh(solve[0] + weights, measured)
        if not freedom:
            found.append(Difference(changed.value - base.value))
            continue
        besides = [(noise * float(weights @ weights), float(freedom))]
        found.append(find_difference(changed, base, effective, besides=besides))
    return correct_all(found)


def _with_mean(design: np.ndarray) -> np.ndarray:
    return np.column_stack([np.ones(len(design)), design])


def _weigh(weights: np.ndarray, measured: Sequence[Resampled]) -> Resampled:
    """A weighted sum of the metric of trainings."""
    value, redrawn, influence = (
        np.tensordot(weights, np.array([getattr(each, name) for each in measured]), 1)
        for name in ("value", "redrawn", "influence")
    )
    return Resampled(float(value), redrawn, influence)
