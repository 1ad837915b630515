"""Builds of features that are killed with SIGKILL at random moments, each followed by a build to the end."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

from tests.log.small_logs import ALL_KINDS, files_of, random_log, schema_of, windows_of, write_log

SCHEMA = schema_of(ALL_KINDS)
WINDOWS = windows_of(6, 8)

_BUILD = """
import json, sys
from pathlib import Path
from mmoe_rec.preprocessing import engines, steps
from mmoe_rec.preprocessing.logs import BuildOptions
from mmoe_rec.preprocessing.prepare import prepare
from mmoe_rec.features import kinds
if __name__ == "__main__":
    steps.ROWS_FOR_PROCESSES = 0
    log, work, workers, threads, schema, windows = sys.argv[1:]
    engines.THREADS_AT_MOST = int(threads)
    print("begin", flush=True)
    options = BuildOptions(workers=int(workers), rows_in_memory=2000)
    prepare(log, kinds.schema_of(json.loads(schema)), json.loads(windows), Path(work), options)
"""


def killed_builds(folder: Path, kills: int) -> int:
    """Starts builds until `kills` were killed before their end: on one worker, two threads and two processes in turn.

    Asserts that what a killed build leaves is nothing or the whole, that the build after it gives the bytes of one that
    was never disturbed, and that nothing else is left. Gives the number of builds that were started.
    """
    table = random_log(12, rows=3000)
    source = write_log(folder / "log", *(table.slice(a, b - a) for a, b in pairwise([0, 1000, 2000, 3000])))
    script = folder / "build.py"
    script.write_text(_BUILD)

    def start(work: Path, workers: int = 1, threads: int = 1) -> subprocess.Popen:
        options = [str(workers), str(threads), SCHEMA.model_dump_json(), json.dumps(WINDOWS)]
        command = [sys.executable, script, source, work, *options]
        environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
        job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True)
        assert job.stdout.readline() == "begin\n"
        return job

    began = time.monotonic()
    assert start(folder / "whole").wait() == 0
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
