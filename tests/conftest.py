"""Tests run in several processes. Each takes its share of the cores: threads of OpenMP that wait for a core in turn are
many times slower than one."""

import os

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // _WORKERS)))
