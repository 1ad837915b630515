"""A simulated log for the tests of this folder."""

import pytest
from simulated_log import Log, simulate


@pytest.fixture
def log() -> Log:
    return simulate(seed=0)
