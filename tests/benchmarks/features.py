"""python -m tests.benchmarks.features --repeats 3

How fast is `mmoe-rec features`? Each in a process of its own, it is timed beside `read`, a bare read of the same
columns with pyarrow, which nothing that reads the log can beat. Both may use every core.

The log is Complete Journey, a synthetic one of `--rows`, or that of another settings file (`--config`). Times are
without the start of Python and its imports; with `--repeats`, the fastest counts. The peak of memory, of all processes,
is that of a run of its own, since watching it takes time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq

from mmoe_rec.preprocessing.logs import BuildInputs
from mmoe_rec.preprocessing.prepare import build_features
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.sections import Settings
from tests.benchmarks.memory import measure

COMPLETE_JOURNEY, SYNTHETIC = "configs/complete_journey.yaml", "configs/synthetic.yaml"


def time_stage(stage: str, settings: Settings) -> dict[str, float]:
    """Rows of the log, and seconds of a stage in this process."""
    logs = BuildInputs.of(settings).logs
    read = [(file.address, list(log.uses)) for log in logs.all for file in log.files]
    started = time.perf_counter()
    if stage == "ours":
        build_features(settings)
    else:
        for address, columns in read:
            pq.read_table(address, columns=columns)
    return {"rows": logs.log.rows, "seconds": time.perf_counter() - started}


def benchmark(config: str, overrides: list[str], repeats: int) -> dict[str, object]:
    """Times the stages in turn, `repeats` times."""
    work, best, rows = Path(load_settings(config, overrides).data.work), {"ours": float("inf"), "read": float("inf")}, 0

    def command(stage: str, folder: str) -> list[str]:
        words = [sys.executable, "-m", "tests.benchmarks.features", "--stage", stage, "--config", config]
        return [*words, *overrides, "--data.work", folder]

    for stage in ("read", "ours", "read") * repeats:  # a read is so short that one alone says little
        with tempfile.TemporaryDirectory(dir=work.parent) as folder:
            done = subprocess.run(command(stage, folder), stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rows, best[stage] = found["rows"], min(best[stage], found["seconds"])
        print(f"{stage:5} {found['seconds']:7.2f} s  {rows / found['seconds']:12,.0f} rows/s", flush=True)
    with tempfile.TemporaryDirectory(dir=work.parent) as folder:
        peak = measure(command("ours", folder), capture=True).peak_gib
    return {
        "rows": rows,
        "rows_per_s": {stage: round(rows / seconds) for stage, seconds in best.items()},
        "ours_over_bare_read": round(best["read"] / best["ours"], 4),
        "peak_gib": round(peak, 3),
    }


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="a synthetic log of so many rows instead of Complete Journey")
    parser.add_argument("--config", help="another settings file, whose log is there, instead; overrides may follow")
    parser.add_argument("--repeats", type=int, default=1, help="times that all is timed (default: %(default)s)")
    parser.add_argument("--stage", choices=("ours", "read"), help=argparse.SUPPRESS)
    options, overrides = parser.parse_known_args()
    if options.stage:
        print(json.dumps(time_stage(options.stage, load_settings(options.config, overrides))))
        return
    with tempfile.TemporaryDirectory() as folder:
        config = options.config or (SYNTHETIC if options.rows else COMPLETE_JOURNEY)
        if options.config is None:
            overrides = [*make_log(Path(folder), options.rows), *overrides]
        print(json.dumps(benchmark(config, overrides, options.repeats)))


def make_log(folder: Path, synthetic_rows: int | None) -> list[str]:
    """Makes a log in a folder; gives the settings that name its place."""
    if synthetic_rows:
        command = ["pipelines.make_synthetic_log", "--out", f"{folder}/log", "--rows", str(synthetic_rows)]
        events = []
    else:
        command = ["pipelines.ingest_complete_journey", "--out", str(folder)]
        events = ["--data.events.purchases.path", f"{folder}/purchases"]
    subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)
    return ["--data.log", f"{folder}/log", "--data.work", f"{folder}/work", *events]


if __name__ == "__main__":
    main()
