"""`evaluate` on validation rows, the rows that it writes, and what the page says of placement."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from tests.commands import read_metrics, refuse, run
from tests.pipelines.short_trainings import World
from tests.report.parsed import Page

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World.of(tmp_path_factory.mktemp("rows"))
    world.train()
    return world


def evaluated(world: World, *words: object) -> str:
    """The words of the page of an evaluation."""
    run("evaluate", "--config", world.folder / "first.yaml", "--model", "models:/learnable@champion", *words)
    out = world.folder / "work" / ("evaluation_validation" if "validation" in words else "evaluation")
    return " ".join(Page((out / "report.html").read_text(encoding="utf-8")).words.split())


@pytest.mark.parametrize("split", ["test", "validation"])
def test_the_rows_of_a_split_with_their_predictions(
    world: World, split: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Beside scikit-learn, and beside what `metrics` makes of the rows."""
    evaluated(world, "--split", split, "--predictions", str(tmp_path / "rows"))
    assert f"predictions: {tmp_path / 'rows' / 'rows.parquet'}" in capsys.readouterr().out
    mine = read_metrics(world.folder / "work" / ("evaluation" if split == "test" else "evaluation_validation"))
    rows = pd.read_parquet(tmp_path / "rows")
    encoded = pd.read_parquet(world.folder / "work" / "features" / "encoded" / split)
    assert len(rows) == len(encoded) == mine["rows"]
    for task in ("click", "liked"):
        np.testing.assert_array_equal(rows[f"label_{task}"], encoded[f"label.{task}"].astype(float))
        known = rows.dropna(subset=f"label_{task}")
        area = roc_auc_score(known[f"label_{task}"], known[f"predicted_{task}"])
        assert mine["tasks"][task]["auc"]["value"] == pytest.approx(area, abs=1e-9)
    words = ["--config", str(world.folder / "first.yaml"), "--predictions", str(tmp_path / "rows")]
    run("metrics", *words, "--out", str(tmp_path / "out"))  # though the log calls its candidates otherwise
    theirs = read_metrics(tmp_path / "out")
    for task in ("click", "liked"):
        for name in ("auc", "gauc_request", "logloss", "ndcg_at_5"):
            assert theirs["tasks"][task][name] == pytest.approx(mine["tasks"][task][name], abs=1e-6)
    assert theirs["score"]["ndcg_at_5"]["value"] == pytest.approx(mine["score"]["ndcg_at_5"]["value"], abs=1e-6)


def test_validation_rows_have_charts_of_their_own(world: World) -> None:
    words = evaluated(world)
    assert "What the model has learnt of where candidates are shown" in words
    assert "odds of click" in words
    before = world_metrics(world)
    words = evaluated(world, "--split", "validation")
    assert "on validation rows" in words
    assert "from 2024-03-06 00:00 UTC to 2024-03-08 00:00 UTC" in words
    assert "it looks better on them than on others" in words
    after = world_metrics(world)
    assert {name for name in after if name.startswith("test/")} == {name for name in before if name.startswith("test/")}
    mine = read_metrics(world.folder / "work" / "evaluation_validation")["tasks"]["click"]["auc"]
    assert after["validation_rows/click.auc"] == pytest.approx(mine["value"])
    assert after["validation_rows/intervals/click.auc.low"] == pytest.approx(mine["low"])


def world_metrics(world: World) -> dict[str, float]:
    holder = world.champion()
    return world.client.get_run(holder.run_id).data.metrics


def test_a_folder_of_other_files_is_left_alone(world: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "mine.parquet").write_text("x")
    for folder, told in (
        (tmp_path, "holds other files, such as 'mine.parquet'"),
        (tmp_path / "mine.parquet", "is a f"),
    ):
        words = ["--config", world.folder / "first.yaml", "--model", "models:/learnable@champion"]
        assert told in refuse(capsys, "evaluate", *words, "--predictions", folder)
    assert [each.name for each in tmp_path.iterdir()] == ["mine.parquet"]
