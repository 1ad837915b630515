"""python -m tests.benchmarks.training

How fast is training, and what does it cost when tables grow? The same rows and sizes (20 id features of dimension 16, 5
numbers, 8 experts [128, 64] on all inputs, 2 tasks, batch 4096) are trained on, each in a process of its own, by

ours     this project's trainer: rows from Parquet, shuffled, tables through torchrec, checkpoints, metrics;
rechub   torch-rechub 0.9.0, its own trainer and loader;
deepctr  DeepCTR-Torch 0.3.0, its own `fit`;
tight    a loop in plain PyTorch, written for speed, with all rows in memory (`tight_loop.py`), in fp32 and in bf16.

Tables have 50 thousand, 500 thousand or 2 million rows each. The peers get an environment of their own, which uv makes
in `--peers` (kept in the folder for temporary files), with the same release of torch. Rows a second are those of the
steps after a warm-up; what is timed several times counts by its fastest. `--peers-only-50k`: only what is needed to
compare with the peers, at 50 thousand rows.

`two_ranks_over_one`: two processes of one thread over one process of one thread, at the same batch size. The limit of
`fraction_of_matmul_limit`: the fastest of the machine's rates in products of two matrices of 2048 x 2048, in fp32 by
torch's BLAS library and by oneDNN and in bf16, measured in turn with the trainings, over the operations that the
model's products take for a row.

`choices` is what a training chose by itself. `auto_over_best_by_hand`: its speed over that of the best combination of
precision, library of products, way of tables and threads set by hand, all of which are timed in turn with it
(`by_hand`). To see another processor: ONEDNN_MAX_CPU_ISA=AVX512_CORE takes its bf16 units away.
"""

import argparse
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmoe_rec.devices import usable_cores
from tests.benchmarks.peers.environment import FOLDER, PEERS, peers_environment, run

TABLE_ROWS = (50_000, 500_000, 2_000_000)
SECONDS = 40  # for a peer's training; some would take an hour
EMULATED = 0.5
"""bf16 products that have less than this share of fp32's rate are not worth a training."""
# Of those that /proc/cpuinfo names, the ones that kernels of products and tables ask for.
_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_tile", "bf16", "sve")


@dataclass(frozen=True)
class Processor:
    """vendor, name: as the system calls them; flags: what products and tables may use; cores: that are free for us;
    settings: environment variables that hold libraries back from using what the processor has."""

    vendor: str
    name: str
    flags: tuple[str, ...]
    cores: int
    settings: tuple[str, ...]


def processor() -> Processor:
    """This machine's."""
    file, first = Path("/proc/cpuinfo"), ""
    if file.is_file():
        first = file.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    fields = dict(line.split(":", 1) for line in first.splitlines() if ":" in line)
    found = {name.strip(): value.strip() for name, value in fields.items()}
    known = set(found.get("flags", found.get("Features", "")).split())
    held = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "OPENBLAS_CORETYPE", "MKL_ENABLE_INSTRUCTIONS")
    return Processor(
        found.get("vendor_id", "unknown"),
        found.get("model name", platform.processor() or platform.machine()),
        tuple(flag for flag in _FLAGS if flag in known),
        usable_cores(),
        tuple(f"{name}={os.environ[name]}" for name in held if name in os.environ),
    )


def product_rates(seconds: float = 1.0, size: int = 2048) -> dict[str, float]:
    """Operations a second in products of two square matrices, the fastest of many: in fp32 by torch's BLAS library and
    by oneDNN, where torch has it, and in bf16.

    seconds: for each; one product is done in any case, which takes long where bf16 is emulated.
    """
    import torch

    from mmoe_rec.model.products import by_onednn, has_onednn

    ways = {"fp32": (torch.float32, torch.mm), "bf16": (torch.bfloat16, torch.mm)}
    if has_onednn():
        ways["fp32_onednn"] = torch.float32, by_onednn
    rates = {}
    for name, (kind, multiply) in ways.items():
        left, right = (torch.randn(size, size).to(kind) for _ in range(2))
        shortest, end = float("inf"), time.perf_counter() + seconds
        while (started := time.perf_counter()) < end:
            multiply(left, right)
            shortest = min(shortest, time.perf_counter() - started)
        rates[name] = 2 * size**3 / shortest
    return rates


def tight_loop(rows: int, table_rows: int, precision: str) -> float:
    """Rows a second of the tight loop."""
    from tests.benchmarks.tight_loop import tight
    from tests.benchmarks.training_rows import draw

    return tight(draw(rows, table_rows), table_rows, precision == "bf16", SECONDS)


def write_rows(rows: int, table_rows: int, folder: Path) -> float:
    """Writes what ours reads; the seconds that it took."""
    from tests.benchmarks.training_ours import write
    from tests.benchmarks.training_rows import draw

    started = time.perf_counter()
    write(folder, draw(rows, table_rows), table_rows)
    return time.perf_counter() - started


def stage(name: str, *arguments: object) -> list[str]:
    """What runs a part of this file in a process of its own."""
    return [sys.executable, "-m", "tests.benchmarks.training", "--stage", name, *map(str, arguments)]


def ours(folder: Path, ranks: int = 1, *options: str) -> list[str]:
    """This project's training, by one process or by several under torchrun; options: settings by hand."""
    start = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
    return [sys.executable, "-m", *start, "tests.benchmarks.training_ours", str(folder), *options]


class Timer:
    """Runs contestants and keeps the fastest time of each, and the machine's rates in turn with them."""

    def __init__(self) -> None:
        self.speeds: dict[str, float] = {}
        self.rates: dict[str, float] = {}
        self.choices: dict[str, Any] = {}

    def rate(self) -> None:
        """Measures the machine."""
        for name, rate in run(stage("rates")).items():
            self.rates[name] = max(rate, self.rates.get(name, 0))

    def timed(self, name: str, command: Sequence[str], **environment: str) -> None:
        """Measures a contestant."""
        found = run(command, **environment)
        if isinstance(found, dict):
            self.choices[name], found = found["choices"], found["rows_per_s"]
        self.speeds[name] = max(found, self.speeds.get(name, 0))
        print(f"{name:28} {found:12,.0f} rows/s", flush=True)

    def tight(self, rows: int, table_rows: int) -> None:
        """The loop in both precisions."""
        name = f"tight_{_short(table_rows)}"
        for precision in ("fp32", "bf16"):
            if precision == "fp32" or self.rates["bf16"] >= EMULATED * self.rates["fp32"]:
                self.timed(name, stage("tight", rows, table_rows, precision))


def benchmark(rows: int, repeats: int, peers: Path, few: bool) -> dict[str, object]:
    """Runs all and tells how they compare; few: only what the comparison with the peers at 50 thousand rows takes."""
    python = peers_environment(peers)
    timer = Timer()
    tables = TABLE_ROWS[:1] if few else TABLE_ROWS
    with tempfile.TemporaryDirectory() as scratch:
        folders = {table_rows: Path(scratch, str(table_rows)) for table_rows in tables}
        for table_rows, folder in folders.items():
            run(stage("write", rows, table_rows, folder))
        smallest = folders[TABLE_ROWS[0]]
        for _ in range(repeats):
            # What is divided by each other is measured next to each other.
            timer.rate()
            for table_rows in tables:
                timer.timed(f"ours_{_short(table_rows)}", ours(folders[table_rows]))
            timer.tight(rows, TABLE_ROWS[0])
            if not few:
                for ranks in (1, 2):
                    timer.timed(f"ours_50k_{ranks}x1", ours(smallest, ranks), OMP_NUM_THREADS="1")
                for name, options in by_hand(timer.rates).items():
                    timer.timed(name, ours(smallest, 1, *options))
                timer.timed("ours_50k", ours(smallest))
        for table_rows in tables:
            for peer in PEERS:
                told = [peer, *map(str, (table_rows, rows, SECONDS))]
                timer.timed(f"{peer}_{_short(table_rows)}", [python, "-m", "tests.benchmarks.training_peers", *told])
            if table_rows != TABLE_ROWS[0]:
                timer.tight(rows, table_rows)
    return _report(timer)


def by_hand(rates: Mapping[str, float]) -> dict[str, list[str]]:
    """Every combination of settings that a training could have chosen here, by name."""
    from mmoe_rec.training.tables import list_ways

    products = {"fp32": ["precision=fp32", "products=blas"]}
    if "fp32_onednn" in rates:
        products["fp32 by oneDNN"] = ["precision=fp32", "products=onednn"]
    if rates["bf16"] >= EMULATED * rates["fp32"]:
        products["bf16"] = ["precision=bf16"]
    threads = sorted({count for count in (usable_cores(), usable_cores() // 2) if count})
    return {
        f"{name}, {way}, {count} threads": [*options, f"tables={way}", f"threads={count}"]
        for (name, options), way, count in itertools.product(products.items(), list_ways(), threads)
    }


def _report(timer: Timer) -> dict[str, object]:
    from tests.benchmarks.training_rows import operations_per_row

    speeds, limit = timer.speeds, max(timer.rates.values()) / operations_per_row()
    best = max(speeds[f"{peer}_50k"] for peer in (*PEERS, "tight"))
    ratios = {
        "ours_over_rechub_50k": speeds["ours_50k"] / speeds["rechub_50k"],
        "ours_over_best_peer_50k": speeds["ours_50k"] / best,
        "fraction_of_matmul_limit": speeds["ours_50k"] / limit,
        "limit_rows_per_s": limit,
    }
    if "ours_2m" in speeds:
        ratios |= {
            "growth_50k_to_2m": speeds["ours_50k"] / speeds["ours_2m"],
            "two_ranks_over_one": speeds["ours_50k_2x1"] / speeds["ours_50k_1x1"],
            "auto_over_best_by_hand": speeds["ours_50k"] / max(speeds[name] for name in by_hand(timer.rates)),
        }
    gigas = {f"{name}_gflop_per_s": round(rate / 1e9) for name, rate in timer.rates.items()}
    return {
        "machine": asdict(processor()) | gigas,
        "choices": timer.choices["ours_50k"],
        "rows_per_s": {name: round(speed) for name, speed in speeds.items()},
        **{name: round(value, 3) for name, value in ratios.items()},
    }


def _short(rows: int) -> str:
    return f"{rows // 1_000_000}m" if rows % 1_000_000 == 0 else f"{rows // 1000}k"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100 * 4096, help="rows that each trains on (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="times that ours is timed (default: %(default)s)")
    parser.add_argument("--peers", type=Path, default=FOLDER)
    parser.add_argument("--peers-only-50k", action="store_true", help="a quick answer, under four minutes")
    parser.add_argument("--stage", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    match options.stage:
        case None:
            print(json.dumps(benchmark(options.rows, options.repeats, options.peers, options.peers_only_50k)))
        case ["rates"]:
            print(json.dumps(product_rates()))
        case ["tight", rows, table_rows, precision]:
            print(tight_loop(int(rows), int(table_rows), precision))
        case ["write", rows, table_rows, folder]:
            print(write_rows(int(rows), int(table_rows), Path(folder)))


if __name__ == "__main__":
    main()
