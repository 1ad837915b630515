"""Sums -> all metrics of a model with their intervals."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from mmoe_rec.evaluation import metrics as every
from mmoe_rec.evaluation.intervals import UNDEFINED, Interval, Key, Values, is_small_sample, resample, rounding_of
from mmoe_rec.evaluation.metrics import metrics_of
from mmoe_rec.evaluation.metrics.metric import Metric, Named, UserSums
from mmoe_rec.evaluation.sums import EvaluationSums

SCORE, CATALOGUE = "score", "catalogue"
LEFT_OUT = ("requests_of_one_row", "requests_without_relevant_row", "requests_of_equal_relevance")
"""Requests that rank nothing."""
Each = TypeVar("Each")


@dataclass(frozen=True)
class GroupSummary:
    """The metrics of a task, or of the score.

    kind: of the task, or `score`; counts: a task's `rows` and, if it is binary, `positives` and `requests`; the score's
    requests `LEFT_OUT`; metrics: those that have intervals; details: those that have none, and what else metrics say;
    effective_users: of the metric that rests on the fewest, None where all have enough; least_ndcg: of the score, the
    NDCG@10 of the worst order of each request, on average.
    """

    kind: str
    counts: dict[str, int]
    metrics: dict[str, Interval]
    details: dict[str, Any]
    effective_users: float | None = None
    least_ndcg: float | None = None

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

    rows, users, requests: that were measured; resamples: of the intervals; tasks: by name; catalogue: how many
    `candidates` there are, and metrics of all requests together, None where candidates are unknown; facts: what else
    the file of metrics says.
    """

    rows: int
    users: int
    requests: int
    resamples: int
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


@dataclass(frozen=True)
class PlacementRecord:
    """What a model has learnt of a value of placement. effects: task -> how many times the odds of a binary task are
    those of the mean row, or what is added to a regression."""

    feature: str
    value: str
    rows: int
    effects: dict[str, float]


@dataclass(frozen=True)
class MeasuredModel:
    """A model's sums, and the summary of its metrics.

    address: where it, or its predictions, come from; gates: task -> mean weight of each expert, None where they are
    unknown; seen: sentences on how it has seen these rows before; training: on how it was trained, also on their users;
    slices: its sums in each, by (what rows are sliced by, value), in the same units; placement: what was learnt of it.
    """

    sums: EvaluationSums
    summary: Summary
    address: str = ""
    gates: dict[str, list[float]] | None = None
    seen: Sequence[str] = ()
    training: Sequence[str] = ()
    slices: Mapping[tuple[str, str], EvaluationSums] = field(default_factory=dict)
    placement: Sequence[PlacementRecord] = ()


def summarise(sums: EvaluationSums, resamples: int = 1000) -> Summary:
    """All metrics of a model, with 95% bootstrap intervals over users.

    resamples: how often users are redrawn, at least 1; 1,000 make ends steady. The same are drawn for all models.
    """
    groups, ranking = sums_by_user(sums), sums.tables["ranking"]
    units, effective = len(ranking), effective_by_metric(groups)
    resampled = resample(lambda counts: evaluate(groups, counts), units, resamples)
    of_all = {key: each.interval(effective[key], key[1] in groups[key[0]].shares) for key, each in resampled.items()}
    for key, at in of_all.items():  # what is the same for all users does not say how sure it is
        if at.low is not None and at.high is not None and at.high - at.low <= rounding_of(at.low):
            of_all[key] = Interval(at.value)
    metrics = nest(of_all)

    def summary_of(
        name: str, kind: str, counts: Sequence[str], least: float | None = None, **details: Any
    ) -> GroupSummary:
        group, its = groups[name], metrics.get(name, {})
        for metric in metrics_of(kind):
            if not metric.has_interval:
                value = float(metric.summarise(group.drawn(np.ones((units, 1))))[0])
                details[metric.name] = value if np.isfinite(value) else None
            details |= metric.details(group, resamples)
        fewest = min((effective[name, each] for each, at in its.items() if at.value is not None), default=np.inf)
        few = fewest if is_small_sample(fewest, units) else None
        return GroupSummary(kind, {each: _total(group.table[each]) for each in counts}, its, details, few, least)

    counted = {"binary": ["rows", "positives", "requests"], "regression": ["rows"]}
    tasks = {task.name: summary_of(task.name, task.kind, counted[task.kind]) for task in sums.tasks}
    score, requests, catalogue = summary_of(SCORE, SCORE, LEFT_OUT), _total(ranking["requests"]), None
    if ranked := _total(ranking["ranked_requests"]):
        least, random = (float(np.sum(ranking[f"{name}_ndcg"])) / ranked for name in ("least", "random"))
        score = summary_of(SCORE, SCORE, LEFT_OUT, least, random_ndcg_at_10=random)
    if (table := sums.tables.get(CATALOGUE)) is not None:
        shown = {metric.name: metric.summarise(table, requests) for metric in every.CATALOGUE_METRICS}
        catalogue = {"candidates": len(table), **shown}
    return Summary(_total(ranking["rows"]), sums.users, requests, resamples, tasks, score, catalogue)


def rows_of_metrics(summaries: Sequence[Summary], group: str) -> dict[Metric[Any], list[Interval]]:
    """What is measured of a task, or of the score: metric -> its value for each model. Where each row is a user of its
    own, how well rows are ranked within users and requests is left out."""
    groups, alone = [each.groups.get(group) for each in summaries], all(each.each_row_is_a_user for each in summaries)
    return {
        metric: [UNDEFINED if each is None else each.get(metric.name) for each in groups]
        for metric in every.METRICS
        if any(each is not None and each.has(metric) for each in groups) and not (alone and metric.ranks_within)
    }


def rows_of_catalogue(summaries: Sequence[Summary]) -> dict[Named, list[Interval]]:
    """The same of the catalogue, which has no intervals; none where no candidates are known."""
    catalogues = [each.catalogue or {} for each in summaries]
    return {
        metric: [Interval(each.get(metric.name)) for each in catalogues]
        for metric in (every.CATALOGUE_METRICS if any(catalogues) else ())
    }


def flatten(summary: Summary) -> dict[str, float]:
    """The numbers of a summary under names that MLflow accepts, such as `bought.auc`, `bought.auc.low`, `score.mrr`.

    What is undefined is left out.
    """
    numbers: dict[str, Any] = {name: getattr(summary, name) for name in ("rows", "users", "requests")}
    numbers |= {f"{CATALOGUE}.{name}": value for name, value in (summary.catalogue or {}).items()}
    for group, its in summary.groups.items():
        parts: dict[str, Any] = dict(its.counts)
        for name, each in its.metrics.items():
            parts |= {name: each.value, f"{name}.low": each.low, f"{name}.high": each.high}
        for name, detail in its.details.items():
            of_parts = detail.items() if isinstance(detail, Mapping) else ()
            parts |= {name: detail, **{f"{name}.{part}": value for part, value in of_parts}}
        numbers |= {f"{group}.{name}": value for name, value in parts.items()}
    return {name: float(value) for name, value in numbers.items() if isinstance(value, (int, float))}


def sums_by_user(sums: EvaluationSums, names: Collection[str] | None = None) -> dict[str, UserSums]:
    """Task name -> its sums, and `score` -> those of the score, over the users of `sums.tables["ranking"]`, or groups
    of them. names: of the metrics in tables, those that are wanted; None: all metrics.
    """
    kinds: dict[str, str] = {task.name: task.kind for task in sums.tasks} | {SCORE: SCORE}
    groups = {}
    for name, kind in kinds.items():
        metrics = metrics_of(kind)
        if names is not None:
            metrics = [each for each in metrics if each.name in names and each.is_shown(kind == SCORE)]
        groups[name] = UserSums(metrics, sums.tables, None if name == SCORE else name)
    return groups


def effective_by_metric(groups: Mapping[str, UserSums]) -> dict[Key, float]:
    """Task or `score` and metric -> the effective number of users by their sizes."""
    return {(name, metric): users for name, group in groups.items() for metric, users in group.effective_users.items()}


def evaluate(groups: Mapping[str, UserSums], counts: np.ndarray) -> Values:
    """All metrics that have intervals in R resamples, which draw the users `counts` (U, R) float64 times."""
    return {(name, key): values for name, group in groups.items() for key, values in group.at(counts).items()}


def nest(flat: Mapping[Key, Each]) -> dict[str, dict[str, Each]]:
    """(task or `score`, metric) -> something, as task or `score` -> metric -> it."""
    groups: dict[str, dict[str, Each]] = {}
    for (group, metric), each in flat.items():
        groups.setdefault(group, {})[metric] = each
    return groups


def _total(column: Any) -> int:
    return int(column.to_numpy().sum())
