"""Sharded training: the sharding plan, tables spread over the ranks, and the way back to a plain model.

One path for a laptop and a cluster: world size 1 on a CPU runs the same calls as 64 GPUs under torchrun.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmoe_rec.errors import UserError
from mmoe_rec.model.layout import EmbeddingTable, ModelLayout
from mmoe_rec.model.tables import from_stored, initial_rows, stored_width, to_stored, used_tables
from mmoe_rec.training.fbgemm import share_cpuinfo
from mmoe_rec.training.planning import Machines, does_not_fit, plan_text, planner, sharders, update_in_backward

FirstRows = Callable[[EmbeddingTable, int, int], Tensor]
"""Table, first and last row (exclusive) -> (last - first, dim) float32, the weights that these rows start from."""


@dataclass(frozen=True)
class Sharded:
    """A model spread over the ranks.

    model: torchrec's DistributedModelParallel, called with a `Batch`; table_optimizer: its fused row-wise Adagrad,
    which updates the tables within the backward pass and takes its learning rate from `param_groups` at `step()`;
    plan: one line per table, saying how and where it is stored.
    """

    model: Any
    table_optimizer: Any
    plan: str

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of all that is not a table: what a dense optimizer steps."""
        named = self.model.module.named_parameters()
        return {name: parameter for name, parameter in named if not name.startswith("tables.")}


def shard(
    model: nn.Module,
    layout: ModelLayout,
    device: torch.device,
    *,
    batch_size: int,
    table_learning_rate: float,
    seed: int = 0,
    first_rows: FirstRows | None = None,
) -> Sharded:
    """Spreads a model with `torchrec_tables` over the ranks of the current process group.

    batch_size: rows a rank and step. Tables start from `first_rows`, by default `initial_rows(table, seed, ...)`,
    whatever the plan. A layout without tables gives plain data parallelism. Raises UserError when the tables do not fit
    into memory.
    """
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.types import ShardingPlan
    from torchrec.streamable import Pipelineable

    from mmoe_rec.batches.batch import Batch

    if device.type == "cpu":
        share_cpuinfo()
    Pipelineable.register(Batch)  # torchrec's pipelines accept only what they know as one
    plan = ShardingPlan({})
    if used_tables(layout):
        update_in_backward(model, table_learning_rate)
        plan = _plan(model, layout, device, batch_size)
    with warnings.catch_warnings():
        # An argument that torchrec hands to torch, deprecated there.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        parallel = DistributedModelParallel(
            model, device=device, plan=plan, sharders=sharders(), init_data_parallel=dist.get_world_size() > 1
        )
    _fill_tables(parallel, layout, first_rows or (lambda table, first, last: initial_rows(table, seed, first, last)))
    return Sharded(parallel, parallel.fused_optimizer, plan_text(plan))


def _plan(model: nn.Module, layout: ModelLayout, device: torch.device, batch_size: int) -> Any:
    from torchrec.distributed.planner.types import PlannerError

    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    kind: Any = device.type
    machines = Machines(dist.get_world_size(), local, kind, *_memory(device))
    try:
        return planner(layout, machines, batch_size).collective_plan(model, sharders(), dist.group.WORLD)
    except PlannerError:
        raise does_not_fit(layout, machines) from None


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes of a rank's card, and of the machine's main memory."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    card = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return card, host


@torch.no_grad()
def _fill_tables(parallel: Any, layout: ModelLayout, first_rows: FirstRows) -> None:
    state = parallel.state_dict()
    for table in used_tables(layout):
        for first, weights in _local_rows(state[f"tables.embedding_bags.{table.name}.weight"]):
            weights.copy_(to_stored(first_rows(table, first, first + len(weights))))


def _local_rows(weights: Any) -> Iterator[tuple[int, Tensor]]:
    """First row and tensor of each part of a sharded table that this rank holds; the tensor is the storage itself."""
    for part in weights.local_shards():
        yield part.metadata.shard_offsets[0], part.tensor


def load_plain(model: nn.Module, folder: Path) -> None:
    """Fills an unsharded model, on one process and without a process group, from a checkpoint's "model" state.

    model: a `RankingModel` over `PlainTables`. Raises UserError when the folder holds no checkpoint.
    """
    import torch.distributed.checkpoint as dcp

    if not (folder / ".metadata").is_file():
        raise UserError(f"'{folder}' holds no complete checkpoint")
    state = {"model": {name: _as_stored(name, weight) for name, weight in model.state_dict().items()}}
    with warnings.catch_warnings():
        # That is intended here.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    expected = model.state_dict()
    model.load_state_dict(
        {
            name: from_stored(weight, expected[name].shape[1]) if name.startswith("tables.") else weight
            for name, weight in state["model"].items()
        }
    )


def _as_stored(name: str, weight: Tensor) -> Tensor:
    """Where a weight of a plain model is read to, before it has its own width."""
    padded = name.startswith("tables.") and stored_width(weight.shape[1]) != weight.shape[1]
    return torch.empty(len(weight), stored_width(weight.shape[1])) if padded else weight


# The backward pass in two parts: that of the dense part first, then that of the tables.
#
# Tables are updated by their optimizer within their backward pass, so what is to be known before anything is updated,
# such as whether the gradient is finite, must be known by then. The graph is cut where the tables' outputs enter the
# dense part; the gradient that arrives there is handed on later, unchanged. The price is that the ranks' exchange of
# dense gradients does not overlap with that of the tables.


class TablesLast:
    """Cuts the graph in front of a model's `mixture` in each training step."""

    def __init__(self, mixture: nn.Module) -> None:
        self._cuts: list[tuple[Tensor, Tensor]] = []
        mixture.register_forward_pre_hook(self._cut)

    def _cut(self, mixture: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        # torchrec's pipeline traces the model by symbols, which are not tensors.
        if not (mixture.training and torch.is_grad_enabled() and isinstance(arguments[0], Tensor)):
            return None
        self._cuts = []
        return tuple(self._leaf(each) if _has_graph(each) else each for each in arguments)

    def _leaf(self, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        self._cuts.append((output, leaf))
        return leaf

    @property
    def finite(self) -> Tensor:
        """() bool: whether the gradients that have arrived at the cut, and their sum, are finite, on this rank."""
        # One pass: an infinity or NaN never leaves a sum.
        found = [leaf.grad.sum() for _, leaf in self._cuts if leaf.grad is not None]
        return torch.stack(found).isfinite().all() if found else torch.tensor(True)

    def rest(self) -> Tensor:
        """What to call `backward` on for the tables' part: its gradient is what has arrived at the cut."""
        parts = [_HandedOn.apply(output, leaf.grad) for output, leaf in self._cuts if leaf.grad is not None]
        self._cuts = []
        return torch.stack(parts).sum() if parts else nothing()


class _HandedOn(torch.autograd.Function):
    """A zero whose gradient, which has to be 1, becomes a given gradient of what went in."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient, None


def nothing() -> Tensor:
    """What has no backward pass, on any rank."""
    return torch.zeros((), requires_grad=True)


def _has_graph(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.requires_grad
