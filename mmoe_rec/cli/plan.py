"""mmoe-rec plan --config configs/cluster.yaml --world-size 16 --local-world-size 8 --hbm-gib 80

Estimate the memory and the lookup time per step of sharded embedding tables, and print the tables on each rank. The
machines don't need to exist. The command needs no GPU, no log and no other process. It fails if the tables don't fit,
and prints their sizes.

Table sizes come from the features in `data.work_dir`. If the features aren't built, the command assumes the largest
sizes that `max_size` and `buckets` allow. Times are torchrec's estimates for lookups and their communication. Use them
to compare settings, not to predict the real time.
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
ASSUMED_TRAINING_ROWS = 10**9  # Assumption for an automatic `training.batch_size`, since planned models are large.
MAX_RANKS = 4_096  # The planner needs about 30 seconds for this number of ranks.
MEMORY = NumberBetween(0.01, 1e6)  # Limits far beyond any machine, in GiB.


@settings_command(__doc__)
@click.option("--world-size", type=COUNT, required=True, metavar="N", help="number of processes, one per GPU")
@click.option("--local-world-size", type=COUNT, required=True, metavar="N", help="number of processes on each machine")
@click.option(
    "--device",
    type=click.Choice(["cuda", "cpu"]),
    default="cuda",
    help="device of the planned training (default: cuda)",
)
@click.option("--hbm-gib", type=MEMORY, default=80, metavar="X", help="memory of a GPU in GiB (default: 80)")
@click.option(
    "--host-gib", type=MEMORY, default=512, metavar="X", help="main memory of a machine in GiB (default: 512)"
)
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
        raise UserError(f"--world-size {world_size} exceeds the limit of {MAX_RANKS:,} ranks")
    from mmoe_rec.training.table_backends import require_torchrec

    require_torchrec("a plan")
    import torch

    from mmoe_rec.features.layout import Layout
    from mmoe_rec.features.pipeline import max_layout
    from mmoe_rec.model.mmoe import build_model
    from mmoe_rec.model.model_layout import ModelLayout
    from mmoe_rec.model.tables import torchrec_tables, used_tables
    from mmoe_rec.training.sharding import Cluster, ShardingPlanner, check_sharding, merge_adjacent_ranks, table_bytes

    encoded = Path(settings.data.work_dir) / "features" / "encoded"
    if (encoded / "layout.json").is_file():
        layout, size_source = Layout.read(encoded), f"from the features in '{encoded.parent}'"
    else:
        layout = max_layout(settings.schema_)
        size_source = "the largest that the settings allow, since the features aren't built"
    layout = ModelLayout.of(layout, settings)
    check_sharding(settings.training.sharding, device)
    hbm = int(hbm_gib * GIB) if device == "cuda" else 0
    cluster = Cluster(world_size, local_world_size, device, hbm, int(host_gib * GIB))
    rank_rows = -(-settings.training.resolve_batch_size(ASSUMED_TRAINING_ROWS) // world_size)
    model = build_model(layout, settings.model, torchrec_tables(layout, torch.device("meta")))
    text, ranks = ShardingPlanner(layout, cluster, rank_rows, settings.training).estimate_plan(model)
    tables = used_tables(layout)
    print(f"table sizes: {size_source}")
    for table in sorted(tables, key=table_bytes, reverse=True):
        print(f"  {table.name}: {table.rows:,} rows x {table.dim} dims, {table_bytes(table) / GIB:,.2f} GiB")
    print(f"  total: {sum(map(table_bytes, tables)) / GIB:,.1f} GiB with the optimizer")
    print(text)
    usages = [(rank.rank, _describe_rank(rank, cluster.table_budget_bytes)) for rank in ranks]
    print("\n".join(merge_adjacent_ranks(usages)))
    print(f"estimated time of tables in a step: {max(rank.step_ms for rank in ranks):.1f} ms")
    start = f"torchrun --nnodes {world_size // local_world_size} --nproc-per-node {local_world_size}"
    print(f"next: {start} ... -m mmoe_rec train {configuration.options()}")


def _describe_rank(rank: RankEstimate, budget_bytes: int) -> str:
    """Describe a rank's memory, out of the budget for tables and activations, and its step time."""
    usage = f"{rank.total_bytes / GIB:.2f} of {budget_bytes / GIB:.2f} GiB ({rank.total_bytes / budget_bytes:.0%})"
    return f"{usage} for tables ({rank.table_bytes / GIB:.2f}) and their activations, {rank.step_ms:.2f} ms a step"
