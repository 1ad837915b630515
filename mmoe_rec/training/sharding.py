"""Sharded training: tables spread over the ranks, the optimizers of all parameters, and the plan of who holds what.

One path for a laptop and a cluster: world size 1 on a CPU shards as 64 GPUs do, and leaves out only what sends ids and
embeddings to other ranks (`look_up_directly`). Without torchrec, one process trains on tables in plain PyTorch.
"""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmoe_rec.batches.batch import Batch
from mmoe_rec.errors import UserError
from mmoe_rec.model.layout import EmbeddingTable, ModelLayout
from mmoe_rec.model.tables import COLUMNS, initial_rows, stored_width, to_stored, torchrec_tables, used_tables
from mmoe_rec.settings.sections import Training
from mmoe_rec.training.fbgemm import torchrec_installed
from mmoe_rec.training.losses import LOG_VARIANCES
from mmoe_rec.training.tables import (
    OneProcess,
    OneProcessTables,
    RowWiseAdagrad,
    Way,
    choose_way,
    look_up_directly,
    use_way,
)

FirstRows = Callable[[EmbeddingTable, int, int], Tensor]
"""Table, first and last row (exclusive) -> (last - first, dim) float32, the weights that these rows start from."""


@dataclass(frozen=True)
class ShardedModel:
    """A model spread over the ranks.

    model: torchrec's DistributedModelParallel, or `OneProcess`, called with a `Batch`; table_optimizer: its fused
    row-wise Adagrad, which updates the tables within the backward pass and takes its learning rate from `param_groups`
    at `zero_grad()` and `step()`; plan: a line for each table, how and where it is stored.
    """

    model: Any
    table_optimizer: Any
    plan: str

    @property
    def pipelined(self) -> bool:
        """Whether torchrec's pipeline takes the model: there are tables, on other ranks or on another device."""
        if isinstance(self.model, OneProcess):
            return False
        elsewhere = dist.get_world_size() > 1 or self.model.device.type != "cpu"
        return bool(self.plan) and elsewhere

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of all that is not a table: what a dense optimizer steps."""
        named = self.model.module.named_parameters()
        return {name: parameter for name, parameter in named if not name.startswith("tables.")}


def training_tables(layout: ModelLayout) -> nn.Module:
    """What `shard` takes as tables of a model: those of torchrec where it is installed."""
    return torchrec_tables(layout, torch.device("meta")) if torchrec_installed() else OneProcessTables(layout)


def shard(
    model: nn.Module,
    layout: ModelLayout,
    device: torch.device,
    *,
    batch_size: int,
    table_learning_rate: float,
    seed: int = 0,
    first_rows: FirstRows | None = None,
    way: Literal["auto"] | Way = "auto",
) -> ShardedModel:
    """Spreads a model over `training_tables` over the ranks of the current process group.

    batch_size: rows a rank and step. Tables start from `first_rows`, by default `initial_rows(table, seed, ...)`. A
    layout without tables gives plain data parallelism. Raises UserError when the tables do not fit into memory, or the
    way is not on offer.
    """
    first_rows = first_rows or (lambda table, first, last: initial_rows(table, seed, first, last))
    way = choose_way(way, device.type, dist.get_world_size())
    if not torchrec_installed():
        tables = model.get_submodule("tables")
        assert isinstance(tables, OneProcessTables), "a model over `training_tables`"
        one = OneProcess(model)
        _fill_tables(one, layout, first_rows)
        lines = [f"{table.name}: one process ({table.rows:,} rows)" for table in used_tables(layout)]
        return ShardedModel(one, RowWiseAdagrad(tables, table_learning_rate), "\n".join(lines))

    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.types import ShardingPlan
    from torchrec.streamable import Pipelineable

    Pipelineable.register(Batch)  # torchrec's pipelines accept only what they know as one
    plan = ShardingPlan({})
    if used_tables(layout):
        update_in_backward(model, table_learning_rate)
        plan = _plan(model, layout, device, batch_size)
    with warnings.catch_warnings():
        # An argument that torchrec hands to torch, deprecated there.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        # Wrapping the dense part also moves it; on a CPU alone there is neither to do.
        alone = device.type == "cpu" and dist.get_world_size() == 1
        parallel = DistributedModelParallel(
            model, device=device, plan=plan, sharders=sharders(), init_data_parallel=not alone
        )
    if device.type == "cpu":
        use_way(parallel, way)
    if alone and plan.plan:
        look_up_directly(parallel)
    _fill_tables(parallel, layout, first_rows)
    return ShardedModel(parallel, parallel.fused_optimizer, describe_plan(plan))


def _plan(model: nn.Module, layout: ModelLayout, device: torch.device, batch_size: int) -> Any:
    from torchrec.distributed.planner.types import PlannerError

    local, kind = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), cast("Literal['cpu', 'cuda']", device.type)
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    card = torch.cuda.get_device_properties(device).total_memory if kind == "cuda" else 0
    machines = Machines(dist.get_world_size(), local, kind, card, host)
    try:
        return planner(layout, machines, batch_size).collective_plan(model, sharders(), dist.group.WORLD)
    except PlannerError:
        raise explain_misfit(layout, machines) from None


@torch.no_grad()
def _fill_tables(parallel: Any, layout: ModelLayout, first_rows: FirstRows) -> None:
    state = parallel.state_dict()
    for table in used_tables(layout):
        stored = state[f"tables.embedding_bags.{table.name}.weight"]
        shards = stored.local_shards() if hasattr(stored, "local_shards") else None
        parts = [(0, stored)] if shards is None else [(each.metadata.shard_offsets[0], each.tensor) for each in shards]
        for first, weights in parts:  # the tensor is the storage itself
            weights.copy_(to_stored(first_rows(table, first, first + len(weights))))


class Optimizers:
    """Steps tables and dense parameters together. Its state goes by the names of parameters, on any number of ranks.

    dense: AdamW of all that is not a table.
    """

    def __init__(self, sharded: ShardedModel, settings: Training) -> None:
        self._tables = sharded.table_optimizer
        self._named = sharded.dense_parameters()
        groups: list[dict[str, Any]] = [
            {"params": [each for name, each in self._named.items() if name != LOG_VARIANCES]}
        ]
        if LOG_VARIANCES in self._named:
            # Decay would pull the weights of tasks toward 1.
            groups.append({"params": [self._named[LOG_VARIANCES]], "weight_decay": 0.0})
        self.dense = torch.optim.AdamW(
            groups, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the tables, then that of the dense part; each with the learning rate `lr` of its next step."""
        return [*self._tables.param_groups, *self.dense.param_groups]

    def zero_grad(self) -> None:
        """Clears all gradients, before a forward pass."""
        self._tables.zero_grad()
        self.dense.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Steps both optimizers, after a backward pass."""
        self._tables.step()
        self.dense.step()

    def init_state(self) -> None:
        """Makes the state that AdamW would make at its first step, as only what is there can be filled.

        Weights may change: they are to be filled afterwards.
        """
        for parameter in self._named.values():
            parameter.grad = torch.zeros_like(parameter)
        self.step()

    def state_dict(self) -> dict[str, Any]:
        """`state`: name of a parameter -> its state; the tensors are those that are stepped."""
        state = {name: dict(self.dense.state[each]) for name, each in self._named.items() if each in self.dense.state}
        return {"state": {**self._tables.state_dict()["state"], **state}}


# Which rank holds which part of which table: torchrec's planner, for the running ranks or for any, on paper.


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

    options: list[Any] = []
    listener = SimpleNamespace(log=lambda *, best_plan, **_: options.extend(best_plan))
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
    for part in (part for option in options for part in option.shards):
        taken[part.rank] += part.storage.hbm + part.storage.ddr
        times[part.rank] += part.perf.total
    return describe_plan(plan), [RankPlan(*each) for each in zip(itertools.count(), taken, times)]


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
