"""Differences of models on the same rows, from a paired bootstrap over users.

All models see the same redrawn users, so what these have in common cancels. The standard error of a difference is its
deviation over the resamples x sqrt(U / (U - 1)) for U users; intervals and p-values are Student's, of U - 1 degrees of
freedom. Where few users have most of the rows, of the weight, or of the positive labels, they decide alone: so U is the
number of users alike that would tell as much: by their sizes, (sum of sizes)^2 / sum of sizes^2 (Kish, 1965), which are
their rows and what the metric divides by; or by their influence on this very difference
(`mmoe_rec.evaluation.judging.influence`), whichever is least. p-values are corrected for how many differences are
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
from mmoe_rec.evaluation.judging.influence import Resampled, Resampling
from mmoe_rec.evaluation.judging.objective import SCORE, Objective
from mmoe_rec.evaluation.metrics.registered import metrics_of
from mmoe_rec.evaluation.metrics.resampling import LEAST_FREEDOM, Values, user_counts
from mmoe_rec.evaluation.summary import effective_by_metric, evaluate, sums_by_user

LEVEL, POWER = 0.05, 0.9
"""Chance that equal models are told apart; and that models are whose difference is called detectable."""
_ROUNDING = 1e-9  # as a share of the values: a smaller difference is none
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
        is `value`, `low`, `high`; `error`, its standard error; `effective_users`, how many users alike would tell as
        much; `p`, two-sided; `p_corrected` for all headline metrics and all others, None for further metrics; and
        `detectable`, the size that nine of ten evaluations like this one would show, by an interval without 0. What is
        undefined is None. There is no `score` of a model that weighs relevance differently, as its truth is another
        one, nor are there tasks that one of the two lacks.

    Raises:
        UserError: two models were not measured on the same rows with the same labels.
    """
    mine, others = models[model], [name for name in models if name != model]
    for other in others:
        check_same_rows(model, mine, other, models[other])
    groups = {name: sums_by_user(sums) for name, sums in models.items()}

    def at(name: str, counts: np.ndarray) -> Values:
        return with_objective(evaluate(groups[name], counts), objective)

    units, effective = len(mine.tables["ranking"]), effective_by_metric(groups[model])
    resampling = {name: Resampling(at(name, np.ones((units, 1))), units) for name in models}
    for counts in user_counts(units, resamples, seed):
        for name, its in resampling.items():
            its.add(counts, at(name, counts))
    resampled = {name: each.found() for name, each in resampling.items()}
    found: dict[str, Any] = {}
    for other in others:
        same_truth = _weights(mine) == _weights(models[other])
        paired = {
            key: difference(mine_of, resampled[other][key], effective_of(key, effective, objective))
            for key, mine_of in resampled[model].items()
            if key in resampled[other] and (same_truth or not _is_of_score(key, objective))
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
        "effective_users": {name: each.effective_rows for name, each in groups[model].items()},
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


def effective_of(
    key: tuple[str, str], effective: Mapping[tuple[str, str], float], objective: Objective | None
) -> float:
    """That of a metric, or of the objective, which is of several groups."""
    if key != OBJECTIVE or objective is None:
        return effective[key]
    return min(effective[group, objective.metric] for group in objective.groups)


def difference(mine: Resampled, other: Resampled, effective: float, units: int | None = None) -> Difference:
    """Of one metric of two models. effective: how many users alike would tell as much by their sizes; units: of those
    that are redrawn, how many have rows, None for all."""
    apart = mine.less(other)
    if not np.isfinite(apart.value):
        return told_as(None)
    rounding = rounding_of(mine.value, other.value)
    value = 0.0 if abs(apart.value) <= rounding else apart.value
    error, effective = apart.error(effective, units)
    return told_as(value) if error is None else by_student(value, error, effective - 1, rounding)


def rounding_of(*values: float) -> float:
    """Up to which size a difference of such values is none."""
    return _ROUNDING * max(map(abs, values))


def by_student(apart: float, error: float, freedom: float, rounding: float) -> Difference:
    """A difference with its standard error and the degrees of freedom of that."""
    if error <= rounding:
        # What differs and does not vary rests on too few resamples, or users, to say how sure it is.
        return told_as(apart, 0.0, 0.0, 1.0, 0.0) if apart == 0 else told_as(apart)
    if freedom < LEAST_FREEDOM:
        return told_as(apart)
    reach, extra = student.ppf([1 - LEVEL / 2, POWER], freedom)
    p = 2 * student.sf(abs(apart) / error, freedom)
    return told_as(apart, error, float(reach * error), float(p), float((reach + extra) * error), freedom + 1)


def told_as(
    value: float | None,
    error: float | None = None,
    reach: float | None = None,
    p: float | None = None,
    detectable: float | None = None,
    effective: float | None = None,
) -> Difference:
    """A difference with its standard error, and how far its interval reaches to either side."""
    low, high = (None, None) if value is None or reach is None else (value - reach, value + reach)
    told = {"value": value, "low": low, "high": high, "error": error, "effective_users": effective}
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
    kinds = [each["user"].type for each in (mine, its)]
    if kinds[0] != kinds[1]:
        return f"users are {kinds[0]} in one, and {kinds[1]} in the other"
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
