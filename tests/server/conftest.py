from pathlib import Path

import pytest

from mmoe_rec.server.app import Application
from mmoe_rec.server.limits import Limits
from mmoe_rec.server.models import Models, Source
from tests.inference.small_model import SmallModel


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return SmallModel(Path(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="session")
def models(small: SmallModel) -> Models:
    models = Models(Limits())
    models.load(Source(small.folder, "models:/small/7", "a_run"))
    return models


@pytest.fixture(scope="session")
def app(models: Models) -> Application:
    return Application(models, Limits(max_total_candidates=120, max_elements=9, max_body_mib=1))
