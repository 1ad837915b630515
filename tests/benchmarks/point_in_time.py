"""python -m tests.benchmarks.point_in_time
python -m tests.benchmarks.point_in_time --logs 1 --first 17

Draws small logs at random and compares counters, histories and labels with a naive reference in pandas that shares no
code with the package (`tests/features/naive_features.py`). The test suite does so for the first 200. Prints one line of
JSON; a log that differs is named, and the second command runs it again.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.features.compared_logs import TOLERANCE, compare


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=int, default=5_000, help="number of logs")
    parser.add_argument("--first", type=int, default=0, help="seed of the first one")
    arguments = parser.parse_args()
    differing: list[int] = []
    built = compared = 0
    begin = time.perf_counter()
    for seed in range(arguments.first, arguments.first + arguments.logs):
        folder = Path(tempfile.mkdtemp(prefix="point-in-time-"))
        try:
            values = compare(seed, folder)
            built, compared = built + (values > 0), compared + values
        except AssertionError as error:
            differing.append(seed)
            print(f"log {seed} differs: {error}", file=sys.stderr)
        finally:
            shutil.rmtree(folder)
    result = {
        "benchmark": "point_in_time",
        "logs": arguments.logs,
        "built": built,
        "values_compared": compared,
        "tolerance": TOLERANCE,
        "differing": differing,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    print(json.dumps(result))
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
