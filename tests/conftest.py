"""Tests run in several processes. Each takes its share of the cores: threads of OpenMP that wait for a core in turn are
many times slower than one."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests import fork_server, mlflow_stores

# Set in these processes alone, not in the one that starts them.
_WORKERS = os.environ.get("PYTEST_XDIST_WORKER_COUNT")
if _WORKERS is not None:
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // int(_WORKERS)))

# Examples of each property: few by default, many in `.ci/run`, and thousands for hours of search.
hypothesis.settings.register_profile("quick", max_examples=40, deadline=None)
hypothesis.settings.register_profile("full", max_examples=200, deadline=None)
hypothesis.settings.register_profile("long", max_examples=5_000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

# Files of half a minute or more, the longest first.
_LONG = [
    "pipelines/test_resume",
    "test_readme",
    "server/test_workers",
    "pipelines/test_end_to_end",
    "pipelines/test_mlflow_away",
    "pipelines/test_commands",
    "preprocessing/test_prepare",
    "training/test_loop",
    "training/test_checkpoint",
    "training/test_losses",
    "training/test_sharding",
    "inference/test_server",
    "training/test_warm_start",
    "pipelines/test_resumed_trainings",
    "pipelines/test_promotion",
    "features/test_added_kind",
    "model/test_added_rule",
    "training/test_without_torchrec",
]
_ORDER = {f"tests/{name}.py": place for place, name in enumerate(_LONG)}


def pytest_configure(config: pytest.Config) -> None:
    """The folder that all processes of this run share; it goes with the first of them."""
    if not hasattr(config, "workerinput"):
        memory = _find_memory()
        folder = tempfile.TemporaryDirectory(dir=memory, ignore_cleanup_errors=True)
        os.chmod(folder.name, 0o711)  # PostgreSQL is another user
        os.environ[fork_server.FOLDER] = folder.name
        config.add_cleanup(folder.cleanup)
        if memory is not None:
            os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", memory)  # of `tmp_path`
            tempfile.tempdir = os.environ["TMPDIR"] = f"{folder.name}/tmp"
            os.mkdir(tempfile.tempdir, 0o711)


def _find_memory() -> str | None:
    """A folder in memory, where there is plenty and no other one is asked for: on a disk tests wait a third of their
    time until it has written what they would not miss."""
    memory, meminfo = Path("/dev/shm"), Path("/proc/meminfo")
    if "TMPDIR" in os.environ or not (memory.is_dir() and os.access(memory, os.W_OK) and meminfo.exists()):
        return None
    available = dict(line.split()[:2] for line in meminfo.read_text().splitlines())["MemAvailable:"]
    room = os.statvfs(memory)
    return str(memory) if min(room.f_bavail * room.f_frsize, 1024 * int(available)) >= 6 * 2**30 else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first: one that is begun last is waited for by all other processes."""
    items.sort(key=lambda item: _ORDER.get(item.nodeid.partition("::")[0], len(_ORDER)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seeds torch's global generator, so that no test depends on what ran before it in the same process."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
    if "mlflow" in sys.modules:
        mlflow_stores.copy_new_stores()


@pytest.fixture(autouse=True)
def _undo_mlflow() -> Iterator[None]:
    """MLflow puts the code of a model that it loads, a part of this package, before all else that can be imported, and
    keeps the address of its last store in the environment."""
    path = sys.path[:]
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    yield
    sys.path[:] = path
