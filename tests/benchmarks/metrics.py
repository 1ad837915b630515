"""python -m tests.benchmarks.metrics [--rows 20000000]

What does the command `metrics` cost? Rows of a simulated log in Parquet, 20 to a request, in random order: two binary
tasks, the second observed where the first one happened; 4 requests to a user, some with hundreds. Metrics of both
tasks, of the score and of the catalogue, with 1,000 resamples of the users.

seconds_20m, peak_gib    of the command on 20 million rows; with another number of rows, `seconds` and `peak_gib`.

The last line is JSON.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks.memory import measure

ROWS, PER_REQUEST, ROWS_PER_FILE, CANDIDATES = 20_000_000, 20, 2_000_000, 100_000


def write_predictions(folder: Path, rows: int) -> None:
    """Files of rows; each file holds whole requests, in random order of the rows."""
    random = np.random.default_rng(0)
    requests, share = rows // PER_REQUEST, CANDIDATES // PER_REQUEST
    users = (requests // 4 * random.random(requests) ** 2).astype(np.int64)  # some come often, most seldom
    for number, start in enumerate(range(0, requests, ROWS_PER_FILE // PER_REQUEST)):
        request = np.repeat(np.arange(start, min(start + ROWS_PER_FILE // PER_REQUEST, requests)), PER_REQUEST)
        random.shuffle(request)
        place = np.empty(len(request), np.int64)  # of a row in its request, so that no candidate comes twice
        place[np.argsort(request, kind="stable")] = np.arange(len(request)) % PER_REQUEST
        logit = random.normal(-2, 1.2, len(request))
        clicked = random.random(len(request)) < 1 / (1 + np.exp(-logit))
        other = 1 / (1 + np.exp(-0.5 * logit))
        liked = random.random(len(request)) < other
        predicted = 1 / (1 + np.exp(-logit - random.normal(0, 0.5, len(request))))
        table = pa.table(
            {
                "user": users[request],
                "request": request,
                "candidate": place * share + random.zipf(1.2, len(request)) % share,
                "predicted_clicked": predicted.astype(np.float32),
                "predicted_liked": other.astype(np.float32),
                "label_clicked": clicked.astype(np.int8),
                "label_liked": pa.array(liked.astype(np.int8), mask=~clicked),
                "score": predicted * np.sqrt(other),
            }
        )
        pq.write_table(table, folder / f"{number:03d}.parquet", row_group_size=262_144)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        write_predictions(folder / "in", rows)
        command = [sys.executable, "-m", "mmoe_rec", "metrics", "--predictions", str(folder / "in")]
        command += ["--tasks", "clicked", "liked=0.5", "--out", str(folder / "out")]
        done = measure(command, capture=True)
        print(done.output, file=sys.stderr)
        if done.exit_code:
            raise SystemExit(done.exit_code)
    seconds = "seconds_20m" if rows == ROWS else "seconds"
    print(json.dumps({seconds: round(done.seconds, 1), "peak_gib": round(done.peak_gib, 2)}))


if __name__ == "__main__":
    main()
