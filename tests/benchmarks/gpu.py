"""python -m tests.benchmarks.gpu --out results

What does a GPU do with this project? On the CUDA device of this machine:

training   rows a second of the project's trainer, on the rows and model of `tests.benchmarks.training`, by batch size,
           precision (fp32 is TF32 in products there) and rows of each of 20 tables: `whole`, with Parquet, shuffling
           and validation; `steps`, of batches that lie ready in page-locked memory; and what the device does in a step:
           the share of its time in tables, products, optimizer and copies, and in which it has nothing to do;
experts    a level of experts and its gates, forward and backward pass: all experts on all rows (`dense`), and each on
           the rows sent to it (`grouped`: one product in bf16 where the GPU has it, else a loop over experts), by the
           number of experts and of experts per row and gate;
scoring    a candidate list, from encoded rows to predictions in main memory, on the device and on the CPU.

Times are medians. All figures go to one Markdown table, `gpu.md`, and to `gpu.json`, both in the folder of `--out`; the
last line is the JSON. `--quick` takes small sizes, and with `--device cpu` runs every part without a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from tests.benchmarks.gpu_parts import Figure


PARTS = ("experts", "scoring", "training")


@dataclass(frozen=True)
class Sizes:
    """What is measured. steps: of a training that is timed; repeats: of everything else.

    batches: rows a step, with tables of the first of `table_rows`; table_rows: of each table, at the first of
    `batches`; experts, k: numbers of each; rows: of a level's step; lists: candidates of a list.
    """

    steps: int = 100
    repeats: int = 20
    batches: tuple[int, ...] = (4096, 16_384, 65_536)
    table_rows: tuple[int, ...] = (50_000, 500_000, 2_000_000)
    precisions: tuple[str, ...] = ("bf16", "fp32")
    experts: tuple[int, ...] = (8, 16, 32, 64)
    k: tuple[int, ...] = (1, 2, 4)
    units: tuple[tuple[int, ...], ...] = ((128, 64), (512, 256))
    rows: int = 16_384
    lists: tuple[int, ...] = (100, 500, 2_000, 16_384)


QUICK = Sizes(
    steps=60,
    repeats=3,
    batches=(256, 512),
    table_rows=(1_000, 5_000),
    experts=(8, 16),
    k=(2,),
    units=((32, 16),),
    rows=512,
    lists=(100, 500),
)


def machine(device: torch.device) -> dict[str, str | int | None]:
    """What the figures belong to."""
    import torch

    found: dict[str, str | int | None] = {"device": device.type, "processor": platform.machine()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"device": card.name, "memory_gib": round(card.total_memory / 2**30)}
        found |= {"capability": f"{card.major}.{card.minor}"}
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    for name in ("torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def markdown(figures: list[Figure], about: dict[str, str | int | None]) -> str:
    """One table, and in a line above it what it was measured on."""
    lines = [", ".join(f"{name} {value}" for name, value in about.items() if value is not None), ""]
    lines += ["| part | case | figure | value |", "|---|---|---|---:|"]
    lines += [f"| {each.part} | {each.case} | {each.name} | {each.value:,.4g} {each.unit} |" for each in figures]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--out", type=Path, default=Path("gpu_benchmark"), help="folder (default: %(default)s)")
    options = parser.parse_args()

    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device here, which is what this measures (on a CPU: --device cpu --quick)")
    from mmoe_rec.devices import pick_device
    from tests.benchmarks import gpu_parts

    device = pick_device(options.device)
    sizes = QUICK if options.quick else Sizes()
    figures: list[Figure] = []
    about = machine(device)
    options.out.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        for figure in getattr(gpu_parts, part)(sizes, device):
            print(f"{figure.part:10} {figure.case:45} {figure.name:20} {figure.value:12,.4g} {figure.unit}", flush=True)
            figures.append(figure)
        # After each part, so that a machine that is taken away leaves what it has measured.
        found = {"machine": about, "sizes": asdict(sizes), "figures": [asdict(each) for each in figures]}
        (options.out / "gpu.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        (options.out / "gpu.md").write_text(markdown(figures, about), encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
