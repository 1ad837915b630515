"""The ways in which tables on a CPU are looked up and updated: fbgemm's kernels, its reference loops, plain PyTorch.

All work on the same storage, that of fbgemm's module where there is one, so a checkpoint does not depend on the way,
and a model may change it between two steps. Which is the fastest depends on the processor, by factors of ten; results
are equal but for rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Literal, get_args

from torch import Tensor, nn

from mmoe_rec.errors import UserError
from mmoe_rec.training.cpuinfo import can_be_withheld, share_cpuinfo, withhold_cpuinfo
from mmoe_rec.training.installed import require_torchrec, torchrec_installed
from mmoe_rec.training.rowwise import Place, RowWise, Storage

Way = Literal["fbgemm", "fbgemm_reference", "torch"]
"""fbgemm: its kernels, which know the processor; fbgemm_reference: its plain loops; torch: `RowWise`."""


def ways_on_offer() -> tuple[Way, ...]:
    """What this machine and its packages allow, on a CPU; the first is the default."""
    return tuple(way for way in get_args(Way) if _missing(way) is None)


def way_of(choice: Literal["auto"] | Way, device: str, ranks: int = 1) -> Way:
    """The way that a setting asks for, for `auto` the default. device: "cpu" or "cuda"; ranks: that train together.

    Raises UserError where it is not on offer here.
    """
    if ranks > 1:
        require_torchrec("training on several processes", "start it without torchrun")
    if device == "cuda":
        require_torchrec("training on a GPU", "set training.device to cpu")
        if choice in ("auto", "fbgemm"):
            return "fbgemm"
        raise UserError(f"training.tables is {choice}, a way of CPUs; on GPUs there is fbgemm alone: set it to auto")
    if choice == "auto":
        return ways_on_offer()[0]
    if (reason := _missing(choice)) is not None:
        others = ", ".join(ways_on_offer())
        raise UserError(f"training.tables is {choice}, but {reason}: set it to auto, or to what is here ({others})")
    return choice


def use_way(model: nn.Module, way: Way) -> None:
    """Has the tables of a sharded model on CPUs looked up and updated in this way from its next forward pass on.

    Which of fbgemm's two ways is taken holds for all tables of the process. Raises UserError where the way is not on
    offer here.
    """
    way_of(way, "cpu")
    tell_fbgemm(way)
    if torchrec_installed():
        for module in table_batches(model):
            set_way(module, way)


def set_way(module: Any, way: Way) -> None:
    """The same for one of fbgemm's modules, which must have row-wise Adagrad and add ids up."""
    tell_fbgemm(way)
    if way == "torch":
        module.forward = functools.partial(_forward, module, RowWise(_places(module)))
    else:
        module.__dict__.pop("forward", None)


def tell_fbgemm(way: Way) -> None:
    """Has all of fbgemm's modules of this process take their kernels or their plain loops."""
    if way == "fbgemm":
        share_cpuinfo()
    elif way == "fbgemm_reference":
        withhold_cpuinfo()


def table_batches(model: nn.Module) -> Iterator[Any]:
    """fbgemm's modules in a sharded model, each of which holds the tables that it looks up together."""
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen

    for part in model.modules():
        for lookup in getattr(part, "_lookups", ()):  # torchrec keeps them in a plain list
            yield from (each for each in lookup.modules() if isinstance(each, SplitTableBatchedEmbeddingBagsCodegen))


def _missing(way: Way) -> str | None:
    """Why a way is not on offer; None if it is."""
    if way == "torch":
        return None
    if not torchrec_installed():
        return "torchrec and fbgemm are not installed"
    if way == "fbgemm_reference" and not can_be_withheld():
        return "fbgemm here asks for the processor itself, so it can't be kept from its kernels"
    return None


def _places(module: Any) -> list[Place]:
    """Of each input of one of fbgemm's modules."""
    weights, momentum = module.weights_offsets.tolist(), module.momentum1_offsets.tolist()
    places = []
    for number, table in enumerate(module.feature_table_map):
        rows, width = module.embedding_specs[table][:2]
        name = module.table_names[table] if module.table_names else str(table)
        places.append(Place(name, rows, width, weights[number], momentum[number]))
    return places


def _forward(
    module: Any, tables: RowWise, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None
) -> Tensor:
    """Instead of the module's own."""
    assert per_sample_weights is None, "ids have no weights of their own here"
    storage = Storage(
        module.weights_host, module.momentum1_host, module.learning_rate_tensor, module.optimizer_args.eps
    )
    return tables.look_up(storage, indices, offsets, module.placeholder_autograd_tensor)
