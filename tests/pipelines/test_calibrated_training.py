"""A training that calibrates: what it leaves, what it says, and that evaluation sees it."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mmoe_rec.batches.encoded_rows import EncodedRows, Part
from mmoe_rec.evaluation.scoring import score_rows
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.model.score import UNCALIBRATED, Calibration
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.tracking import registry
from tests.commands import run
from tests.pipelines.learnable_log import settings_tree, write_files

pytestmark = pytest.mark.thorough


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
    config = write_files(folder, training=training, features=features)
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
