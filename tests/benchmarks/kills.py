"""python -m tests.benchmarks.kills [--kills 20]

Kills trainings at random moments, from the start of the command to its end, and goes on with the same command; each end
has to be that of a training that was never killed: the same weights, bit by bit, and metrics, in one MLflow run.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

from tests.fork_server import FOLDER
from tests.pipelines.killed_trainings import kill_and_compare, whole_training


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of trainings")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FOLDER] = folder
        whole, seconds = whole_training(Path(folder))
        print(f"a training that is not killed takes {seconds:.1f} s")
        print(json.dumps(kill_and_compare(whole, arguments.kills, seconds, arguments.seed)))


if __name__ == "__main__":
    main()
