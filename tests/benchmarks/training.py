"""python -m tests.benchmarks.training

How fast is training, and what does it cost when tables grow? The same rows and sizes (20 id features of dimension 16, 5
numbers, 8 experts [128, 64] on all inputs, 2 tasks, batch 4096) are trained on, each in a process of its own, by

ours     this project's trainer: rows from Parquet, shuffled, tables through torchrec, checkpoints, metrics;
rechub   torch-rechub 0.9.0, its own trainer and loader;
deepctr  DeepCTR-Torch 0.3.0, its own `fit`;
tight    a loop in plain PyTorch, written for speed, with all rows in memory (`tight_loop.py`).

Tables have 50 thousand, 500 thousand or 2 million rows each. The peers get an environment of their own, which uv makes
in `--peers` (kept in the folder for temporary files), with the same release of torch. Rows a second are those of the
steps after a warm-up; what is timed several times counts by its fastest. `two_ranks_over_one`: two processes of one
thread over one process of one thread, at the same batch size. The limit of `fraction_of_matmul_limit`: the machine's
bf16 rate in products of two matrices of 2048 x 2048, measured in turn with the trainings, over the operations that the
model's products take for a row.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PEERS = {"rechub": "torch-rechub==0.9.0", "deepctr": "deepctr-torch==0.3.0"}
TABLE_ROWS = (50_000, 500_000, 2_000_000)
SECONDS = 40  # for a peer's training; some would take an hour
MATRIX = 2048


def matrix_rate(seconds: float = 3.0) -> float:
    """bf16 operations a second in products of two square matrices: the fastest of many."""
    import torch

    left, right = (torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16) for _ in range(2))
    shortest, end = float("inf"), time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        torch.mm(left, right)
        shortest = min(shortest, time.perf_counter() - started)
    return 2 * MATRIX**3 / shortest


def tight_loop(rows: int, table_rows: int) -> float:
    """Rows a second of the tight loop."""
    import torch

    from mmoe_rec.devices import use_bf16
    from tests.benchmarks.tight_loop import tight
    from tests.benchmarks.training_rows import draw

    return tight(draw(rows, table_rows), table_rows, use_bf16("auto", torch.device("cpu")), SECONDS)


def write_rows(rows: int, table_rows: int, folder: Path) -> float:
    """Writes what ours reads; the seconds that it took."""
    from tests.benchmarks.training_ours import write
    from tests.benchmarks.training_rows import draw

    started = time.perf_counter()
    write(folder, draw(rows, table_rows), table_rows)
    return time.perf_counter() - started


def run(command: Sequence[str], **environment: str) -> float:
    """The number that a command prints last."""
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=os.environ | environment)
    if finished.returncode != 0:
        raise SystemExit(f"{shlex.join(command)} failed")
    return float(finished.stdout.splitlines()[-1])


def stage(name: str, *arguments: object) -> list[str]:
    """What runs a part of this file in a process of its own."""
    return [sys.executable, "-m", "tests.benchmarks.training", "--stage", name, *map(str, arguments)]


def ours(folder: Path, ranks: int = 1) -> list[str]:
    """This project's training, by one process or by several under torchrun."""
    start = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
    return [sys.executable, "-m", *start, "tests.benchmarks.training_ours", str(folder)]


def peers_environment(folder: Path) -> str:
    """The Python of an environment with the peers and this environment's release of torch."""
    import torch

    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run(["uv", "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
    # DeepCTR-Torch imports requests and pip, which it does not ask for.
    needed = [*PEERS.values(), "requests", "pip", f"torch=={torch.__version__.partition('+')[0]}"]
    subprocess.run(["uv", "pip", "install", "--quiet", "--python", str(python), *needed], check=True)
    return str(python)


def benchmark(rows: int, repeats: int, peers: Path) -> dict[str, object]:
    """Runs all and tells how they compare."""
    from tests.benchmarks.training_rows import operations_per_row

    python = peers_environment(peers)
    speeds: dict[str, float] = {}
    rate = 0.0

    def timed(name: str, command: Sequence[str], **environment: str) -> None:
        speed = run(command, **environment)
        speeds[name] = max(speed, speeds.get(name, 0))
        print(f"{name:16} {speed:12,.0f} rows/s", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        folders = {table_rows: Path(scratch, str(table_rows)) for table_rows in TABLE_ROWS}
        for table_rows, folder in folders.items():
            run(stage("write", rows, table_rows, folder))
        for _ in range(repeats):
            # What is divided by each other is measured next to each other.
            rate = max(rate, run(stage("matrix")))
            for table_rows in TABLE_ROWS:
                timed(f"ours_{_short(table_rows)}", ours(folders[table_rows]))
            timed("tight_50k", stage("tight", rows, TABLE_ROWS[0]))
            for ranks in (1, 2):
                timed(f"ours_50k_{ranks}x1", ours(folders[TABLE_ROWS[0]], ranks), OMP_NUM_THREADS="1")
        for table_rows in TABLE_ROWS:
            for peer in PEERS:
                sizes = map(str, (table_rows, rows, SECONDS))
                timed(f"{peer}_{_short(table_rows)}", [python, "-m", "tests.benchmarks.training_peers", peer, *sizes])
            if table_rows != TABLE_ROWS[0]:
                timed(f"tight_{_short(table_rows)}", stage("tight", rows, table_rows))
    limit = rate / operations_per_row()
    return {"rows_per_s": {name: round(speed) for name, speed in speeds.items()}} | _ratios(speeds, limit)


def _ratios(speeds: Mapping[str, float], limit: float) -> dict[str, float]:
    best = max(speeds[f"{peer}_50k"] for peer in (*PEERS, "tight"))
    ratios = {
        "ours_over_rechub_50k": speeds["ours_50k"] / speeds["rechub_50k"],
        "ours_over_best_peer_50k": speeds["ours_50k"] / best,
        "growth_50k_to_2m": speeds["ours_50k"] / speeds["ours_2m"],
        "two_ranks_over_one": speeds["ours_50k_2x1"] / speeds["ours_50k_1x1"],
        "fraction_of_matmul_limit": speeds["ours_50k"] / limit,
        "limit_rows_per_s": limit,
    }
    return {name: round(value, 3) for name, value in ratios.items()}


def _short(rows: int) -> str:
    return f"{rows // 1_000_000}m" if rows % 1_000_000 == 0 else f"{rows // 1000}k"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100 * 4096, help="rows that each trains on (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="times that ours is timed (default: %(default)s)")
    parser.add_argument("--peers", type=Path, default=Path(tempfile.gettempdir(), "mmoe_rec_peers"))
    parser.add_argument("--stage", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    match options.stage:
        case None:
            print(json.dumps(benchmark(options.rows, options.repeats, options.peers)))
        case ["matrix"]:
            print(matrix_rate())
        case ["tight", rows, table_rows]:
            print(tight_loop(int(rows), int(table_rows)))
        case ["write", rows, table_rows, folder]:
            print(write_rows(int(rows), int(table_rows), Path(folder)))


if __name__ == "__main__":
    main()
