"""A look-up and an update of small tables like those of a training, to be timed before it begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mmoe_rec.batches.batch import KeyedIds
from mmoe_rec.model.layout import EmbeddingTable, ModelLayout
from mmoe_rec.model.tables import stored_width, used_tables
from mmoe_rec.training.installed import torchrec_installed
from mmoe_rec.training.one_process import EPS, OneProcessTables
from mmoe_rec.training.ways import Way, set_way, tell_fbgemm, way_of

ROWS_AT_MOST = 50_000
_RATE = 0.05
_WEIGHT = 0.01


def trial(way: Way, layout: ModelLayout, ids: Any, rows_at_most: int = ROWS_AT_MOST) -> Callable[[], None]:
    """What does one look-up and one update in this way, in some milliseconds for a batch of thousands of rows.

    Call it once or twice unmeasured, within `mmoe_rec.allocation.freed_memory_kept`, as training does.

    Args:
        way: one of `ways_on_offer`. Another one raises UserError.
        layout: of the training; tables have its widths, and no more than `rows_at_most` rows.
        ids: of a batch as it is trained on, `KeyedIds` or a KeyedJaggedTensor; ids beyond a table's last row begin
            again at its first. Without inputs, nothing is done.

    The tables are about as large as the training's own on one rank, or on several together. Which of fbgemm's two ways
    was tried last holds for the process until `use_way` (or `shard`) chooses one.
    """
    way_of(way, "cpu")
    if not layout.ids:
        return lambda: None
    tables = tuple(replace(each, rows=min(each.rows, rows_at_most)) for each in layout.tables)
    # fbgemm wants inputs that share a table next to each other.
    names = [table.name for table in tables]
    inputs = tuple(sorted(layout.ids, key=lambda each: names.index(each.table)))
    small = replace(layout, tables=tables, ids=inputs)
    values, offsets = _ids(small, ids, [layout.ids.index(each) for each in inputs])
    look_up = _by_fbgemm(way, small) if torchrec_installed() else _alone(small)
    width = sum(stored_width(small.table(each.table).dim) for each in small.ids)
    gradient = torch.randn((len(offsets) - 1) // len(small.ids), width)

    def once() -> None:
        tell_fbgemm(way)
        look_up(values, offsets).backward(gradient)

    return once


def _ids(layout: ModelLayout, ids: Any, order: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Ids and offsets in the layout's order of inputs; order: the number in `ids` of each of them."""
    values, offsets = (ids.values, ids.offsets) if isinstance(ids, KeyedIds) else (ids.values(), ids.offsets())
    batch = (len(offsets) - 1) // len(order)
    ends = offsets[::batch].tolist()
    rows = [layout.table(each.table).rows for each in layout.ids]
    parts = [values[ends[number] : ends[number + 1]] % most for number, most in zip(order, rows, strict=True)]
    lengths = offsets.long().diff().view(len(order), batch)[list(order)].flatten()
    return torch.cat(parts), functional.pad(lengths.cumsum(0), (1, 0))


def _by_fbgemm(way: Way, layout: ModelLayout) -> Callable[[Tensor, Tensor], Tensor]:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    tables: Sequence[EmbeddingTable] = used_tables(layout)
    names = [table.name for table in tables]
    module: Any = SplitTableBatchedEmbeddingBagsCodegen(
        [(table.rows, stored_width(table.dim), EmbeddingLocation.HOST, ComputeDevice.CPU) for table in tables],
        feature_table_map=[names.index(each.table) for each in layout.ids],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=_RATE,
        eps=EPS,
        pooling_mode=PoolingMode.SUM,
        table_names=names,
    )
    module.weights_host.detach().fill_(_WEIGHT)
    set_way(module, way)
    return lambda values, offsets: module(indices=values, offsets=offsets)


def _alone(layout: ModelLayout) -> Callable[[Tensor, Tensor], Tensor]:
    tables = OneProcessTables(layout)
    tables.storage.weights.fill_(_WEIGHT)
    tables.storage.rate.fill_(_RATE)
    return tables.look_up
