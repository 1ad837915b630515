"""Journals in SQLite and in PostgreSQL."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.journals import PostgreSQL, postgresql


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
