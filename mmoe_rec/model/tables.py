"""Embedding tables in two forms with equal weights, names and outputs.

`PlainTables` is pure torch: serving and single-process evaluation. `torchrec_tables` gives the collection that
`mmoe_rec.training.sharding` spreads over ranks. Both have the state `embedding_bags.<table>.weight`, and give, read by
`by_name`, the mean of an input's ids (no id gives zeros). The latter's state is as wide as kernels need it, see
`stored_width`; and it adds ids up, as kernels that average them are slow on some processors: `by_name` divides.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmoe_rec.batches.batch import KeyedIds
from mmoe_rec.features.layout import IdInput
from mmoe_rec.model.layout import EmbeddingTable, ModelLayout

# New ids start near zero: an id that training has barely seen then adds next to nothing to a row.
INITIAL_DEVIATION = 0.01
# Rows that share a generator. A rank fills any range of rows by drawing only the blocks that the range touches.
BLOCK_ROWS = 65_536


def used_tables(layout: ModelLayout) -> list[EmbeddingTable]:
    """The tables that an id input looks up, in layout order."""
    used = {each.table for each in layout.ids}
    return [table for table in layout.tables if table.name in used]


def initial_rows(table: EmbeddingTable, seed: int, first: int, last: int) -> Tensor:
    """Initial weights of rows first..last (exclusive): (last - first, dim) float32, normal with INITIAL_DEVIATION.

    A function of seed, table name and row alone, so that any sharding over any number of ranks starts the same.
    """
    weights = torch.empty(last - first, table.dim)
    for block in range(first // BLOCK_ROWS, -(-last // BLOCK_ROWS)):
        begin, end = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, table.rows)
        key = hashlib.blake2b(f"{seed}/{table.name}/{block}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)
        drawn = torch.empty(end - begin, table.dim).normal_(0.0, INITIAL_DEVIATION, generator=generator)
        low, high = max(first, begin), min(last, end)
        weights[low - first : high - first] = drawn[low - begin : high - begin]
    return weights


class PlainTables(nn.Module):
    """One `torch.nn.EmbeddingBag` per table. The counterpart of torchrec's EmbeddingBagCollection."""

    def __init__(self, tables: tuple[EmbeddingTable, ...], ids: tuple[IdInput, ...], seed: int = 0) -> None:
        super().__init__()
        self.embedding_bags = nn.ModuleDict()
        used = {each.table for each in ids}
        for table in tables:
            if table.name in used:
                weight = initial_rows(table, seed, 0, table.rows)
                self.embedding_bags[table.name] = nn.EmbeddingBag.from_pretrained(
                    weight, freeze=False, mode="mean", include_last_offset=True
                )
        self.table_of = {each.name: each.table for each in ids}

    def forward(self, ids: KeyedIds) -> dict[str, Tensor]:
        """Mean embedding of every input: name -> (B, dim) float32."""
        return {name: self.embedding_bags[table](*ids.column(name)) for name, table in self.table_of.items()}


def plain_tables(layout: ModelLayout, seed: int = 0) -> PlainTables:
    """The tables of a layout on this process alone."""
    return PlainTables(layout.tables, layout.ids, seed)


def torchrec_tables(layout: ModelLayout, device: torch.device | str = "meta") -> nn.Module:
    """The tables of a layout as torchrec's EmbeddingBagCollection; without id inputs, an empty `PlainTables`.

    Weights are zeros until `mmoe_rec.training.sharding.shard` (or a checkpoint) fills them. The forward pass takes a
    KeyedJaggedTensor and gives sums, to be read by `by_name`, as their order follows the sharding plan.
    """
    tables = used_tables(layout)
    if not tables:
        return PlainTables((), ())
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, PoolingType

    configs = [
        EmbeddingBagConfig(
            name=table.name,
            num_embeddings=table.rows,
            embedding_dim=stored_width(table.dim),
            feature_names=[each.name for each in layout.ids if each.table == table.name],
            pooling=PoolingType.SUM,
            init_fn=nn.init.zeros_,  # torchrec's own would draw from the global generator, differently on each rank
        )
        for table in tables
    ]
    collection: nn.Module = EmbeddingBagCollection(tables=configs, device=torch.device(device))
    return collection


def by_name(embeddings: Any, dims: dict[str, int], ragged: Sequence[str], shares: Tensor | None) -> dict[str, Tensor]:
    """Mean embeddings from what a collection of either form gives: input name -> (B, dim) float32.

    dims: width of each input's embedding; ragged, shares: see `Batch`, of the inputs whose sums have to be divided.
    """
    if isinstance(embeddings, dict):
        return embeddings
    # One split, whose gradient is one tensor; inputs picked one by one would each give a gradient as wide as all.
    parts = embeddings.values().split(embeddings.length_per_key(), dim=1)
    sums = {name: from_stored(part, dims[name]) for name, part in zip(embeddings.keys(), parts, strict=True)}
    if shares is None:
        return sums
    return sums | {name: sums[name] * each[:, None] for name, each in zip(ragged, shares, strict=True)}


# How a table of any width is trained by kernels that take multiples of four columns only.
#
# fbgemm stores rows of D' columns, the width D rounded up to such a multiple; columns from D on are zeros, get
# no gradient and stay zeros. Row-wise Adagrad divides a row's step by the root of the mean square of its gradients, a
# mean that then is over D' columns and so too small by D / D'. Hence what is stored is the weights times sqrt(D' / D):
# steps do not depend on a gradient's scale, so a stored row moves by as much as any other, and the weights by sqrt(D /
# D') of that, which is what a table of D columns would do (but for Adagrad's epsilon of 1e-8).
#
# Only training stores tables so; a trained model, as it is served, started from or evaluated, has D columns.


COLUMNS = 4


def stored_width(dim: int) -> int:
    """Columns in which a table of that width is stored."""
    return -(-dim // COLUMNS) * COLUMNS


def to_stored(weights: Tensor) -> Tensor:
    """Rows (N, D) as they are stored: (N, D')."""
    dim = weights.shape[1]
    width = stored_width(dim)
    return weights if width == dim else functional.pad(weights * math.sqrt(width / dim), (0, width - dim))


def from_stored(weights: Tensor, dim: int) -> Tensor:
    """Stored rows (N, D'), or means of such rows, as weights: (N, D)."""
    width = weights.shape[1]
    return weights if width == dim else weights[:, :dim] * math.sqrt(dim / width)
