"""python -m tests.benchmarks.features --repeats 3

How fast is `mmoe-rec features`? On the same rows of one log, each in a process of its own, it is timed beside

tuned_pandas  the same features by an expert in pandas who writes for speed (`tuned_pandas_features.py`);
read          a bare read of the same columns with pyarrow, which nothing that reads the log can beat.

All may use every core. The baseline holds everything in memory and, unlike ours, keeps nothing that would encode a
request; its docstring tells the rest of what it does less.

The log is Complete Journey, a synthetic one of `--rows`, or that of another settings file (`--config`). What both wrote
is compared, column by column. Times are without the start of Python and its imports; with `--repeats`, the fastest
counts. Peaks of memory, of all processes of a stage, in GiB, are those of a run of their own, since watching it takes
time.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmoe_rec.features.kinds.history import HistoryFeature
from mmoe_rec.features.kinds.id import IdFeature
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.schema import Schema
from mmoe_rec.settings.sections import Settings
from tests.benchmarks.memory import measure
from tests.benchmarks.tuned_pandas_features import LOG, build, source_columns, source_files

COMPLETE_JOURNEY, SYNTHETIC = "configs/complete_journey.yaml", "configs/synthetic.yaml"
SPLITS = ("train", "validation", "test")
TOLERANCE, AFFINE = 1e-4, 5e-3
STAGES = ("ours", "tuned_pandas", "read")
# A read is so short that one alone says little.
TURNS = ("read", "ours", "read", "tuned_pandas", "read")


def prepare_stage(stage: str, settings: Settings) -> Callable[[], object]:
    """Imports what a stage needs; gives what is to be timed."""
    columns, files = source_columns(settings.schema_), source_files(settings.data.log, settings.schema_)
    if stage == "ours":
        from mmoe_rec.jobs.places import build_features

        return lambda: build_features(settings)
    if stage == "tuned_pandas":
        windows = settings.split.windows()
        return lambda: build(settings.data.log, settings.schema_, windows, Path(settings.data.work))
    for module in ("pandas", "pyarrow.dataset"):  # which pyarrow would import at its first read
        import_module(module)

    def read() -> None:
        for source, paths in files.items():
            for path in paths:
                pq.read_table(path, columns=columns[source])

    return read


def stage_command(stage: str, config: str, overrides: list[str]) -> list[str]:
    """What runs one stage in a process of its own."""
    return [sys.executable, "-m", "tests.benchmarks.features", "--stage", stage, "--config", config, *overrides]


def time_stage(command: list[str]) -> float:
    """Seconds of one stage in a fresh process."""
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode != 0:
        raise SystemExit(f"{shlex.join(command)} failed")
    return float(finished.stdout.splitlines()[-1])


def compare(schema: Schema, one: Path, other: Path) -> dict[str, float]:
    """Assert that two folders of encoded splits hold the same; gives the largest differences.

    The order of rows and the files that they stand in don't matter. Known ids may be numbered in different ways.
    Unknown ones all count as one: they are hashed to the buckets by another function, or to none but the first.
    """
    largest = {"dense": 0.0, "histories": 0.0}
    splits = {name: (sorted_rows(schema, one / name), sorted_rows(schema, other / name)) for name in SPLITS}
    numbers = {
        name: renumbering(schema, name, list(splits.values()))
        for name, feature in schema.features.items()
        if isinstance(feature, IdFeature) and feature.table is None
    }
    for split, (left, right) in splits.items():
        assert set(left.column_names) == set(right.column_names), set(left.column_names) ^ set(right.column_names)
        for name in left.column_names:
            kind, _, feature = name.partition(".")
            where = f"{split}: {name}"
            if kind == "dense":
                difference = largest_difference(left[name].to_numpy(), right[name].to_numpy(), where)
                largest["dense"] = max(largest["dense"], difference)
                assert difference < TOLERANCE, f"{where} differs by {difference}"
            elif kind == "id" and isinstance(schema.features.get(feature), HistoryFeature):
                share = different_histories(schema, feature, left[name], right[name], numbers[schema.table_of(feature)])
                largest["histories"] = max(largest["histories"], share)
                # Which of several unknown ids of one instant are cut off is a matter of their buckets.
                assert share < 1e-3, f"{where} differs in {share:.2%} of the rows"
            elif kind == "id" and feature in schema.features:
                pair = [without_buckets(schema, feature, table[name].to_numpy()) for table in (left, right)]
                differs = pair[0] != numbers[schema.table_of(feature)][pair[1]]
                assert not differs.any(), f"{where} differs in {differs.sum()} rows"
            elif name != "request" or schema.columns.request is not None:
                assert left[name].cast(right[name].type).equals(right[name]), f"{where} differs"
    return largest


def sorted_rows(schema: Schema, folder: Path) -> pa.Table:
    """A split's rows in an order that does not depend on how they were written."""
    keys = ["time", "user", "candidate"] + (["request"] if schema.columns.request else [])
    return pq.read_table(folder).sort_by([(name, "ascending") for name in keys])


def renumbering(schema: Schema, name: str, splits: list[tuple[pa.Table, pa.Table]]) -> np.ndarray:
    """For each row of an id feature's table in the right split, the one that holds the same id in the left split."""
    column = f"id.{name}"
    left, right = (
        without_buckets(schema, name, np.concatenate([tables[side][column].to_numpy() for tables in splits]))
        for side in (0, 1)
    )
    numbers = np.arange(max(left.max(), right.max(), 1) + 1)
    numbers[right] = left
    assert (numbers[right] == left).all(), f"{column}: one id on the right is several on the left"
    assert len(np.unique(left)) == len(np.unique(right)), f"{column}: one id on the left is several on the right"
    assert list(numbers[:2]) == [0, 1], f"{column}: other ids are missing or unknown"
    return numbers


def largest_difference(one: np.ndarray, other: np.ndarray, where: str) -> float:
    """Largest difference of two standardised columns, once one's mean and deviation are taken to the other's.

    The project takes them from values that are rounded to 13 bits, scikit-learn from the values.
    """
    differs = one != other  # both are 0 where the number is missing, and 10 where it is far out
    inside = differs & (np.abs(one) < 9.9)
    if inside.any() and np.ptp(other[inside]) > 0:
        slope, shift = np.polyfit(other[inside].astype(np.float64), one[inside].astype(np.float64), 1)
        assert max(abs(slope - 1), abs(shift)) < AFFINE, f"{where}: {slope} x + {shift}"
        difference = np.where(differs, one - np.clip(slope * other + shift, -10, 10), 0)
    else:
        difference = one - other
    return float(np.abs(difference).max(initial=0))


def without_buckets(schema: Schema, name: str, rows: np.ndarray) -> np.ndarray:
    """A feature's table rows with 1 for every unknown id."""
    unknown = schema.features[schema.table_of(name)].oov_buckets
    return np.where((rows > 0) & (rows <= unknown), 1, rows)


def different_histories(
    schema: Schema, name: str, left: pa.ChunkedArray, right: pa.ChunkedArray, numbers: np.ndarray
) -> float:
    """Share of rows whose histories are not the same but for the order of what happened at one instant."""
    sums = []
    for column, renumbered in ((left.combine_chunks(), np.arange(len(numbers))), (right.combine_chunks(), numbers)):
        lengths = pc.list_value_length(column).to_numpy()
        items = renumbered[without_buckets(schema, name, column.flatten().to_numpy())]
        # A sum of scrambled items is the same in any order.
        scrambled = (items.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        scrambled ^= scrambled >> np.uint64(29)
        total = np.append(np.uint64(0), np.cumsum(scrambled * scrambled))
        ends = np.cumsum(lengths)
        sums.append((lengths, total[ends] - total[ends - lengths]))
    return float(((sums[0][0] != sums[1][0]) | (sums[0][1] != sums[1][1])).mean())


def benchmark(config: str, overrides: list[str], repeats: int) -> dict[str, object]:
    """Time the stages in turn, `repeats` times, and compare what was written."""
    settings = load_settings(config, overrides)
    rows = sum(pq.read_metadata(file).num_rows for file in source_files(settings.data.log, settings.schema_)[LOG])
    best, peak = dict.fromkeys(STAGES, float("inf")), dict.fromkeys(STAGES, 0.0)
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(dir=Path(settings.data.work).parent) as folder:
            for stage in TURNS:
                seconds = time_stage(stage_command(stage, config, [*overrides, "--data.work", f"{folder}/{stage}"]))
                best[stage] = min(best[stage], seconds)
                print(f"{stage:12} {seconds:7.2f} s  {rows / seconds:12,.0f} rows/s", flush=True)
            theirs = Path(folder, "tuned_pandas")
            largest = compare(settings.schema_, Path(folder, "ours", "features", "encoded"), theirs)
            print(
                f"ours and tuned_pandas are equal: dense columns to {largest['dense']:.1e}, "
                f"histories but for {largest['histories']:.4%} of the rows"
            )
    for stage in STAGES:
        with tempfile.TemporaryDirectory(dir=Path(settings.data.work).parent) as folder:
            command = stage_command(stage, config, [*overrides, "--data.work", f"{folder}/{stage}"])
            peak[stage] = measure(command, capture=True).peak_gib
            print(f"{stage:12} {peak[stage]:7.2f} GiB", flush=True)
    return {
        "rows": rows,
        "rows_per_s": {stage: round(rows / best[stage]) for stage in STAGES},
        "ours_over_tuned_pandas": round(best["tuned_pandas"] / best["ours"], 3),
        "ours_over_bare_read": round(best["read"] / best["ours"], 4),
        "peak_gib": round(peak["ours"], 3),
    }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="a synthetic log of so many rows instead of Complete Journey")
    parser.add_argument("--config", help="another settings file, whose log is there, instead; overrides may follow")
    parser.add_argument("--repeats", type=int, default=1, help="times that all is timed (default: %(default)s)")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options, overrides = parser.parse_known_args()
    if options.stage:
        work = prepare_stage(options.stage, load_settings(options.config, overrides))
        started = time.perf_counter()
        work()
        print(time.perf_counter() - started)
        return
    with tempfile.TemporaryDirectory() as folder:
        config = options.config or (SYNTHETIC if options.rows else COMPLETE_JOURNEY)
        if options.config is None:
            overrides = [*make_log(Path(folder), options.rows), *overrides]
        print(json.dumps(benchmark(config, overrides, options.repeats)))


def make_log(folder: Path, synthetic_rows: int | None) -> list[str]:
    """Make a log in a folder; gives the settings that name its place."""
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
