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
import pyarrow as pa

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.intervals import (
    Difference,
    Interval,
    Resampled,
    Values,
    effective_sample_size,
    find_difference,
    find_interval,
    resample,
)
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


@dataclass(frozen=True)
class Lists:
    """N rows of requests. users, requests: (N,); logs: (N, T) log predictions; labels: (N, T), NaN where unobserved."""

    users: pa.Array
    requests: pa.Array
    logs: np.ndarray
    labels: np.ndarray


def lists_of(scored: ScoredRows) -> Lists:
    """Rows of a model as a sweep reads them."""
    kinds = [task.kind for task in scored.layout.tasks]
    least = np.where([kind == "binary" for kind in kinds], _SMALLEST_PROBABILITY, SMALLEST_VALUE)
    logs = np.log(np.maximum(scored.predictions.astype(np.float64), least))
    return Lists(scored.users, scored.requests, logs, scored.labels)


class Sweep:
    """NDCG of each task by the ranking of each weights, per user. weights: P of T, which sum to 1."""

    def __init__(self, tasks: Sequence[str], lists: Lists, weights: Sequence[Weights]) -> None:
        self.tasks, self.weights = list(tasks), list(weights)
        request = lists.requests.dictionary_encode().indices.to_numpy().astype(np.int64)
        units, self.units = units_of(lists.users)
        requests = int(request.max()) + 1
        unit_of_request = np.zeros(requests, np.int64)
        unit_of_request[request] = units
        gains = np.maximum(np.nan_to_num(lists.labels, nan=0.0), 0.0)
        self._sums = np.zeros((len(weights), len(tasks), self.units))
        self._counts = np.zeros((len(tasks), self.units))
        rows = np.bincount(units, minlength=self.units).astype(np.float64)
        by_rows = effective_sample_size(rows)
        ranked: list[np.ndarray] = []
        for number, each in enumerate(weights):
            order = RankedLists.of(request, lists.logs @ np.array(each), np.zeros(len(request)), requests)
            for task in range(len(tasks)):
                mine = replace(order, gain=gains[order.row, task])
                if number == 0:
                    ranked.append(~np.any(list(ranks_nothing(mine).values()), axis=0))
                    self._counts[task] = np.bincount(unit_of_request[ranked[task]], minlength=self.units)
                found = np.where(ranked[task], ndcg(mine, CUTOFF), 0.0)
                self._sums[number, task] = np.bincount(unit_of_request, found, self.units)
        self.effective = [min(by_rows, effective_sample_size(counts)) for counts in self._counts]

    def resampled(self, resamples: int, seed: int = 0) -> list[list[Resampled]]:
        """P of T, in resamples of the users; NaN where no request ranks anything for a task."""

        def at(counts: np.ndarray) -> Values:
            found = _ratio(self._sums @ counts, self._counts @ counts)
            return {
                (str(p), task): each for p, of in enumerate(found) for task, each in zip(self.tasks, of, strict=True)
            }

        found = resample({"": at}, self.units, resamples, seed)[""]
        return [[found[str(p), task] for task in self.tasks] for p in range(len(self.weights))]


def make_grid(tasks: int, deployed: Weights, seed: int = 0) -> list[Weights]:
    """Weights that sum to 1: the deployed ones first, then all of a grid, or some that are drawn where that is
    large."""
    if (steps := _DENOMINATORS.get(tasks)) is None:
        drawn = np.random.default_rng(seed).dirichlet(np.ones(tasks), _DRAWN)
        others = [tuple(float(x) for x in each) for each in [*np.eye(tasks), *drawn]]
    else:
        parts = itertools.product(range(steps + 1), repeat=tasks)
        others = [tuple(x / steps for x in each) for each in parts if sum(each) == steps]
    return [deployed, *(each for each in others if not np.allclose(each, deployed))]


def normalise(weights: Sequence[float]) -> Weights:
    """Weights that sum to 1. Raises UserError where none is above 0, or one is below."""
    total = sum(weights)
    if total <= 0 or min(weights) < 0:
        raise UserError(
            f"weights of tasks in the score are {list(weights)}; trade-offs need some above 0 and none below"
        )
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

    @property
    def changes(self) -> bool:
        """Whether other weights were chosen than those that the model has."""
        return self.before != self.weights


def find_front(sweep: Sweep, resamples: int, seed: int = 0) -> list[WeightsRecord]:
    """A record for each weights, in their order."""
    found = sweep.resampled(resamples, seed)
    once = np.array([[each.value for each in of] for of in found])
    records = []
    for number, each in enumerate(sweep.weights):
        values = {
            task: find_interval(of.value, of.redrawn, sweep.units)
            for task, of in zip(sweep.tasks, found[number], strict=True)
        }
        records.append(WeightsRecord(dict(zip(sweep.tasks, each, strict=True)), values, _dominated_by(number, once)))
    return records


def compare_with_first(sweep: Sweep, number: int, resamples: int, seed: int = 0) -> dict[str, Difference]:
    """By how much each task's NDCG@10 by some weights differs from that by the first ones."""
    found = sweep.resampled(resamples, seed)
    return _apart(sweep, found[number], found[0])


def choose_weights(sweep: Sweep, goal: str, margins: Mapping[str, float], resamples: int, seed: int = 0) -> int:
    """The number of the weights that serve a task best while no other one loses more than its margin, beside the first.

    margins: task -> NDCG@10 that it may lose: the interval of its loss must not reach further.
    """
    found = sweep.resampled(resamples, seed)
    place, best = sweep.tasks.index(goal), 0
    for number in range(1, len(sweep.weights)):
        if found[number][place].value > found[best][place].value:
            apart = _apart(sweep, found[number], found[0])
            best = number if all(_at_least(apart[task], -margin) for task, margin in margins.items()) else best
    return best


def _apart(sweep: Sweep, mine: Sequence[Resampled], first: Sequence[Resampled]) -> dict[str, Difference]:
    return {
        task: find_difference(each, its, effective)
        for task, each, its, effective in zip(sweep.tasks, mine, first, sweep.effective, strict=True)
    }


def _at_least(apart: Difference, least: float) -> bool:
    return apart.low is not None and apart.low >= least


def _dominated_by(number: int, values: np.ndarray) -> int | None:
    mine = values[number]
    known = ~np.isnan(mine)
    for other, its in enumerate(values):
        if (its[known] >= mine[known]).all() and (its[known] > mine[known]).any():
            return other
    return None


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=np.broadcast_to(counts > 0, sums.shape))
