"""What a model is worth over trainings: another seed, and other users, would have given other metrics.

The mean over trainings errs by both: its variance is that of the trainings / S plus that of the users, by the bootstrap
of the mean of all S on the same redrawn users. The interval is Student's, with degrees of freedom by Welch and
Satterthwaite.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student

from mmoe_rec.evaluation.closed import ClosedSums
from mmoe_rec.evaluation.judging.differences import LEVEL
from mmoe_rec.evaluation.metrics.resampling import defined_well, user_counts
from mmoe_rec.evaluation.summary import evaluate, sums_by_user


def over_trainings(sums: Sequence[ClosedSums], resamples: int, seed: int = 0) -> dict[str, dict[str, dict[str, Any]]]:
    """Task or `score` -> metric -> `mean`, `low`, `high`; `values` of the trainings, `between_trainings`, their
    standard deviation, and `between_users`, the standard error of their mean from the choice of users.

    sums: of two or more trainings, measured on the same rows. What is undefined is None.
    """
    groups = [sums_by_user(each) for each in sums]
    units = len(sums[0].tables["ranking"])
    once = [evaluate(each, np.ones((units, 1))) for each in groups]
    redrawn: dict[tuple[str, str], list[np.ndarray]] = {key: [] for key in once[0]}
    for counts in user_counts(units, resamples, seed):
        values = [evaluate(each, counts) for each in groups]
        for key, found in redrawn.items():
            found.append(np.mean([each[key] for each in values], axis=0))
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for (group, metric), found in redrawn.items():
        values_of = np.array([each[group, metric][0] for each in once])
        summary.setdefault(group, {})[metric] = _joined(values_of, np.concatenate(found), units)
    return summary


def larger(summary: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    """Of each task, which of the two is the larger uncertainty of one training, as a sentence. summary: of
    `over_trainings`."""
    for group, metrics in summary.items():
        metric = "auc" if "auc" in metrics else "r2"
        each = metrics.get(metric)
        if each is None or each["between_users"] is None:
            continue
        seeds, users = each["between_trainings"], each["between_users"]
        which = (
            "another seed would change it more than other users"
            if seeds > users
            else "other users would change it more"
        )
        yield (
            f"{group}: one training's {metric} differs by {seeds:.2g} from seed to seed, and by {users:.2g} from users "
            f"to users: {which}"
        )


def _joined(values: np.ndarray, redrawn: np.ndarray, units: int) -> dict[str, Any]:
    told = [float(each) if np.isfinite(each) else None for each in values]
    nothing = {
        "mean": None,
        "low": None,
        "high": None,
        "values": told,
        "between_trainings": None,
        "between_users": None,
    }
    if not np.isfinite(values).all():
        return nothing
    mean, spread = float(values.mean()), float(values.std(ddof=1))
    defined = redrawn[np.isfinite(redrawn)]
    if not defined_well(defined, len(redrawn), units):
        return nothing | {"mean": mean, "between_trainings": spread}
    of_users = float(defined.std()) * np.sqrt(units / (units - 1))
    variances, freedom = (spread**2 / len(values), of_users**2), (len(values) - 1, units - 1)
    error = float(np.sqrt(sum(variances)))
    reach = 0.0
    if error > 0:
        joint = sum(variances) ** 2 / sum(each**2 / free for each, free in zip(variances, freedom, strict=True))
        reach = float(student.ppf(1 - LEVEL / 2, joint)) * error
    ends = {"low": mean - reach, "high": mean + reach}
    return nothing | {"mean": mean, **ends, "between_trainings": spread, "between_users": of_users}
