"""mmoe-rec plan --config configs/cluster.yaml --world-size 16 --local-world-size 8 --hbm-gib 80

Prints which rank would hold which part of the embedding tables, how much memory that takes, and about how long a step
would take, for machines that need not exist: it needs no GPU, no log and no other process. Tables that do not fit are
refused, with their sizes. Where features are built, some of their rows are
read, to say how many cores of a machine its GPUs would keep busy with reading.

The sizes of tables are those of the features in `data.work`, if they are built; else the largest that the settings
allow, by `max_size` and `buckets`. Times are torchrec's estimate for looking tables up and exchanging what was found,
and the operations of the dense part at 100 TFLOP/s (CPU: 0.4): good for comparing settings, no promise.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from mmoe_rec.cli.main import COUNT, Configuration, NumberBetween, settings_command
from mmoe_rec.errors import UserError
from mmoe_rec.locks import reading

if TYPE_CHECKING:
    from mmoe_rec.features.layout import Layout
    from mmoe_rec.training.planning import Machines, RankPlan

GIB = 2**30
MANY_ROWS = 10**9  # to train on, where `training.batch_size` depends on them: what asks for a plan is large
MOST_RANKS = 4_096  # the planner's time grows with them; a plan for so many takes about half a minute
# Floating-point operations a second of a rank in products of bf16 matrices, as training reaches them.
TFLOPS = {"cuda": 100.0, "cpu": 0.4}
ROWS_READ = 2**20  # at most, to measure how fast they are read
RANKS_READ = 8  # likewise
ROWS_OF_GPU = 150_000  # a second, of eight that train TorchRec's DLRM at 1.2 million in batches of 131,072
MEMORY = NumberBetween(0.01, 1e6)  # both ends are far beyond any machine


@settings_command(__doc__)
@click.option("--world-size", type=COUNT, required=True, metavar="N", help="processes, one for each GPU")
@click.option("--local-world-size", type=COUNT, required=True, metavar="N", help="processes on each machine")
@click.option("--device", type=click.Choice(list(TFLOPS)), default="cuda", help="default: cuda")
@click.option("--hbm-gib", type=MEMORY, default=80, metavar="X", help="memory of a GPU (default: 80)")
@click.option("--host-gib", type=MEMORY, default=512, metavar="X", help="main memory of a machine (default: 512)")
def plan(
    configuration: Configuration,
    world_size: int,
    local_world_size: int,
    device: Literal["cuda", "cpu"],
    hbm_gib: float,
    host_gib: float,
) -> None:
    settings = configuration.settings
    if world_size % local_world_size:
        raise UserError(f"--world-size {world_size} is not a multiple of --local-world-size {local_world_size}")
    if world_size > MOST_RANKS:
        raise UserError(f"--world-size {world_size} is more than a plan is made for, {MOST_RANKS:,}")
    from mmoe_rec.training.sharded_tables import require_torchrec

    require_torchrec("a plan")
    import torch

    from mmoe_rec.features.layout import Layout
    from mmoe_rec.features.pipeline import largest_layout
    from mmoe_rec.model.mmoe import build_model
    from mmoe_rec.model.model_layout import ModelLayout
    from mmoe_rec.model.tables import torchrec_tables, used_tables
    from mmoe_rec.training.planning import Machines, Planning, Sharding, merge_neighbours, table_bytes

    built = Path(settings.data.work) / "features" / "encoded"
    if (built / "layout.json").is_file():
        layout, where = Layout.read(built), f"of the features in '{built.parent}'"
    else:
        layout = largest_layout(settings.schema_)
        where = "the largest that the settings allow; features are not built yet"
    layout, sharding = ModelLayout.of(layout, settings), Sharding.of(settings.training)
    sharding.check(device)
    hbm = int(hbm_gib * GIB) if device == "cuda" else 0
    machines = Machines(world_size, local_world_size, device, hbm, int(host_gib * GIB))
    rows = -(-settings.training.rows_of_step(MANY_ROWS) // world_size)
    model = build_model(layout, settings.model, torchrec_tables(layout, torch.device("meta")))
    (text, ranks), tables = Planning(layout, machines, rows, sharding).on_paper(model), used_tables(layout)
    print(f"table sizes: {where}")
    for table in sorted(tables, key=table_bytes, reverse=True):
        print(f"  {table.name}: {table.rows:,} rows of {table.dim}, {table_bytes(table) / GIB:,.2f} GiB")
    print(f"  together: {sum(map(table_bytes, tables)) / GIB:,.1f} GiB with the optimizer")
    print(text)
    print("\n".join(merge_neighbours([(each.rank, describe_rank(each, machines.rank_bytes)) for each in ranks])))
    slowest = max(rank.milliseconds for rank in ranks)
    weights = sum(each.numel() for each in model.mixture.parameters())
    dense = 1e3 * 6 * weights * rows / (TFLOPS[device] * 1e12)
    print(f"estimated step: {slowest + dense:.1f} ms, of which tables {slowest:.1f} and the dense part {dense:.1f}")
    if (built / "train").is_dir():
        with reading(built.parent, "a plan"):
            print_reading(built / "train", layout, rows, settings.training.shuffle_window, machines)
    start = f"torchrun --nnodes {world_size // local_world_size} --nproc-per-node {local_world_size}"
    print(f"next: {start} ... -m mmoe_rec train {configuration.options()}")


def describe_rank(rank: RankPlan, most: int) -> str:
    """What a rank takes of so many bytes, and of a step's time."""
    share = f"{rank.bytes / GIB:.2f} of {most / GIB:.2f} GiB ({rank.bytes / most:.0%})"
    return f"{share} for tables ({rank.tables / GIB:.2f}) and their activations, {rank.milliseconds:.2f} ms a step"


def print_reading(folder: Path, layout: Layout, rows: int, window: int, machines: Machines) -> None:
    """Prints what `measure_reading` finds, and the cores that read for a machine's GPUs."""
    try:
        rate = measure_reading(folder, layout, rows, window, machines)
    except UserError as error:  # the plan holds without
        print(f"reading was not measured: {error}")
        return
    taken = ROWS_OF_GPU * machines.local_world_size
    cores = f": {taken / rate:.1f} cores a machine for {taken:,} rows/s, as GPUs take in TorchRec's DLRM"
    print(f"reading: {rate:,.0f} rows/s of a core here{cores if machines.device == 'cuda' else ''}")


def measure_reading(folder: Path, layout: Layout, rows: int, window: int, machines: Machines) -> float:
    """Rows a second of a core, from files to batches of so many rows for each of the ranks of a machine, one after the
    other: in the second pass over a window of the order. Ranks that need rows of the same row group each decode it.
    """
    from mmoe_rec.batches.batch import make_batch
    from mmoe_rec.batches.encoded_rows import EncodedRows
    from mmoe_rec.batches.row_reader import TrainingReader
    from mmoe_rec.devices import freed_memory_kept
    from mmoe_rec.progress import quiet_loggers
    from mmoe_rec.training.ranks import NOISY_LOGGERS

    window = min(window, ROWS_READ)
    some, rate = EncodedRows(folder, layout, outcomes=True).head(window), 0.0
    ranks, size = machines.world_size, min(rows * machines.world_size, some.rows)
    with freed_memory_kept(), quiet_loggers(dict.fromkeys(NOISY_LOGGERS, logging.CRITICAL)):
        for epoch in range(2):
            start, count = time.process_time(), 0.0
            for rank in range(min(machines.local_world_size, RANKS_READ)):
                reader = TrainingReader(
                    some, batch_size=size, shuffle_window=window, seed=0, rank=rank, world_size=ranks
                )
                before = 0
                for read, position in reader.resume(reader.position(epoch), epoch + 1):
                    make_batch(read.encoded, layout, read.labels, position, numbers=read.numbers, torchrec=True)
                    count += (position.row - before) / ranks  # without the copies that stretch a batch
                    before = position.row
            rate = count / (time.process_time() - start)
    return rate
