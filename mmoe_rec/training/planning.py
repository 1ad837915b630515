"""Which rank holds which part of which table: torchrec's planner, for the running ranks or for any, on paper."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal, NamedTuple

from torch import nn

from mmoe_rec.errors import UserError
from mmoe_rec.model.layout import EmbeddingTable, ModelLayout
from mmoe_rec.model.tables import COLUMNS, stored_width, used_tables

# The planner tries every combination of ways to spread the tables if there are at most this many, by ranks; beyond that
# it starts from the best way of each table and goes on to the next.
_COMBINATIONS_BY_RANKS = 64_000
_MOST_COMBINATIONS = 10_000
RESERVED_SHARE = 0.2  # of a rank's memory, for all but tables and their activations
GIB = 2**30
_FLOAT = 4


@dataclass(frozen=True)
class Machines:
    """Ranks that train together, `local_world_size` of them on each machine.

    card_bytes: memory of a rank's GPU, 0 on CPUs; host_bytes: main memory of a machine.
    """

    world_size: int
    local_world_size: int
    device: Literal["cpu", "cuda"]
    card_bytes: int
    host_bytes: int

    @property
    def rank_bytes(self) -> int:
        """Memory of a rank that tables and their activations may take."""
        whole = self.card_bytes if self.device == "cuda" else self.host_bytes // self.local_world_size
        return int(whole * (1 - RESERVED_SHARE))


class RankPlan(NamedTuple):
    """What the planner expects of a rank: bytes of tables, optimizer and activations, and milliseconds a step."""

    rank: int
    bytes: int
    milliseconds: float


def update_in_backward(model: nn.Module, learning_rate: float) -> None:
    """Has tables updated by row-wise Adagrad within the backward pass, once they are sharded."""
    from torch.distributed.optim import _apply_optimizer_in_backward
    from torchrec.optim import RowWiseAdagrad

    _apply_optimizer_in_backward(RowWiseAdagrad, model.get_submodule("tables").parameters(), {"lr": learning_rate})


def sharders() -> list[Any]:
    """What knows how to spread tables."""
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

    return [EmbeddingBagCollectionSharder()]


def planner(layout: ModelLayout, machines: Machines, batch_size: int, stats: Any = None) -> Any:
    """torchrec's planner. batch_size: rows a rank and step; stats: receives the plan."""
    from torchrec.distributed.embedding_types import EmbeddingComputeKernel
    from torchrec.distributed.planner import EmbeddingShardingPlanner
    from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
    from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer, UniformProposer
    from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
    from torchrec.distributed.planner.types import KernelConfig, ParameterConstraints, TopologyFactory, TrainerConfig
    from torchrec.distributed.types import ShardingType

    # Data parallel is left out (its optimizer state has other keys, so a table could not be resharded) and so is
    # column-wise (row-wise Adagrad would keep a state per shard of a row).
    types = [ShardingType.TABLE_WISE]
    if machines.device == "cuda":
        types += [ShardingType.ROW_WISE, ShardingType.TABLE_ROW_WISE]
    allowed = ParameterConstraints(
        sharding_types=[each.value for each in types], compute_kernels=[EmbeddingComputeKernel.FUSED.value]
    )
    topology = TopologyFactory.create_topology(
        TrainerConfig(
            world_size=machines.world_size,
            local_world_size=machines.local_world_size,
            hbm_cap_bytes=machines.card_bytes,
            ddr_cap_bytes=machines.host_bytes // machines.local_world_size,
        ),
        kernel_config=KernelConfig(compute_device=machines.device),
    )
    constraints = {table.name: allowed for table in used_tables(layout)}
    return EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        enumerator=EmbeddingEnumerator(topology, batch_size, constraints),
        storage_reservation=FixedPercentageStorageReservation(RESERVED_SHARE),
        proposer=[
            GridSearchProposer(min(_MOST_COMBINATIONS, _COMBINATIONS_BY_RANKS // machines.world_size)),
            GreedyProposer(),
            GreedyProposer(use_depth=False),
            UniformProposer(),
        ],
        constraints=constraints,
        stats=stats,
        debug=False,
    )


def plan_on_paper(
    model: nn.Module, layout: ModelLayout, machines: Machines, batch_size: int
) -> tuple[str, list[RankPlan]]:
    """The plan for machines that need not be there, as `describe_plan` tells it, and what each rank bears.

    model: over `torchrec_tables` on the device "meta".

    Raises UserError, with the reason and what would help, when the tables don't fit.
    """
    from torchrec.distributed.planner.types import PlannerError

    listener = _Listener()
    update_in_backward(model, learning_rate=1.0)  # what it keeps takes memory
    try:
        plan = planner(layout, machines, batch_size, listener).plan(model, sharders())
    except PlannerError:
        try:
            planner(layout, machines, 1).plan(model, sharders())
        except PlannerError:
            raise explain_misfit(layout, machines) from None
        raise UserError(
            f"the embedding tables fit, but not beside what a step of {batch_size:,} rows a rank takes: set "
            "`training.batch_size` lower, or use more ranks"
        ) from None
    taken, times = [0] * machines.world_size, [0.0] * machines.world_size
    for part in (part for option in listener.options for part in option.shards):
        taken[part.rank] += part.storage.hbm + part.storage.ddr
        times[part.rank] += part.perf.total
    return describe_plan(plan), [RankPlan(*each) for each in zip(itertools.count(), taken, times)]


class _Listener:
    """Keeps what the planner reports of its plan."""

    def __init__(self) -> None:
        self.options: Sequence[Any] = ()

    def log(self, *, best_plan: Sequence[Any], **_: Any) -> None:
        """Called by the planner."""
        self.options = best_plan


def describe_plan(plan: Any) -> str:
    """One line per table."""
    lines = []
    for module in plan.plan.values():
        for table, parameter in module.items():
            shards = getattr(parameter.sharding_spec, "shards", None) or []
            places = [(each.placement.rank(), f"{each.shard_sizes[0]:,} rows") for each in shards]
            lines.append(f"{table}: {parameter.sharding_type} ({', '.join(merge_neighbours(places))})")
    return "\n".join(lines)


def merge_neighbours(ranks: Sequence[tuple[int, str]]) -> list[str]:
    """The text on each rank, once for neighbours with the same text."""
    lines = []
    for text, group in itertools.groupby(ranks, key=itemgetter(1)):
        numbers = [rank for rank, _ in group]
        who = f"rank {numbers[0]}" if len(numbers) == 1 else f"each of ranks {numbers[0]}-{numbers[-1]}"
        lines.append(f"{who}: {text}")
    return lines


def table_bytes(table: EmbeddingTable) -> int:
    """Bytes of a table's weights as they are stored, and of row-wise Adagrad's one number a row."""
    return table.rows * (stored_width(table.dim) + 1) * _FLOAT


def explain_misfit(layout: ModelLayout, machines: Machines) -> UserError:
    """Why the tables don't fit, and which setting would make them."""
    tables = sorted(used_tables(layout), key=table_bytes, reverse=True)
    needed, offered = sum(map(table_bytes, tables)), machines.world_size * machines.rank_bytes
    largest = tables[0]
    where = f"{machines.world_size} rank(s), each with {machines.rank_bytes / GIB:.2f} GiB for them"
    what = f"the embedding tables take {needed / GIB:.1f} GiB with their optimizer and do not fit into {where}"
    most = f"the largest, '{largest.name}', has {largest.rows:,} rows of {largest.dim} numbers"
    whole = machines.rank_bytes if machines.device == "cpu" else offered  # on CPUs a table is not split
    room = whole - (0 if machines.device == "cpu" else needed - table_bytes(largest))
    ways = []
    if machines.device == "cuda" or table_bytes(largest) <= machines.rank_bytes:
        machines_needed = math.ceil(needed * 1.1 / machines.rank_bytes / machines.local_world_size)
        ranks = max(machines_needed * machines.local_world_size, machines.world_size + machines.local_world_size)
        ways.append(f"use {ranks} ranks")
    if room > 0 and (rows := int(room * 0.9) // ((stored_width(largest.dim) + 1) * _FLOAT)) < largest.rows:
        ways.append(f"set `max_size` (or `buckets`) of '{largest.name}' to {rows:,} at most")
    narrower = int(largest.dim * 0.9 * (offered / needed)) // COLUMNS * COLUMNS  # other widths take no less
    if 0 < narrower < largest.dim:
        ways.append(f"make `dim` smaller everywhere, {narrower} instead of {largest.dim}")
    return UserError(f"{what}; {most}: {', or '.join(ways) or 'give each rank more memory'}")
