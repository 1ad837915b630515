"""A sweep of weights against the metrics of each ranking, and a choice that a guardrail bounds."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.metrics.lists import RankedLists, ndcg, ranks_nothing
from mmoe_rec.evaluation.sums import MeasuredTask, PredictedRows
from mmoe_rec.evaluation.tradeoffs import Sweep, make_grid

TASKS = ["bought", "liked"]


def rows(seed: int = 0, users: int = 300) -> PredictedRows:
    """Two tasks that want different rows first."""
    random = np.random.default_rng(seed)
    requests = 4 * users
    request = np.repeat(np.arange(requests), 8)
    logit = random.normal(-1, 1.5, size=(len(request), 2))
    logit[:, 1] -= 0.5 * logit[:, 0]
    labels = (random.random(logit.shape) < 1 / (1 + np.exp(-logit))).astype(float)
    labels[:, 1] = np.where(random.random(len(request)) < 0.3, np.nan, labels[:, 1])
    predicted, label = (dict(zip(TASKS, each.T, strict=True)) for each in (1 / (1 + np.exp(-logit)), labels))
    tasks = tuple(MeasuredTask(name, "binary", 0.5) for name in TASKS)
    return PredictedRows(tasks, pa.array(request // 4), pa.array(request), None, predicted, label, logit.sum(1))


def sweep(given: PredictedRows, weights: list[tuple[float, ...]], resamples: int = 20) -> Sweep:
    return Sweep(given, TASKS, weights, resamples)


def test_values_are_the_ndcg_of_each_ranking_and_task() -> None:
    given, weights = rows(), make_grid([3.0, 7.0])
    assert weights[0] == (0.3, 0.7)
    assert len(weights) == 21  # the deployed ones are on the grid
    found = sweep(given, weights)
    assert found.values.shape == (21, 2)
    for number in (0, 4, 20):
        score = sum(
            weight * np.log(given.predictions[task]) for task, weight in zip(TASKS, weights[number], strict=True)
        )
        for place, task in enumerate(TASKS):
            request, gain = given.requests.to_numpy(), np.nan_to_num(given.labels[task])
            lists = RankedLists.of(request, score, gain, request.max() + 1)
            ranked = ~np.any(list(ranks_nothing(lists).values()), axis=0)
            assert found.values[number, place] == pytest.approx(ndcg(lists, 10)[ranked].mean(), rel=1e-9)


def test_the_front_is_what_no_other_ranking_beats() -> None:
    weights = make_grid([1.0, 1.0])
    found = sweep(rows(), weights)
    for is_front, mine in zip(found.find_front(), found.values, strict=True):
        better = [its for its in found.values if (its >= mine).all() and (its > mine).any()]
        assert is_front == (not better)
    for place in range(2):
        best = found.values[:, place].argmax()
        assert found.find_front()[best]
        assert weights[best][place] > 0.8


def test_the_goal_is_raised_while_others_lose_no_more_than_they_may() -> None:
    weights = make_grid([1.0, 1.0])
    found = sweep(rows(), weights, 200)
    number = found.choose("bought", {})
    assert weights[number][0] > 0.8
    assert found.compare_with_first(number)["liked"].high < 0
    number = found.choose("bought", {"liked": 0.03})
    assert 0.5 < weights[number][0] < 0.8
    apart = found.compare_with_first(number)
    assert apart["liked"].low >= -0.03
    assert apart["bought"].value > 0
    # None gains without a loss, so the deployed weights stay.
    assert found.choose("bought", {"liked": 0.0}) == 0


def test_users_without_labels_of_a_task_do_not_make_it_surer() -> None:
    given = rows()
    few = np.where(given.users.to_numpy() < 10, given.labels["liked"], np.nan)
    of_few = sweep(replace(given, labels=given.labels | {"liked": few}), [(0.5, 0.5), (1.0, 0.0)])
    apart = of_few.compare_with_first(1)
    assert apart["bought"].freedom > apart["liked"].freedom
    assert apart["liked"].freedom <= 9


def test_weights_of_any_number_of_tasks_sum_to_1() -> None:
    for tasks in range(2, 8):
        deployed = [1.0, *[0.5] * (tasks - 1)]
        weights = make_grid(deployed)
        assert weights[0] == pytest.approx(np.array(deployed) / sum(deployed))
        assert all(sum(each) == pytest.approx(1) and min(each) >= 0 for each in weights)
        assert len({tuple(np.round(each, 9)) for each in weights}) == len(weights) <= 60
        for corner in np.eye(tasks):
            assert any(np.allclose(each, corner) for each in weights)
    for wrong in ([0.0, 0.0], [1.0, -0.5]):
        with pytest.raises(UserError, match="trade-offs need some above 0 and none below"):
            make_grid(wrong)


def test_a_task_without_a_relevant_row_is_undefined() -> None:
    given = rows(2, users=30)
    unobserved = given.labels | {"liked": np.full(len(given.score), np.nan)}
    found = sweep(replace(given, labels=unobserved), [(0.5, 0.5), (1.0, 0.0)])
    assert np.isnan(found.values[:, 1]).all()
    assert not np.isnan(found.values[:, 0]).any()
    assert found.compare_with_first(1)["liked"].value is None
    assert found.find_front().any()
