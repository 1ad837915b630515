"""Weights of tasks: chosen on validation rows, told of on test rows."""

import json
from pathlib import Path

import numpy as np
import pytest

from mmoe_rec.batches.encoded_rows import EncodedRows
from mmoe_rec.evaluation.scoring import score_rows
from mmoe_rec.evaluation.tradeoffs import WeightsChoice, log_predictions
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.report.tables import show_choice
from tests.commands import exit_code
from tests.inference.small_model import SmallModel


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return SmallModel(tmp_path_factory.mktemp("model"))


def run(model: SmallModel, *words: str) -> int:
    return exit_code("tune-weights", "--config", model.config(), "--model", model.folder, *words)


def test_logs_are_those_of_the_served_score(model: SmallModel) -> None:
    """By the deployed weights, the sweep ranks as the model does; one of the tasks is a regression."""
    ranker = Ranker.load(model.folder)
    scored = score_rows(ranker.model, ranker.layout, EncodedRows(model.prepared.split("test"), ranker.layout), 64)
    weights = np.array([task.score_weight for task in ranker.layout.tasks])
    np.testing.assert_allclose(log_predictions(scored) @ weights, scored.score, rtol=1e-4, atol=1e-4)


def test_the_choice_is_told_on_test_rows(model: SmallModel, capsys: pytest.CaptureFixture) -> None:
    assert run(model, "--goal", "click", "--keep", "liked=100", "spent=100") == 0  # few users rule out little
    printed = capsys.readouterr().out
    found = json.loads((Path(model.settings.data.work) / "tradeoffs" / "tradeoffs.json").read_text())
    assert found["goal"] == "click"
    assert found["margins"] == {"liked": 100.0, "spent": 100.0}
    by_weights = {tuple(each["weights"].values()): each["values"]["click"]["value"] for each in found["records"]}
    before, after = (by_weights[tuple(found[name].values())] for name in ("before", "weights"))
    assert found["apart"]["click"]["value"] == pytest.approx(after - before)
    assert "click: NDCG@10 changes by " in printed
    assert "the model's" in printed
    if found["before"] != found["weights"]:
        assert f"tasks.click.score_weight: {found['weights']['click']:.4g}" in printed
    same = WeightsChoice("click", {"liked": 0.0}, found["before"], found["before"], {}, [])
    assert list(show_choice(same))[1:] == [
        "no weights serve click better without a loss of liked by 0 or more: keep those of the model"
    ]


def test_what_is_asked_for_wrongly_is_told(model: SmallModel, capsys: pytest.CaptureFixture) -> None:
    for words, sentence in (
        (("--goal", "loved"), "there is no task 'loved'; the settings have click, liked, spent"),
        (("--keep", "loved=0.1"), "there is no task 'loved'"),
        (("--keep", "liked"), "--keep takes TASK=LOSS, such as rebought=0.002; found 'liked'"),
        (("--keep", "liked=much"), "found 'liked=much'"),
        (("--goal", "liked", "--keep", "liked=0.1"), "'liked' is the goal, and can't be kept as well"),
    ):
        assert run(model, *words) == 2
        assert sentence in capsys.readouterr().err
