"""Differences of models on the same rows, from a paired bootstrap over users.

All models see the same redrawn users, so what these have in common cancels. The standard error of a difference is its
deviation over the resamples x sqrt(U / (U - 1)) for U users; intervals and p-values are Student's. Where few users have
most of the rows, they decide alone: so the degrees of freedom are one less than the number of users of equal size that
would tell as much, (sum of rows)^2 / sum of rows^2 (Kish, 1965). p-values are corrected for how many differences are
looked at by Holm's method (1979).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from scipy.stats import t as student

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.closed import ClosedSums
from mmoe_rec.evaluation.judging.objective import SCORE, Objective
from mmoe_rec.evaluation.metrics.registered import metrics_of
from mmoe_rec.evaluation.metrics.resampling import Values, defined_well, user_counts
from mmoe_rec.evaluation.summary import evaluate, sums_by_user

LEVEL, POWER = 0.05, 0.9
"""Chance that equal models are told apart; and that models are whose difference is called detectable."""
_ROUNDING = 1e-9  # as a share of the values: a smaller difference is none
_LEAST_FREEDOM = 0.5  # below, an interval is no news
_SAME = ["user", "rows", "requests", "digest"]
OBJECTIVE = ("objective", "objective")

Difference = dict[str, float | None]


def differences(
    models: Mapping[str, ClosedSums],
    model: str,
    objective: Objective | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Differences of one of the models from each of the others, with 95% intervals.

    Returns:
        `model`, `resamples`, `seed`, `units` that were redrawn, `effective_users` of each task and the `score`,
        `objective` (`name`, `metric`, `groups`, `better`; or None), and `against`: name of each other model ->
        `objective` -> the difference, model - other, and `groups` -> task or `score` -> metric -> the difference. That
        is `value`, `low`, `high`; `error`, its standard error; `p`, two-sided; `p_corrected` for all headline metrics
        and all others, None for further metrics; and `detectable`, the size that nine of ten evaluations like this one
        would show, by an interval without 0. What is undefined is None. There is no `score` of a model that weighs
        relevance differently, as its truth is another one, nor are there tasks that one of the two lacks.

    Raises:
        UserError: two models were not measured on the same rows with the same labels.
    """
    mine, others = models[model], [name for name in models if name != model]
    for other in others:
        check_same_rows(model, mine, other, models[other])
    groups = {name: sums_by_user(sums) for name, sums in models.items()}

    def at(name: str, counts: np.ndarray) -> Values:
        return with_objective(evaluate(groups[name], counts), objective)

    units, effective = len(mine.tables["ranking"]), effective_users(mine)
    once = {name: at(name, np.ones((units, 1))) for name in models}
    redrawn: dict[str, dict[tuple[str, str], list[np.ndarray]]]
    redrawn = {name: {key: [] for key in values} for name, values in once.items()}
    for counts in user_counts(units, resamples, seed):
        for name in models:
            for key, value in at(name, counts).items():
                redrawn[name][key].append(value)
    resampled = {name: {key: np.concatenate(each) for key, each in found.items()} for name, found in redrawn.items()}
    found: dict[str, Any] = {}
    for other in others:
        same_truth = _weights(mine) == _weights(models[other])
        paired = {
            key: difference(
                once[model][key][0],
                once[other][key][0],
                resampled[model][key],
                resampled[other][key],
                units,
                effective_of(key, effective, objective),
            )
            for key in once[model]
            if key in once[other] and (same_truth or not _is_of_score(key, objective))
        }
        found[other] = {"objective": paired.pop(OBJECTIVE, told_as(None)), "groups": {}}
        for (group, metric), each in paired.items():
            found[other]["groups"].setdefault(group, {})[metric] = each
    correct(mine, found)
    told = None if objective is None else asdict(objective) | {"name": objective.name}
    return {
        "model": model,
        "resamples": resamples,
        "seed": seed,
        "units": units,
        "effective_users": effective,
        "objective": told,
        "against": found,
    }


def with_objective(values: Values, objective: Objective | None) -> Values:
    """Values of metrics, with that of what decides where all of its parts are there."""
    if objective is not None and all((each, objective.metric) in values for each in objective.groups):
        values[OBJECTIVE] = objective.of_values(values)
    return values


def holm(p: Sequence[float]) -> list[float]:
    """p-values of several tests, each corrected so that all together err as rarely as one (Holm, 1979)."""
    order = np.argsort(p, kind="stable")
    corrected = np.minimum(np.maximum.accumulate(np.asarray(p)[order] * np.arange(len(p), 0, -1)), 1.0)
    found = np.empty(len(p))
    found[order] = corrected
    return [float(each) for each in found]


def effective_users(sums: ClosedSums) -> dict[str, float]:
    """Task or `score` -> how many users of equal size would tell as much as those there are, 1 or more."""
    found = {}
    for name in (SCORE, *(task.name for task in sums.tasks)):
        rows = sums.tables["ranking" if name == SCORE else f"{name}.users"]["rows"].to_numpy().astype(np.float64)
        found[name] = float(rows.sum() ** 2 / (rows**2).sum()) if len(rows) else 1.0
    return found


def effective_of(key: tuple[str, str], effective: Mapping[str, float], objective: Objective | None) -> float:
    groups = objective.groups if key == OBJECTIVE and objective is not None else key[:1]
    return min(effective[group] for group in groups)


def difference(
    value: float, other: float, redrawn: np.ndarray, others: np.ndarray, units: int, effective: float
) -> Difference:
    """Of one metric of two models: its values, and those (R,) in all resamples of so many units, effectively so
    many."""
    apart, defined = value - other, (redrawn - others)[np.isfinite(redrawn) & np.isfinite(others)]
    if not np.isfinite(apart):
        return told_as(None)
    rounding = rounding_of(value, other)
    apart = 0.0 if abs(apart) <= rounding else float(apart)
    if not defined_well(defined, len(redrawn), units):
        return told_as(apart)
    error = float(defined.std()) * np.sqrt(units / (units - 1))
    return by_student(apart, float(error), effective - 1, rounding)


def rounding_of(*values: float) -> float:
    """Up to which size a difference of such values is none."""
    return _ROUNDING * max(map(abs, values))


def by_student(apart: float, error: float, freedom: float, rounding: float) -> Difference:
    """A difference with its standard error and the degrees of freedom of that."""
    if error <= rounding:
        # What differs and does not vary rests on too few resamples, or users, to say how sure it is.
        return told_as(apart, 0.0, 0.0, 1.0, 0.0) if apart == 0 else told_as(apart)
    if freedom < _LEAST_FREEDOM:
        return told_as(apart)
    reach, extra = student.ppf([1 - LEVEL / 2, POWER], freedom)
    p = 2 * student.sf(abs(apart) / error, freedom)
    return told_as(apart, error, float(reach * error), float(p), float((reach + extra) * error))


def told_as(
    value: float | None,
    error: float | None = None,
    reach: float | None = None,
    p: float | None = None,
    detectable: float | None = None,
) -> Difference:
    """A difference with its standard error, and how far its interval reaches to either side."""
    low, high = (None, None) if value is None or reach is None else (value - reach, value + reach)
    told = {"value": value, "low": low, "high": high, "error": error}
    return {**told, "p": p, "p_corrected": None, "detectable": detectable}


def correct(base: ClosedSums, found: Mapping[str, Any]) -> None:
    """Adds the corrected p-values of the metrics that tables show. found: name of each other model -> `objective` and
    `groups`, as `differences` gives them."""
    kinds = {task.name: task.kind for task in base.tasks}
    shown = {
        group: {each.name for each in metrics_of(kinds.get(group, SCORE)) if each.is_shown(group == SCORE)}
        for group in [*kinds, SCORE]
    }
    looked_at = [
        each
        for model in found.values()
        for group, metrics in model["groups"].items()
        for metric, each in metrics.items()
        if metric in shown[group] and each["p"] is not None
    ]
    # The objective was chosen before, so it is corrected for the number of models alone.
    objectives = [model["objective"] for model in found.values() if model["objective"]["p"] is not None]
    for family in (looked_at, objectives):
        for each, corrected in zip(family, holm([each["p"] for each in family]), strict=True):
            each["p_corrected"] = corrected


def check_same_rows(name: str, sums: ClosedSums, against: str, base: ClosedSums) -> None:
    """Raises UserError where two models were not measured on the same rows with the same labels."""
    tables = ["ranking", *(f"{task.name}.users" for task in base.tasks if f"{task.name}.users" in sums.tables)]
    for table in tables:
        mine, its = (
            each.tables[table].select([key for key in _SAME if key in each.tables[table].column_names])
            for each in (sums, base)
        )
        if not mine.equals(its):
            raise UserError(
                f"'{name}' and '{against}' were not measured on the same rows ({_what_differs(table, sums, base)}): "
                "differences of models need the same requests and candidates, with the same labels"
            )


def _what_differs(table: str, sums: ClosedSums, base: ClosedSums) -> str:
    mine, its = (each.tables[table] for each in (sums, base))
    rows = [int(each["rows"].to_numpy().sum()) for each in (mine, its)]
    of = "" if table == "ranking" else f" with a label of '{table.removesuffix('.users')}'"
    if rows[0] != rows[1] or sums.users != base.users:
        return f"{rows[0]:,} rows{of} of {sums.users:,} users, and {rows[1]:,} of {base.users:,}"
    if not mine["user"].equals(its["user"]):
        return f"the users of rows{of} differ"
    apart = int((mine["digest"].to_numpy() != its["digest"].to_numpy()).sum())
    who = "users" if sums.users == len(base.tables["ranking"]) else "groups of users"
    what = "requests or candidates" if table == "ranking" else f"labels of '{table.removesuffix('.users')}'"
    return f"{what} of {apart or 'some'} of {len(mine):,} {who} differ"


def _is_of_score(key: tuple[str, str], objective: Objective | None) -> bool:
    return SCORE in (objective.groups if key == OBJECTIVE and objective is not None else key[:1])


def _weights(sums: ClosedSums) -> dict[str, float]:
    return {task.name: task.weight for task in sums.tasks if task.weight}
