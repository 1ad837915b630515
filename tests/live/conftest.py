"""Journals in SQLite and in PostgreSQL, and a registered model that refreshes begin with."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.journals import PostgreSQL, postgresql
from tests.live.refreshed_model import RefreshedModel


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgreSQL]:
    with postgresql() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a journal that is not there yet."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'journal.db'}"
    server: PostgreSQL = request.getfixturevalue("postgres")
    return server.new_address()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> RefreshedModel:
    return RefreshedModel(tmp_path_factory.mktemp("model")).keep()


@pytest.fixture
def model(kept: RefreshedModel, tmp_path: Path) -> RefreshedModel:
    kept.journal = tmp_path / "journal.db"
    return kept.restore()
