"""Sharded training: tables spread over the ranks, the optimizers of all parameters, and the plan of who holds what.

One path for a laptop and a cluster: world size 1 on a CPU shards as 64 GPUs do. Without torchrec, one process trains on
tables in plain PyTorch.
"""

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
from mmoe_rec.model.model_layout import EmbeddingTable, ModelLayout
from mmoe_rec.model.tables import initial_rows, padded_dim, to_padded, torchrec_tables, used_tables
from mmoe_rec.settings.training import Training
from mmoe_rec.training.losses import LOG_VARIANCES
from mmoe_rec.training.table_backends import (
    RowWiseAdagrad,
    SingleProcessModel,
    SingleProcessTables,
    TableBackend,
    copy_cpuinfo_to_fbgemm,
    require_torchrec,
)

RESERVED_FRACTION = 0.2  # of a rank's memory, for all but tables and their activations
GIB = 2**30
_FLOAT = 4
WHOLE_ROW_SHARDINGS = ("table_wise", "row_wise", "table_row_wise")
CPU_SHARDINGS = ("auto", "table_wise", "column_wise")  # torchrec's own limit

RowInitializer = Callable[[EmbeddingTable, int, int], Tensor]
"""Table, first and last row (exclusive) -> (last - first, dim) float32, the weights that these rows start from."""


# Which rank holds which part of which table: torchrec's planner, for the running ranks or for any, on paper.


def check_sharding(kind: str, device: str) -> None:
    """Raise UserError for a setting `training.sharding` that can't work on "cpu" or "cuda"."""
    if kind != "auto":
        require_torchrec(f"training.sharding {kind}", "set it to auto")
    if device == "cpu" and kind not in CPU_SHARDINGS:
        raise UserError(
            f"training.sharding is {kind}, which torchrec has on GPUs alone: on CPUs set it to "
            f"{', '.join(CPU_SHARDINGS[:-1])} or {CPU_SHARDINGS[-1]}"
        )


@dataclass(frozen=True)
class Cluster:
    """Ranks that train together, `local_world_size` of them on each machine.

    gpu_bytes: memory of a rank's GPU, 0 on CPUs; host_bytes: main memory of a machine.
    """

    world_size: int
    local_world_size: int
    device: Literal["cpu", "cuda"]
    gpu_bytes: int
    host_bytes: int

    @property
    def table_budget_bytes(self) -> int:
        """Memory of a rank that tables and their activations may take."""
        whole = self.gpu_bytes if self.device == "cuda" else self.host_bytes // self.local_world_size
        return int(whole * (1 - RESERVED_FRACTION))


class RankEstimate(NamedTuple):
    """What is expected of a rank. tables: bytes of their weights and optimizer; bytes: of these and of activations, as
    torchrec estimates them; milliseconds: of a step, likewise.
    """

    rank: int
    table_bytes: int
    total_bytes: int
    step_ms: float


def update_in_backward(model: nn.Module, learning_rate: float) -> None:
    """Has tables updated by row-wise Adagrad within the backward pass, once they are sharded."""
    from torch.distributed.optim import _apply_optimizer_in_backward
    from torchrec.optim import RowWiseAdagrad

    _apply_optimizer_in_backward(RowWiseAdagrad, model.get_submodule("tables").parameters(), {"lr": learning_rate})


@dataclass(frozen=True)
class ShardingPlanner:
    """What a plan of the tables follows from. batch_size: rows a rank and step; settings: how tables are spread."""

    layout: ModelLayout
    machines: Cluster
    batch_size: int
    settings: Training

    def sharders(self) -> list[Any]:
        """What knows how to spread tables."""
        from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

        if self.settings.communication_dtype == "fp32":
            return [EmbeddingBagCollectionSharder()]
        from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs
        from torchrec.distributed.types import CommOp

        codecs = get_qcomm_codecs(QCommsConfig(CommType.BF16, CommType.BF16))
        # Not `get_qcomm_codecs_registry`, which takes fp16 instead of bf16 on CPUs, although gloo sends both.
        return [EmbeddingBagCollectionSharder(qcomm_codecs_registry={each.name: codecs for each in CommOp})]

    def make_plan(self, model: nn.Module, group: Any = None, stats: Any = None) -> Any:
        """torchrec's plan for a model over `torchrec_tables`, which the ranks of a process group make together.

        stats: receives the plan. Raises UserError, with what would help, when the tables don't fit.
        """
        from torchrec.distributed.embedding_types import EmbeddingComputeKernel
        from torchrec.distributed.planner import EmbeddingShardingPlanner, types
        from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
        from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
        from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation

        machines, sharders, kind = self.machines, self.sharders(), self.settings.sharding

        class StorageEstimator(EmbeddingStorageEstimator):
            # torchrec counts one number of row-wise Adagrad for a whole row, and each part of a row has one.
            def estimate(self, sharding_options: Any, sharder_data_map: Any) -> None:
                super().estimate(sharding_options, sharder_data_map)
                for option, part in ((each, part) for each in sharding_options for part in each.shards):
                    missing = math.ceil(_FLOAT * part.size[0] * (1 - part.size[1] / option.tensor.shape[1]))
                    own, host = (missing, 0) if machines.device == "cuda" else (0, missing)
                    part.storage += types.Storage(hbm=own, ddr=host)

        # Data parallel is left out: its optimizer state has other keys, so a table could not be resharded.
        by_default = WHOLE_ROW_SHARDINGS if machines.device == "cuda" else ("table_wise",)
        # With `min_partition`, the number of parts of a row is that of the settings on any number of ranks, as is then
        # the state of row-wise Adagrad, which has a number for each part: so a table can be resharded.
        constraints = {
            table.name: types.ParameterConstraints(
                sharding_types=list(by_default) if kind == "auto" else [kind],
                compute_kernels=[EmbeddingComputeKernel.FUSED.value],
                min_partition=self.settings.shard_columns,
            )
            for table in used_tables(self.layout)
        }
        topology = types.TopologyFactory.create_topology(
            types.TrainerConfig(
                world_size=machines.world_size,
                local_world_size=machines.local_world_size,
                hbm_cap_bytes=machines.gpu_bytes,
                ddr_cap_bytes=machines.host_bytes // machines.local_world_size,
            ),
            kernel_config=types.KernelConfig(compute_device=machines.device),
        )
        estimators = [EmbeddingPerfEstimator(topology, constraints), StorageEstimator(topology, constraints)]
        planner = EmbeddingShardingPlanner(
            topology=topology,
            batch_size=self.batch_size,
            enumerator=EmbeddingEnumerator(topology, self.batch_size, constraints, estimators),
            storage_reservation=FixedPercentageStorageReservation(RESERVED_FRACTION),
            constraints=constraints,
            stats=stats,
            debug=False,
        )
        try:
            return planner.plan(model, sharders) if group is None else planner.collective_plan(model, sharders, group)
        except types.PlannerError:
            raise self._explain() from None

    def _explain(self) -> UserError:
        tables, machines = used_tables(self.layout), self.machines
        needed, offered = sum(map(table_bytes, tables)) / GIB, machines.world_size * machines.table_budget_bytes / GIB
        largest = max(tables, key=table_bytes)
        return UserError(
            f"the embedding tables take {needed:,.1f} GiB with their optimizer and do not fit, beside a step of "
            f"{self.batch_size:,} rows, into {machines.world_size} rank(s) with {offered:,.1f} GiB for them in all. "
            f"The largest, '{largest.name}', has {largest.rows:,} rows of {largest.dim} numbers and takes "
            f"{table_bytes(largest) / GIB:.1f} GiB. Use more ranks, spread rows by `training.sharding`, or lower "
            "`training.batch_size` or a table's `max_size`, `buckets` or `dim`."
        )

    def estimate_plan(self, model: nn.Module) -> tuple[str, list[RankEstimate]]:
        """The plan for machines that need not be there, as `describe_plan` tells it, and what each rank bears.

        model: over `torchrec_tables` on the device "meta". Raises UserError as `make`.
        """
        options: list[Any] = []
        update_in_backward(model, learning_rate=1.0)  # what it keeps takes memory
        plan = self.make_plan(model, stats=SimpleNamespace(log=lambda *, best_plan, **_: options.extend(best_plan)))
        ranks = [RankEstimate(rank, 0, 0, 0.0) for rank in range(self.machines.world_size)]
        for part in (part for option in options for part in option.shards):
            rank, tables, taken, time = ranks[part.rank]
            tables += part.size[0] * (part.size[1] + 1) * _FLOAT
            taken += part.storage.hbm + part.storage.ddr
            ranks[rank] = RankEstimate(rank, tables, taken, time + part.perf.total)
        return describe_plan(plan), ranks


def describe_plan(plan: Any) -> str:
    """One line per table."""
    lines = []
    for module in plan.plan.values():
        for table, parameter in module.items():
            shards = getattr(parameter.sharding_spec, "shards", None) or []
            split = len({each.shard_offsets[1] for each in shards}) > 1
            sizes = (f"{each.shard_sizes[0]:,} rows" + f" of {each.shard_sizes[1]} columns" * split for each in shards)
            places = list(zip((each.placement.rank() for each in shards), sizes, strict=True))
            lines.append(f"{table}: {parameter.sharding_type} ({', '.join(merge_adjacent_ranks(places))})")
    return "\n".join(lines)


def merge_adjacent_ranks(ranks: Sequence[tuple[int, str]]) -> list[str]:
    """The text on each rank, once for neighbours with the same text."""
    lines = []
    for text, group in itertools.groupby(ranks, key=itemgetter(1)):
        numbers = sorted({rank for rank, _ in group})  # one may have several parts of a row
        first, last = numbers[0], numbers[-1]
        together = f"{first}-{last}" if len(numbers) == last - first + 1 else ", ".join(map(str, numbers))
        who = f"rank {first}" if len(numbers) == 1 else f"each of ranks {together}"
        lines.append(f"{who}: {text}")
    return lines


def table_bytes(table: EmbeddingTable) -> int:
    """Bytes of a table's weights as they are stored, and of row-wise Adagrad's one number a row."""
    return table.rows * (padded_dim(table.dim) + 1) * _FLOAT


# Models spread over the running ranks.


@dataclass(frozen=True)
class ShardedModel:
    """A model spread over the ranks.

    model: torchrec's DistributedModelParallel, or `SingleProcessModel`, called with a `Batch`; table_optimizer: its
    fused row-wise Adagrad, which updates the tables within the backward pass and takes its learning rate from
    `param_groups` at `zero_grad()` and `step()`; plan: a line for each table, how and where it is stored.
    """

    model: Any
    table_optimizer: Any
    plan: str

    @property
    def pipelined(self) -> bool:
        """Whether torchrec's pipeline takes the model: there are tables, on other ranks or on another device."""
        if isinstance(self.model, SingleProcessModel):
            return False
        elsewhere = dist.get_world_size() > 1 or self.model.device.type != "cpu"
        return bool(self.plan) and elsewhere

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of all that is not a table: what a dense optimizer steps."""
        named = self.model.module.named_parameters()
        return {name: parameter for name, parameter in named if not name.startswith("tables.")}


def training_tables(layout: ModelLayout, way: TableBackend) -> nn.Module:
    """Return the tables of a backend, which `shard` takes as those of a model."""
    return torchrec_tables(layout, torch.device("meta")) if way == "fbgemm" else SingleProcessTables(layout)


def shard(
    model: nn.Module,
    layout: ModelLayout,
    device: torch.device,
    *,
    batch_size: int,
    settings: Training,
    row_initializer: RowInitializer | None = None,
) -> ShardedModel:
    """Spreads a model over `training_tables` over the ranks of the current process group.

    batch_size: rows a rank and step. Tables start from `row_initializer`, by default `initial_rows`. A
    layout without tables gives plain data parallelism. Raises UserError when the tables do not fit into memory, or the
    sharding is not on offer.
    """
    row_initializer = row_initializer or (lambda table, first, last: initial_rows(table, settings.seed, first, last))
    check_sharding(settings.sharding, device.type)
    tables = model.get_submodule("tables")
    if isinstance(tables, SingleProcessTables):
        one = SingleProcessModel(model)
        _fill_tables(one, layout, row_initializer)
        lines = [f"{table.name}: one process ({table.rows:,} rows)" for table in used_tables(layout)]
        return ShardedModel(one, RowWiseAdagrad(tables, settings.table_learning_rate), "\n".join(lines))

    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.types import ShardingPlan
    from torchrec.streamable import Pipelineable

    Pipelineable.register(Batch)  # torchrec's pipelines accept only what they know as one
    plan = ShardingPlan({})
    planning = ShardingPlanner(layout, _machines(device), batch_size, settings)
    if used_tables(layout):
        update_in_backward(model, settings.table_learning_rate)
        plan = planning.make_plan(model, dist.group.WORLD)
    with warnings.catch_warnings():
        # An argument that torchrec hands to torch, deprecated there.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        # Wrapping the dense part also moves it; on a CPU alone there is neither to do.
        alone = device.type == "cpu" and dist.get_world_size() == 1
        parallel = DistributedModelParallel(
            model, device=device, plan=plan, sharders=planning.sharders(), init_data_parallel=not alone
        )
    if device.type == "cpu":
        copy_cpuinfo_to_fbgemm()
    _fill_tables(parallel, layout, row_initializer)
    return ShardedModel(parallel, parallel.fused_optimizer, describe_plan(plan))


def _machines(device: torch.device) -> Cluster:
    """The machines that train."""
    kind = cast("Literal['cpu', 'cuda']", device.type)
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    card = torch.cuda.get_device_properties(device).total_memory if kind == "cuda" else 0
    ranks_of_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # as torchrun has started them
    return Cluster(dist.get_world_size(), ranks_of_machine, kind, card, host)


@torch.no_grad()
def _fill_tables(parallel: Any, layout: ModelLayout, row_initializer: RowInitializer) -> None:
    state = parallel.state_dict()
    for table in used_tables(layout):
        for (first, column), weights in _local_parts(state[f"tables.embedding_bags.{table.name}.weight"]):
            rows = to_padded(row_initializer(table, first, first + len(weights)))
            weights.copy_(rows[:, column : column + weights.shape[1]])


def _local_parts(stored: Any) -> list[tuple[Sequence[int], Tensor]]:
    """First row and column, and the storage itself, of each part of a table that this rank has."""
    if hasattr(stored, "local_shards"):
        return [(each.metadata.shard_offsets, each.tensor) for each in stored.local_shards()]
    return [((0, 0), stored)]


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
        self._tables.zero_grad()
        self.dense.zero_grad(set_to_none=True)

    def step(self) -> None:
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
