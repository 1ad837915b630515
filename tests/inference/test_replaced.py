"""A model whose files are replaced while it is used, or while it is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.inference import ranker as rankers
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.jobs import score
from tests.inference.other_weights import other_weights
from tests.inference.small_model import CONTEXT, ITEMS, USER, SmallModel


@pytest.fixture
def folder(small: SmallModel, tmp_path: Path) -> Path:
    """A model that a test may replace."""
    shutil.copytree(small.folder, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def other(folder: Path, tmp_path: Path) -> Path:
    """Another model of the same shapes."""
    return other_weights(folder, tmp_path / "other", 0.5, 0.9)


def scores(ranker: Ranker) -> list[float]:
    return ranker.rank({"user": USER}, CONTEXT, {"item": ITEMS}).scores


def test_a_loaded_model_stays_what_it_is_when_another_is_written_over_it(folder: Path, other: Path) -> None:
    ranker = Ranker.load(folder)
    before = scores(ranker)
    assert scores(Ranker.load(other)) != before
    for file in other.glob("*.*"):
        (folder / file.name).write_bytes(file.read_bytes())  # in place, as `cp` does
    assert scores(ranker) == before
    (folder / "weights.safetensors").write_bytes(b"")
    assert scores(ranker) == before


def test_a_model_that_is_replaced_while_it_is_loaded_is_refused(
    folder: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = rankers.read_calibration

    def replaced(path: Path) -> object:
        shutil.rmtree(folder)
        shutil.copytree(other, folder)
        return read(path)

    monkeypatch.setattr(rankers, "read_calibration", replaced)
    with pytest.raises(UserError, match=f"another model took the place of the one in '{folder}' while it was loaded"):
        Ranker.load(folder)


def test_rows_are_not_scored_by_a_model_that_came_later(
    small: SmallModel, folder: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version that stands beside each row is that of the model that scored it."""
    job = score._Scoring._job

    def replaced(self: score._Scoring, *arguments: object) -> score.ScoreJob:
        shutil.rmtree(folder)
        shutil.copytree(other, folder)
        score.forget_ranker()
        return job(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(score._Scoring, "_job", replaced)
    with pytest.raises(UserError, match=r"another model \(version .*\) took the place of the one in"):
        score.score_log(folder, small.settings.data.log, tmp_path / "out", "tables")
    assert not (tmp_path / "out").exists()
