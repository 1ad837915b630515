from pathlib import Path

import pytest

from mmoe_rec.inference.artifact import ResolvedModel
from mmoe_rec.server.app import Application
from mmoe_rec.server.models import ModelManager
from mmoe_rec.server.options import ServerOptions
from tests.inference.small_model import SmallModel
from tests.server.asking import application


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return SmallModel(Path(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="session")
def models(small: SmallModel) -> ModelManager:
    return ModelManager(ServerOptions(), ResolvedModel(small.folder, "models:/small/7", "a_run"))


@pytest.fixture(scope="session")
def app(models: ModelManager) -> Application:
    return application(models, max_total_candidates=120, max_elements=9, max_body_mib=1)
