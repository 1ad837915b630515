"""What decides which of several models is better: one number, named before anything is measured.

Differences of models on the same rows, from a paired bootstrap over users.

All models see the same redrawn users, so what these have in common cancels. The standard error of a difference is its
deviation over the resamples x sqrt(U / (U - 1)) for U users; intervals and p-values are Student's, of U - 1 degrees of
freedom. Where few users have most of the rows, of the weight, or of the positive labels, they decide alone: so U is the
number of users alike that would tell as much: by their sizes, (sum of sizes)^2 / sum of sizes^2 (Kish, 1965), which are
their rows and what the metric divides by; or by their influence on this very difference
(`mmoe_rec.evaluation.intervals`), whichever is least. p-values are corrected for how many differences are
looked at by Holm's method (1979).


Whether a model is better than another, in words: the one rule by which models are compared, reported and promoted.

A model is better where its objective is (its 95% interval lies above 0), and no guardrail holds it back: for no task
may the interval of what it loses reach beyond a margin, nor may its probabilities be far off where they were not.


A model beside others: differences of all metrics, and a verdict on each of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

from mmoe_rec.auc import FEWEST
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.intervals import LEAST_FREEDOM, Resampled, Resampling, Values, are_few, user_counts
from mmoe_rec.evaluation.metrics import METRICS, metrics_of
from mmoe_rec.evaluation.metrics.metric import Metric
from mmoe_rec.evaluation.numbers import number, numbers, once_corrected, with_interval
from mmoe_rec.evaluation.summary import effective_by_metric, evaluate, sums_by_user
from mmoe_rec.evaluation.sums import ClosedSums
from mmoe_rec.settings.sections import Evaluation

SCORE = "score"


@dataclass(frozen=True)
class Objective:
    """A metric of the score, or the mean of one over tasks.

    groups: `score`, or the tasks; better: which values are, higher or lower.
    """

    metric: str
    groups: tuple[str, ...]
    better: str

    @staticmethod
    def of(decide_by: str, sums: ClosedSums, tasks: Collection[str]) -> Objective | None:
        """That of a setting: a metric of tasks, such as `auc`, or of the score, such as `score.ndcg_at_10`.

        That of tasks is the mean over the `tasks` which have it and labels enough to judge by; where none has, R2 of
        the regressions, and None where there are none either. Raises UserError for what is no such metric.
        """
        metric = _asked(decide_by)
        if decide_by.startswith(f"{SCORE}."):
            return Objective(metric.name, (SCORE,), metric.better)
        for each in (metric, _asked("r2")):
            kinds = {task.name: task.kind for task in sums.tasks if task.kind in each.kinds}
            if judged := tuple(task for task in tasks if task in kinds and rarer(sums, task) >= FEWEST):
                return Objective(each.name, judged, each.better)
        return None

    @property
    def name(self) -> str:
        """In words."""
        if self.groups == (SCORE,):
            return f"{self.metric} of the score"
        return f"{'mean ' if len(self.groups) > 1 else ''}{self.metric} of {', '.join(self.groups)}"

    def of_values(self, values: Values) -> np.ndarray:
        """(R,) float64, of the values of all metrics."""
        return np.asarray(np.mean([values[group, self.metric] for group in self.groups], axis=0))


def check_objective(decide_by: str) -> None:
    """Raises UserError for a setting that names no metric by which models can be told apart."""
    _asked(decide_by)


def rarer(sums: ClosedSums, task: str) -> int:
    """How many rows have the rarer label of a binary task, or an observed label of a regression."""
    table = sums.tables[f"{task}.users"]
    rows = int(table["rows"].to_numpy().sum())
    if "positives" not in table.column_names:
        return rows
    positives = int(table["positives"].to_numpy().sum())
    return min(positives, rows - positives)


def _asked(decide_by: str) -> Metric[Any]:
    group, _, name = decide_by.rpartition(".")
    for metric in METRICS:
        is_of = SCORE in metric.kinds if group == SCORE else {"binary", "regression"} & set(metric.kinds)
        if metric.name == name and group in ("", SCORE) and is_of and metric.has_interval and metric.better != "one":
            return metric
    raise UserError(
        f"evaluation.decide_by is '{decide_by}'; expected a metric of tasks, such as auc, gauc_user or logloss, or "
        "one of the score, such as score.ndcg_at_10"
    )


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


BETTER, HELD_BACK, NOT_SHOWN, WORSE, UNDECIDED = "better", "held back", "not shown", "worse", "undecided"
_GUARDED = {"binary": "auc", "regression": "r2"}


@dataclass(frozen=True)
class Rule:
    """margin: of AUC, or R2, that no task may lose; calibration: largest factor by which probabilities may be off."""

    margin: float = 0.005
    calibration: float = 1.25

    @staticmethod
    def of(settings: Evaluation) -> Rule:
        """That of the settings."""
        return Rule(settings.margin, settings.calibration)


def verdict(
    compared: Mapping[str, Any],
    other: str,
    summaries: Mapping[str, Mapping[str, Any]],
    judged: Sequence[str],
    rule: Rule,
) -> dict[str, Any]:
    """What a model is beside another one.

    compared: of `differences`; other: one that the model is compared with; summaries: of both, by name; judged: tasks
    with labels enough.

    Returns:
        `kind`: `better`, `held back` (better, but for guardrails), `not shown`, `worse`, or `undecided`, where the
        objective is undefined; `sentence`; `detectable`, the gain, the same for all tasks, with which nine of ten
        evaluations like this one would call a model better; and `guards`, each with its `task`, `metric`, whether it
        has `passed`, and a `sentence`.
    """
    name, against, objective, found = compared["model"], other, compared["objective"], compared["against"][other]
    apart = found["objective"]
    guards = [
        guard
        for task in judged
        for guard in (_loss(task, found, summaries[name], rule), _calibration(task, name, against, summaries, rule))
        if guard is not None
    ]
    told: dict[str, Any] = {"guards": guards, "detectable": None}
    if objective is None or apart["p"] is None:
        why = f"no task has labels enough ({FEWEST} rows of either)"
        if objective is not None:
            alone = "has no interval, as one user decides nearly alone, or many redraws leave it undefined"
            why = f"{objective['name']} {'is undefined' if apart['value'] is None else alone}"
        return {"kind": UNDECIDED, "sentence": f"'{name}' and '{against}' can't be told apart: {why}", **told}
    gain, low, high = apart["value"], apart["low"], apart["high"]
    if objective["better"] == "lower":
        gain, low, high = -gain, -high, -low
    what, detectable = objective["name"], _detectable(compared, found, summaries[name], judged, rule)
    told["detectable"] = detectable
    if apart["p_corrected"] >= LEVEL or not (low > 0 or high < 0):
        if apart["low"] == apart["high"] == 0:
            return {
                "kind": NOT_SHOWN,
                "sentence": f"'{name}' and '{against}' do not differ{_others(found)}: {what} is the same",
                **told,
            }
        sentence = (
            f"no difference is shown between '{name}' and '{against}'{once_corrected(apart)}: {what} differs by "
            f"{with_interval(apart)}; nine of ten evaluations like this one would show a gain of "
            f"{number(detectable, sign=False)}{_besides(objective, summaries[name], judged)}"
        )
        return {"kind": NOT_SHOWN, "sentence": sentence, **told}
    which = "higher" if apart["value"] > 0 else "lower"
    ends = sorted(abs(each) for each in (apart["low"], apart["high"]))
    size, *shown = numbers(abs(gain), *ends, sign=False)
    size = f"{size} ({' to '.join(shown)})"
    if gain < 0:
        return {"kind": WORSE, "sentence": f"'{name}' is worse than '{against}': {what} is {which} by {size}", **told}
    if failed := [guard["sentence"] for guard in guards if not guard["passed"]]:
        although = f"'{name}' is held back, although {what} is {which} than that of '{against}' by {size}"
        return {"kind": HELD_BACK, "sentence": f"{although}: {'; '.join(failed)}", **told}
    return {"kind": BETTER, "sentence": f"'{name}' is better than '{against}': {what} is {which} by {size}", **told}


def _detectable(
    compared: Mapping[str, Any],
    found: Mapping[str, Any],
    summary: Mapping[str, Any],
    judged: Sequence[str],
    rule: Rule,
) -> float:
    """The gain, the same for all tasks, with which nine of ten evaluations would call a model better.

    The objective and all guardrails of its metric have to hold at once, so each has to fail that much more rarely; and
    where several models are looked at, the first p-value has to be that much smaller.
    """
    objective = compared["objective"]
    guarded = [
        (found["groups"][task][metric]["error"], found["groups"][task][metric]["effective_users"])
        for task in judged
        if (metric := _GUARDED[summary["tasks"][task]["kind"]]) == objective["metric"]
        and found["groups"].get(task, {}).get(metric, {}).get("error")
    ]
    power = 1 - (1 - POWER) / (1 + len(guarded))
    own = found["objective"]["error"]
    levels = [1 - LEVEL / len(compared["against"]) / 2, power]
    sizes = [own * sum(student.ppf(levels, found["objective"]["effective_users"] - 1))] if own else [0.0]
    # What the guardrail of a task asks for.
    sizes += [error * sum(student.ppf([1 - LEVEL / 2, power], users - 1)) - rule.margin for error, users in guarded]
    return float(max(sizes))


def _others(found: Mapping[str, Any]) -> str:
    """Which other metrics are shown to differ where what decides is the same."""
    shown = [
        f"{metric} of {'the score' if group == SCORE else group}"
        for group, metrics in found["groups"].items()
        for metric, each in metrics.items()
        if each["p_corrected"] is not None and each["p_corrected"] < LEVEL
    ]
    more = f" and {len(shown) - 2} more" if len(shown) > 2 else ""
    return f" in what decides, though in {', '.join(shown[:2])}{more}" if shown else ""


def _besides(objective: Mapping[str, Any], summary: Mapping[str, Any], judged: Sequence[str]) -> str:
    """What else may hold a model back, where guardrails are of another metric than the objective."""
    metrics = {_GUARDED[summary["tasks"][task]["kind"]] for task in judged} - {objective["metric"]}
    return f", if guardrails of {' and '.join(sorted(metrics))} allow it" if metrics else ""


def _loss(task: str, found: Mapping[str, Any], summary: Mapping[str, Any], rule: Rule) -> dict[str, Any]:
    metric = _GUARDED[summary["tasks"][task]["kind"]]
    apart = found["groups"].get(task, {}).get(metric)
    told = {"task": task, "metric": metric}
    if apart is None or apart["low"] is None:
        missing = "is undefined" if apart is None or apart["value"] is None else "has no interval"
        limit = f"a loss of more than {rule.margin:g} (evaluation.margin) can't be ruled out"
        return {**told, "passed": False, "sentence": f"the difference in {metric} of {task} {missing}, so {limit}"}
    passed = apart["low"] >= -rule.margin
    changes = f"{metric} of {task} changes by {with_interval(apart)}"
    limit = f"loss of more than {rule.margin:g} (evaluation.margin)"
    shown = f"which is a {limit}" if apart["high"] < -rule.margin else f"so a {limit} can't be ruled out"
    end = f"so a {limit} is ruled out" if passed else shown
    return {**told, "passed": passed, "sentence": f"{changes}, {end}"}


def _calibration(
    task: str, name: str, against: str, summaries: Mapping[str, Mapping[str, Any]], rule: Rule
) -> dict[str, Any] | None:
    mine, its = (summaries[each]["tasks"][task].get("calibration") for each in (name, against))
    if mine is None or its is None or mine["value"] is None or its["value"] is None:
        return None  # of a regression, or without a positive label
    low, high = (mine["value"], mine["value"]) if mine["low"] is None else (mine["low"], mine["high"])
    outside = low > rule.calibration or high < 1 / rule.calibration
    passed = not (outside and _off(mine["value"]) > _off(its["value"]))
    where = "beyond" if outside else "not shown to be beyond"
    sentence = (
        f"the probabilities of {task} are {mine['value']:.2f} times what was observed ({low:.2f} to {high:.2f}), which "
        f"is {where} a factor of {rule.calibration:g} (evaluation.calibration); those of '{against}' are "
        f"{its['value']:.2f} times"
    )
    return {"task": task, "metric": "calibration", "passed": passed, "sentence": sentence}


def _off(ratio: float) -> float:
    return abs(math.log(ratio)) if ratio > 0 else math.inf


def compare(
    models: Mapping[str, ClosedSums],
    model: str,
    summaries: Mapping[str, Mapping[str, Any]],
    tasks: Sequence[str],
    decide_by: str,
    rule: Rule,
    resamples: int,
    seed: int = 0,
) -> dict[str, Any]:
    """What `differences` gives of a model from all others, with a `verdict` on each.

    summaries: of all; tasks: those that may decide; decide_by: see `Objective.of`. Also holds `judged`, those of the
    tasks with labels enough, and `left_out`: each other task -> rows of its rarer label. Raises UserError where the
    rows are not the same, or for a metric that there is not.
    """
    mine = models[model]
    labels = {task: rarer(mine, task) for task in tasks}
    judged = [task for task, rows in labels.items() if rows >= FEWEST]
    found = differences(models, model, Objective.of(decide_by, mine, tasks), resamples, seed)
    for other, each in found["against"].items():
        each["verdict"] = verdict(found, other, summaries, judged, rule)
    return found | {"judged": judged, "left_out": {task: rows for task, rows in labels.items() if task not in judged}}


def told_of(compared: Mapping[str, Any]) -> list[str]:
    """For people: the verdicts, with the guardrails that hold a model back, and tasks that were not judged."""
    found = [each["verdict"]["sentence"] for each in compared["against"].values()]
    found += [
        f"{task} was not judged: {rows:,} rows have its rarer label, and {FEWEST} are needed"
        for task, rows in compared["left_out"].items()
    ]
    few = {name: users for name, users in compared["effective_users"].items() if are_few(users, compared["units"])}
    found += [
        f"few users have most rows of {name}: all tell as much as {users:.1f} of equal size, by which intervals of "
        "differences are wide"
        for name, users in few.items()
    ]
    if compared["objective"] is not None:
        what = compared["objective"]["name"]
        fewest = min(
            (each["objective"]["effective_users"] or np.inf for each in compared["against"].values()), default=np.inf
        )
        if not few and are_few(fewest, compared["units"]):
            found.append(
                f"few users decide on {what}, by their rows, weight, positive labels or influence: all tell as much as "
                f"{fewest:.1f} alike, by which intervals of differences are wide"
            )
    return found
