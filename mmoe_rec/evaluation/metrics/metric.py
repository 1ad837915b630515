"""Base classes of metrics, and the inputs of metrics.

A metric is computed in two steps. `measure` turns rows into contributions, which are added up for each user.
`summarize` computes the metric from the sums of the users.

Intervals resample users, so `summarize` computes the metric in R resamples at once. In a resample, the sums of a user
count as often as the user was drawn. The resample that draws each user once gives the value of the metric.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmoe_rec.evaluation.intervals import effective_sample_size
from mmoe_rec.task_kinds import KINDS

Measured = TypeVar("Measured")
Made = TypeVar("Made")
_BETTER = {"higher": "↑", "lower": "↓", "one": "→ 1"}


class BaseMetric(ABC):
    """Name and format of a metric in tables."""

    name: str
    """Name in `metrics.json`, MLflow and tables."""
    better: Literal["higher", "lower", "one"]
    """Direction of better values. `one` means closer to 1."""
    is_headline: bool = True
    """Whether the table on the terminal has the metric. `metrics.json` and MLflow have all metrics."""

    @property
    def label(self) -> str:
        """Name in a table."""
        return f"{self.name} {_BETTER[self.better]}"

    def loss(self, value: float) -> float:
        """Return a number that is smaller for better values."""
        return {"higher": -value, "lower": value, "one": distance_from_one(value)}[self.better]

    def format(self, value: float) -> str:
        """Format a value, or half the width of an interval, for a table."""
        return f"{value:.4f}" if 0.0005 <= abs(value) < 1000 else f"{value:.3g}"


class Metric(BaseMetric, Generic[Measured]):
    """Metric of the rows of tasks (`Metric[TaskRows]`), or of ranked lists (`Metric[RankedRequests]`)."""

    kinds: Sequence[str]
    """Kinds of tasks that have the metric. `score` in this list means that the score has the metric.

    A kind whose name is not in any list has the metrics of its `TaskKind.metrics_kind`.
    """
    required_sums: Sequence[str] = ()
    """Names of the sums that `summarize` reads.

    They come from `measure` of this metric or another metric, or are columns of `EvaluationSums`, such as `weight`.
    """
    is_ranking_metric: bool = False
    """Whether the metric of a task measures requests as ranked lists. Metrics of the score always do.

    The rows of a list are sorted by falling prediction of the task. The relevance of a row is max(0, label).
    """
    is_within_group: bool = False
    """Whether the metric compares rows of the same user or request. It is undefined if each user has only one row."""
    has_interval: bool = True
    is_fraction: bool = False
    """Whether the metric is a fraction, or a mean of values between 0 and 1."""

    def applies_to(self, kind: str) -> bool:
        """Return whether the metric applies to tasks of a kind, or to the `score`."""
        return kind in self.kinds or (kind in KINDS and KINDS[kind].metrics_kind in self.kinds)

    def is_shown(self, of_score: bool) -> bool:
        """Return whether the main tables show the metric, for the score (`of_score`) or for tasks.

        The tables hide ranking metrics of tasks, because GAUC is enough to show how well a task ranks.
        """
        return self.is_headline and (of_score or not self.is_ranking_metric)

    def measure(self, rows: Measured) -> dict[str, np.ndarray]:
        """Return contributions to the sums that this metric defines.

        Returns:
            Name of the sum -> contribution of each of N rows of a task, or of each of Q ranked requests. Empty if the
                metric only reads sums that other metrics define.
        """
        return {}

    @abstractmethod
    def summarize(self, resamples: "Resamples") -> np.ndarray:
        """Compute the value in each resample, shape (R,) float64. It is NaN if undefined."""

    def details(self, sums: "UserSums", resamples: int) -> dict[str, Any]:
        """Return further results for `GroupSummary.details`, such as the bins of a plot, by name.

        Args:
            sums: Sums of the users.
            resamples: Number of resamples for intervals.
        """
        return {}


class Ratio(Metric[Measured]):
    """Metric that divides the first of its two `required_sums` by the second."""

    def summarize(self, resamples: "Resamples") -> np.ndarray:
        return ratio(resamples[self.required_sums[0]], resamples[self.required_sums[1]])


@dataclass(frozen=True)
class TaskRows:
    """N rows with an observed label of a task.

    Attributes:
        label: Labels, shape (N,) float64.
        prediction: Predictions, shape (N,) float64.
        weight: Weights, shape (N,) float64.
        user: Users as indices from 0 without gaps, shape (N,) int64.
        request: Requests, in the same form as `user`.
        unit: Users or groups of users that resamples draw, in the same form as `user`.
    """

    label: np.ndarray
    prediction: np.ndarray
    weight: np.ndarray
    user: np.ndarray
    request: np.ndarray
    unit: np.ndarray

    def assign_to_first_rows(self, group: np.ndarray, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Assign the values of groups to the first row of each group, so that they add up.

        Args:
            group: Group of each row, shape (N,) int64 in [0, G). Each group has a row.
            values: Name -> values of the groups (G,).

        Returns:
            Name -> values (N,), 0 except for the first row of a group.
        """
        first = np.zeros(int(group.max(initial=-1)) + 1, np.int64)
        first[group[::-1]] = np.arange(len(group))[::-1]  # reversed, because the last assignment to an index wins
        by_row = {name: np.zeros(len(group), run_values.dtype) for name, run_values in values.items()}
        for name, of_groups in values.items():
            by_row[name][first] = of_groups
        return by_row


class UserSums:
    """Sums of a task or the score, for U users or groups of users that resamples draw.

    Attributes:
        users: IDs of the users or groups.
        is_score: Whether the sums belong to the score.
        table: Table `ranking` or `TASK.users` of `EvaluationSums`.
        bins: Table `TASK.bins` of a binary task, else None.
        counts: Table `TASK.counts` of a binary task, else None.
    """

    def __init__(self, metrics: Sequence[Metric[Any]], tables: Mapping[str, pa.Table], task: str | None) -> None:
        """Select the sums that metrics need.

        Args:
            metrics: Metrics of the task or the score.
            tables: Tables of `EvaluationSums`.
            task: Name of the task, None for the score.
        """
        self.users, self.is_score = tables["ranking"]["user"], task is None
        self.table = tables["ranking" if task is None else f"{task}.users"]
        self.bins, self.counts = tables.get(f"{task}.bins"), tables.get(f"{task}.counts")
        self._metrics = [metric for metric in metrics if metric.has_interval]
        self._positions = self.index(self.table["user"])
        self._cache: dict[Any, Any] = {}
        self._totals = sorted({name for metric in metrics for name in metric.required_sums})
        self._values = np.array([self.column(name) for name in self._totals]).reshape(-1, len(self.users))

    def column(self, name: str) -> np.ndarray:
        """Return the column `name` of `table` for each user, shape (U,) float64, 0 for users without a row."""
        if name not in self.table.column_names:
            raise ValueError(f"a metric reads {name!r}, which no metric measures")
        values = np.zeros(len(self.users))
        values[self._positions] = self.table[name].to_numpy()
        return values

    def index(self, users: pa.ChunkedArray) -> np.ndarray:
        """Return the position in `self.users` of each of N `users`, shape (N,) int64."""
        return pc.index_in(users, value_set=self.users.combine_chunks()).to_numpy().astype(np.int64)

    def cached(self, make: Callable[["UserSums"], Made]) -> Made:
        """Return the result of `make` for these sums, computed on first use."""
        made: Made = self._cache.get(make) or self._cache.setdefault(make, make(self))
        return made

    def resamples(self, counts: np.ndarray) -> "Resamples":
        """Return the sums in R resamples. `counts` (U, R) float64 says how often each resample draws each user."""
        # One matrix product for all sums is fast, because it reads the large `counts` only once.
        return Resamples(self, counts, dict(zip(self._totals, self._values @ counts, strict=True)))

    @cached_property
    def effective_users(self) -> dict[str, float]:
        """Effective number of users of each metric with an interval, see `effective_sample_size`.

        The number depends on the measure of a user's size, so the minimum over several measures counts. Ranking metrics
        and metrics of the score use the numbers of rows and of ranked requests. Other metrics use the number of rows
        and the weight, and for binary tasks also the weights of positive and of negative rows.
        """
        of_lists = [self.column("rows"), self.column("ranked_requests")]
        of_rows = of_lists[:1] if self.is_score else [of_lists[0], self.column("weight")]
        if self.bins is not None:  # binary tasks
            of_rows += [self.column("label"), self.column("weight") - self.column("label")]
        lists, rows = (min(map(effective_sample_size, sizes)) for sizes in (of_lists, of_rows))
        return {metric.name: lists if metric.is_ranking_metric or self.is_score else rows for metric in self._metrics}

    def compute(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Compute the metrics that have intervals in R resamples (`counts` (U, R)): name -> values (R,) float64."""
        resamples = self.resamples(counts)
        return {metric.name: metric.summarize(resamples) for metric in self._metrics}


@dataclass(frozen=True)
class Resamples:
    """R resamples of users. `resamples["weight"]` is the total (R,) of a sum that a metric requires.

    Attributes:
        sums: Sums of the users.
        counts: Number of draws of each user, shape (U, R) float64.
        totals: Name of a sum -> total in each resample, shape (R,).
    """

    sums: UserSums
    counts: np.ndarray
    totals: Mapping[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.totals[name]


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide arrays. The result is NaN where the denominator is not positive.

    Args:
        numerator: Any shape.
        denominator: A shape that broadcasts to the numerator's shape.

    Returns:
        Ratio in the numerator's shape, float64.
    """
    is_positive = np.broadcast_to(denominator > 0, numerator.shape)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=is_positive)


def distance_from_one(ratio: float) -> float:
    """Return the distance of a ratio from 1 as |log ratio|, so that 2 and 1/2 are equally far."""
    return abs(math.log(ratio)) if ratio > 0 else math.inf
