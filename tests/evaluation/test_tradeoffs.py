"""A sweep of weights against the metrics of each ranking, and a choice that a guardrail bounds."""

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.intervals import UNDEFINED
from mmoe_rec.evaluation.scoring import ScoredRows
from mmoe_rec.evaluation.summary import summarise
from mmoe_rec.evaluation.sums import MeasuredTask, measure
from mmoe_rec.evaluation.tradeoffs import Sweep, choose_weights, find_front, make_grid, normalise
from mmoe_rec.features.layout import Layout, TaskOutput

TASKS = ["bought", "liked"]


def rows(seed: int = 0, users: int = 300) -> ScoredRows:
    """Two tasks that want different rows first."""
    random = np.random.default_rng(seed)
    requests = 4 * users
    request = np.repeat(np.arange(requests), 8)
    logit = random.normal(-1, 1.5, size=(len(request), 2))
    logit[:, 1] -= 0.5 * logit[:, 0]
    labels = (random.random(logit.shape) < 1 / (1 + np.exp(-logit))).astype(float)
    labels[:, 1] = np.where(random.random(len(request)) < 0.3, np.nan, labels[:, 1])
    layout: Any = Layout((), (), (), tuple(TaskOutput(name, "binary") for name in TASKS))
    ids, predictions = (pa.array(request // 4), pa.array(request), None), 1 / (1 + np.exp(-logit))
    return ScoredRows(layout, *ids, predictions, labels, predictions.sum(1), None, {}, dict.fromkeys(TASKS, 1.0))


def test_values_are_the_ndcg_of_each_ranking_and_task() -> None:
    given, weights = rows(), make_grid(2, (0.3, 0.7))
    assert weights[0] == (0.3, 0.7)
    assert len(weights) == 21  # the deployed ones are on the grid
    found = find_front(Sweep(given, weights, 100))
    predicted, labels = (dict(zip(TASKS, each.T, strict=True)) for each in (given.predictions, given.labels))
    for number in (0, 4, 20):
        for task in TASKS:
            measured = [MeasuredTask(name, "binary", float(name == task)) for name in TASKS]
            score = np.log(given.predictions) @ np.array(weights[number])
            summary = summarise(measure(measured, given.users, given.requests, predicted, labels, score=score), 100)
            expected = summary.score.metrics["ndcg_at_10"]
            value = found[number].values[task]
            assert asdict(value) == pytest.approx(asdict(expected), rel=1e-9)
        assert found[number].weights == dict(zip(TASKS, weights[number], strict=True))


def test_users_without_labels_of_a_task_do_not_make_it_surer() -> None:
    given = rows()
    known = np.column_stack([np.ones(len(given.labels), bool), given.users.to_numpy() < 10])
    sweep = Sweep(replace(given, labels=np.where(known, given.labels, np.nan)), [(0.5, 0.5)], 1)
    assert sweep.effective[0] > 200
    assert sweep.effective[1] <= 10


def test_the_front_is_what_no_other_ranking_beats() -> None:
    found = find_front(Sweep(rows(), make_grid(2, (0.5, 0.5)), 20))
    points = [[each.values[task].value for task in TASKS] for each in found]
    for each, mine in zip(found, points, strict=True):
        better = [its for its in points if its[0] >= mine[0] and its[1] >= mine[1] and its != mine]
        assert (each.dominated_by is not None) == bool(better)
        if each.dominated_by is not None:
            assert points[each.dominated_by] in better
    only = {name: max(range(len(points)), key=lambda number: points[number][place]) for place, name in enumerate(TASKS)}
    assert found[only["bought"]].weights["bought"] > 0.8
    assert found[only["liked"]].weights["liked"] > 0.8


def test_the_goal_is_raised_while_others_lose_no_more_than_they_may() -> None:
    sweep = Sweep(rows(), make_grid(2, (0.5, 0.5)), 200)
    number = choose_weights(sweep, "bought", {})
    assert sweep.weights[number][0] > 0.8
    assert sweep.compare_with_first(number)["liked"].high < 0
    number = choose_weights(sweep, "bought", {"liked": 0.03})
    assert 0.5 < sweep.weights[number][0] < 0.8
    apart = sweep.compare_with_first(number)
    assert apart["liked"].low >= -0.03
    assert apart["bought"].value > 0
    # None gains without a loss, so the deployed weights stay.
    assert choose_weights(sweep, "bought", {"liked": 0.0}) == 0


def test_weights_of_any_number_of_tasks_sum_to_1() -> None:
    for tasks in range(1, 8):
        deployed = normalise([1.0, *[0.5] * (tasks - 1)])
        weights = make_grid(tasks, deployed)
        assert weights[0] == deployed
        assert all(sum(each) == pytest.approx(1) and min(each) >= 0 for each in weights)
        assert len({tuple(np.round(each, 9)) for each in weights}) == len(weights) <= 70
        for corner in np.eye(tasks):
            assert any(np.allclose(each, corner) for each in weights)
    for wrong in ([0.0, 0.0], [1.0, -0.5]):
        with pytest.raises(UserError, match="trade-offs need some above 0 and none below"):
            normalise(wrong)


def test_many_users_are_redrawn_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    given, weights = rows(1, users=600), [(0.5, 0.5), (1.0, 0.0)]
    alone = find_front(Sweep(given, weights, 400))
    monkeypatch.setattr("mmoe_rec.evaluation.sums.MOST_UNITS", 128)
    together = find_front(Sweep(given, weights, 400))
    for one, other in zip(alone, together, strict=True):
        for task in TASKS:
            assert other.values[task].value == pytest.approx(one.values[task].value, rel=1e-9)
            widths = [each.values[task].high - each.values[task].low for each in (one, other)]
            assert widths[1] == pytest.approx(widths[0], rel=0.3)


def test_a_task_without_a_relevant_row_is_undefined() -> None:
    given = rows(2, users=30)
    given.labels[:, 1] = np.nan
    found = find_front(Sweep(given, [(0.5, 0.5), (1.0, 0.0)], 20))
    assert found[0].values["liked"] == UNDEFINED
    assert found[0].values["bought"].value is not None
