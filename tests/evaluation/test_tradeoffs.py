"""Weights of tasks: a sweep against the metrics of each ranking, a choice that a guardrail bounds, and the command."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.metrics.ranking_metrics import RankedRequests, find_uninformative_requests, ndcg
from mmoe_rec.evaluation.prediction_files import columns_from_settings, load_predictions
from mmoe_rec.evaluation.summary import BootstrapMetrics
from mmoe_rec.evaluation.sums import MeasuredTask, PredictedRows
from mmoe_rec.evaluation.tradeoffs import WeightSweep, make_grid
from mmoe_rec.report.report_files import read_report
from tests.commands import exit_code
from tests.inference.small_model import WITHOUT_COMPARISONS, SmallModel

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
    predicted, label = (dict(zip(TASKS, item.T, strict=True)) for item in (1 / (1 + np.exp(-logit)), labels))
    tasks = tuple(MeasuredTask(name, "binary", 0.5) for name in TASKS)
    return PredictedRows(tasks, pa.array(request // 4), pa.array(request), None, predicted, label, logit.sum(1))


def sweep(given: PredictedRows, weights: list[tuple[float, ...]], resamples: int = 20) -> WeightSweep:
    return WeightSweep(given, TASKS, weights, resamples)


def test_values_are_the_ndcg_of_each_ranking_and_task() -> None:
    given, weights = rows(), make_grid([3.0, 7.0])
    assert weights[0] == (0.3, 0.7)
    assert len(weights) == 21  # the deployed ones are on the grid
    actual = sweep(given, weights)
    assert actual.values.shape == (21, 2)
    for number in (0, 4, 20):
        score = sum(
            weight * np.log(given.predictions[task]) for task, weight in zip(TASKS, weights[number], strict=True)
        )
        for place, task in enumerate(TASKS):
            request, gain = given.requests.to_numpy(), np.nan_to_num(given.labels[task])
            lists = RankedRequests.of(request, score, gain, request.max() + 1)
            ranked = ~np.any(list(find_uninformative_requests(lists).values()), axis=0)
            assert actual.values[number, place] == pytest.approx(ndcg(lists, 10)[ranked].mean(), rel=1e-9)


def test_the_front_is_what_no_other_ranking_beats() -> None:
    weights = make_grid([1.0, 1.0])
    actual = sweep(rows(), weights)
    for is_front, mine in zip(actual.find_pareto_front(), actual.values, strict=True):
        better = [theirs for theirs in actual.values if (theirs >= mine).all() and (theirs > mine).any()]
        assert is_front == (not better)
    for place in range(2):
        best = actual.values[:, place].argmax()
        assert actual.find_pareto_front()[best]
        assert weights[best][place] > 0.8


def test_the_goal_is_raised_while_others_lose_no_more_than_they_may() -> None:
    weights = make_grid([1.0, 1.0])
    actual = sweep(rows(), weights, 200)
    number = actual.choose("bought", {})
    assert weights[number][0] > 0.8
    assert actual.compare_with_deployed(number)["liked"].high < 0
    number = actual.choose("bought", {"liked": 0.03})
    assert 0.5 < weights[number][0] < 0.8
    separate = actual.compare_with_deployed(number)
    assert separate["liked"].low >= -0.03
    assert separate["bought"].value > 0
    # None gains without a loss, so the deployed weights stay.
    assert actual.choose("bought", {"liked": 0.0}) == 0


def test_users_without_labels_of_a_task_do_not_make_it_surer() -> None:
    given = rows()
    few = np.where(given.users.to_numpy() < 10, given.labels["liked"], np.nan)
    of_few = sweep(replace(given, labels=given.labels | {"liked": few}), [(0.5, 0.5), (1.0, 0.0)])
    separate = of_few.compare_with_deployed(1)
    assert separate["bought"].degrees_of_freedom > separate["liked"].degrees_of_freedom
    assert separate["liked"].degrees_of_freedom <= 9


def test_weights_of_any_number_of_tasks_sum_to_1() -> None:
    for tasks in range(2, 8):
        deployed = [1.0, *[0.5] * (tasks - 1)]
        weights = make_grid(deployed)
        assert weights[0] == pytest.approx(np.array(deployed) / sum(deployed))
        assert all(sum(weight) == pytest.approx(1) and min(weight) >= 0 for weight in weights)
        assert len({tuple(np.round(weight, 9)) for weight in weights}) == len(weights) <= 60
        for corner in np.eye(tasks):
            assert any(np.allclose(weight, corner) for weight in weights)
    for wrong in ([0.0, 0.0], [1.0, -0.5]):
        with pytest.raises(UserError, match="Set all to 0 or more, and at least one above 0"):
            make_grid(wrong)


def test_a_task_without_a_relevant_row_is_undefined() -> None:
    given = rows(2, users=30)
    unobserved = given.labels | {"liked": np.full(len(given.score), np.nan)}
    actual = sweep(replace(given, labels=unobserved), [(0.5, 0.5), (1.0, 0.0)])
    assert np.isnan(actual.values[:, 1]).all()
    assert not np.isnan(actual.values[:, 0]).any()
    assert actual.compare_with_deployed(1)["liked"].value is None
    assert actual.find_pareto_front().any()


# The command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    # The labels are random. With these features, other weights of the tasks gain on the test rows, too.
    return SmallModel(tmp_path_factory.mktemp("model"), features=WITHOUT_COMPARISONS)


def run(model: SmallModel, *words: str) -> int:
    return exit_code("tune-weights", "--config", model.config(), *words)


def test_the_choice_is_reported_on_test_rows(model: SmallModel, capsys: pytest.CaptureFixture) -> None:
    work = Path(model.settings.data.work_dir)
    for split in ("validation", "test"):
        words = ("--config", model.config(), "--model", model.folder, "--split", split)
        assert exit_code("evaluate", *words) == 0
    assert run(model, "--goal", "click", "--max-drop", "liked=100", "spent=100") == 0  # few users rule out little
    printed = capsys.readouterr().out
    report = read_report(work / "tradeoffs")
    assert report is not None
    (table,) = report.tables
    assert table.header == ["click : liked : spent", "click", "liked", "spent", ""]
    rows = {row[-1]: row for row in table.rows}
    before, after = (
        float(rows[mark][1]) for mark in ("the settings'", "chosen" if "chosen" in rows else "the settings'")
    )
    assert (after > before) == ("chosen" in rows) == report.headline.startswith("set tasks.click.score_weight to ")
    if "chosen" in rows:
        (changed,) = (
            sentence.text for sentence in report.sentences if sentence.text.startswith("click: NDCG@10 changes by ")
        )
        assert float(changed.split()[4]) == pytest.approx(after - before, abs=1e-4)
    assert report.headline in " ".join(printed.split())
    assert len(table.rows) + len(table.folded) == len(make_grid([1.0, 0.5, 0.2]))
    # None gains without a loss, so the weights of the settings stay.
    assert run(model, "--goal", "click", "--max-drop", "liked=0", "spent=0") == 0
    assert "no other weights improve click within the allowed losses" in " ".join(capsys.readouterr().out.split())


def test_weights_of_the_settings_rank_as_the_model(model: SmallModel) -> None:
    """One of the tasks is a regression."""
    assert exit_code("evaluate", "--config", model.config(), "--model", model.folder) == 0
    file, settings = Path(model.settings.data.work_dir) / "evaluation" / "predictions.parquet", model.settings
    given, tasks = load_predictions(columns_from_settings(settings), str(file), "--predictions"), list(settings.tasks)
    weights = make_grid([task.score_weight for task in settings.tasks.values()])[:1]
    (actual,) = WeightSweep(given, tasks, weights, 1).values
    assert np.isfinite(actual).sum() >= 2
    for task, value in zip(tasks, actual, strict=True):
        alone = replace(given, tasks=tuple(replace(item, weight=float(item.name == task)) for item in given.tasks))
        expected = BootstrapMetrics(alone.sum()).point_values["score", "ndcg_at_10"]  # of the model's own scores
        assert value == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_what_is_asked_for_wrongly_is_reported(
    model: SmallModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for words, sentence in (
        (("--goal", "loved"), "there is no task 'loved'; the settings have click, liked, spent"),
        (("--max-drop", "loved=0.1"), "there is no task 'loved'"),
        (("--max-drop", "liked"), "--max-drop takes TASK=LOSS, such as rebought=0.002, not 'liked'"),
        (("--max-drop", "liked=much"), "not 'liked=much'"),
        (("--goal", "liked", "--max-drop", "liked=0.1"), "'liked' is the goal, so it can't be in --max-drop"),
        (("--predictions", str(tmp_path / "nowhere"), "b"), "nowhere' does not exist. Set --predictions"),
    ):
        assert run(model, *words) == 2
        assert sentence in capsys.readouterr().err
