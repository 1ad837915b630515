"""Processes that share nothing with each other or with the tests, but begin with what they need already imported."""

import multiprocessing
from multiprocessing import forkserver
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Arrow imports pandas when it is first used.
_IMPORTED = ["tests.batches.consumer", "tests.training.ranks", "pandas"]


def start_server() -> None:
    """Starts the server of the start method `forkserver`, where it does not run yet."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(_IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # the server does not take over sys.path before Python 3.13
        forkserver.ensure_running()
