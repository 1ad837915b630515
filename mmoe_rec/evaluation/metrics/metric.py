"""What a metric says of itself, and what it is given.

Rows are measured into sums per user (`measure`); `summarize` computes the value from the sums. The intervals redraw
users, so `summarize` is asked for R resamples at once, in which each user counts as often as it was drawn. One resample
that counts every user once gives the metric itself.
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
    """What tables say of a metric."""

    name: str
    """What it is called in `metrics.json`, MLflow and tables."""
    better: Literal["higher", "lower", "one"]
    """Which values are better; `one`: those closer to 1."""
    is_headline: bool = True
    """Whether it stands in the table on the terminal; `metrics.json` and MLflow have all."""

    @property
    def label(self) -> str:
        """Its name in a table."""
        return f"{self.name} {_BETTER[self.better]}"

    def loss(self, value: float) -> float:
        """A number that is smaller for better values."""
        return {"higher": -value, "lower": value, "one": distance_from_one(value)}[self.better]

    def format(self, value: float) -> str:
        """A value, or half the width of an interval, in a table."""
        return f"{value:.4f}" if 0.0005 <= abs(value) < 1000 else f"{value:.3g}"


class Metric(BaseMetric, Generic[Measured]):
    """One metric of the rows of tasks (`Metric[TaskRows]`), or of ranked lists (`Metric[RankedLists]`)."""

    kinds: Sequence[str]
    """What it is a metric of: kinds of tasks, also those that are measured as such a kind, or the `score`."""
    required_sums: Sequence[str] = ()
    """The sums that `summarize` reads: its own, those of others, and those of `EvaluationSums` (`weight`, `label`)."""
    is_ranking_metric: bool = False
    """Whether a metric of tasks measures ranked lists, as those of the score always do: the rows of each request by
    falling prediction, where a row is worth its label, or nothing if that is negative."""
    is_within_group: bool = False
    """Whether it says how well rows are ranked within users or requests, of which a row alone says nothing."""
    has_interval: bool = True
    is_fraction: bool = False
    """Whether it is a mean of what lies between 0 and 1."""

    def applies_to(self, kind: str) -> bool:
        """Whether it is a metric of tasks of this kind, or of the `score`."""
        return kind in self.kinds or (kind in KINDS and KINDS[kind].metrics_kind in self.kinds)

    def is_shown(self, of_score: bool) -> bool:
        """Whether a table shows it of the score, or of tasks: of how these rank each request's rows, only GAUC."""
        return self.is_headline and (of_score or not self.is_ranking_metric)

    def measure(self, rows: Measured) -> dict[str, np.ndarray]:
        """Sums of its own, if any: name -> what each row (N,) of a task, or each request (Q,) of lists, adds."""
        return {}

    @abstractmethod
    def summarize(self, resamples: "Resamples") -> np.ndarray:
        """(R,) float64, the value in each resample; NaN where it is undefined."""

    def details(self, sums: "UserSums", resamples: int) -> dict[str, Any]:
        """What else the summary says."""
        return {}


class Ratio(Metric[Measured]):
    """A metric that is the ratio of its two `required_sums`."""

    def summarize(self, resamples: "Resamples") -> np.ndarray:
        return ratio(resamples[self.required_sums[0]], resamples[self.required_sums[1]])


@dataclass(frozen=True)
class TaskRows:
    """The N rows in which the label of a task is observed.

    label, prediction, weight: (N,) float64; user, request, unit: (N,) int64 from 0 on, without gaps; a unit is the
    user, or the group of users, that resamples draw.
    """

    label: np.ndarray
    prediction: np.ndarray
    weight: np.ndarray
    user: np.ndarray
    request: np.ndarray
    unit: np.ndarray

    def assign_to_first_rows(self, group: np.ndarray, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Values of groups of rows, name -> (G,), as what rows add: name -> (N,), 0 but for one row of each group.

        group: (N,) int64 in [0, G), such as `request`; each group has a row.
        """
        first = np.zeros(int(group.max(initial=-1)) + 1, np.int64)
        first[group[::-1]] = np.arange(len(group))[::-1]  # what is written last stays
        found = {name: np.zeros(len(group), run_values.dtype) for name, run_values in values.items()}
        for name, each in values.items():
            found[name][first] = each
        return found


class UserSums:
    """The sums of a task, or of the score, for each of all U users, or groups of them, that resamples draw.

    metrics: those of the task or the score; tables: of `EvaluationSums`; task: its name, None for the score; bins,
    counts: the tables of a binary task.
    """

    def __init__(self, metrics: Sequence[Metric[Any]], tables: Mapping[str, pa.Table], task: str | None) -> None:
        self.users, self.is_score = tables["ranking"]["user"], task is None
        self.table = tables["ranking" if task is None else f"{task}.users"]
        self.bins, self.counts = tables.get(f"{task}.bins"), tables.get(f"{task}.counts")
        self._metrics = [metric for metric in metrics if metric.has_interval]
        self._place = self.index(self.table["user"])
        self._made: dict[Any, Any] = {}
        self._totals = sorted({name for metric in metrics for name in metric.required_sums})
        self._values = np.array([self.column(name) for name in self._totals]).reshape(-1, len(self.users))

    def column(self, name: str) -> np.ndarray:
        """(U,) float64, the sum of each user; 0 for users without a row."""
        if name not in self.table.column_names:
            raise ValueError(f"a metric reads {name!r}, which no metric measures")
        values = np.zeros(len(self.users))
        values[self._place] = self.table[name].to_numpy()
        return values

    def index(self, users: pa.ChunkedArray) -> np.ndarray:
        """(N,) int64, where each of N users stands among the U."""
        return pc.index_in(users, value_set=self.users.combine_chunks()).to_numpy().astype(np.int64)

    def cached(self, make: Callable[["UserSums"], Made]) -> Made:
        """What `make` gives for these sums, made on first use."""
        made: Made = self._made.get(make) or self._made.setdefault(make, make(self))
        return made

    def resamples(self, counts: np.ndarray) -> "Resamples":
        """The sums in R resamples that draw the users `counts` (U, R) float64 times."""
        # One product for the sums of all metrics reads the counts once.
        return Resamples(self, counts, dict(zip(self._totals, self._values @ counts, strict=True)))

    @cached_property
    def effective_users(self) -> dict[str, float]:
        """Metric that has an interval -> the effective number of users: the least by rows, and by ranked requests, or
        by weight and labels of either class."""
        of_lists = [self.column("rows"), self.column("ranked_requests")]
        of_rows = of_lists[:1] if self.is_score else [of_lists[0], self.column("weight")]
        if self.bins is not None:  # of a binary task
            of_rows += [self.column("label"), self.column("weight") - self.column("label")]
        lists, rows = (min(map(effective_sample_size, sizes)) for sizes in (of_lists, of_rows))
        return {metric.name: lists if metric.is_ranking_metric or self.is_score else rows for metric in self._metrics}

    def compute(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Name of each metric that has an interval -> (R,) float64."""
        resamples = self.resamples(counts)
        return {metric.name: metric.summarize(resamples) for metric in self._metrics}


@dataclass(frozen=True)
class Resamples:
    """R resamples of the users; `drawn["weight"]` is the total (R,) of a sum that a metric names in `totals`.

    counts: (U, R) float64, how often each user was drawn.
    """

    sums: UserSums
    counts: np.ndarray
    totals: Mapping[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.totals[name]


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The same shape, float64; NaN where the denominator is not positive."""
    some = np.broadcast_to(denominator > 0, numerator.shape)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=some)


def distance_from_one(ratio: float) -> float:
    """How far probabilities are off, by either factor."""
    return abs(math.log(ratio)) if ratio > 0 else math.inf
