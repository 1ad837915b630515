"""Compares a model with others on the same rows, and decides which one is better.

The objective, one number named before anything is measured (`evaluation.decide_by`), decides, in `decide`.
A model is better where the 95% interval of the difference lies on the better side of 0 and no guardrail holds it back:
for no task may the interval of its loss reach beyond a margin, nor may its probabilities be far off where those of the
other model are less so.

All models see the same redrawn users (`mmoe_rec.evaluation.intervals`). p-values of the metrics in tables are corrected
for how many they are by Holm's method (1979); the objective's for the number of models alone, as it was chosen before.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.stats import t as student

from mmoe_rec.auc import FEWEST
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.intervals import (
    LEVEL,
    POWER,
    Difference,
    Interval,
    Key,
    Values,
    correct_by_holm,
    find_difference,
    resample,
)
from mmoe_rec.evaluation.metrics import METRICS, metrics_of
from mmoe_rec.evaluation.metrics.metric import Metric
from mmoe_rec.evaluation.summary import SCORE, GroupSummary, Summary, effective_by_metric, evaluate, sums_by_user
from mmoe_rec.evaluation.sums import ClosedSums

OBJECTIVE: Key = ("objective", "objective")
BETTER, HELD_BACK, NOT_SHOWN, WORSE, UNDECIDED = "better", "held back", "not shown", "worse", "undecided"
_GUARDED = {"binary": "auc", "regression": "r2"}
_SAME = ["user", "rows", "requests", "digest"]


@dataclass(frozen=True)
class Objective:
    """What decides: a metric of the score, or the mean of one over tasks.

    groups: `score`, or the tasks; better: which values are, higher or lower.
    """

    metric: str
    groups: tuple[str, ...]
    better: str

    @staticmethod
    def of(decide_by: str, sums: ClosedSums, tasks: Collection[str]) -> Objective | None:
        """The objective of a setting: a metric of tasks, such as `auc`, or of the score, such as `score.ndcg_at_10`.

        A metric of tasks is averaged over those `tasks` that have it and enough labels; where none has, it is R2 of
        the regressions, and None where there are none either. Raises UserError for what is no such metric.
        """
        metric = find_objective(decide_by)
        if decide_by.startswith(f"{SCORE}."):
            return Objective(metric.name, (SCORE,), metric.better)
        for each in (metric, find_objective("r2")):
            kinds = {task.name: task.kind for task in sums.tasks if task.kind in each.kinds}
            if judged := tuple(task for task in tasks if task in kinds and count_rarer_label(sums, task) >= FEWEST):
                return Objective(each.name, judged, each.better)
        return None

    @property
    def name(self) -> str:
        """In words."""
        if self.groups == (SCORE,):
            return f"{self.metric} of the score"
        return f"{'mean ' if len(self.groups) > 1 else ''}{self.metric} of {', '.join(self.groups)}"

    def add_to(self, values: Values) -> Values:
        """Values of metrics, with the objective's where all of its parts are there."""
        if all((each, self.metric) in values for each in self.groups):
            values[OBJECTIVE] = np.asarray(np.mean([values[group, self.metric] for group in self.groups], axis=0))
        return values

    def effective_users(self, effective: Mapping[Key, float]) -> float:
        """The least effective number of users of its parts."""
        return min(effective[group, self.metric] for group in self.groups)


def find_objective(decide_by: str) -> Metric[Any]:
    """The metric of a setting. Raises UserError where models can't be told apart by it."""
    group, _, name = decide_by.rpartition(".")
    for metric in METRICS:
        is_of = SCORE in metric.kinds if group == SCORE else {"binary", "regression"} & set(metric.kinds)
        if metric.name == name and group in ("", SCORE) and is_of and metric.has_interval and metric.better != "one":
            return metric
    raise UserError(
        f"evaluation.decide_by is '{decide_by}'; expected a metric of tasks, such as auc, gauc_user or logloss, or "
        "one of the score, such as score.ndcg_at_10"
    )


def count_rarer_label(sums: ClosedSums, task: str) -> int:
    """How many rows have the rarer label of a binary task, or an observed label of a regression."""
    table = sums.tables[f"{task}.users"]
    rows = int(table["rows"].to_numpy().sum())
    if "positives" not in table.column_names:
        return rows
    positives = int(table["positives"].to_numpy().sum())
    return min(positives, rows - positives)


@dataclass(frozen=True)
class Rule:
    """margin: of AUC, or R2, that no task may lose; calibration: largest factor by which probabilities may be off."""

    margin: float = 0.005
    calibration: float = 1.25


@dataclass(frozen=True)
class Guard:
    """Whether a guardrail of a task has passed.

    metric: `auc` or `r2`, with the `difference`, or `calibration`, with the calibration of the model and of the other
    one; is_outside: whether the difference is shown to be a loss beyond the margin, or the model's probabilities to be
    beyond the limit.
    """

    task: str
    metric: str
    passed: bool
    is_outside: bool
    difference: Difference | None = None
    calibrations: tuple[Interval, Interval] | None = None


@dataclass(frozen=True)
class Verdict:
    """What is decided between two models.

    kind: `better`, `held back` (better, but for guardrails), `not shown`, `worse`, or `undecided`, where the objective
    is undefined; guards: all guardrails; detectable: the gain, the same for all tasks, with which nine of ten
    evaluations like this one would call a model better.
    """

    kind: str
    guards: tuple[Guard, ...]
    detectable: float | None


@dataclass(frozen=True)
class Versus:
    """Differences of a model from another one: of the objective, and of all metrics, task or `score` -> metric."""

    objective: Difference
    groups: dict[str, dict[str, Difference]]
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Comparison:
    """A model beside others.

    units: users, or groups of them, that were redrawn; effective_users: by rows, of each task and the score; against:
    name of each other model -> the differences from it; judged: tasks with enough labels; left_out: each other task ->
    rows of its rarer label.
    """

    model: str
    resamples: int
    seed: int
    units: int
    effective_users: dict[str, float]
    objective: Objective | None
    against: dict[str, Versus]
    rule: Rule = field(default_factory=Rule)
    judged: tuple[str, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)


def compare(
    models: Mapping[str, ClosedSums],
    model: str,
    summaries: Mapping[str, Summary],
    tasks: Sequence[str],
    decide_by: str,
    rule: Rule,
    resamples: int,
    seed: int = 0,
) -> Comparison:
    """Compares a model with all others and decides.

    summaries: of all; tasks: those that may decide; decide_by: see `Objective.of`. Raises UserError where the rows are
    not the same, or for a metric that there is not.
    """
    labels = {task: count_rarer_label(models[model], task) for task in tasks}
    judged = tuple(task for task, rows in labels.items() if rows >= FEWEST)
    compared = find_differences(models, model, Objective.of(decide_by, models[model], tasks), resamples, seed)
    left_out = {task: rows for task, rows in labels.items() if task not in judged}
    compared = replace(compared, rule=rule, judged=judged, left_out=left_out)
    decided = {
        other: replace(versus, verdict=decide(compared, other, summaries)) for other, versus in compared.against.items()
    }
    return replace(compared, against=decided)


def decide(compared: Comparison, other: str, summaries: Mapping[str, Summary]) -> Verdict:
    """The verdict on the model that is compared with another one. summaries: of both, by name."""
    objective, versus, mine = compared.objective, compared.against[other], summaries[compared.model]
    its = summaries[other]
    guards = [
        guard
        for task in compared.judged
        for guard in (
            guard_loss(task, mine.tasks[task].kind, versus, compared.rule),
            guard_calibration(task, mine.tasks[task], its.tasks[task], compared.rule),
        )
        if guard is not None
    ]
    apart = versus.objective
    if objective is None or apart.p is None or apart.p_corrected is None or apart.value is None:
        return Verdict(UNDECIDED, tuple(guards), None)
    detectable = find_detectable_gain(compared, versus, mine)
    low, high = apart.low or 0.0, apart.high or 0.0
    if not apart.is_significant or low <= 0 <= high:
        return Verdict(NOT_SHOWN, tuple(guards), detectable)
    if (apart.value > 0) != (objective.better == "higher"):
        return Verdict(WORSE, tuple(guards), detectable)
    return Verdict(BETTER if all(guard.passed for guard in guards) else HELD_BACK, tuple(guards), detectable)


def guard_loss(task: str, kind: str, versus: Versus, rule: Rule) -> Guard:
    """Passes where the interval rules out that a task loses more than the margin."""
    apart = versus.groups.get(task, {}).get(_GUARDED[kind], Difference(None))
    passed = apart.low is not None and apart.low >= -rule.margin
    return Guard(task, _GUARDED[kind], passed, apart.high is not None and apart.high < -rule.margin, apart)


def guard_calibration(task: str, model: GroupSummary, other: GroupSummary, rule: Rule) -> Guard | None:
    """Passes unless the probabilities are shown to be off by more than the limit, and by more than the other model's.

    None for a regression, or without a positive label.
    """
    mine, its = model.get("calibration"), other.get("calibration")
    if mine.value is None or its.value is None:
        return None
    low, high = (mine.value, mine.value) if mine.low is None or mine.high is None else (mine.low, mine.high)
    is_outside = low > rule.calibration or high < 1 / rule.calibration
    passed = not (is_outside and distance_from_one(mine.value) > distance_from_one(its.value))
    return Guard(task, "calibration", passed, is_outside, calibrations=(mine, its))


def distance_from_one(ratio: float) -> float:
    """How far probabilities are off, by either factor."""
    return abs(math.log(ratio)) if ratio > 0 else math.inf


def find_detectable_gain(compared: Comparison, versus: Versus, summary: Summary) -> float:
    """The gain, the same for all tasks, with which nine of ten evaluations would call a model better.

    The objective and all guardrails of its metric have to hold at once, so each has to fail that much more rarely; and
    where several models are compared, the first p-value has to be that much smaller.
    """
    assert compared.objective is not None, "without an objective there is no gain"
    guarded = []
    for task in compared.judged:
        metric = guarded_metric(summary, task)
        apart = versus.groups.get(task, {}).get(metric, Difference(None))
        if metric == compared.objective.metric and apart.error and apart.effective_users is not None:
            guarded.append((apart.error, apart.effective_users))
    power, own, sizes = 1 - (1 - POWER) / (1 + len(guarded)), versus.objective, [0.0]
    if own.error and own.effective_users is not None:
        levels = [1 - LEVEL / len(compared.against) / 2, power]
        sizes = [own.error * sum(student.ppf(levels, own.effective_users - 1))]
    margin = compared.rule.margin
    sizes += [error * sum(student.ppf([1 - LEVEL / 2, power], users - 1)) - margin for error, users in guarded]
    return float(max(sizes))


def guarded_metric(summary: Summary, task: str) -> str:
    """Of which a task may not lose more than the margin."""
    return _GUARDED[summary.tasks[task].kind]


def find_differences(
    models: Mapping[str, ClosedSums],
    model: str,
    objective: Objective | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Differences of a model from each of the others in all metrics, without a verdict.

    There is no `score` of a model that weighs relevance differently, as its truth is another one, nor are there tasks
    that one of the two lacks. Raises UserError where two models were not measured on the same rows with the same
    labels.
    """
    mine, others = models[model], [name for name in models if name != model]
    for other in others:
        check_same_rows(model, mine, other, models[other])
    groups = {name: sums_by_user(sums) for name, sums in models.items()}
    units, effective = len(mine.tables["ranking"]), effective_by_metric(groups[model])
    if objective is not None:
        effective |= {OBJECTIVE: objective.effective_users(effective)}

    def values_of(name: str, counts: np.ndarray) -> Values:
        values = evaluate(groups[name], counts)
        return values if objective is None else objective.add_to(values)

    sides = {name: lambda counts, name=name: values_of(name, counts) for name in models}
    resampled = resample(sides, units, resamples, seed)
    against = {}
    for other in others:
        same_truth = _weights(mine) == _weights(models[other])
        paired = {
            key: find_difference(its, resampled[other][key], effective[key])
            for key, its in resampled[model].items()
            if key in resampled[other] and (same_truth or not _is_of_score(key, objective))
        }
        decides, by_group = paired.pop(OBJECTIVE, Difference(None)), dict[str, dict[str, Difference]]()
        for (group, metric), each in paired.items():
            by_group.setdefault(group, {})[metric] = each
        against[other] = Versus(decides, by_group)
    by_rows = {name: each.effective_rows for name, each in groups[model].items()}
    return Comparison(model, resamples, seed, units, by_rows, objective, correct(mine, against))


def correct(base: ClosedSums, against: Mapping[str, Versus]) -> dict[str, Versus]:
    """The same differences with the corrected p-values: of the metrics that tables show, and of the objectives."""
    kinds = {SCORE: SCORE} | {task.name: task.kind for task in base.tasks}
    shown = {
        (group, metric.name)
        for group, kind in kinds.items()
        for metric in metrics_of(kind)
        if metric.is_shown(kind == SCORE)
    }
    differences = {
        (name, *key): each for name, versus in against.items() for key, each in _differences_of(versus).items()
    }
    tested = {key: each.p for key, each in differences.items() if each.p is not None}
    for family in ([key for key in tested if key[1:] in shown], [key for key in tested if key[1:] == OBJECTIVE]):
        for key, p in zip(family, correct_by_holm([tested[key] for key in family]), strict=True):
            differences[key] = replace(differences[key], p_corrected=p)
    return {
        name: replace(
            versus,
            objective=differences[name, *OBJECTIVE],
            groups={
                group: {metric: differences[name, group, metric] for metric in metrics}
                for group, metrics in versus.groups.items()
            },
        )
        for name, versus in against.items()
    }


def _differences_of(versus: Versus) -> dict[Key, Difference]:
    of_metrics = {(group, metric): each for group, its in versus.groups.items() for metric, each in its.items()}
    return of_metrics | {OBJECTIVE: versus.objective}


def check_same_rows(name: str, sums: ClosedSums, against: str, base: ClosedSums) -> None:
    """Raises UserError where two models were not measured on the same rows with the same labels."""
    for table in ["ranking", *(f"{task.name}.users" for task in base.tasks if f"{task.name}.users" in sums.tables)]:
        mine, its = (
            each.tables[table].select([key for key in _SAME if key in each.tables[table].column_names])
            for each in (sums, base)
        )
        if not mine.equals(its):
            raise UserError(
                f"'{name}' and '{against}' were not measured on the same rows ({_what_differs(table, sums, base)}): "
                "differences of models need the same requests and candidates, with the same labels"
            )


def have_same_rows(sums: ClosedSums, other: ClosedSums | None) -> bool:
    """True if both were measured on the same rows."""
    try:
        if other is not None:
            check_same_rows("", sums, "", other)
    except UserError:
        return False
    return other is not None


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


def _is_of_score(key: Key, objective: Objective | None) -> bool:
    return SCORE in (objective.groups if key == OBJECTIVE and objective is not None else key[:1])


def _weights(sums: ClosedSums) -> dict[str, float]:
    return {task.name: task.weight for task in sums.tasks if task.weight}
