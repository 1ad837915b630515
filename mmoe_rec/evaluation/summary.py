"""Rows with predictions and labels -> sums -> metrics of a model with their intervals; and which of them decides."""

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
"""Requests that rank nothing."""
OBJECTIVE: MetricKey = ("objective", "objective")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Objective:
    """What decides: a metric of the score, or the mean of one over tasks.

    groups: `score`, or the tasks; better: which values are, higher or lower.
    """

    metric: str
    groups: tuple[str, ...]
    better: str

    @staticmethod
    def from_setting(primary_metric: str, sums: EvaluationSums, tasks: Collection[str]) -> "Objective | None":
        """The objective of a setting: a metric of tasks, such as `auc`, or of the score, such as `score.ndcg_at_10`.

        A metric of tasks is averaged over those `tasks` that have it and enough labels; where none has, it is R2 of
        the regressions, and None where there are none either. Raises UserError for what is no such metric.
        """
        metric = find_objective_metric(primary_metric)
        if primary_metric.startswith(f"{SCORE}."):
            return Objective(metric.name, (SCORE,), metric.better)
        for each in (metric, find_objective_metric("r2")):
            having = {task.name for task in sums.tasks if each.applies_to(task.kind)}
            if judged := tuple(
                task for task in tasks if task in having and count_minority(sums, task) >= MIN_RARER_ROWS
            ):
                return Objective(each.name, judged, each.better)
        return None

    @property
    def name(self) -> str:
        """The metric that decides, in words."""
        if self.groups == (SCORE,):
            return f"{self.metric} of the score"
        return f"{'mean ' if len(self.groups) > 1 else ''}{self.metric} of {', '.join(self.groups)}"


def find_objective_metric(primary_metric: str) -> Metric[Any]:
    """The metric of a setting. Raises UserError where models can't be told apart by it."""
    group, _, name = primary_metric.rpartition(".")
    for metric in every.METRICS:
        is_of = SCORE in metric.kinds if group == SCORE else {*metric.kinds} - {SCORE}
        if metric.name == name and group in ("", SCORE) and is_of and metric.has_interval and metric.better != "one":
            return metric
    raise UserError(
        f"evaluation.primary_metric is '{primary_metric}'; expected a metric of tasks, such as auc, gauc_user "
        "or logloss, or "
        "one of the score, such as score.ndcg_at_10"
    )


class BootstrapMetrics:
    """The metrics of a model that have intervals, and what decides, in resamples of users, or groups of them.

    groups: task name -> its sums, and `score` -> those of the score; names: of the metrics that are wanted besides the
    objective's, not of how tasks rank; None: all.
    """

    def __init__(
        self, sums: EvaluationSums, objective: Objective | None = None, names: Collection[str] | None = None
    ) -> None:
        self.num_units, self.objective = len(sums.tables["ranking"]), objective
        self.groups: dict[str, UserSums] = {}
        for name, kind in {**{task.name: task.kind for task in sums.tasks}, SCORE: SCORE}.items():
            decides = "" if objective is None or name not in objective.groups else objective.metric
            metrics = [
                each
                for each in every.metrics_for_kind(kind)
                if names is None or each.name == decides or (each.name in names and each.is_shown(kind == SCORE))
            ]
            if metrics:
                self.groups[name] = UserSums(metrics, sums.tables, None if name == SCORE else name)

    def compute(self, counts: np.ndarray) -> Replicates:
        """All in R resamples, which draw the users `counts` (U, R) float64 times; no objective that lacks a part."""
        values = {
            (name, key): each for name, group in self.groups.items() for key, each in group.compute(counts).items()
        }
        parts = [] if self.objective is None else [(each, self.objective.metric) for each in self.objective.groups]
        if parts and values.keys() >= {*parts}:
            values[OBJECTIVE] = np.mean([values[part] for part in parts], axis=0)
        return values

    @property
    def point_values(self) -> dict[MetricKey, float]:
        """All of the users as they are."""
        return {key: float(each[0]) for key, each in self.compute(np.ones((self.num_units, 1))).items()}

    def effective_users(self, key: MetricKey) -> float:
        """The effective number of users of a metric; of the objective, the least of its parts."""
        if key == OBJECTIVE and self.objective is not None:
            return min(self.groups[group].effective_users[self.objective.metric] for group in self.objective.groups)
        return self.groups[key[0]].effective_users[key[1]]

    def bootstrap(
        self, resamples: int, compute: Callable[[np.ndarray], Replicates] | None = None
    ) -> dict[MetricKey, Estimate]:
        """All metrics, or other numbers by metric (`compute`) of the same users, when users are redrawn."""
        found = bootstrap(compute or self.compute, self.num_units, resamples)
        return {key: replace(each, effective_users=self.effective_users(key)) for key, each in found.items()}


@dataclass(frozen=True)
class GroupSummary:
    """The metrics of a task, or of the score.

    kind: of the task, or `score`; counts: a task's `rows` and, if it is binary, `positives` and `requests`; the score's
    requests `UNINFORMATIVE_REQUESTS`; metrics: those that have intervals; details: those that have none, and what else
    metrics say; effective_users: None if there are enough.
    """

    kind: str
    counts: dict[str, int]
    metrics: dict[str, Interval]
    details: dict[str, Any]
    effective_users: float | None = None

    @property
    def guardrail_metric(self) -> str:
        """The metric of which the task may not lose more than the margin."""
        return KINDS[self.kind].guardrail_metric

    def get(self, metric: str) -> Interval:
        """A metric, undefined where it was not measured."""
        value = self.details.get(metric)
        return self.metrics.get(metric) or (Interval(value) if isinstance(value, (int, float)) else UNDEFINED)


@dataclass(frozen=True)
class Summary:
    """All metrics of a model.

    rows, users, requests: that were measured; resamples: of the intervals; tasks: by name; catalog: how many
    `candidates` there are, and metrics of all requests together, None where candidates are unknown; facts: what else
    the file of metrics says.
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
        """The tasks, then the score."""
        return {**self.tasks, SCORE: self.score}

    @property
    def one_row_per_user(self) -> bool:
        """True if each row has a user of its own, as in a plain table: then nothing ranks within users or requests."""
        return self.users == self.rows


@dataclass(frozen=True)
class MeasuredModel:
    """A model's sums, and the summary of its metrics.

    address: where it, or its predictions, come from; seen: sentences on how it has seen these rows before; early_end:
    that its training ended too early, if it did; slices: its sums in each, by (what rows are sliced by, value), in the
    same units.
    """

    sums: EvaluationSums
    summary: Summary
    address: str = ""
    training_overlap: Sequence[str] = ()
    undertraining: str | None = None
    slices: Mapping[tuple[str, str], EvaluationSums] = field(default_factory=dict)


RowsBySlice = Mapping[str, Mapping[str, np.ndarray]]
"""What rows are sliced by -> name of the slice -> (n,) numbers of the rows in the slice"""


def measure_model(
    rows: PredictedRows,
    resamples: int,
    slices: RowsBySlice | None = None,
    facts: Mapping[str, Any] | None = None,
    **about: Any,
) -> MeasuredModel:
    """Compute all metrics of rows with their intervals, and the sums of each slice.

    Args:
        rows: Rows as the model predicts them.
        resamples: Number of bootstrap resamples of users.
        slices: Parts of the rows to measure too.
        facts: Further entries of `metrics.json`.
        about: Further attributes of the `MeasuredModel`.

    Raises:
        UserError: There is no row.
    """
    sums = rows.sum()
    grouped = sums.users > len(sums.tables["ranking"])
    of_slices = {
        (by, name): rows.take(places).sum(grouped)
        for by, named in (slices or {}).items()
        for name, places in named.items()
    }
    summary = replace(summarize(sums, resamples), facts=dict(facts or {}))
    return MeasuredModel(sums, summary, slices=of_slices, **about)


def summarize(sums: EvaluationSums, resamples: int = 1000) -> Summary:
    """All metrics of a model, with 95% bootstrap intervals over users.

    resamples: how often users are redrawn, at least 1; 1,000 make ends steady. The same are drawn for all models.
    """
    measured = BootstrapMetrics(sums)
    groups, num_units = measured.groups, measured.num_units
    shares = {metric.name for metric in every.METRICS if metric.is_fraction}
    of_all = {key: each.interval(key[1] in shares) for key, each in measured.bootstrap(resamples).items()}
    for key, at in of_all.items():  # what is the same for all users does not say how sure it is
        if at.low is not None and at.high is not None and at.high - at.low <= rounding_tolerance(at.low):
            of_all[key] = Interval(at.value)
    metrics = nest(of_all)

    def summary_of(name: str, kind: str, counts: Sequence[str], **details: Any) -> GroupSummary:
        group, its = groups[name], metrics.get(name, {})
        for metric in every.metrics_for_kind(kind):
            if not metric.has_interval:
                value = float(metric.summarize(group.resamples(np.ones((num_units, 1))))[0])
                details[metric.name] = value if np.isfinite(value) else None
            details |= metric.details(group, resamples)
        fewest = min((group.effective_users[each] for each, at in its.items() if at.value is not None), default=np.inf)
        few = fewest if fewest < min(FEW_USERS, num_units / 2) else None
        task = None if name == SCORE else name
        return GroupSummary(kind, {each: sums.total(each, task) for each in counts}, its, details, few)

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
    """What is measured of a task, or of the score: metric -> its value for each model. Where each row is a user of its
    own, how well rows are ranked within users and requests is left out."""
    groups, alone = [each.groups.get(group) for each in summaries], all(each.one_row_per_user for each in summaries)
    return {
        metric: [UNDEFINED if each is None else each.get(metric.name) for each in groups]
        for metric in every.METRICS
        if any(metric.name in {**each.metrics, **each.details} for each in groups if each is not None)
        and not (alone and metric.is_within_group)
    }


def flatten(summary: Summary) -> dict[str, float]:
    """The numbers of a summary under names that MLflow accepts, such as `bought.auc`, `bought.auc.low`, `score.mrr`.

    What is undefined is left out.
    """
    numbers: dict[str, Any] = {name: getattr(summary, name) for name in ("rows", "users", "requests")}
    numbers |= {f"{CATALOG}.{name}": value for name, value in (summary.catalog or {}).items()}
    for group, its in summary.groups.items():
        parts: dict[str, Any] = dict(its.counts)
        for name, each in its.metrics.items():
            parts |= {name: each.value, f"{name}.low": each.low, f"{name}.high": each.high}
        for name, detail in its.details.items():
            of_parts = detail.items() if isinstance(detail, Mapping) else ()
            parts |= {name: detail, **{f"{name}.{part}": value for part, value in of_parts}}
        numbers |= {f"{group}.{name}": value for name, value in parts.items()}
    return {name: float(value) for name, value in numbers.items() if isinstance(value, (int, float))}


def nest(flat: Mapping[MetricKey, Item]) -> dict[str, dict[str, Item]]:
    """(task or `score`, metric) -> something, as task or `score` -> metric -> it."""
    groups: dict[str, dict[str, Item]] = {}
    for (group, metric), each in flat.items():
        groups.setdefault(group, {})[metric] = each
    return groups
