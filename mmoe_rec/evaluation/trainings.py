"""What a model is worth over trainings: another seed, and other users, would have given other metrics.

The mean over trainings errs by both: its variance is that of the trainings / S plus that of the users, by the bootstrap
of the mean of all S on the same redrawn users. The interval is Student's, with degrees of freedom by Welch and
Satterthwaite. So it is with the difference of two settings' means: their users are the same, and their trainings not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student

from mmoe_rec.evaluation.comparison import (
    LEVEL,
    OBJECTIVE,
    Difference,
    Objective,
    by_student,
    check_same_rows,
    correct,
    effective_of,
    rounding_of,
    told_as,
    with_objective,
)
from mmoe_rec.evaluation.intervals import LEAST_FREEDOM, Resampled, Resampling, Values, user_counts
from mmoe_rec.evaluation.numbers import number, once_corrected, with_interval
from mmoe_rec.evaluation.summary import effective_by_metric, evaluate, sums_by_user
from mmoe_rec.evaluation.sums import ClosedSums


def over_trainings(sums: Sequence[ClosedSums], resamples: int, seed: int = 0) -> dict[str, dict[str, dict[str, Any]]]:
    """Task or `score` -> metric -> `mean`, `low`, `high`; `values` of the trainings, `between_trainings`, their
    standard deviation, and `between_users`, the standard error of their mean from the choice of users.

    sums: of two or more trainings, measured on the same rows. What is undefined is None.
    """
    effective = effective_by_metric(sums_by_user(sums[0]))
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for (group, metric), (values, mean) in _redrawn(sums, resamples, seed).items():
        summary.setdefault(group, {})[metric] = _joined(values, mean, effective[group, metric])
    return summary


def apart_over_trainings(
    sums: Sequence[ClosedSums],
    others: Mapping[str, Sequence[ClosedSums]],
    objective: Objective | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Name of each other setting -> `objective`, with its `name` and which values are `better`; `groups`: task or
    `score` -> metric -> the difference of the means over trainings, as those of `differences`; and `means`, of the
    other one. A difference's variance is that of either's trainings / their number, and that on the same redrawn users.

    sums, others: of two or more trainings each. Raises UserError where the rows are not the same.
    """
    mine = _redrawn(sums, resamples, seed, objective)
    effective, found = effective_by_metric(sums_by_user(sums[0])), dict[str, Any]()
    for name, its in others.items():
        for each in its:
            check_same_rows("these settings", sums[0], name, each)
        theirs = _redrawn(its, resamples, seed, objective)
        groups: dict[str, dict[str, Difference]] = {}
        for key in (key for key in mine if key in theirs):
            apart = _apart(*mine[key], *theirs[key], effective_of(key, effective, objective))
            groups.setdefault(key[0], {})[key[1]] = apart
        (decides,) = groups.pop(OBJECTIVE[0], {"": told_as(None)}).values()
        found[name] = {"objective": decides, "groups": groups}
        found[name]["means"] = _means(theirs)
        found[name] |= {"name": None if objective is None else objective.name}
        found[name] |= {"better": None if objective is None else objective.better}
    correct(sums[0], found)
    return found


def _means(redrawn: Mapping[tuple[str, str], tuple[np.ndarray, Resampled]]) -> dict[str, dict[str, float | None]]:
    found: dict[str, dict[str, float | None]] = {}
    for (group, metric), (values, _) in redrawn.items():
        if (group, metric) != OBJECTIVE:
            found.setdefault(group, {})[metric] = float(values.mean()) if np.isfinite(values).all() else None
    return found


def _redrawn(
    sums: Sequence[ClosedSums], resamples: int, seed: int, objective: Objective | None = None
) -> dict[tuple[str, str], tuple[np.ndarray, Resampled]]:
    """Task or `score` and metric -> (S,) values of the trainings, and their mean when users are redrawn."""
    groups, units = [sums_by_user(each) for each in sums], len(sums[0].tables["ranking"])

    def at(counts: np.ndarray) -> list[Values]:
        return [with_objective(evaluate(each, counts), objective) for each in groups]

    def mean(values: list[Values]) -> Values:
        return {key: np.mean([each[key] for each in values], axis=0) for key in values[0]}

    once = at(np.ones((units, 1)))
    resampling = Resampling(mean(once), units)
    for counts in user_counts(units, resamples, seed):
        resampling.add(counts, mean(at(counts)))
    return {key: (np.array([each[key][0] for each in once]), of) for key, of in resampling.found().items()}


def larger(summary: Mapping[str, Mapping[str, Mapping[str, Any]]], units: str = "users") -> Iterator[str]:
    """Of each task, which of the two is the larger uncertainty of one training, as a sentence.

    summary: of `over_trainings`; units: what was redrawn.
    """
    for group, metrics in summary.items():
        metric = "auc" if "auc" in metrics else "r2"
        each = metrics.get(metric)
        if each is None or each["between_users"] is None:
            continue
        seeds, users = each["between_trainings"], each["between_users"]
        which = f"another seed changes it more than other {units}" if seeds > users else f"other {units} change it more"
        yield (
            f"{group}: the {metric} of one training has a standard deviation of {seeds:.2g} over seeds, and one of "
            f"{users:.2g} over the choice of {units}: {which}"
        )


def told_apart(against: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Beside each other setting, whether this one is better on average, by what decides. against: of
    `apart_over_trainings`."""
    for other, each in against.items():
        apart, name = each["objective"], each["name"]
        if apart["value"] is None or apart["low"] is None:
            yield f"it can't be told how the trainings differ from those of '{other}': too few labels, or users"
            continue
        if apart["p_corrected"] < LEVEL:
            which = "better" if (apart["value"] > 0) == (each["better"] == "higher") else "worse"
            told = f"{name} differs by {with_interval(apart)}"
            yield f"on average these settings are {which} than '{other}': {told}"
        else:
            yield (
                f"no difference from '{other}' is shown on average{once_corrected(apart)}: {name} differs by "
                f"{with_interval(apart)}; nine of ten such comparisons would show one of "
                f"{number(apart['detectable'], sign=False)}"
            )


def _joined(values: np.ndarray, redrawn: Resampled, effective: float) -> dict[str, Any]:
    told = [float(each) if np.isfinite(each) else None for each in values]
    names = ("mean", "low", "high", "between_trainings", "between_users")
    nothing = {**dict.fromkeys(names), "values": told}
    if not np.isfinite(values).all():
        return nothing
    mean, spread = float(values.mean()), float(values.std(ddof=1))
    of_users, effective = redrawn.error(effective)
    if of_users is None or effective - 1 < LEAST_FREEDOM:
        return nothing | {"mean": mean, "between_trainings": spread}
    error, freedom = _welch((spread**2 / len(values), of_users**2), (len(values) - 1, effective - 1))
    reach = float(student.ppf(1 - LEVEL / 2, freedom)) * error
    ends = {"low": mean - reach, "high": mean + reach}
    return nothing | {"mean": mean, **ends, "between_trainings": spread, "between_users": of_users}


def _apart(
    mine: np.ndarray, redrawn: Resampled, its: np.ndarray, its_redrawn: Resampled, effective: float
) -> Difference:
    if not (np.isfinite(mine).all() and np.isfinite(its).all()):
        return told_as(None)
    rounding = rounding_of(mine.mean(), its.mean())
    apart, (of_users, effective) = float(mine.mean() - its.mean()), redrawn.less(its_redrawn).error(effective)
    apart = 0.0 if abs(apart) <= rounding else apart
    if of_users is None:
        return told_as(apart)
    of_users = 0.0 if of_users <= rounding else of_users
    if by_student(apart, of_users, effective - 1, rounding)["low"] is None and of_users > rounding:
        return told_as(apart)  # a few users decide nearly alone
    of_seeds = (each.var(ddof=1) / len(each) for each in (mine, its))
    error, freedom = _welch((*of_seeds, of_users**2), (len(mine) - 1, len(its) - 1, effective - 1))
    return by_student(apart, error, freedom, rounding)


def _welch(variances: Sequence[float], freedom: Sequence[float]) -> tuple[float, float]:
    """Standard error of a sum, and its degrees of freedom by Welch and Satterthwaite. Infinite where all variances are
    0."""
    total = sum(variances)
    if total == 0:
        return 0.0, np.inf
    joint = total**2 / sum(each**2 / free for each, free in zip(variances, freedom, strict=True) if each)
    return float(np.sqrt(total)), float(joint)
