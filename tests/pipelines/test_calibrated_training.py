"""A training that calibrates: what it leaves, what it says, and that evaluation sees it."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score

from mmoe_rec.batches.batch import make_batch
from mmoe_rec.batches.encoded_rows import EncodedRows, Part
from mmoe_rec.evaluation.scoring import score_rows
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.jobs import evaluate
from mmoe_rec.jobs import train as steps
from mmoe_rec.model.score import UNCALIBRATED, Calibration
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.settings.load import load_settings
from mmoe_rec.tracking import registry
from tests.commands import run
from tests.pipelines.learnable_log import settings_tree, write_files

pytestmark = pytest.mark.thorough
BEST = 3  # of lists that are shorter than ten


@dataclass(frozen=True)
class World:
    """A log, its settings file and the calibrated model made of them."""

    folder: Path
    config: Path
    ranker: Ranker

    def sums(self, split: str, calibration: Calibration, part: Part | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Sums of predictions and of labels of each task's observed rows."""
        layout = self.ranker.layout
        rows = EncodedRows(FeatureFolder(self.folder / "work" / "features").split(split), layout, part=part)
        scored = score_rows(self.ranker.model, layout, rows, 1000, calibration=calibration)
        known = ~np.isnan(scored.labels)
        return np.where(known, scored.predictions, 0).sum(0), np.where(known, scored.labels, 0).sum(0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("calibrated")
    tree = settings_tree(folder)
    training = tree["training"] | {"epochs": 1, "calibration": "temperature"}
    features = tree["features"] | {"clicked": tree["features"]["clicked"] | {"pooling": "attention"}}
    serving = {"precision": "auto"}
    config = write_files(folder, training=training, features=features, serving=serving)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "BEST", BEST)
        run("train", "--config", str(config))
    return World(folder, config, Ranker.load(folder / "work" / "model"))


def test_selecting_rows_are_predicted_right_on_average(world: World) -> None:
    assert list(world.ranker.calibration.tasks) == ["click", "liked"]
    predicted, observed = world.sums("validation", world.ranker.calibration, Part.SELECTING)
    np.testing.assert_allclose(predicted, observed, rtol=1e-4)
    before, _ = world.sums("validation", UNCALIBRATED, Part.SELECTING)
    assert (np.abs(before / observed - 1) > 2e-4).all()
    uri = f"sqlite:///{world.folder / 'mlflow.db'}"
    registered = Ranker.load(registry.fetch_model("models:/learnable@champion", uri))
    assert registered.calibration == world.ranker.calibration


def test_evaluation_measures_calibrated_predictions(world: World) -> None:
    run("evaluate", "--config", str(world.config), "--model", "models:/learnable@champion")
    found = json.loads((world.folder / "work" / "evaluation" / "metrics.json").read_text())["tasks"]
    calibrated, plain = (np.divide(*world.sums("test", each)) for each in (world.ranker.calibration, UNCALIBRATED))
    for index, task in enumerate(("click", "liked")):
        assert found[task]["calibration"]["value"] == pytest.approx(calibrated[index], rel=1e-5)
        assert calibrated[index] != pytest.approx(plain[index], rel=1e-4)


def test_what_bf16_does_to_the_ranking_is_measured(world: World) -> None:
    ranker, folder = world.ranker, FeatureFolder(world.folder / "work" / "features").split("validation")
    rows = pa.concat_tables([pq.read_table(file) for file in sorted(folder.glob("*.parquet"))])
    every = next(EncodedRows(folder, ranker.layout).stream(len(rows)))[0]
    with torch.inference_mode():
        inputs, _ = ranker.model.side_by_side(make_batch(every.encoded, ranker.layout, every.labels, torchrec=False))
    found = []
    for way in ("blas", "bf16"):
        ranker.scorer.multiply_by(way)
        scored = ranker.scorer.score(inputs)
        known = ~np.isnan(every.labels)
        areas = [roc_auc_score(every.labels[known[:, t], t], scored.values[known[:, t], t]) for t in (0, 1)]
        weights = [task.score_weight for task in ranker.about.tasks]
        frame = pd.DataFrame({"request": rows["request"].to_numpy(), "score": scored.logs @ weights})
        lists = frame[frame.groupby("request")["score"].transform("size") > BEST]
        order = lists.sort_values("score", ascending=False, kind="stable").groupby("request").cumcount()
        found.append((areas, set(order.index[order < BEST])))
    ranker.scorer.multiply_by("blas")
    (before, first), (after, second) = found
    measured = ranker.about.in_bf16
    assert measured is not None
    assert measured.auc == pytest.approx(max(np.subtract(after, before), key=abs), abs=1e-5)
    assert len(first) > 100
    assert measured.top_10 == pytest.approx(len(first & second) / len(first), abs=1e-3)
    assert abs(measured.ndcg) < 0.01
    assert ranker.about.precision == "auto"


def test_a_task_with_too_few_rows_is_told_of(world: World, capsys: pytest.CaptureFixture) -> None:
    settings = load_settings(world.config, ["--training.calibration", "isotonic"])
    calibration = steps.calibrate(settings, FeatureFolder(world.folder / "work" / "features"), world.ranker.model)
    assert "liked" not in calibration.tasks
    told = [line for line in capsys.readouterr().err.splitlines() if "is not calibrated" in line]
    assert "task 'liked' is not calibrated" in told[-1]
    assert "isotonic needs 1,000" in told[-1]
