"""python -m tests.benchmarks.batch_scoring

How fast are rows of a Parquet file scored? The sizes are those of `tests/benchmarks/training.py`: 20 id features of
dimension 16 with 50 thousand ids each, 5 numbers, 8 experts [128, 64], 2 tasks, random weights; and, in ours only, two
counters. Each contestant is a process of its own on the same rows, and its rate is that of the whole job, without the
start of the process and imports:

tables   `mmoe-rec score --as-of tables`: Parquet to Parquet, with ids looked up in vocabularies, counters and ranks;
log      the same with `--as-of log`: counters as of each request, from the log;
rechub   torch-rechub 0.9.0: `MTLTrainer.predict` of its own data set, from arrays in memory with ids as row numbers,
         the faster of a loader in its process and one with two workers.

Peak memory is that of all processes of a contestant (see `tests/benchmarks/memory.py`). torch-rechub gets its
environment as in `tests/benchmarks/training.py`, in `--peers`. What is timed several times counts by its fastest.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TABLE_ROWS = 50_000
PEER_ROWS = 200_000  # its rate does not depend on them
ROWS_PER_REQUEST = 20


def _settings(work: Path) -> Any:
    from mmoe_rec.settings.sections import Settings
    from tests.benchmarks.training_rows import DIM, EXPERT_UNITS, EXPERTS, ID_NAMES, NUMBER_NAMES, TOWER_UNITS

    features: dict[str, Any] = {n: {"kind": "id", "column": n, "dim": DIM, "min_count": 1} for n in ID_NAMES}
    features |= {name: {"kind": "numeric", "column": name} for name in NUMBER_NAMES}
    features |= {
        f"{key}_label": {"kind": "counter", "task": "task0", "by": [key], "outputs": ["positives", "rows"]}
        for key in ("user", "item")
    }
    return Settings.model_validate(
        {
            "name": "scored",
            "data": {"log": str(work / "log"), "work": str(work)},
            "columns": {"user": "user", "candidate": "item", "time": "time", "request": "request"},
            "roles": {"candidate": [*ID_NAMES, *NUMBER_NAMES]},
            "tasks": {name: {"label": name, "objective": "engagement"} for name in ("task0", "task1")},
            "features": features,
            "split": {"train_end": "2023-11-20T00:00:00", "validation_end": "2023-11-22T00:00:00"},
            "model": {
                "bottom": {"units": [], "cross_layers": 0, "piecewise": False},
                "experts": {"count": EXPERTS, "units": list(EXPERT_UNITS)},
                "gates": {"dropout": 0},
                "towers": {"units": list(TOWER_UNITS)},
            },
        }
    )


def write(rows: int, work: Path) -> None:
    """The log and a model with random weights."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from mmoe_rec.inference.writing import write_artifact
    from mmoe_rec.model.layout import ModelLayout
    from mmoe_rec.model.mmoe import build_model
    from mmoe_rec.model.tables import PlainTables
    from mmoe_rec.preprocessing.prepare import prepare
    from tests.benchmarks.training_rows import draw

    drawn, chance = draw(rows, TABLE_ROWS), np.random.default_rng(1)
    request = np.arange(rows) // ROWS_PER_REQUEST
    start, days = 1_699_920_000_000_000, 10 * 86_400_000_000
    columns = {
        "request": request,
        "user": chance.integers(0, rows // 200, request[-1] + 1)[request],
        "item": chance.integers(0, 20_000, rows),
        "time": start + request * (days // (request[-1] + 1)),
        **drawn.by_name(),
        **{f"task{index}": labels for index, labels in enumerate(drawn.labels.T)},
    }
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    place = table.column_names.index("time")
    table = table.set_column(place, "time", table["time"].cast(pa.timestamp("us", "UTC")))
    (work / "log").mkdir(parents=True)
    pq.write_table(table, work / "log" / "0.parquet", row_group_size=65_536)
    settings = _settings(work)
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"duplicates": "keep"})})
    from mmoe_rec.jobs.places import log_and_place

    prepared = prepare(*log_and_place(settings))
    layout = ModelLayout.of(prepared.layout, settings)
    model = build_model(layout, settings.model, PlainTables(layout))
    write_artifact(work / "model", settings=settings, prepared=prepared, state_dict=model.state_dict())


def ours(work: Path, as_of: Any) -> float:
    """Rows a second of a scoring from Parquet to Parquet."""
    import torch  # noqa: F401 - whose import is not timed

    from mmoe_rec.jobs.score import score_log

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = score_log(work / "model", work / "log", Path(folder, "scores"), as_of)
    return done.manifest["rows"] / (time.perf_counter() - started)


def rechub(rows: int) -> float:
    """Rows a second of torch-rechub's predictions; runs in its environment."""
    from torch.utils.data import DataLoader
    from torch_rechub.basic.features import DenseFeature, SparseFeature
    from torch_rechub.trainers import MTLTrainer
    from torch_rechub.utils.data import PredictDataset

    from tests.benchmarks.peers.mixtures import rechub_mixture
    from tests.benchmarks.training_rows import BATCH, DIM, ID_NAMES, NUMBER_NAMES, TASKS, draw

    drawn = draw(rows, TABLE_ROWS)
    features: list[Any] = [SparseFeature(name, vocab_size=TABLE_ROWS, embed_dim=DIM) for name in ID_NAMES]
    features += [DenseFeature(name) for name in NUMBER_NAMES]
    model, columns = rechub_mixture(features, TASKS), drawn.by_name()
    fastest = float("inf")
    with tempfile.TemporaryDirectory() as folder:
        trainer = MTLTrainer(model, ["classification"] * TASKS, n_epoch=1, model_path=folder)
        for workers in (0, 2):
            loader = DataLoader(PredictDataset(columns), batch_size=BATCH, num_workers=workers)
            started = time.perf_counter()
            assert len(trainer.predict(model, loader)) == rows
            fastest = min(fastest, time.perf_counter() - started)
    return rows / fastest


def benchmark(rows: int, repeats: int, peers: Path) -> dict[str, float]:
    """Runs all in turn."""
    from tests.benchmarks.memory import measure
    from tests.benchmarks.peers.environment import peers_environment

    peer = peers_environment(peers)
    this = [sys.executable, "-m", "tests.benchmarks.batch_scoring", "--stage"]
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder, "work")
        write(rows, work)
        commands = {
            "tables": [*this, "tables", "--work", str(work)],
            "log": [*this, "log", "--work", str(work)],
            "rechub": [peer, *this[1:], "rechub", "--rows", str(min(rows, PEER_ROWS))],
        }
        for _ in range(repeats):
            for name, command in commands.items():
                measured = measure(command, capture=True)
                if measured.exit_code:
                    raise SystemExit(f"{name} failed")
                rate = float(measured.output.splitlines()[-1])
                found[f"{name}_rows_per_s"] = max(round(rate), found.get(f"{name}_rows_per_s", 0))
                found[f"{name}_peak_gib"] = round(max(measured.peak_gib, found.get(f"{name}_peak_gib", 0)), 2)
                print(f"{name:8} {rate:10,.0f} rows/s, peak {measured.peak_gib:.2f} GiB", flush=True)
    for name in ("tables", "log"):
        found[f"{name}_over_rechub"] = round(found[f"{name}_rows_per_s"] / found["rechub_rows_per_s"], 2)
    return {"rows": rows, **found}


def main() -> None:
    """Runs the benchmark, or one contestant of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", type=Path, default=Path(tempfile.gettempdir(), "mmoe_rec_peers"))
    parser.add_argument("--stage", choices=["tables", "log", "rechub"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage == "rechub":
        print(rechub(arguments.rows))
    elif arguments.stage:
        print(ours(arguments.work, arguments.stage))
    else:
        print(json.dumps(benchmark(arguments.rows, arguments.repeats, arguments.peers)))


if __name__ == "__main__":
    main()
