"""Sharded training: the sharding plan, embedding tables sharded over ranks (processes), and the optimizers.

With torchrec, a laptop and a cluster use the same code: a single process shards each table into one part. Without
torchrec, a single process trains on tables in plain PyTorch.
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

RESERVED_FRACTION = 0.2  # Fraction of a rank's memory that is kept free of tables and their activations.
GIB = 2**30
_FLOAT = 4  # Bytes of a float32.
WHOLE_ROW_SHARDINGS = ("table_wise", "row_wise", "table_row_wise")
CPU_SHARDINGS = ("auto", "table_wise", "column_wise")  # torchrec supports no other kinds on CPUs.

RowInitializer = Callable[[EmbeddingTable, int, int], Tensor]
"""Initial weights of rows of a table: (table, first row, end row) -> float32, shape (end - first, dim)."""


# The sharding plan, which torchrec's planner makes for the running ranks or for a hypothetical cluster.


def check_sharding(kind: str, device: str) -> None:
    """Raise UserError if the device or the installation doesn't support a kind of sharding.

    Args:
        kind: The setting `training.sharding`.
        device: "cpu" or "cuda".
    """
    if kind != "auto":
        require_torchrec(f"training.sharding {kind}", "set it to auto")
    if device == "cpu" and kind not in CPU_SHARDINGS:
        raise UserError(
            f"training.sharding is {kind}, which torchrec supports only on GPUs. On CPUs, set it to "
            f"{', '.join(CPU_SHARDINGS[:-1])} or {CPU_SHARDINGS[-1]}."
        )


@dataclass(frozen=True)
class Cluster:
    """Machines whose ranks train together.

    Attributes:
        world_size: Number of all ranks.
        local_world_size: Number of ranks on each machine.
        device: Device type of the ranks.
        gpu_bytes: Memory of a rank's GPU, 0 on CPUs.
        host_bytes: Main memory of a machine.
    """

    world_size: int
    local_world_size: int
    device: Literal["cpu", "cuda"]
    gpu_bytes: int
    host_bytes: int

    @property
    def table_budget_bytes(self) -> int:
        """Memory of a rank for tables and their activations."""
        total = self.gpu_bytes if self.device == "cuda" else self.host_bytes // self.local_world_size
        return int(total * (1 - RESERVED_FRACTION))


class RankEstimate(NamedTuple):
    """Estimated load of a rank.

    Attributes:
        rank: Number of the rank.
        table_bytes: Bytes of the tables' weights and optimizer state.
        total_bytes: torchrec's estimate for tables, optimizer state and activations.
        step_ms: torchrec's estimate of the time that tables take in a step, including communication.
    """

    rank: int
    table_bytes: int
    total_bytes: int
    step_ms: float


def _update_in_backward(model: nn.Module, learning_rate: float) -> None:
    """Make the model's backward pass, after sharding, update the tables by row-wise Adagrad."""
    from torch.distributed.optim import _apply_optimizer_in_backward
    from torchrec.optim import RowWiseAdagrad

    _apply_optimizer_in_backward(RowWiseAdagrad, model.get_submodule("tables").parameters(), {"lr": learning_rate})


@dataclass(frozen=True)
class ShardingPlanner:
    """Planner of the tables' sharding.

    Attributes:
        layout: The model's tables and inputs.
        cluster: Ranks to plan for.
        batch_size: Rows per rank and step.
        settings: Training settings, with the kind of sharding and the data type of communication.
    """

    layout: ModelLayout
    cluster: Cluster
    batch_size: int
    settings: Training

    def sharders(self) -> list[Any]:
        """Return torchrec's sharders for the tables, which also set the data type of communication."""
        from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

        if self.settings.communication_dtype == "fp32":
            return [EmbeddingBagCollectionSharder()]
        from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs
        from torchrec.distributed.types import CommOp

        codecs = get_qcomm_codecs(QCommsConfig(CommType.BF16, CommType.BF16))
        # `get_qcomm_codecs_registry` would replace bf16 by fp16 on CPUs, although gloo supports both.
        return [EmbeddingBagCollectionSharder(qcomm_codecs_registry={op.name: codecs for op in CommOp})]

    def _make_plan(self, model: nn.Module, group: Any = None, stats: Any = None) -> Any:
        """Return the `ShardingPlan` on which all ranks of `group` agree, and pass its estimates to `stats.log`."""
        from torchrec.distributed.embedding_types import EmbeddingComputeKernel
        from torchrec.distributed.planner import EmbeddingShardingPlanner, types
        from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
        from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
        from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation

        cluster, sharders, kind = self.cluster, self.sharders(), self.settings.sharding

        class StorageEstimator(EmbeddingStorageEstimator):
            # torchrec counts one optimizer value per row. Row-wise Adagrad has one per column shard of a row.
            def estimate(self, sharding_options: Any, sharder_data_map: Any) -> None:
                super().estimate(sharding_options, sharder_data_map)
                for option, part in ((table, part) for table in sharding_options for part in table.shards):
                    missing = math.ceil(_FLOAT * part.size[0] * (1 - part.size[1] / option.tensor.shape[1]))
                    hbm, ddr = (missing, 0) if cluster.device == "cuda" else (0, missing)
                    part.storage += types.Storage(hbm=hbm, ddr=ddr)

        # `auto` never copies a table to all ranks (data parallelism). The optimizer state would then have different
        # keys, so a checkpoint couldn't be resumed with a different sharding.
        auto_kinds = WHOLE_ROW_SHARDINGS if cluster.device == "cuda" else ("table_wise",)
        # Row-wise Adagrad has one value per row and column shard. `min_partition` fixes the number of column shards, so
        # that a checkpoint can be resumed on another number of ranks.
        constraints = {
            table.name: types.ParameterConstraints(
                sharding_types=list(auto_kinds) if kind == "auto" else [kind],
                compute_kernels=[EmbeddingComputeKernel.FUSED.value],
                min_partition=self.settings.shard_columns,
            )
            for table in used_tables(self.layout)
        }
        topology = types.TopologyFactory.create_topology(
            types.TrainerConfig(
                world_size=cluster.world_size,
                local_world_size=cluster.local_world_size,
                hbm_cap_bytes=cluster.gpu_bytes,
                ddr_cap_bytes=cluster.host_bytes // cluster.local_world_size,
            ),
            kernel_config=types.KernelConfig(compute_device=cluster.device),
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
            raise self._memory_error() from None

    def _memory_error(self) -> UserError:
        tables, cluster = used_tables(self.layout), self.cluster
        needed, available = sum(map(table_bytes, tables)) / GIB, cluster.world_size * cluster.table_budget_bytes / GIB
        largest = max(tables, key=table_bytes)
        return UserError(
            f"the embedding tables take {needed:,.1f} GiB with their optimizer. They do not fit, with a step of "
            f"{self.batch_size:,} rows, into {cluster.world_size} rank(s) with {available:,.1f} GiB for tables in all. "
            f"The largest table, '{largest.name}', has {largest.rows:,} rows of {largest.dim} columns and takes "
            f"{table_bytes(largest) / GIB:.1f} GiB. Use more ranks, shard rows by `training.sharding`, or lower "
            "`training.batch_size` or a table's `max_size`, `buckets` or `dim`."
        )

    def estimate_plan(self, model: nn.Module) -> tuple[str, list[RankEstimate]]:
        """Plan for a cluster that need not exist. Return the plan as text (`describe_plan`) and the load of each rank.

        Args:
            model: Model whose tables are `torchrec_tables`, on torch's device "meta", which allocates no memory.

        Raises:
            UserError: The tables don't fit into the ranks' memory.
        """
        options: list[Any] = []
        _update_in_backward(model, learning_rate=1.0)  # This adds the memory of the optimizer state to the estimate.
        plan = self._make_plan(model, stats=SimpleNamespace(log=lambda *, best_plan, **_: options.extend(best_plan)))
        ranks = [RankEstimate(rank, 0, 0, 0.0) for rank in range(self.cluster.world_size)]
        for part in (part for option in options for part in option.shards):
            rank, tables, total, time = ranks[part.rank]
            tables += part.size[0] * (part.size[1] + 1) * _FLOAT
            total += part.storage.hbm + part.storage.ddr
            ranks[rank] = RankEstimate(rank, tables, total, time + part.perf.total)
        return describe_plan(plan), ranks


def describe_plan(plan: Any) -> str:
    """Describe torchrec's plan, one line for each table."""
    lines = []
    for module in plan.plan.values():
        for table, parameter in module.items():
            shards = getattr(parameter.sharding_spec, "shards", None) or []
            split = len({part.shard_offsets[1] for part in shards}) > 1
            sizes = (f"{part.shard_sizes[0]:,} rows" + f" of {part.shard_sizes[1]} columns" * split for part in shards)
            ranks = list(zip((part.placement.rank() for part in shards), sizes, strict=True))
            lines.append(f"{table}: {parameter.sharding_type} ({', '.join(merge_adjacent_ranks(ranks))})")
    return "\n".join(lines)


def merge_adjacent_ranks(ranks: Sequence[tuple[int, str]]) -> list[str]:
    """Return lines such as "each of ranks 0-3: text" from (rank, text) pairs. Successive equal texts share a line."""
    lines = []
    for text, group in itertools.groupby(ranks, key=itemgetter(1)):
        numbers = sorted({rank for rank, _ in group})  # A rank with several column shards of a table appears twice.
        first, last = numbers[0], numbers[-1]
        numbers_text = f"{first}-{last}" if len(numbers) == last - first + 1 else ", ".join(map(str, numbers))
        subject = f"rank {first}" if len(numbers) == 1 else f"each of ranks {numbers_text}"
        lines.append(f"{subject}: {text}")
    return lines


def table_bytes(table: EmbeddingTable) -> int:
    """Return the bytes of a table's padded weights and of the one value per row that row-wise Adagrad stores."""
    return table.rows * (padded_dim(table.dim) + 1) * _FLOAT


# Models sharded over the running ranks.


@dataclass(frozen=True)
class ShardedModel:
    """A model whose tables are sharded over the ranks.

    Attributes:
        model: torchrec's DistributedModelParallel or `SingleProcessModel`. Call it with a `Batch`.
        table_optimizer: Row-wise Adagrad of the tables. The backward pass updates the tables. `zero_grad()` and
            `step()` only pass a changed `lr` of `param_groups` on to the tables.
        plan: Sharding of the tables, one line for each table.
    """

    model: Any
    table_optimizer: Any
    plan: str

    @property
    def pipelined(self) -> bool:
        """Whether torchrec's pipeline can train the model. This needs tables, and either several ranks or a GPU."""
        if isinstance(self.model, SingleProcessModel):
            return False
        return bool(self.plan) and (dist.get_world_size() > 1 or self.model.device.type != "cpu")

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """Return all parameters except tables, by name, for a dense optimizer."""
        named = self.model.module.named_parameters()
        return {name: parameter for name, parameter in named if not name.startswith("tables.")}


def training_tables(layout: ModelLayout, backend: TableBackend) -> nn.Module:
    """Create the tables of a model, for `shard`.

    Args:
        layout: The model's tables and inputs.
        backend: Implementation of the tables.
    """
    return torchrec_tables(layout, torch.device("meta")) if backend == "fbgemm" else SingleProcessTables(layout)


def shard(
    model: nn.Module,
    layout: ModelLayout,
    device: torch.device,
    *,
    batch_size: int,
    settings: Training,
    row_initializer: RowInitializer | None = None,
) -> ShardedModel:
    """Shard a model over the ranks of the current process group. Without tables, this is plain data parallelism.

    Args:
        model: Model whose tables come from `training_tables`.
        layout: The model's tables and inputs.
        device: Device of this rank.
        batch_size: Rows per rank and step.
        settings: Training settings.
        row_initializer: Initial weights of table rows. Defaults to `initial_rows`.

    Raises:
        UserError: The tables don't fit into memory, or the device doesn't support the kind of sharding.
    """
    row_initializer = row_initializer or (lambda table, first, last: initial_rows(table, settings.seed, first, last))
    check_sharding(settings.sharding, device.type)
    tables = model.get_submodule("tables")
    if isinstance(tables, SingleProcessTables):
        single = SingleProcessModel(model)
        _fill_tables(single, layout, row_initializer)
        lines = [f"{table.name}: one process ({table.rows:,} rows)" for table in used_tables(layout)]
        return ShardedModel(single, RowWiseAdagrad(tables, settings.table_learning_rate), "\n".join(lines))

    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.types import ShardingPlan
    from torchrec.streamable import Pipelineable

    Pipelineable.register(Batch)  # torchrec's pipelines accept only registered classes.
    plan = ShardingPlan({})
    planner = ShardingPlanner(layout, _running_cluster(device), batch_size, settings)
    if used_tables(layout):
        _update_in_backward(model, settings.table_learning_rate)
        plan = planner._make_plan(model, dist.group.WORLD)
    with warnings.catch_warnings():
        # torchrec passes an argument to torch that torch has deprecated.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        # `init_data_parallel` wraps the dense part and moves it to the device. A single CPU process needs neither.
        on_one_cpu = device.type == "cpu" and dist.get_world_size() == 1
        parallel = DistributedModelParallel(
            model, device=device, plan=plan, sharders=planner.sharders(), init_data_parallel=not on_one_cpu
        )
    if device.type == "cpu":
        copy_cpuinfo_to_fbgemm()
    _fill_tables(parallel, layout, row_initializer)
    return ShardedModel(parallel, parallel.fused_optimizer, describe_plan(plan))


def _running_cluster(device: torch.device) -> Cluster:
    kind = cast("Literal['cpu', 'cuda']", device.type)
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpu_bytes = torch.cuda.get_device_properties(device).total_memory if kind == "cuda" else 0
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun sets this variable.
    return Cluster(dist.get_world_size(), local_world_size, kind, gpu_bytes, host_bytes)


@torch.no_grad()
def _fill_tables(parallel: Any, layout: ModelLayout, row_initializer: RowInitializer) -> None:
    state = parallel.state_dict()
    for table in used_tables(layout):
        for (first, column), weights in _local_parts(state[f"tables.embedding_bags.{table.name}.weight"]):
            rows = to_padded(row_initializer(table, first, first + len(weights)))
            weights.copy_(rows[:, column : column + weights.shape[1]])


def _local_parts(stored: Any) -> list[tuple[Sequence[int], Tensor]]:
    """Return the parts of a table on this rank: for each part, (first row, first column) and its weights."""
    if hasattr(stored, "local_shards"):
        return [(part.metadata.shard_offsets, part.tensor) for part in stored.local_shards()]
    return [((0, 0), stored)]


class Optimizers:
    """The optimizers of tables and dense parameters (all other weights), with the interface of one optimizer.

    Args:
        sharded: Model to optimize.
        settings: Training settings, with the learning rate and weight decay of dense parameters.

    Attributes:
        dense: AdamW of the dense parameters.
    """

    def __init__(self, sharded: ShardedModel, settings: Training) -> None:
        self._tables = sharded.table_optimizer
        self._named = sharded.dense_parameters()
        weights = [parameter for name, parameter in self._named.items() if name != LOG_VARIANCES]
        groups: list[dict[str, Any]] = [{"params": weights}]
        if LOG_VARIANCES in self._named:
            # Weight decay would pull the log variances toward 0, and so the learned task weights toward 1.
            groups.append({"params": [self._named[LOG_VARIANCES]], "weight_decay": 0.0})
        self.dense = torch.optim.AdamW(
            groups, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the tables, then of the dense parameters. Set `lr` to change a group's learning rate."""
        return [*self._tables.param_groups, *self.dense.param_groups]

    def zero_grad(self) -> None:
        """Reset the gradients of dense parameters, and pass a changed `lr` of `param_groups` on to the tables.

        The backward pass updates the tables with this rate, so tables have no gradients to reset.
        """
        self._tables.zero_grad()
        self.dense.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Update the dense parameters, and pass a changed `lr` of `param_groups` on to the tables.

        The backward pass has already updated the tables.
        """
        self._tables.step()
        self.dense.step()

    def init_state(self) -> None:
        """Create the optimizer state by a step without gradients, before loading a checkpoint. Weights may change."""
        for parameter in self._named.values():
            parameter.grad = torch.zeros_like(parameter)
        self.step()

    def state_dict(self) -> dict[str, Any]:
        """Return {"state": {parameter name: state}} for any number of ranks to load. The tensors are not copied."""
        dense, named = self.dense.state, self._named.items()
        state = {name: dict(dense[parameter]) for name, parameter in named if parameter in dense}
        return {"state": {**self._tables.state_dict()["state"], **state}}
