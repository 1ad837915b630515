"""Weights of tasks: chosen on validation rows, told of on test rows."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.commands import exit_code
from tests.inference.small_model import SmallModel


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return SmallModel(tmp_path_factory.mktemp("model"))


def run(model: SmallModel, *words: str) -> int:
    return exit_code("tune-weights", "--config", model.config(), *words)


def test_the_choice_is_told_on_test_rows(model: SmallModel, capsys: pytest.CaptureFixture) -> None:
    work = Path(model.settings.data.work)
    for split in ("validation", "test"):
        words = ("--config", model.config(), "--model", model.folder, "--split", split)
        assert exit_code("evaluate", *words) == 0
    assert run(model, "--goal", "click", "--keep", "liked=100", "spent=100") == 0  # few users rule out little
    printed = capsys.readouterr().out
    found = json.loads((work / "tradeoffs" / "tradeoffs.json").read_text())
    assert found["goal"] == "click"
    assert found["margins"] == {"liked": 100.0, "spent": 100.0}
    assert found["tasks"] == ["click", "liked", "spent"]
    before, after = (found["values"][number][0] for number in (0, found["chosen"]))
    assert found["apart"]["click"]["value"] == pytest.approx(after - before)
    assert "the settings'" in printed
    if found["chosen"]:
        assert "click: NDCG@10 changes by " in printed
        assert f"tasks.click.score_weight: {found['weights'][found['chosen']][0]:.4g}" in printed
    # By the weights of the settings, rows rank as the model ranks them; one of the tasks is a regression.
    rows = pd.read_parquet(work / "evaluation" / "predictions.parquet")
    least = {"click": 1e-38, "liked": 1e-38, "spent": 1e-6}
    weights = dict(zip(found["tasks"], found["weights"][0], strict=True))
    logs = sum(weight * np.log(rows[f"predicted_{task}"].clip(least[task])) for task, weight in weights.items())
    total = sum(task.score_weight for task in model.settings.tasks.values())
    np.testing.assert_allclose(total * logs, np.log(rows["score"]), rtol=1e-4, atol=1e-4)
    # None gains without a loss, so the weights of the settings stay.
    assert run(model, "--goal", "click", "--keep", "liked=0", "spent=0") == 0
    assert "no weights serve click better within the losses allowed" in capsys.readouterr().out


def test_what_is_asked_for_wrongly_is_told(model: SmallModel, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for words, sentence in (
        (("--goal", "loved"), "there is no task 'loved'; the settings have click, liked, spent"),
        (("--keep", "loved=0.1"), "there is no task 'loved'"),
        (("--keep", "liked"), "--keep takes TASK=LOSS, such as rebought=0.002; found 'liked'"),
        (("--keep", "liked=much"), "found 'liked=much'"),
        (("--goal", "liked", "--keep", "liked=0.1"), "'liked' is the goal, and can't be kept as well"),
        (("--predictions", str(tmp_path / "nowhere"), "b"), "nowhere' does not exist; set `--predictions`"),
    ):
        assert run(model, *words) == 2
        assert sentence in capsys.readouterr().err
