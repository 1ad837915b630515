from pathlib import Path

import pytest

from mmoe_rec.inference.ranker import Ranker
from tests.inference.small_model import SmallModel


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return SmallModel(Path(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="session")
def ranker(small: SmallModel) -> Ranker:
    return Ranker.load(small.folder)
