"""What a model is worth over trainings: another seed, and other users, would have given other metrics.

The mean over trainings errs by both: its variance is that of the trainings / S plus that of the users, by the bootstrap
of the mean of all S on the same redrawn users. The interval is Student's, with degrees of freedom by Welch and
Satterthwaite. So it is with the difference of two settings' means, whose users are the same, and trainings not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from mmoe_rec.evaluation.comparison import resample_mean
from mmoe_rec.evaluation.intervals import LEAST_FREEDOM, LEVEL, Resampled, add_errors
from mmoe_rec.evaluation.summary import Objective, nest
from mmoe_rec.evaluation.sums import EvaluationSums


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


def average_trainings(
    sums: Sequence[EvaluationSums], resamples: int, objective: Objective | None = None
) -> dict[str, dict[str, TrainingsMean]]:
    """Task or `score` -> metric -> its mean over two or more trainings that were measured on the same rows.

    objective: what decides, whose mean is under `OBJECTIVE`, if all of its tasks are measured.
    """
    means, effective = resample_mean(sums, resamples, objective)
    return nest({key: _mean_of(*each, effective[key]) for key, each in means.items()})


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
