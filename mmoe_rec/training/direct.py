"""Looks tables up by fbgemm's module itself, where there is one process on a CPU.

torchrec's own way there goes through what sends ids and embeddings from rank to rank, which takes longer than to look
up the ids of a thousand rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from mmoe_rec.training.one_process import Pooled
from mmoe_rec.training.ways import table_batches


def look_up_directly(model: Any) -> None:
    """Changes the forward pass of a sharded model's tables, which gives the same sums; weights stay where they are.

    model: torchrec's DistributedModelParallel on one process. Left as it is where fbgemm holds its tables apart.
    """
    modules, inputs = list(table_batches(model)), list(_inputs(model))
    if len(modules) == len(inputs) == 1:
        module, names = modules[0], inputs[0]
        widths = [module.embedding_specs[table][1] for table in module.feature_table_map]
        model.module.tables.forward = partial(_forward, module, names, widths)


def _inputs(model: Any) -> Iterator[list[str]]:
    """Names of the inputs of each of fbgemm's modules, in their order there, or none where torchrec hides them."""
    for lookup in getattr(model.module.tables, "_lookups", ()):
        yield from (config.feature_names() for config in getattr(lookup, "grouped_configs", ()))


def _forward(module: Any, names: list[str], widths: list[int], ids: Any) -> Pooled:
    """Sums of the embeddings of each input of a KeyedJaggedTensor, to be read by `by_name`."""
    keys = ids.keys()
    if keys != names:
        ids = ids.permute([keys.index(name) for name in names])
    return Pooled(names, widths, module(ids.values(), ids.offsets().long()))
