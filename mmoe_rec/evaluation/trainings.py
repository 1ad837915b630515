"""What a model is worth over trainings: another seed, and other users, would have given other metrics.

The mean over trainings errs by both: its variance is that of the trainings / S plus that of the users, by the bootstrap
of the mean of all S on the same redrawn users. The interval is Student's, with degrees of freedom by Welch and
Satterthwaite. So it is with the difference of two settings' means, whose users are the same, and trainings not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from mmoe_rec.evaluation.comparison import (
    OBJECTIVE,
    Objective,
    Versus,
    correct,
    effective_users,
    evaluate_with,
    weights_of_tasks,
)
from mmoe_rec.evaluation.intervals import (
    LEAST_FREEDOM,
    LEVEL,
    Difference,
    Key,
    Resampled,
    Values,
    add_errors,
    find_difference,
    resample,
)
from mmoe_rec.evaluation.summary import SCORE, effective_by_metric, nest, sums_by_user
from mmoe_rec.evaluation.sums import EvaluationSums, check_same_rows


@dataclass(frozen=True)
class TrainingsMean:
    """A metric over trainings: their mean with its 95% interval; between_trainings: their standard deviation;
    between_users: the standard error of the mean from the choice of users; values: of each training."""

    mean: float | None
    low: float | None
    high: float | None
    between_trainings: float | None
    between_users: float | None
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class SettingsDifference(Versus):
    """Differences of means over trainings from those of other settings, and the name and direction of the objective."""

    name: str | None
    better: str | None


def average_trainings(sums: Sequence[EvaluationSums], resamples: int) -> dict[str, dict[str, TrainingsMean]]:
    """Task or `score` -> metric -> its mean over two or more trainings that were measured on the same rows."""
    effective = effective_by_metric(sums_by_user(sums[0]))
    means = _resample_mean(sums, resamples)
    return nest({key: _mean_of(*each, effective[key]) for key, each in means.items()})


def compare_trainings(
    sums: Sequence[EvaluationSums],
    others: Mapping[str, Sequence[EvaluationSums]],
    objective: Objective | None = None,
    resamples: int = 1000,
) -> dict[str, SettingsDifference]:
    """Name of each other setting -> the difference of the means over trainings from its own.

    sums, others: as for `find_differences`. Raises UserError where the rows are not the same.
    """
    differences = find_differences(sums, others.items(), objective, resamples)
    named = (None, None) if objective is None else (objective.name, objective.better)
    corrected = correct(sums[0], differences, others)
    return {name: SettingsDifference(each.objective, each.groups, *named) for name, each in corrected.items()}


def find_differences(
    sums: Sequence[EvaluationSums],
    others: Iterable[tuple[str, Sequence[EvaluationSums]]],
    objective: Objective | None = None,
    resamples: int = 1000,
    metrics: Collection[str] | None = None,
) -> dict[tuple[str, str, str], Difference]:
    """Name of other settings, task or `score`, and metric -> the difference of the means, not corrected.

    Where one side has a single training, the intervals are over users alone. Tasks that one side lacks are left out,
    and so is the score of settings by which rows are worth something else.

    sums: of trainings; others: names of settings, with those of their trainings, of which one is held at a time;
    metrics: those that are wanted, the objective's among them; None: all. Raises UserError where the rows are not the
    same.
    """
    mine = _resample_mean(sums, resamples, objective, metrics)
    effective = effective_users(sums_by_user(sums[0], metrics), objective)
    differences = dict[tuple[str, str, str], Difference]()
    for name, its in others:
        for each in its:
            check_same_rows("these settings", sums[0], name, each)
        theirs = _resample_mean(its, resamples, objective, metrics)
        left_out = {SCORE} if weights_of_tasks(sums[0]) != weights_of_tasks(its[0]) else set[str]()
        if left_out and objective is not None and SCORE in objective.groups:
            left_out.add(OBJECTIVE[0])
        for key in (key for key in mine if key in theirs and key[0] not in left_out):
            (values, redrawn), (its_values, its_redrawn) = mine[key], theirs[key]
            sides = (values, its_values)
            of_seeds = [(each.var(ddof=1) / len(each), len(each) - 1) for each in sides if min(map(len, sides)) > 1]
            differences[name, *key] = find_difference(redrawn, its_redrawn, effective[key], besides=of_seeds)
    return differences


def _resample_mean(
    sums: Sequence[EvaluationSums],
    resamples: int,
    objective: Objective | None = None,
    metrics: Collection[str] | None = None,
) -> dict[Key, tuple[np.ndarray, Resampled]]:
    """Task or `score` and metric -> (S,) values of the trainings, and their mean when users are redrawn."""
    groups, units = [sums_by_user(each, metrics) for each in sums], len(sums[0].tables["ranking"])

    def values_of(counts: np.ndarray) -> list[Values]:
        return [evaluate_with(objective, each, counts) for each in groups]

    def mean_of(counts: np.ndarray) -> Values:
        values = values_of(counts)
        return {key: np.mean([each[key] for each in values], axis=0) for key in values[0]}

    once = values_of(np.ones((units, 1)))
    resampled = resample(mean_of, units, resamples)
    return {key: (np.array([each[key][0] for each in once]), of) for key, of in resampled.items()}


def _mean_of(values: np.ndarray, redrawn: Resampled, effective: float) -> TrainingsMean:
    each = tuple(float(value) if np.isfinite(value) else None for value in values)
    if None in each:
        return TrainingsMean(None, None, None, None, None, each)
    mean, spread = float(values.mean()), float(values.std(ddof=1))
    of_users, effective = redrawn.error(effective)
    if of_users is None or effective - 1 < LEAST_FREEDOM:
        return TrainingsMean(mean, None, None, spread, None, each)
    error, freedom = add_errors([(spread**2 / len(values), len(values) - 1), (of_users**2, effective - 1)])
    reach = float(student.ppf(1 - LEVEL / 2, freedom)) * error
    return TrainingsMean(mean, mean - reach, mean + reach, spread, of_users, each)
