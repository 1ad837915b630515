from pathlib import Path

import pytest

from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.model.score import Calibration, TaskCalibration
from tests.inference.small_model import SmallModel


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return SmallModel(Path(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="session")
def ranker(small: SmallModel) -> Ranker:
    return Ranker.load(small.folder)


@pytest.fixture(scope="session")
def calibrated(small: SmallModel, tmp_path_factory: pytest.TempPathFactory) -> Ranker:
    """The same model with a calibration by a line and one by pieces."""
    linear, pieces = TaskCalibration.linear(0.6, -1.5), TaskCalibration((-0.2, 0.1, 0.5), (-2.0, -1.9, 1.0), 2.0)
    folder = tmp_path_factory.mktemp("calibrated") / "model"
    small.write(folder, Calibration({"click": linear, "liked": pieces}))
    return Ranker.load(folder)
