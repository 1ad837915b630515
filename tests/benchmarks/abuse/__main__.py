"""python -m tests.benchmarks.abuse [--only fuzz|odd] [--requests 100000]

Abuses our server with two workers, and prints as JSON what came of it, by part:

fuzz  requests of any kind (Hypothesis) over connections that are kept, with valid ones between them, whose replies must
      stay the same within 1e-6 (calls may share a pass), and bit for bit once they are alone. A reply is status 200,
      4xx, or 503 with Retry-After; JSON; a refusal has one sentence of at most 500 characters; at most 80 characters of
      the body come back; the memory (PSS) of all processes grows by less than 5% after the first tenth, before which
      each worker had the largest calls that the limits allow
odd   HTTP that is wrong or rare: several lengths, encodings, versions, thousands of headers, upgrades

It takes the model of the quickstart, or another one's folder (`--model`), and Linux. What slow and large callers,
SIGTERM, kills and reloads do is tested in `tests/server`.
"""

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.abuse.fuzz import fuzz
from tests.benchmarks.abuse.odd import odd

MODEL = Path("data/complete_journey/work/model")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--only", choices=("fuzz", "odd"))
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    parts: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
        "fuzz": lambda model, folder: fuzz(model, folder, given.requests, given.seed),
        "odd": odd,
    }
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server of a part ends as well
    if not (given.model / "model.json").is_file():
        parser.error(f"'{given.model}' holds no model; run python -m pipelines.quickstart, or give --model")
    counts = {}
    for name in [given.only] if given.only else parts:
        with tempfile.TemporaryDirectory() as folder:
            counts[name] = parts[name](given.model.resolve(), Path(folder))
        print(f"{name}: {json.dumps(counts[name])}", flush=True)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
