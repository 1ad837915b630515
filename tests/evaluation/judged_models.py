"""Pairs of models whose true difference is known: how often is which verdict given?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
from sklearn.metrics import roc_auc_score

from mmoe_rec.evaluation.comparison import Verdict, compare
from mmoe_rec.evaluation.summary import MeasuredModel, summarise
from mmoe_rec.evaluation.sums import EvaluationSums, MeasuredTask, measure
from mmoe_rec.settings.sections import Evaluation

TASKS = (MeasuredTask("bought", "binary", 1.0), MeasuredTask("liked", "binary", 1.0))
NAMES = [task.name for task in TASKS]
NOISE = 0.8
"""Deviation of a model's logits from the true ones."""


class World:
    """Users of different habits, in requests of five rows, and what they do."""

    def __init__(self, random: np.random.Generator, users: int) -> None:
        self.random = random
        requests = random.integers(1, 5, size=users)
        self.user = np.repeat(np.arange(users), 5 * requests)
        self.request = np.repeat(np.arange(requests.sum()), 5)
        shape = (len(NAMES), len(self.user))
        self.logits = random.normal(size=shape) + random.normal(0, 0.7, size=(len(NAMES), users))[:, self.user] - 1
        self.labels = (random.random(shape) < 1 / (1 + np.exp(-self.logits))).astype(float)

    def predictions(self, noise: float) -> np.ndarray:
        """(T, N) of a model that is wrong by that much, in its own way: alike for rows of one user."""
        of_users = self.random.normal(0, 0.4 * noise, size=(len(NAMES), self.user[-1] + 1))[:, self.user]
        return 1 / (1 + np.exp(-self.logits - of_users - self.random.normal(0, noise, size=self.logits.shape)))

    def sums(self, predictions: np.ndarray) -> EvaluationSums:
        given = [dict(zip(NAMES, each, strict=True)) for each in (predictions, self.labels)]
        return measure(TASKS, self.user, self.request, *given, score=np.log(predictions).sum(0))


def true_gain(noise: float, worlds: int = 12, users: int = 4000) -> float:
    """By how much the mean AUC of a model is higher than that of one with `NOISE`."""
    gains = []
    for seed in range(worlds):
        world = World(np.random.default_rng([7, seed]), users)
        for task, label in enumerate(world.labels):
            areas = [roc_auc_score(label, world.predictions(each)[task]) for each in (noise, NOISE)]
            gains.append(areas[0] - areas[1])
    return float(np.mean(gains))


def compared(noise: float, number: int, users: int, resamples: int) -> Iterator[Verdict]:
    """Verdicts of that many challengers, each on other users, beside a champion with `NOISE`."""
    for seed in range(number):
        world = World(np.random.default_rng([11, seed]), users)
        sums = {name: world.sums(world.predictions(each)) for name, each in (("new", noise), ("old", NOISE))}
        models = {name: MeasuredModel(each, summarise(each, 20)) for name, each in sums.items()}
        yield compare(models, "new", NAMES, Evaluation(), resamples, seed).verdicts["old"]


def verdicts(noise: float, number: int, users: int, resamples: int) -> tuple[Counter[str], float]:
    """How often each kind of verdict is given, and the mean size that the comparisons call detectable."""
    counts, sizes = Counter[str](), []
    for judged in compared(noise, number, users, resamples):
        counts[judged.kind] += 1
        sizes.append(judged.detectable)
    return counts, float(np.mean(sizes))


def noise_of_gain(gain: float, of_noise: Callable[[float], float] = true_gain) -> float:
    """The noise of a model whose mean AUC is truly higher by that much, by bisection."""
    low, high = 0.0, NOISE
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if of_noise(middle) > gain else (low, middle)
    return (low + high) / 2
