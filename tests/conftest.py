"""Tests run in several processes. Each takes its share of the cores: threads of OpenMP that wait for a core in turn are
many times slower than one."""

import os

# Set in these processes alone, not in the one that starts them.
_WORKERS = os.environ.get("PYTEST_XDIST_WORKER_COUNT")
if _WORKERS is not None:
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // int(_WORKERS)))
