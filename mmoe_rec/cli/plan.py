"""mmoe-rec plan --config configs/cluster.yaml --world-size 16 --local-world-size 8 --hbm-gib 80

Prints which rank would hold which part of the embedding tables, how much memory that takes, and about how long looking
them up takes in a step, for machines that need not exist: it needs no GPU, no log and no other process. Tables that do
not fit are refused, with their sizes.

The sizes of tables are those of the features in `data.work_dir`, if they are built; else the largest that the settings
allow, by `max_size` and `buckets`. Times are torchrec's estimate for looking tables up and exchanging what was found:
good for comparing settings, no promise.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from mmoe_rec.cli.main import COUNT, Configuration, NumberBetween, settings_command
from mmoe_rec.errors import UserError

if TYPE_CHECKING:
    from mmoe_rec.training.sharding import RankEstimate

GIB = 2**30
ASSUMED_TRAINING_ROWS = 10**9  # to train on, where `training.batch_size` depends on them: what asks for a plan is large
MAX_RANKS = 4_096  # the planner's time grows with them; a plan for so many takes about half a minute
MEMORY = NumberBetween(0.01, 1e6)  # both ends are far beyond any machine


@settings_command(__doc__)
@click.option("--world-size", type=COUNT, required=True, metavar="N", help="processes, one for each GPU")
@click.option("--local-world-size", type=COUNT, required=True, metavar="N", help="processes on each machine")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", help="default: cuda")
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
    if world_size > MAX_RANKS:
        raise UserError(f"--world-size {world_size} is more than a plan is made for, {MAX_RANKS:,}")
    from mmoe_rec.training.table_backends import require_torchrec

    require_torchrec("a plan")
    import torch

    from mmoe_rec.features.layout import Layout
    from mmoe_rec.features.pipeline import max_layout
    from mmoe_rec.model.mmoe import build_model
    from mmoe_rec.model.model_layout import ModelLayout
    from mmoe_rec.model.tables import torchrec_tables, used_tables
    from mmoe_rec.training.sharding import Cluster, ShardingPlanner, check_sharding, merge_adjacent_ranks, table_bytes

    built = Path(settings.data.work_dir) / "features" / "encoded"
    if (built / "layout.json").is_file():
        layout, where = Layout.read(built), f"of the features in '{built.parent}'"
    else:
        layout = max_layout(settings.schema_)
        where = "the largest that the settings allow; features are not built yet"
    layout = ModelLayout.of(layout, settings)
    check_sharding(settings.training.sharding, device)
    hbm = int(hbm_gib * GIB) if device == "cuda" else 0
    machines = Cluster(world_size, local_world_size, device, hbm, int(host_gib * GIB))
    rows = -(-settings.training.resolve_batch_size(ASSUMED_TRAINING_ROWS) // world_size)
    model = build_model(layout, settings.model, torchrec_tables(layout, torch.device("meta")))
    (text, ranks), tables = (
        ShardingPlanner(layout, machines, rows, settings.training).estimate_plan(model),
        used_tables(layout),
    )
    print(f"table sizes: {where}")
    for table in sorted(tables, key=table_bytes, reverse=True):
        print(f"  {table.name}: {table.rows:,} rows of {table.dim}, {table_bytes(table) / GIB:,.2f} GiB")
    print(f"  together: {sum(map(table_bytes, tables)) / GIB:,.1f} GiB with the optimizer")
    print(text)
    print(
        "\n".join(
            merge_adjacent_ranks([(each.rank, describe_rank(each, machines.table_budget_bytes)) for each in ranks])
        )
    )
    print(f"estimated time of tables in a step: {max(rank.step_ms for rank in ranks):.1f} ms")
    start = f"torchrun --nnodes {world_size // local_world_size} --nproc-per-node {local_world_size}"
    print(f"next: {start} ... -m mmoe_rec train {configuration.options()}")


def describe_rank(rank: RankEstimate, most: int) -> str:
    """What a rank takes of so many bytes, and of a step's time."""
    share = f"{rank.total_bytes / GIB:.2f} of {most / GIB:.2f} GiB ({rank.total_bytes / most:.0%})"
    return f"{share} for tables ({rank.table_bytes / GIB:.2f}) and their activations, {rank.step_ms:.2f} ms a step"
