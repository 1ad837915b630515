"""python -m tests.benchmarks.point_in_time
python -m tests.benchmarks.point_in_time --logs 1 --first 17

Draws small logs at random and compares counters, histories and labels with a naive reference in pandas that shares no
code with the package (`tests/reference`). Where days are added, files of days before are delivered again: touched,
moved, copied, written again, divided, compacted. The test suite does so for the first 200. Prints one line of JSON,
also where Ctrl-C ends it sooner; a log that differs is named, and the second command runs it again.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from mmoe_rec.progress import bar, say
from tests.point_in_time.compared_logs import TOLERANCE, compare
from tests.point_in_time.drawn_logs import draw


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=int, default=5_000, help="number of logs")
    parser.add_argument("--first", type=int, default=0, help="seed of the first one")
    arguments = parser.parse_args()
    differing: list[int] = []
    done = built = compared = again = 0
    begin = time.perf_counter()
    with bar() as progress, suppress(KeyboardInterrupt):
        for seed in progress.track(range(arguments.first, arguments.first + arguments.logs), description="logs"):
            with tempfile.TemporaryDirectory(prefix="point-in-time-") as folder:
                try:
                    values = compare(seed, Path(folder))
                    built, compared = built + (values > 0), compared + values
                    again += values > 0 and bool(draw(seed).again)
                except AssertionError as error:
                    differing.append(seed)
                    say(f"log {seed} differs: {error}")
            done += 1
    result = {
        "benchmark": "point_in_time",
        "logs": done,
        "built": built,
        "delivered_again": again,
        "values_compared": compared,
        "tolerance": TOLERANCE,
        "differing": differing,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    print(json.dumps(result))
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
