"""Simulated predictions and labels, with ties, unobserved labels and requests of different lengths."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmoe_rec.evaluation.sums import EvaluationSums, MeasuredTask
from tests.evaluation.trees import measure

BOUGHT = MeasuredTask("bought", "binary", 1.0)
LIKED = MeasuredTask("liked", "binary", 0.5)
SPENT = MeasuredTask("spent", "regression", 0.1)


@dataclass(frozen=True)
class Log:
    """The arguments of `measure`, as arrays."""

    tasks: tuple[MeasuredTask, ...]
    users: np.ndarray
    requests: np.ndarray
    predictions: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    score: np.ndarray
    weight: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> "Log":
        return replace(
            self,
            users=self.users[rows],
            requests=self.requests[rows],
            predictions={name: values[rows] for name, values in self.predictions.items()},
            labels={name: values[rows] for name, values in self.labels.items()},
            score=self.score[rows],
            weight=None if self.weight is None else self.weight[rows],
        )

    def with_labels(self, **labels: np.ndarray) -> "Log":
        """The same rows with other labels of some tasks."""
        return replace(self, labels=self.labels | labels)

    def with_predictions(self, **predictions: np.ndarray) -> "Log":
        """The same rows with other predictions of some tasks."""
        return replace(self, predictions=self.predictions | predictions)

    def measure(self, **more: Any) -> EvaluationSums:
        """Sums of all rows; more: arguments of `measure`."""
        given = (self.tasks, self.users, self.requests, self.predictions, self.labels)
        return measure(*given, score=self.score, weight=self.weight, **more)

    def observed(self, task: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows, labels, predictions) where the label is observed."""
        rows = np.flatnonzero(~np.isnan(self.labels[task]))
        return rows, self.labels[task][rows], self.predictions[task][rows]


def simulate(seed: int, users: int = 60, requests: int = 400, decimals: int | None = None, **changes: Any) -> Log:
    """A log in random row order; `decimals` rounds predictions and scores, so that there are ties."""
    generator = np.random.default_rng(seed)
    request_user = generator.integers(users, size=requests)
    request = np.repeat(np.arange(requests), generator.integers(1, 12, size=requests))
    generator.shuffle(request)
    rows = len(request)
    logit = generator.normal(size=rows) + 0.7 * generator.normal(size=users)[request_user[request]] - 1
    bought = (generator.random(rows) < 1 / (1 + np.exp(-logit))).astype(float)
    liked = np.where(generator.random(rows) < 0.4, np.nan, generator.random(rows) < 0.3)
    spent = np.where(generator.random(rows) < 0.2, np.nan, bought * np.exp(generator.normal(size=rows)))
    probability = 1 / (1 + np.exp(-logit - 0.5 * generator.normal(size=rows)))
    second = generator.uniform(0.01, 0.99, size=rows)
    if decimals is not None:
        probability, second = (np.clip(p.round(decimals), 0.1, 0.9) for p in (probability, second))
    # As exact as the logloss takes probabilities.
    probability, second = (item.astype(np.float32).astype(np.float64) for item in (probability, second))
    log = Log(
        tasks=(BOUGHT, LIKED, SPENT),
        users=request_user[request] - users // 2,  # negative ids too
        requests=request * 1_000_003,
        predictions={"bought": probability, "liked": second, "spent": np.exp(logit)},
        labels={"bought": bought, "liked": liked, "spent": spent},
        score=probability * second if decimals is None else probability,
    )
    return replace(log, **changes)
