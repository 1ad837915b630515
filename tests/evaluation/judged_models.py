"""Pairs of models whose true difference is known: how often is which verdict given?"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from mmoe_rec.evaluation.comparison import Verdict, compare
from mmoe_rec.evaluation.slices import compare_slices
from mmoe_rec.evaluation.summary import MeasuredModel, summarize
from mmoe_rec.evaluation.sums import EvaluationSums, MeasuredTask
from mmoe_rec.settings.sections import Evaluation
from tests.evaluation.trees import measure

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

    def measure(self, predictions: np.ndarray, slices: bool) -> MeasuredModel:
        """With 20 slices, which hold a fifth of the users each, if wanted."""

        def sums(rows: np.ndarray) -> EvaluationSums:
            given = [dict(zip(NAMES, item[:, rows], strict=True)) for item in (predictions, self.labels)]
            score = np.log(predictions[:, rows]).sum(0)
            return measure(TASKS, self.user[rows], self.request[rows], *given, score=score)

        fifths = {(f"{by}", f"{value}"): self.fifth(by) == value for by in range(4 * slices) for value in range(5)}
        whole = sums(np.full(len(self.user), True))
        return MeasuredModel(whole, summarize(whole, 20), slices={key: sums(rows) for key, rows in fifths.items()})

    def fifth(self, by: int) -> np.ndarray:
        """(N,) of 0 to 4, by one of several columns."""
        return np.random.default_rng(by).permutation(self.user[-1] + 1)[self.user] % 5


def true_gain(noise: float, worlds: int = 12, users: int = 4000) -> float:
    """By how much the mean AUC of a model is higher than that of one with `NOISE`."""
    gains = []
    for seed in range(worlds):
        world = World(np.random.default_rng([7, seed]), users)
        for task, label in enumerate(world.labels):
            areas = [roc_auc_score(label, world.predictions(item)[task]) for item in (noise, NOISE)]
            gains.append(areas[0] - areas[1])
    return float(np.mean(gains))


def compared(
    noise: float, number: int, users: int, resamples: int, slices: bool = False, broken: bool = False
) -> Iterator[Verdict]:
    """Verdicts of that many challengers, each on other users, beside a champion with `NOISE`. broken: whether the
    challenger ranks one of the slices at random, beside a champion that is worse elsewhere."""
    for seed in range(number):
        world, both = World(np.random.default_rng([11, seed]), users), dict[str, np.ndarray]()
        for name, item in (("new", noise), ("old", 1.4 if broken else NOISE)):
            predictions, spoilt = world.predictions(item), np.flatnonzero(world.fifth(0) == 3)
            if broken and name == "new":
                predictions[:, spoilt] = predictions[:, world.random.permutation(spoilt)]
            both[name] = predictions
        models = {name: world.measure(item, slices) for name, item in both.items()}
        actual = compare_slices(models, "new", resamples)
        yield compare(models, "new", NAMES, Evaluation(resamples=resamples), actual).verdicts["old"]


def verdicts(*arguments: Any, **options: Any) -> Counter[str]:
    """How often each kind of verdict is given, and `only slices` hold a challenger back. arguments, options: of
    `compared`."""
    counts = Counter[str]()
    for judged in compared(*arguments, **options):
        counts[judged.kind] += 1
        failed = [guard.metric for guard in judged.guardrails if not guard.passed]
        counts["only slices"] += judged.kind == "blocked" and failed == ["slices"]
    return counts


def noise_of_gain(gain: float, of_noise: Callable[[float], float] = true_gain) -> float:
    """The noise of a model whose mean AUC is truly higher by that much, by bisection."""
    low, high = 0.0, NOISE
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if of_noise(middle) > gain else (low, middle)
    return (low + high) / 2
