"""Turn sums of rows into the metrics of a model with intervals, and find the objective: the metric that decides."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from mmoe_rec.auc import MIN_RARER_ROWS
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation import metrics as every
from mmoe_rec.evaluation.intervals import (
    FEW_USERS,
    UNDEFINED,
    Estimate,
    Interval,
    MetricKey,
    Replicates,
    bootstrap,
    rounding_tolerance,
)
from mmoe_rec.evaluation.metrics.metric import Metric, UserSums
from mmoe_rec.evaluation.sums import EvaluationSums, PredictedRows, count_minority
from mmoe_rec.task_kinds import KINDS

SCORE, CATALOG = "score", "catalog"
UNINFORMATIVE_REQUESTS = ("requests_of_one_row", "requests_without_relevant_row", "requests_of_equal_relevance")
"""Names of counts of requests for which all orders of rows are equally good."""
OBJECTIVE: MetricKey = ("objective", "objective")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Objective:
    """Metric that decides which model is better: a metric of the score, or the mean of a metric over tasks.

    Attributes:
        metric: Name of the metric.
        groups: Names of the tasks, or `score` alone.
        better: Whether `higher` or `lower` values are better.
    """

    metric: str
    groups: tuple[str, ...]
    better: str

    @staticmethod
    def from_setting(primary_metric: str, sums: EvaluationSums, tasks: Collection[str]) -> "Objective | None":
        """Return the objective for the setting `evaluation.primary_metric`.

        A metric of tasks is averaged over all `tasks` that have the metric and enough labels. If no task has them, the
        objective is the mean R2 of the regressions with enough labels.

        Args:
            primary_metric: Metric of tasks, such as `auc`, or of the score, such as `score.ndcg_at_10`.
            sums: Sums of the model.
            tasks: Names of the tasks to average over.

        Returns:
            The objective, None if no task has enough labels.

        Raises:
            UserError: `primary_metric` is not a metric that can compare models.
        """
        metric = find_objective_metric(primary_metric)
        if primary_metric.startswith(f"{SCORE}."):
            return Objective(metric.name, (SCORE,), metric.better)
        for candidate in (metric, find_objective_metric("r2")):
            with_metric = {task.name for task in sums.tasks if candidate.applies_to(task.kind)}
            measured = [task for task in tasks if task in with_metric]
            if eligible := tuple(task for task in measured if count_minority(sums, task) >= MIN_RARER_ROWS):
                return Objective(candidate.name, eligible, candidate.better)
        return None

    @property
    def name(self) -> str:
        """Text such as `mean auc of clicked, bought` or `ndcg_at_10 of the score`."""
        if self.groups == (SCORE,):
            return f"{self.metric} of the score"
        return f"{'mean ' if len(self.groups) > 1 else ''}{self.metric} of {', '.join(self.groups)}"


def find_objective_metric(primary_metric: str) -> Metric[Any]:
    """Return the metric of `evaluation.primary_metric`, or raise UserError if it can't compare models."""
    group, _, name = primary_metric.rpartition(".")
    for metric in every.METRICS:
        applies = SCORE in metric.kinds if group == SCORE else {*metric.kinds} - {SCORE}
        if metric.name == name and group in ("", SCORE) and applies and metric.has_interval and metric.better != "one":
            return metric
    raise UserError(
        f"evaluation.primary_metric is '{primary_metric}'; expected a metric of tasks, such as auc, gauc_user or "
        "logloss, or one of the score, such as score.ndcg_at_10"
    )


class BootstrapMetrics:
    """Metrics with intervals and the objective, in resamples of users or of groups of users.

    Attributes:
        num_units: Number of units that resamples draw.
        objective: Metric that decides which model is better, None without a decision.
        groups: Task name or `score` -> sums of its metrics by unit.
    """

    def __init__(
        self, sums: EvaluationSums, objective: Objective | None = None, names: Collection[str] | None = None
    ) -> None:
        """Select the metrics to resample.

        Args:
            sums: Sums of the model.
            objective: Metric that decides which model is better, None without a decision.
            names: Names of metrics to compute besides the objective, if main tables show them. None for all metrics.
        """
        self.num_units, self.objective = len(sums.tables["ranking"]), objective
        self.groups: dict[str, UserSums] = {}
        for name, kind in {**{task.name: task.kind for task in sums.tasks}, SCORE: SCORE}.items():
            decides = "" if objective is None or name not in objective.groups else objective.metric
            metrics = [
                metric
                for metric in every.metrics_for_kind(kind)
                if names is None or metric.name == decides or (metric.name in names and metric.is_shown(kind == SCORE))
            ]
            if metrics:
                self.groups[name] = UserSums(metrics, sums.tables, None if name == SCORE else name)

    def compute(self, counts: np.ndarray) -> Replicates:
        """Compute all metrics in R resamples. The objective is left out if one of its tasks is not measured.

        Args:
            counts: How often each resample draws each of U users or groups, shape (U, R) float64.
        """
        values = {
            (name, key): value for name, group in self.groups.items() for key, value in group.compute(counts).items()
        }
        parts = [] if self.objective is None else [(group, self.objective.metric) for group in self.objective.groups]
        if parts and values.keys() >= {*parts}:
            values[OBJECTIVE] = np.mean([values[part] for part in parts], axis=0)
        return values

    @property
    def point_values(self) -> dict[MetricKey, float]:
        """Values of all metrics with each user counted once."""
        return {key: float(value[0]) for key, value in self.compute(np.ones((self.num_units, 1))).items()}

    def effective_users(self, key: MetricKey) -> float:
        """Return the effective number of users of a metric. For the objective, it is the minimum over its tasks."""
        if key == OBJECTIVE and self.objective is not None:
            return min(self.groups[group].effective_users[self.objective.metric] for group in self.objective.groups)
        return self.groups[key[0]].effective_users[key[1]]

    def bootstrap(
        self, resamples: int, compute: Callable[[np.ndarray], Replicates] | None = None
    ) -> dict[MetricKey, Estimate]:
        """Estimate numbers with bootstrap replicates.

        Args:
            resamples: Number of resamples.
            compute: Function like `self.compute` that returns other numbers by metric, None for `self.compute`.
        """
        estimates = bootstrap(compute or self.compute, self.num_units, resamples)
        return {key: replace(value, effective_users=self.effective_users(key)) for key, value in estimates.items()}


@dataclass(frozen=True)
class GroupSummary:
    """Metrics of a task, or of the score.

    Attributes:
        kind: Kind of the task, or `score`.
        counts: Number of `rows` of a task, and of `positives` and `requests` if it is binary. For the score, numbers of
            requests by the names in `UNINFORMATIVE_REQUESTS`.
        metrics: Name -> metric with interval.
        details: Name -> metric without interval, or another result, such as `calibration_bins`.
        effective_users: Effective number of users, if it is too small for reliable intervals. Else None.
    """

    kind: str
    counts: dict[str, int]
    metrics: dict[str, Interval]
    details: dict[str, Any]
    effective_users: float | None = None

    @property
    def guardrail_metric(self) -> str:
        """Metric in which the task may not lose more than `evaluation.max_metric_drop`."""
        return KINDS[self.kind].guardrail_metric

    def get(self, metric: str) -> Interval:
        """Return a metric with its interval, `UNDEFINED` if it was not measured."""
        value = self.details.get(metric)
        return self.metrics.get(metric) or (Interval(value) if isinstance(value, (int, float)) else UNDEFINED)


@dataclass(frozen=True)
class Summary:
    """All metrics of a model.

    Attributes:
        rows: Number of measured rows.
        users: Number of users of these rows.
        requests: Number of requests of these rows.
        resamples: Number of bootstrap resamples.
        tasks: Task -> metrics.
        score: Metrics of the score.
        catalog: Number of `candidates`, and `CATALOG_METRICS` by name. None if the rows have no candidates.
        facts: Further entries of `metrics.json`.
    """

    rows: int
    users: int
    requests: int
    resamples: int
    tasks: dict[str, GroupSummary]
    score: GroupSummary
    catalog: dict[str, float] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def groups(self) -> dict[str, GroupSummary]:
        """Metrics of the tasks, then of the score."""
        return {**self.tasks, SCORE: self.score}

    @property
    def one_row_per_user(self) -> bool:
        """Whether each row has its own user, as in plain tables. Then metrics within users or requests are missing."""
        return self.users == self.rows


@dataclass(frozen=True)
class MeasuredModel:
    """A model's sums, and the summary of its metrics.

    Attributes:
        sums: Sums of the users.
        summary: Metrics.
        address: URI of the model, or path of its predictions.
        training_overlap: Phrases that follow the model's name, if it was trained on measured rows.
        slices: (name of the slicing, such as a column; name of the slice) -> sums of the slice. They are by the same
            units as `sums`: users, or groups of users.
    """

    sums: EvaluationSums
    summary: Summary
    address: str = ""
    training_overlap: Sequence[str] = ()
    slices: Mapping[tuple[str, str], EvaluationSums] = field(default_factory=dict)


RowsBySlice = Mapping[str, Mapping[str, np.ndarray]]
"""Column that slices rows -> name of the slice -> numbers (n,) of the rows in the slice."""


def measure_model(
    rows: PredictedRows,
    resamples: int,
    slices: RowsBySlice | None = None,
    facts: Mapping[str, Any] | None = None,
    **about: Any,
) -> MeasuredModel:
    """Compute all metrics of rows with intervals, and the sums of each slice.

    Args:
        rows: Rows with the model's predictions.
        resamples: Number of bootstrap resamples of users.
        slices: Row numbers of the slices.
        facts: Further entries of `metrics.json`.
        about: Values of other attributes of the `MeasuredModel`, such as `address`.

    Raises:
        UserError: There is no row.
    """
    sums = rows.sum()
    grouped = sums.users > len(sums.tables["ranking"])
    slice_sums = {
        (by, name): rows.take(rows_of_slice).sum(grouped)
        for by, named in (slices or {}).items()
        for name, rows_of_slice in named.items()
    }
    summary = replace(summarize(sums, resamples), facts=dict(facts or {}))
    return MeasuredModel(sums, summary, slices=slice_sums, **about)


def summarize(sums: EvaluationSums, resamples: int = 1000) -> Summary:
    """Compute all metrics of a model, with 95% bootstrap intervals over users.

    Args:
        sums: Sums of the model.
        resamples: Number of resamples, at least 1. Intervals are stable from 1,000 on. All models use the same
            resamples.
    """
    measured = BootstrapMetrics(sums)
    groups, num_units = measured.groups, measured.num_units
    fractions = {metric.name for metric in every.METRICS if metric.is_fraction}
    intervals = {key: estimate.interval(key[1] in fractions) for key, estimate in measured.bootstrap(resamples).items()}
    for key, at in intervals.items():  # a metric that is equal for all users has no meaningful interval
        if at.low is not None and at.high is not None and at.high - at.low <= rounding_tolerance(at.low):
            intervals[key] = Interval(at.value)
    metrics = nest(intervals)

    def summary_of(name: str, kind: str, counts: Sequence[str], **details: Any) -> GroupSummary:
        group, its = groups[name], metrics.get(name, {})
        for metric in every.metrics_for_kind(kind):
            if not metric.has_interval:
                value = float(metric.summarize(group.resamples(np.ones((num_units, 1))))[0])
                details[metric.name] = value if np.isfinite(value) else None
            details |= metric.details(group, resamples)
        users = [group.effective_users[metric] for metric, at in its.items() if at.value is not None]
        fewest = min(users, default=np.inf)
        few = fewest if fewest < min(FEW_USERS, num_units / 2) else None
        task = None if name == SCORE else name
        return GroupSummary(kind, {count: sums.total(count, task) for count in counts}, its, details, few)

    counted = {True: ["rows", "positives", "requests"], False: ["rows"]}
    tasks = {task.name: summary_of(task.name, task.kind, counted[task.kind.is_binary]) for task in sums.tasks}
    random, requests, catalog = dict[str, float](), sums.total("requests"), None
    if ranked := sums.total("ranked_requests"):
        random = {"random_ndcg_at_10": float(np.sum(sums.tables["ranking"]["random_ndcg"])) / ranked}
    score = summary_of(SCORE, SCORE, UNINFORMATIVE_REQUESTS, **random)
    if (table := sums.tables.get(CATALOG)) is not None:
        shown = {metric.name: metric.summarize(table, requests) for metric in every.CATALOG_METRICS}
        catalog = {"candidates": len(table), **shown}
    return Summary(sums.total("rows"), sums.users, requests, resamples, tasks, score, catalog)


def collect_metrics(summaries: Sequence[Summary], group: str) -> dict[Metric[Any], list[Interval]]:
    """Collect the metrics of a task or of the score. Metrics within users are left out if each row has its own user.

    Args:
        summaries: Summaries of the models.
        group: Task, or `score`.

    Returns:
        Metric -> value and interval for each model, `UNDEFINED` for a model that lacks the metric.
    """
    groups = [summary.groups.get(group) for summary in summaries]
    alone = all(summary.one_row_per_user for summary in summaries)
    return {
        metric: [UNDEFINED if group is None else group.get(metric.name) for group in groups]
        for metric in every.METRICS
        if any(metric.name in {**group.metrics, **group.details} for group in groups if group is not None)
        and not (alone and metric.is_within_group)
    }


def flatten(summary: Summary) -> dict[str, float]:
    """Return the defined numbers of a summary by names that MLflow accepts, such as `bought.auc.low` or `score.mrr`."""
    numbers: dict[str, Any] = {name: getattr(summary, name) for name in ("rows", "users", "requests")}
    numbers |= {f"{CATALOG}.{name}": value for name, value in (summary.catalog or {}).items()}
    for group, summary_of_group in summary.groups.items():
        parts: dict[str, Any] = dict(summary_of_group.counts)
        for name, metric in summary_of_group.metrics.items():
            parts |= {name: metric.value, f"{name}.low": metric.low, f"{name}.high": metric.high}
        for name, detail in summary_of_group.details.items():
            parts_of_detail = detail.items() if isinstance(detail, Mapping) else ()
            parts |= {name: detail, **{f"{name}.{part}": value for part, value in parts_of_detail}}
        numbers |= {f"{group}.{name}": value for name, value in parts.items()}
    return {name: float(value) for name, value in numbers.items() if isinstance(value, (int, float))}


def nest(flat: Mapping[MetricKey, Item]) -> dict[str, dict[str, Item]]:
    """Nest a dictionary by task or `score`, then by metric."""
    groups: dict[str, dict[str, Item]] = {}
    for (group, metric), item in flat.items():
        groups.setdefault(group, {})[metric] = item
    return groups
