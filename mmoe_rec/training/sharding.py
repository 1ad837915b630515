"""Sharded training: tables spread over the ranks, the optimizers of all parameters, and the plan of who holds what.

One path for a laptop and a cluster: world size 1 on a CPU shards as 64 GPUs do. Without torchrec, one process trains on
tables in plain PyTorch.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmoe_rec.batches.batch import Batch
from mmoe_rec.model.model_layout import EmbeddingTable, ModelLayout
from mmoe_rec.model.tables import initial_rows, to_stored, torchrec_tables, used_tables
from mmoe_rec.settings.training import Training
from mmoe_rec.training.losses import LOG_VARIANCES
from mmoe_rec.training.planning import (
    BY_DEFAULT,
    Machines,
    Planning,
    Sharding,
    describe_plan,
    update_in_backward,
)
from mmoe_rec.training.sharded_tables import (
    OneProcess,
    OneProcessTables,
    RowWiseAdagrad,
    Way,
    share_cpuinfo,
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


def training_tables(layout: ModelLayout, way: Way) -> nn.Module:
    """Return the tables of a backend, which `shard` takes as those of a model."""
    return torchrec_tables(layout, torch.device("meta")) if way == "fbgemm" else OneProcessTables(layout)


def shard(
    model: nn.Module,
    layout: ModelLayout,
    device: torch.device,
    *,
    batch_size: int,
    table_learning_rate: float,
    seed: int = 0,
    first_rows: FirstRows | None = None,
    sharding: Sharding = BY_DEFAULT,
) -> ShardedModel:
    """Spreads a model over `training_tables` over the ranks of the current process group.

    batch_size: rows a rank and step. Tables start from `first_rows`, by default `initial_rows(table, seed, ...)`. A
    layout without tables gives plain data parallelism. Raises UserError when the tables do not fit into memory, or the
    sharding is not on offer.
    """
    first_rows = first_rows or (lambda table, first, last: initial_rows(table, seed, first, last))
    sharding.check(device.type)
    tables = model.get_submodule("tables")
    if isinstance(tables, OneProcessTables):
        one = OneProcess(model)
        _fill_tables(one, layout, first_rows)
        lines = [f"{table.name}: one process ({table.rows:,} rows)" for table in used_tables(layout)]
        return ShardedModel(one, RowWiseAdagrad(tables, table_learning_rate), "\n".join(lines))

    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.types import ShardingPlan
    from torchrec.streamable import Pipelineable

    Pipelineable.register(Batch)  # torchrec's pipelines accept only what they know as one
    plan = ShardingPlan({})
    planning = Planning(layout, _machines(device), batch_size, sharding)
    if used_tables(layout):
        update_in_backward(model, table_learning_rate)
        plan = planning.make(model, dist.group.WORLD)
    with warnings.catch_warnings():
        # An argument that torchrec hands to torch, deprecated there.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        # Wrapping the dense part also moves it; on a CPU alone there is neither to do.
        alone = device.type == "cpu" and dist.get_world_size() == 1
        parallel = DistributedModelParallel(
            model, device=device, plan=plan, sharders=planning.sharders(), init_data_parallel=not alone
        )
    if device.type == "cpu":
        share_cpuinfo()
    _fill_tables(parallel, layout, first_rows)
    return ShardedModel(parallel, parallel.fused_optimizer, describe_plan(plan))


def _machines(device: torch.device) -> Machines:
    """The machines that train."""
    kind = cast("Literal['cpu', 'cuda']", device.type)
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    card = torch.cuda.get_device_properties(device).total_memory if kind == "cuda" else 0
    ranks_of_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # as torchrun has started them
    return Machines(dist.get_world_size(), ranks_of_machine, kind, card, host)


@torch.no_grad()
def _fill_tables(parallel: Any, layout: ModelLayout, first_rows: FirstRows) -> None:
    state = parallel.state_dict()
    for table in used_tables(layout):
        for (first, column), weights in _local_parts(state[f"tables.embedding_bags.{table.name}.weight"]):
            rows = to_stored(first_rows(table, first, first + len(weights)))
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
