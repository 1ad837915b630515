"""Weights of tasks: chosen on validation rows, told of on test rows."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmoe_rec.evaluation.prediction_files import columns_of_settings, open_predictions
from mmoe_rec.evaluation.summary import UserMetrics
from mmoe_rec.evaluation.tradeoffs import Sweep, make_grid
from mmoe_rec.report.report_files import read_report
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
    report = read_report(work / "tradeoffs")
    assert report is not None
    (table,) = report.tables
    assert table.heads == ["click : liked : spent", "click", "liked", "spent", ""]
    rows = {row[-1]: row for row in table.rows}
    before, after = (
        float(rows[mark][1]) for mark in ("the settings'", "chosen" if "chosen" in rows else "the settings'")
    )
    assert (after > before) == ("chosen" in rows) == report.headline.startswith("set tasks.click.score_weight to ")
    if "chosen" in rows:
        (changed,) = (each.text for each in report.sentences if each.text.startswith("click: NDCG@10 changes by "))
        assert float(changed.split()[4]) == pytest.approx(after - before, abs=1e-4)
    assert report.headline in " ".join(printed.split())
    assert len(table.rows) + len(table.more) == len(make_grid([1.0, 0.5, 0.2]))
    # None gains without a loss, so the weights of the settings stay.
    assert run(model, "--goal", "click", "--keep", "liked=0", "spent=0") == 0
    assert "no weights serve click better within the losses allowed" in " ".join(capsys.readouterr().out.split())


def test_weights_of_the_settings_rank_as_the_model(model: SmallModel) -> None:
    """One of the tasks is a regression."""
    words = ("--config", model.config(), "--model", model.folder)
    assert exit_code("evaluate", *words) == 0
    file, settings = Path(model.settings.data.work) / "evaluation" / "predictions.parquet", model.settings
    rows, tasks = open_predictions(columns_of_settings(settings), str(file), "--predictions"), list(settings.tasks)
    weights = make_grid([task.score_weight for task in settings.tasks.values()])[:1]
    (found,) = Sweep(rows, tasks, weights, 1).values
    assert np.isfinite(found).sum() >= 2
    for task, value in zip(tasks, found, strict=True):
        alone = replace(rows, tasks=tuple(replace(each, weight=float(each.name == task)) for each in rows.tasks))
        expected = UserMetrics(alone.sum()).once["score", "ndcg_at_10"]  # of the model's own scores
        assert value == pytest.approx(expected, abs=1e-9, nan_ok=True)


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
