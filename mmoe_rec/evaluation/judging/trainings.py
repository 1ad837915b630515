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

from mmoe_rec.evaluation.closed import ClosedSums
from mmoe_rec.evaluation.judging.differences import (
    LEVEL,
    POWER,
    Difference,
    check_same_rows,
    correct,
    effective_users,
    told_as,
)
from mmoe_rec.evaluation.metrics.resampling import defined_well, user_counts
from mmoe_rec.evaluation.summary import evaluate, sums_by_user


def over_trainings(sums: Sequence[ClosedSums], resamples: int, seed: int = 0) -> dict[str, dict[str, dict[str, Any]]]:
    """Task or `score` -> metric -> `mean`, `low`, `high`; `values` of the trainings, `between_trainings`, their
    standard deviation, and `between_users`, the standard error of their mean from the choice of users.

    sums: of two or more trainings, measured on the same rows. What is undefined is None.
    """
    units = len(sums[0].tables["ranking"])
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for (group, metric), (values, redrawn) in _redrawn(sums, resamples, seed).items():
        summary.setdefault(group, {})[metric] = _joined(values, redrawn, units)
    return summary


def apart_over_trainings(
    sums: Sequence[ClosedSums], others: Mapping[str, Sequence[ClosedSums]], resamples: int, seed: int = 0
) -> dict[str, dict[str, dict[str, Difference]]]:
    """Name of each other setting -> task or `score` -> metric -> the difference of the means over trainings, as those
    of `differences`: its variance is that of either's trainings / their number, and that of the difference on the same
    redrawn users.

    sums, others: of two or more trainings each. Raises UserError where the rows are not the same.
    """
    units, mine = len(sums[0].tables["ranking"]), _redrawn(sums, resamples, seed)
    effective, found = effective_users(sums[0]), dict[str, Any]()
    for name, its in others.items():
        for each in its:
            check_same_rows("this setting", sums[0], name, each)
        theirs = _redrawn(its, resamples, seed)
        groups: dict[str, dict[str, Difference]] = {}
        for group, metric in (key for key in mine if key in theirs):
            pair = (*mine[group, metric], *theirs[group, metric])
            groups.setdefault(group, {})[metric] = _apart(*pair, units, effective[group])
        found[name] = {"objective": told_as(None), "groups": groups}
    correct(sums[0], found)
    return {name: each["groups"] for name, each in found.items()}


def _redrawn(
    sums: Sequence[ClosedSums], resamples: int, seed: int
) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """Task or `score` and metric -> (S,) values of the trainings, and (R,) their means when users are redrawn."""
    groups, units = [sums_by_user(each) for each in sums], len(sums[0].tables["ranking"])
    once = [evaluate(each, np.ones((units, 1))) for each in groups]
    redrawn: dict[tuple[str, str], list[np.ndarray]] = {key: [] for key in once[0]}
    for counts in user_counts(units, resamples, seed):
        values = [evaluate(each, counts) for each in groups]
        for key, found in redrawn.items():
            found.append(np.mean([each[key] for each in values], axis=0))
    return {key: (np.array([each[key][0] for each in once]), np.concatenate(found)) for key, found in redrawn.items()}


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
            f"{group}: one training's {metric} differs by {seeds:.2g} from seed to seed, and by {users:.2g} from one "
            f"draw of users to another: {which}"
        )


def told_apart(against: Mapping[str, Mapping[str, Mapping[str, Difference]]]) -> Iterator[str]:
    """Of each other setting and task, whether this one is better on average, as a sentence. against: of
    `apart_over_trainings`."""
    for other, groups in against.items():
        for group, metrics in groups.items():
            metric = "auc" if "auc" in metrics else "r2"
            each = metrics.get(metric)
            if each is None or each["value"] is None or each["low"] is None:
                continue
            p, apart = each["p_corrected"], each["value"]
            which = "higher" if apart > 0 else "lower"
            is_shown = p is not None and p < LEVEL
            told = f"{which} by {abs(apart):.2g} than" if is_shown else "not shown to differ from"
            yield f"{group}: the mean {metric} is {told} that of '{other}' ({each['low']:+.2g} to {each['high']:+.2g})"


def _joined(values: np.ndarray, redrawn: np.ndarray, units: int) -> dict[str, Any]:
    told = [float(each) if np.isfinite(each) else None for each in values]
    names = ("mean", "low", "high", "between_trainings", "between_users")
    nothing = {**dict.fromkeys(names), "values": told}
    if not np.isfinite(values).all():
        return nothing
    mean, spread = float(values.mean()), float(values.std(ddof=1))
    of_users = _of_users(redrawn, units)
    if of_users is None:
        return nothing | {"mean": mean, "between_trainings": spread}
    error, freedom = _welch((spread**2 / len(values), of_users**2), (len(values) - 1, units - 1))
    reach = float(student.ppf(1 - LEVEL / 2, freedom)) * error
    ends = {"low": mean - reach, "high": mean + reach}
    return nothing | {"mean": mean, **ends, "between_trainings": spread, "between_users": of_users}


def _apart(
    mine: np.ndarray,
    redrawn: np.ndarray,
    its: np.ndarray,
    its_redrawn: np.ndarray,
    units: int,
    effective: float,
) -> Difference:
    if not (np.isfinite(mine).all() and np.isfinite(its).all()):
        return told_as(None)
    apart, of_users = float(mine.mean() - its.mean()), _of_users(redrawn - its_redrawn, units)
    if of_users is None or effective <= 1:
        return told_as(apart)
    of_seeds = (each.var(ddof=1) / len(each) for each in (mine, its))
    error, freedom = _welch((*of_seeds, of_users**2), (len(mine) - 1, len(its) - 1, effective - 1))
    if error == 0:  # the same models on both sides
        return told_as(apart, 0.0, 0.0, 1.0, 0.0) if apart == 0 else told_as(apart)
    reach, extra = student.ppf([1 - LEVEL / 2, POWER], freedom)
    p = 2 * student.sf(abs(apart) / error, freedom)
    return told_as(apart, error, float(reach * error), float(p), float((reach + extra) * error))


def _of_users(redrawn: np.ndarray, units: int) -> float | None:
    """The standard error from the choice of users; None where too few redraws are defined."""
    defined = redrawn[np.isfinite(redrawn)]
    if not defined_well(defined, len(redrawn), units):
        return None
    return float(defined.std()) * float(np.sqrt(units / (units - 1)))


def _welch(variances: Sequence[float], freedom: Sequence[float]) -> tuple[float, float]:
    """Standard error of a sum, and its degrees of freedom by Welch and Satterthwaite. Infinite where all variances are
    0."""
    total = sum(variances)
    if total == 0:
        return 0.0, np.inf
    joint = total**2 / sum(each**2 / free for each, free in zip(variances, freedom, strict=True))
    return float(np.sqrt(total)), float(joint)
