"""python -m pipelines.plan --config configs/cluster.yaml --world-size 16 --local-world-size 8 --hbm-gib 80

Prints which rank would hold which part of the embedding tables, how much memory that takes, and about how long a step
would take, for machines that need not exist: it needs no GPU, no log and no other process. What does not fit is
refused, with the reason and with the settings that would make it fit.

The sizes of tables are those of the features in `data.work`, if they are built; else the largest that the settings
allow, by `max_size` and `buckets`. Times are torchrec's estimate for looking tables up and exchanging what was found,
and the operations of the dense part at `--tflops`: good for comparing settings, no promise.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmoe_rec.errors import UserError, exit_with_message
from mmoe_rec.jobs.commands.command import count, number_between, read_command
from mmoe_rec.program import spelled

if TYPE_CHECKING:
    from mmoe_rec.model.layout import ModelLayout
    from mmoe_rec.settings.sections import Settings
    from mmoe_rec.training.planning import Machines, PaperPlan

GIB = 2**30
MOST_RANKS = 16_384  # the planner's time grows with them; a plan for so many takes about half a minute
# Floating-point operations a second of a rank in products of bf16 matrices, as training reaches them.
TFLOPS = {"cuda": 100.0, "cpu": 0.4}


@exit_with_message()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments, settings = read_command(__doc__ or "", argv, _add_arguments)
    if arguments.world_size % arguments.local_world_size:
        raise UserError(
            f"--world-size {arguments.world_size} is not a multiple of --local-world-size {arguments.local_world_size}"
        )
    if arguments.world_size > MOST_RANKS:
        raise UserError(f"--world-size {arguments.world_size} is more than a plan is made for, {MOST_RANKS:,}")
    from mmoe_rec.training.fbgemm import require_torchrec

    require_torchrec("a plan")
    import torch

    from mmoe_rec.model.mmoe import build_model
    from mmoe_rec.model.tables import torchrec_tables
    from mmoe_rec.training.planning import Machines, plan_on_paper

    layout, where = _layout(settings)
    machines = Machines(
        arguments.world_size,
        arguments.local_world_size,
        arguments.device,
        int(arguments.hbm_gib * GIB) if arguments.device == "cuda" else 0,
        int(arguments.host_gib * GIB),
    )
    rows = -(-settings.training.batch_size // machines.world_size)
    model = build_model(layout, settings.model, torchrec_tables(layout, torch.device("meta")))
    plan = plan_on_paper(model, layout, machines, rows)
    print(f"table sizes: {where}")
    _print_tables(layout)
    print(plan.text)
    dense = sum(each.numel() for each in model.mixture.parameters())
    tflops = arguments.tflops or TFLOPS[arguments.device]
    _print_ranks(plan, machines, 1e3 * 6 * dense * rows / (tflops * 1e12))
    start = f"torchrun --nnodes {machines.world_size // machines.local_world_size}"
    options = shlex.join(["--config", arguments.config, *arguments.overrides])
    print(spelled(f"next: {start} --nproc-per-node {machines.local_world_size} ... -m pipelines.train {options}"))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world-size", type=count, required=True, metavar="N", help="processes, one for each GPU")
    parser.add_argument("--local-world-size", type=count, required=True, metavar="N", help="processes on each machine")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    # Both ends are far beyond any machine.
    memory, speed = number_between(0.01, 1e6), number_between(0.001, 1e6)
    parser.add_argument(
        "--hbm-gib", type=memory, default=80, metavar="X", help="memory of a GPU (default: %(default)s)"
    )
    parser.add_argument(
        "--host-gib", type=memory, default=512, metavar="X", help="main memory of a machine (default: %(default)s)"
    )
    parser.add_argument(
        "--tflops", type=speed, metavar="X", help="what a process reaches in bf16 products (default: 100; CPU: 0.4)"
    )


def _layout(settings: Settings) -> tuple[ModelLayout, str]:
    """The layout, and where its sizes come from."""
    from mmoe_rec.features.layout import Layout
    from mmoe_rec.features.pipeline import largest_layout
    from mmoe_rec.model.layout import ModelLayout

    built = Path(settings.data.work) / "features" / "encoded"
    if (built / "layout.json").is_file():
        layout, where = Layout.read(built), f"of the features in '{built.parent}'"
    else:
        layout = largest_layout(settings.schema_)
        where = "the largest that the settings allow; features are not built yet"
    return ModelLayout.of(layout, settings), where


def _print_tables(layout: ModelLayout) -> None:
    from mmoe_rec.model.tables import used_tables
    from mmoe_rec.training.planning import table_bytes

    tables = used_tables(layout)
    for table in sorted(tables, key=table_bytes, reverse=True):
        print(f"  {table.name}: {table.rows:,} rows of {table.dim}, {table_bytes(table) / GIB:,.2f} GiB")
    print(f"  together: {sum(map(table_bytes, tables)) / GIB:,.1f} GiB with the optimizer")


def _print_ranks(plan: PaperPlan, machines: Machines, dense_ms: float) -> None:
    from mmoe_rec.training.planning import alike

    said = []
    for each in plan.ranks:
        taken = (
            f"{each.bytes / GIB:.2f} of {machines.rank_bytes / GIB:.2f} GiB ({each.bytes / machines.rank_bytes:.0%})"
        )
        said.append((each.rank, f"{taken} for tables and their activations, {each.milliseconds:.2f} ms a step"))
    print("\n".join(alike(said)))
    slowest = max((rank.milliseconds for rank in plan.ranks), default=0.0)
    print(
        f"estimated step: {slowest + dense_ms:.1f} ms, of which tables {slowest:.1f} and the dense part {dense_ms:.1f}"
    )
