"""python -m tests.benchmarks.feature_kills [--kills 20]

Kill builds of features at random moments; each next build has to give the same bytes and to leave nothing else behind.
"""

import argparse
import json
import tempfile
from pathlib import Path

from tests.preprocessing.killed_builds import killed_builds


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    kills = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as folder:
        attempts = killed_builds(Path(folder), kills)
    print(json.dumps({"killed": kills, "ended_before": attempts - kills, "same_bytes_after": attempts}))


if __name__ == "__main__":
    main()
