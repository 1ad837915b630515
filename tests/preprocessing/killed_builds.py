"""Builds of features that are killed with SIGKILL at random moments, each followed by a build to the end."""

import signal
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

from mmoe_rec.preprocessing import engines, steps
from mmoe_rec.preprocessing.logs import BuildInputs, BuildOptions
from mmoe_rec.preprocessing.prepare import prepare
from tests.fork_server import Command, call
from tests.log.small_logs import ALL_KINDS, files_of, random_log, schema_of, windows_of, write_log
from tests.processes import until

SCHEMA = schema_of(ALL_KINDS)
WINDOWS = windows_of(6, 8)


def build(source: str, work: Path, workers: int, threads: int) -> None:
    """Builds and says when it begins. It is called in a process of its own."""
    steps.ROWS_FOR_PROCESSES = 0
    engines.THREADS_AT_MOST = threads
    print("begin", flush=True)
    prepare(BuildInputs(source, SCHEMA, WINDOWS, work, BuildOptions(workers=workers, rows_in_memory=2000)))


def killed_builds(folder: Path, kills: int) -> int:
    """Starts builds until `kills` were killed before their end: on one worker, two threads and two processes in turn.

    Asserts that what a killed build leaves is nothing or the whole, that the build after it gives the bytes of one that
    was never disturbed, and that nothing else is left. Gives the number of builds that were started.
    """
    table = random_log(12, rows=3000)
    source = write_log(folder / "log", *(table.slice(a, b - a) for a, b in pairwise([0, 1000, 2000, 3000])))

    def start(work: Path, workers: int = 1, threads: int = 1) -> Command:
        job = call(build, str(source), work, workers, threads)
        until(lambda: job.stdout == "begin\n" or job.poll() is not None, pause=0.005)
        return job

    whole, began = start(folder / "whole"), time.monotonic()
    assert whole.wait() == 0
    took = time.monotonic() - began
    expected = files_of(folder / "whole" / "features")
    random = np.random.default_rng(0)
    attempts = disturbed = 0
    while disturbed < kills:
        attempts += 1
        work = folder / f"work-{attempts}"
        job = start(work, *((1, 1), (2, 2), (2, 1))[attempts % 3])
        time.sleep(random.uniform(0, took))
        job.send_signal(signal.SIGKILL)
        disturbed += job.wait() == -signal.SIGKILL
        assert not (work / "features").exists() or files_of(work / "features") == expected
        assert start(work).wait() == 0
        assert files_of(work / "features") == expected
        assert [each.name for each in work.iterdir()] == ["features"]
    return attempts
