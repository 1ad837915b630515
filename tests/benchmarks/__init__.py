"""Benchmarks, each run as `python -m tests.benchmarks.NAME`, with threads that wait as those of commands do."""

import pipelines  # noqa: F401
