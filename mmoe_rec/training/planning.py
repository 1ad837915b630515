"""Which rank holds which part of which table: torchrec's planner, for the running ranks or for any, on paper."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

from torch import nn

from mmoe_rec.errors import UserError
from mmoe_rec.model.model_layout import EmbeddingTable, ModelLayout
from mmoe_rec.model.tables import stored_width, used_tables
from mmoe_rec.settings.training import Training
from mmoe_rec.training.sharded_tables import require_torchrec

RESERVED_SHARE = 0.2  # of a rank's memory, for all but tables and their activations
GIB = 2**30
_FLOAT = 4
WHOLE_ROWS = ("table_wise", "row_wise", "table_row_wise")
ON_CPUS = ("auto", "table_wise", "column_wise")  # torchrec's own limit


@dataclass(frozen=True)
class Sharding:
    """How tables are spread, as the settings of `training` of the same names say it."""

    kind: str = "auto"
    columns: int = 32
    communication: Literal["fp32", "bf16"] = "fp32"

    @staticmethod
    def of(settings: Training) -> "Sharding":
        return Sharding(settings.sharding, settings.shard_columns, settings.communication)

    def check(self, device: str) -> None:
        """Raises UserError for what can't work on "cpu" or "cuda"."""
        if self.kind != "auto":
            require_torchrec(f"training.sharding {self.kind}", "set it to auto")
        if device == "cpu" and self.kind not in ON_CPUS:
            raise UserError(
                f"training.sharding is {self.kind}, which torchrec has on GPUs alone: on CPUs set it to "
                f"{', '.join(ON_CPUS[:-1])} or {ON_CPUS[-1]}"
            )

    def types(self, device: str) -> list[str]:
        """What the planner may choose among, for each table."""
        if self.kind != "auto":
            return [self.kind]
        # Data parallel is left out: its optimizer state has other keys, so a table could not be resharded.
        return list(WHOLE_ROWS) if device == "cuda" else ["table_wise"]


BY_DEFAULT = Sharding()


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
    """What is expected of a rank. tables: bytes of their weights and optimizer; bytes: of these and of activations, as
    torchrec estimates them; milliseconds: of a step, likewise.
    """

    rank: int
    tables: int
    bytes: int
    milliseconds: float


def update_in_backward(model: nn.Module, learning_rate: float) -> None:
    """Has tables updated by row-wise Adagrad within the backward pass, once they are sharded."""
    from torch.distributed.optim import _apply_optimizer_in_backward
    from torchrec.optim import RowWiseAdagrad

    _apply_optimizer_in_backward(RowWiseAdagrad, model.get_submodule("tables").parameters(), {"lr": learning_rate})


@dataclass(frozen=True)
class Planning:
    """What a plan of the tables follows from. batch_size: rows a rank and step."""

    layout: ModelLayout
    machines: Machines
    batch_size: int
    sharding: Sharding = BY_DEFAULT

    def sharders(self) -> list[Any]:
        """What knows how to spread tables."""
        from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

        if self.sharding.communication == "fp32":
            return [EmbeddingBagCollectionSharder()]
        from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs
        from torchrec.distributed.types import CommOp

        codecs = get_qcomm_codecs(QCommsConfig(CommType.BF16, CommType.BF16))
        # Not `get_qcomm_codecs_registry`, which takes fp16 instead of bf16 on CPUs, although gloo sends both.
        return [EmbeddingBagCollectionSharder(qcomm_codecs_registry={each.name: codecs for each in CommOp})]

    def make(self, model: nn.Module, group: Any = None, stats: Any = None) -> Any:
        """torchrec's plan for a model over `torchrec_tables`, which the ranks of a process group make together.

        stats: receives the plan. Raises UserError, with what would help, when the tables don't fit.
        """
        from torchrec.distributed.embedding_types import EmbeddingComputeKernel
        from torchrec.distributed.planner import EmbeddingShardingPlanner, types
        from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation

        machines, sharding, sharders = self.machines, self.sharding, self.sharders()
        # With `min_partition`, the number of parts of a row is that of the settings on any number of ranks, as is then
        # the state of row-wise Adagrad, which has a number for each part: so a table can be resharded.
        constraints = {
            table.name: types.ParameterConstraints(
                sharding_types=sharding.types(machines.device),
                compute_kernels=[EmbeddingComputeKernel.FUSED.value],
                min_partition=sharding.columns,
            )
            for table in used_tables(self.layout)
        }
        topology = types.TopologyFactory.create_topology(
            types.TrainerConfig(
                world_size=machines.world_size,
                local_world_size=machines.local_world_size,
                hbm_cap_bytes=machines.card_bytes,
                ddr_cap_bytes=machines.host_bytes // machines.local_world_size,
            ),
            kernel_config=types.KernelConfig(compute_device=machines.device),
        )
        planner = EmbeddingShardingPlanner(
            topology=topology,
            batch_size=self.batch_size,
            storage_reservation=FixedPercentageStorageReservation(RESERVED_SHARE),
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
        needed, offered = sum(map(table_bytes, tables)) / GIB, machines.world_size * machines.rank_bytes / GIB
        largest = max(tables, key=table_bytes)
        return UserError(
            f"the embedding tables take {needed:,.1f} GiB with their optimizer and do not fit, beside a step of "
            f"{self.batch_size:,} rows, into {machines.world_size} rank(s) with {offered:,.1f} GiB for them in all. "
            f"The largest, '{largest.name}', has {largest.rows:,} rows of {largest.dim} numbers and takes "
            f"{table_bytes(largest) / GIB:.1f} GiB. Use more ranks, spread rows by `training.sharding`, or lower "
            "`training.batch_size` or a table's `max_size`, `buckets` or `dim`."
        )

    def on_paper(self, model: nn.Module) -> tuple[str, list[RankPlan]]:
        """The plan for machines that need not be there, as `describe_plan` tells it, and what each rank bears.

        model: over `torchrec_tables` on the device "meta". Raises UserError as `make`.
        """
        options: list[Any] = []
        update_in_backward(model, learning_rate=1.0)  # what it keeps takes memory
        plan = self.make(model, stats=SimpleNamespace(log=lambda *, best_plan, **_: options.extend(best_plan)))
        ranks = [RankPlan(rank, 0, 0, 0.0) for rank in range(self.machines.world_size)]
        for part in (part for option in options for part in option.shards):
            rank, tables, taken, time = ranks[part.rank]
            tables += part.size[0] * (part.size[1] + 1) * _FLOAT
            taken += part.storage.hbm + part.storage.ddr
            ranks[rank] = RankPlan(rank, tables, taken, time + part.perf.total)
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
            lines.append(f"{table}: {parameter.sharding_type} ({', '.join(merge_neighbours(places))})")
    return "\n".join(lines)


def merge_neighbours(ranks: Sequence[tuple[int, str]]) -> list[str]:
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
    return table.rows * (stored_width(table.dim) + 1) * _FLOAT
