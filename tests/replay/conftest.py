from collections.abc import Iterator

import pytest

from tests.inference.small_model import SmallModel
from tests.replay.fake_server import FakeServer, served
from tests.replay.replayed_log import FROM, model_of


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return model_of(tmp_path_factory.mktemp("replayed"))


@pytest.fixture
def fake(small: SmallModel) -> FakeServer:
    return FakeServer(small, FROM)


@pytest.fixture
def url(fake: FakeServer) -> Iterator[str]:
    with served(fake) as address:
        yield address
