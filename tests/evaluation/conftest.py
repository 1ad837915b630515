"""Two simulated logs for the tests of this folder."""

import pytest
from simulated_log import Log, simulate


@pytest.fixture
def log() -> Log:
    return simulate(seed=0)


@pytest.fixture
def tied_log() -> Log:
    return simulate(seed=1, decimals=1)
