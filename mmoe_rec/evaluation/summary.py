"""Sums -> all metrics of a model with their intervals."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmoe_rec.evaluation.intervals import UNDEFINED, Interval, Key, Values, bootstrap, find_interval, is_small_sample
from mmoe_rec.evaluation.metrics import CATALOGUE_METRICS, metrics_of
from mmoe_rec.evaluation.metrics.metric import Metric, UserSums
from mmoe_rec.evaluation.sums import ClosedSums, EvaluationSums, as_closed

SCORE, CATALOGUE = "score", "catalogue"
LEFT_OUT = ("requests_of_one_row", "requests_without_relevant_row", "requests_of_equal_relevance")
"""Requests that rank nothing."""
Sums = EvaluationSums | ClosedSums


@dataclass(frozen=True)
class GroupSummary:
    """The metrics of a task, or of the score.

    kind: of the task, or `score`; counts: a task's `rows` and, if it is binary, `positives` and `requests`; the score's
    requests `LEFT_OUT`; metrics: those that have intervals; details: those that have none, and what else metrics say;
    effective_users: of the metric that rests on the fewest, None where all have enough; least_ndcg, random_ndcg: of the
    score, the NDCG@10 of the worst order of each request, and that of a random one, on average.
    """

    kind: str
    counts: dict[str, int]
    metrics: dict[str, Interval]
    details: dict[str, Any]
    effective_users: float | None = None
    least_ndcg: float | None = None
    random_ndcg: float | None = None

    def get(self, metric: str) -> Interval:
        """A metric, undefined where it was not measured."""
        value = self.details.get(metric)
        return self.metrics.get(metric) or (Interval(value) if isinstance(value, (int, float)) else UNDEFINED)

    def has(self, metric: Metric[Any]) -> bool:
        """True if the metric was measured."""
        return metric.name in self.metrics or metric.name in self.details


@dataclass(frozen=True)
class Summary:
    """All metrics of a model.

    rows, users, requests: that were measured; resamples, seed: of the intervals; tasks: by name; catalogue: how many
    `candidates` there are, and metrics of all requests together, None where candidates are unknown; facts: what else
    the file of metrics says.
    """

    rows: int
    users: int
    requests: int
    resamples: int
    seed: int
    tasks: dict[str, GroupSummary]
    score: GroupSummary
    catalogue: dict[str, float] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def groups(self) -> dict[str, GroupSummary]:
        """The tasks, then the score."""
        return {**self.tasks, SCORE: self.score}

    @property
    def each_row_is_a_user(self) -> bool:
        """True if each row has a user of its own, as in a plain table: then nothing ranks within users or requests."""
        return self.users == self.rows


def summarise(sums: Sums, resamples: int = 1000, seed: int = 0) -> Summary:
    """All metrics of a model, with 95% bootstrap intervals over users.

    Args:
        sums: of all rows.
        resamples: how often users are redrawn, at least 1; 1,000 make the ends of the intervals steady.
        seed: of the draws; the same seed gives the same users, whatever the model.
    """
    sums = as_closed(sums)
    groups, ranking = sums_by_user(sums), sums.tables["ranking"]
    units, effective = len(ranking), effective_by_metric(groups)
    resampled = bootstrap(lambda counts: evaluate(groups, counts), units, resamples, seed)
    metrics: dict[str, dict[str, Interval]] = {}
    for (name, metric), value in evaluate(groups, np.ones((units, 1))).items():
        interval = find_interval(value[0], resampled[name, metric], units, effective[name, metric])
        metrics.setdefault(name, {})[metric] = interval

    def summary_of(name: str, kind: str, counts: dict[str, int], **ndcg: float) -> GroupSummary:
        details: dict[str, Any] = {}
        for metric in metrics_of(kind):
            if not metric.has_interval:
                value = float(metric.summarise(groups[name].drawn(np.ones((units, 1))))[0])
                details[metric.name] = value if np.isfinite(value) else None
            details |= metric.details(groups[name], resamples, seed)
        found = metrics.get(name, {})
        fewest = min((effective[name, each] for each, at in found.items() if at.value is not None), default=np.inf)
        few = fewest if is_small_sample(fewest, units) else None
        return GroupSummary(kind, counts, found, details, few, **ndcg)

    tasks = {}
    for task in sums.tasks:
        table = sums.tables[f"{task.name}.users"]
        names = ["rows", "positives", "requests"] if task.kind == "binary" else ["rows"]
        tasks[task.name] = summary_of(task.name, task.kind, {name: _total(table[name]) for name in names})
    ndcg = {}
    if ranked := _total(ranking["ranked_requests"]):
        names = ["least_ndcg", "random_ndcg"]
        ndcg = {name: float(np.sum(ranking[name])) / ranked for name in names if name in ranking.column_names}
    score = summary_of(SCORE, SCORE, {name: _total(ranking[name]) for name in LEFT_OUT}, **ndcg)
    requests, catalogue = _total(ranking["requests"]), dict[str, float]()
    if (table := sums.tables.get(CATALOGUE)) is not None:
        shown = {metric.name: metric.summarise(table, requests) for metric in CATALOGUE_METRICS}
        catalogue = {"candidates": len(table), **shown}
    return Summary(_total(ranking["rows"]), sums.users, requests, resamples, seed, tasks, score, catalogue or None)


def flatten(summary: Summary) -> dict[str, float]:
    """The numbers of a summary under names that MLflow accepts, such as `bought.auc`, `bought.auc.low`, `score.mrr`.

    What is undefined is left out.
    """
    flat: dict[str, float] = {name: float(getattr(summary, name)) for name in ("rows", "users", "requests")}
    groups = {SCORE: _numbers_of(summary.score)}
    groups |= {} if summary.catalogue is None else {CATALOGUE: dict(summary.catalogue)}
    for name, numbers in (groups | {name: _numbers_of(task) for name, task in summary.tasks.items()}).items():
        flat |= {f"{name}.{each}": float(value) for each, value in numbers.items()}
    return flat


def _numbers_of(group: GroupSummary) -> dict[str, float]:
    numbers: dict[str, float] = dict(group.counts)
    for name, each in group.metrics.items():
        ends = {name: each.value, f"{name}.low": each.low, f"{name}.high": each.high}
        numbers |= {end: value for end, value in ends.items() if value is not None}
    if group.random_ndcg is not None:
        numbers["random_ndcg_at_10"] = group.random_ndcg
    for name, detail in group.details.items():
        parts = {f"{name}.{part}": value for part, value in detail.items()} if isinstance(detail, Mapping) else {}
        parts = parts or {name: detail}
        numbers |= {part: value for part, value in parts.items() if isinstance(value, (int, float))}
    return numbers


def sums_by_user(sums: Sums, names: Collection[str] | None = None) -> dict[str, UserSums]:
    """Task name -> its sums, and `score` -> those of the score, over the users of `sums.tables["ranking"]`, or groups
    of them. names: of the metrics in tables, those that are wanted; None: all metrics.
    """
    sums = as_closed(sums)

    def wanted(kind: str) -> list[Metric[Any]]:
        if names is None:
            return metrics_of(kind)
        return [metric for metric in metrics_of(kind) if metric.name in names and metric.is_shown(kind == SCORE)]

    groups = {task.name: UserSums(wanted(task.kind), sums.tables, task.name) for task in sums.tasks}
    return groups | {SCORE: UserSums(wanted(SCORE), sums.tables, None)}


def effective_by_metric(groups: Mapping[str, UserSums]) -> dict[Key, float]:
    """Task or `score` and metric -> the effective number of users by their sizes."""
    return {(name, metric): users for name, group in groups.items() for metric, users in group.effective_users.items()}


def evaluate(groups: Mapping[str, UserSums], counts: np.ndarray) -> Values:
    """All metrics that have intervals in R resamples, which draw the users `counts` (U, R) float64 times."""
    return {(name, key): values for name, group in groups.items() for key, values in group.at(counts).items()}


def _total(column: Any) -> int:
    return int(column.to_numpy().sum())
