"""What other weights of the tasks in the score would give each task: a front of rankings none of which is best for all.

The score is the sum of weight x log prediction, so only the ratios of weights matter: they sum to 1 here. How well a
ranking serves a task is the NDCG of its rows, whose relevance is the label of that task alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.intervals import Difference, Interval, Values, effective_sample_size, find_difference, resample
from mmoe_rec.evaluation.metrics.metric import ratio
from mmoe_rec.evaluation.metrics.ranking import RankedLists, ndcg, ranks_nothing
from mmoe_rec.evaluation.sums import units_of
from mmoe_rec.model.score import SMALLEST_VALUE

if TYPE_CHECKING:
    from mmoe_rec.evaluation.scoring import ScoredRows

CUTOFF = 10
_DENOMINATORS = {1: 1, 2: 20, 3: 8, 4: 5}
"""Number of tasks -> steps from no weight to all of it; of more tasks, weights are drawn."""
_DRAWN = 60
_SMALLEST_PROBABILITY = 1e-38
Weights = tuple[float, ...]


def log_predictions(scored: ScoredRows) -> np.ndarray:
    """(N, T) float64, of which the weighted sum is the score."""
    is_binary = [task.kind == "binary" for task in scored.layout.tasks]
    least = np.where(is_binary, _SMALLEST_PROBABILITY, SMALLEST_VALUE)
    return np.log(np.maximum(scored.predictions.astype(np.float64), least))


class Sweep:
    """NDCG of each task by each ranking, in resamples of users: `values`, P of T; NaN where no request ranks anything.

    scored: of a model with T tasks; weights: P of T, which sum to 1.
    """

    def __init__(self, scored: ScoredRows, weights: Sequence[Weights], resamples: int) -> None:
        self.tasks, self.weights = [task.name for task in scored.layout.tasks], list(weights)
        logs = log_predictions(scored)
        gains = np.maximum(np.nan_to_num(scored.labels.astype(np.float64), nan=0.0), 0.0)
        request = scored.requests.dictionary_encode().indices.to_numpy().astype(np.int64)
        unit, keys = units_of(scored.users)
        requests, units = int(request.max()) + 1, len(keys)
        unit_of_request = np.zeros(requests, np.int64)
        unit_of_request[request] = unit
        sums = np.zeros((len(weights), len(self.tasks), units))
        counts = np.zeros((len(self.tasks), units))
        for number, each in enumerate(weights):
            order = RankedLists.of(request, logs @ np.array(each), np.zeros(len(request)), requests)
            for task in range(len(self.tasks)):
                mine = replace(order, gain=gains[order.row, task])
                ranked = ~np.any(list(ranks_nothing(mine).values()), axis=0)
                counts[task] = np.bincount(unit_of_request[ranked], minlength=units)
                found = np.where(ranked, ndcg(mine, CUTOFF), 0.0)
                sums[number, task] = np.bincount(unit_of_request, found, units)
        rows = effective_sample_size(np.bincount(unit, minlength=units).astype(np.float64))
        self.effective = [min(rows, effective_sample_size(each)) for each in counts]

        def at(drawn: np.ndarray) -> Values:
            found, places = ratio(sums @ drawn, counts @ drawn), np.ndindex(sums.shape[:2])
            return {place: found[place] for place in places}

        resampled = resample(at, units, resamples)
        self.values = [[resampled[number, task] for task in range(len(self.tasks))] for number in range(len(weights))]

    def compare_with_first(self, number: int) -> dict[str, Difference]:
        """The difference of each task's NDCG@10 by some weights from that by the first ones."""
        each = zip(self.tasks, self.values[number], self.values[0], self.effective, strict=True)
        return {task: find_difference(mine, first, effective) for task, mine, first, effective in each}


def make_grid(tasks: int, deployed: Weights) -> list[Weights]:
    """Weights that sum to 1: the deployed ones, then all of a grid, or some that are drawn where that is large."""
    if (steps := _DENOMINATORS.get(tasks)) is None:
        drawn = np.random.default_rng(0).dirichlet(np.ones(tasks), _DRAWN)
        others = [tuple(float(x) for x in each) for each in [*np.eye(tasks), *drawn]]
    else:
        parts = itertools.product(range(steps + 1), repeat=tasks)
        others = [tuple(x / steps for x in each) for each in parts if sum(each) == steps]
    return [deployed, *(each for each in others if not np.allclose(each, deployed))]


def normalise(weights: Sequence[float]) -> Weights:
    """Weights that sum to 1. Raises UserError where none is above 0, or one is below."""
    total = sum(weights)
    if total <= 0 or min(weights) < 0:
        raise UserError(f"weights of tasks in a score are {list(weights)}; trade-offs need some above 0 and none below")
    return tuple(each / total for each in weights)


@dataclass(frozen=True)
class WeightsRecord:
    """What a ranking gives. weights: of tasks; values: task -> NDCG@10; dominated_by: the number of another record that
    is better for one task and worse for none, None on the front."""

    weights: dict[str, float]
    values: dict[str, Interval]
    dominated_by: int | None


@dataclass(frozen=True)
class WeightsChoice:
    """Weights for a goal. before, weights: task -> weight, which sum to 1; apart: task -> difference of NDCG on the
    test rows; goal, margins: as they were given; records: of the sweep over the test rows."""

    goal: str
    margins: dict[str, float]
    before: dict[str, float]
    weights: dict[str, float]
    apart: dict[str, Difference]
    records: list[WeightsRecord]


def find_front(sweep: Sweep) -> list[WeightsRecord]:
    """A record for each weights, in their order."""
    values = np.array([[each.value for each in of] for of in sweep.values])
    records = []
    for weights, mine, of in zip(sweep.weights, values, sweep.values, strict=True):
        known = ~np.isnan(mine)
        is_better = (values[:, known] >= mine[known]).all(1) & (values[:, known] > mine[known]).any(1)
        records.append(
            WeightsRecord(
                dict(zip(sweep.tasks, weights, strict=True)),
                {
                    task: each.interval(effective, is_share=True)
                    for task, each, effective in zip(sweep.tasks, of, sweep.effective, strict=True)
                },
                int(is_better.argmax()) if is_better.any() else None,
            )
        )
    return records


def choose_weights(sweep: Sweep, goal: str, margins: Mapping[str, float]) -> int:
    """The number of the weights that serve a task best while no other one loses more than its margin, beside the first.

    margins: task -> NDCG@10 that it may lose: the interval of its loss must not reach further.
    """
    place, best = sweep.tasks.index(goal), 0
    for number in range(1, len(sweep.weights)):
        if sweep.values[number][place].value > sweep.values[best][place].value:
            lows = {task: each.low for task, each in sweep.compare_with_first(number).items()}
            if all((low := lows[task]) is not None and low >= -margin for task, margin in margins.items()):
                best = number
    return best
