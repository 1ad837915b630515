"""python -m tests.benchmarks.abuse [--only fuzz,odd,slow,large,sigterm,kills,reloads] [--requests 100000]

Abuses our server with two workers, and prints as JSON what came of it, by part:

fuzz      requests of any kind (Hypothesis) over connections that are kept, with valid ones between them, whose replies
          must stay the same within 1e-6 (calls may share a pass), and bit for bit once they are alone. A reply is
          status 200, 4xx, or 503 with Retry-After; JSON; a refusal has one sentence of at most 500 characters; at most
          80 characters of the body come back; the memory (PSS) of all processes grows by less than 5% after the first
          tenth, before which each worker had the largest calls that the limits allow
odd       HTTP that is wrong or rare: several lengths, encodings, versions, thousands of headers, upgrades
slow      200 connections at a time that send too little, too slowly, or take no reply, with valid requests beside them
large     bodies of 1 GB, by length and in chunks: how much of them could be sent
sigterm   SIGTERM under load, ten times
kills     a killed worker under load, ten times
reloads   100 reloads under load, between two models

It takes the model of the quickstart, or another one's folder (`--model`), and Linux. `--schemathesis PROGRAM` also runs
that program, from an environment of its own, against the server's schema.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.abuse.fuzz import fuzz
from tests.benchmarks.abuse.kills import kills
from tests.benchmarks.abuse.large import large
from tests.benchmarks.abuse.odd import odd
from tests.benchmarks.abuse.reloads import reloads
from tests.benchmarks.abuse.schema import schema
from tests.benchmarks.abuse.sigterm import sigterm
from tests.benchmarks.abuse.slow import slow

MODEL = Path("data/complete_journey/work/model")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--only", type=lambda text: text.split(","), help="parts, between commas")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schemathesis", metavar="PROGRAM")
    given = parser.parse_args()
    parts: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
        "fuzz": lambda model, folder: fuzz(model, folder, given.requests, given.seed),
        "odd": odd,
        "slow": slow,
        "large": large,
        "sigterm": sigterm,
        "kills": kills,
        "reloads": reloads,
    }
    if given.schemathesis:
        parts["schema"] = lambda model, folder: schema(model, folder, given.schemathesis)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server of a part ends as well
    names = given.only or [*parts]
    if unknown := [name for name in names if name not in parts]:
        parser.error(f"no part is named {unknown[0]}; there are {', '.join(parts)}")
    if not (given.model / "model.json").is_file():
        parser.error(f"'{given.model}' holds no model; run python -m pipelines.quickstart, or give --model")
    counts = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            counts[name] = parts[name](given.model.resolve(), Path(folder))
        print(f"{name}: {json.dumps(counts[name])}", flush=True)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
