"""Embedding tables in two forms with equal weights, names and outputs.

`PlainTables` is pure torch: serving and single-process evaluation. `torchrec_tables` gives the collection that
`mmoe_rec.training.sharding` spreads over ranks. Both have the state `embedding_bags.<table>.weight`, and give, read by
`mean_embeddings`, the mean of an input's ids (no id gives zeros). The latter's state is as wide as kernels need it, see
`padded_dim`; and it adds ids up, as kernels that average them are slow on some processors: `mean_embeddings` divides.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmoe_rec.batches.batch import AttentionEvents, KeyedIds
from mmoe_rec.features.layout import position_input
from mmoe_rec.model.model_layout import EmbeddingTable, ModelLayout

# New ids start near zero: an id that training has barely seen then adds next to nothing to a row.
INITIAL_STD = 0.01
# Rows that share a generator. A rank fills any range of rows by drawing only the blocks that the range touches.
BLOCK_ROWS = 65_536
PooledEmbeddings = tuple[list[str], list[int], Tensor]
"""Names of inputs, the width of each, and the sums of their embeddings side by side, (B, sum of widths) float32."""


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
        drawn = torch.empty(end - begin, table.dim).normal_(0.0, INITIAL_STD, generator=generator)
        low, high = max(first, begin), min(last, end)
        weights[low - first : high - first] = drawn[low - begin : high - begin]
    return weights


class PlainTables(nn.Module):
    """One `torch.nn.EmbeddingBag` per table. The counterpart of torchrec's EmbeddingBagCollection."""

    def __init__(self, layout: ModelLayout, seed: int = 0) -> None:
        super().__init__()
        self.embedding_bags = nn.ModuleDict()
        for table in used_tables(layout):
            weight = initial_rows(table, seed, 0, table.rows)
            self.embedding_bags[table.name] = nn.EmbeddingBag.from_pretrained(
                weight, freeze=False, mode="mean", include_last_offset=True
            )
        self.table_of = {each.name: each.table for each in layout.ids}
        self._looked_at = {name for each in layout.attention for name, _ in layout.history_inputs(each)}

    def forward(self, ids: KeyedIds) -> dict[str, Tensor]:
        """Mean embedding of every input: name -> (B, dim) float32; (E, dim) of each id where attention looks at it."""
        return {
            name: self.rows(table, ids.column(name)[0])
            if name in self._looked_at
            else self.embedding_bags[table](*ids.column(name))
            for name, table in self.table_of.items()
        }

    def rows(self, table: str, ids: Tensor) -> Tensor:
        """(...) int64 -> (..., dim) float32 of a table."""
        bag: Any = self.embedding_bags[table]
        return bag.rows(ids) if isinstance(bag, Int8EmbeddingBag) else functional.embedding(ids, bag.weight)


def torchrec_tables(layout: ModelLayout, device: torch.device | str = "meta") -> nn.Module:
    """The tables of a layout as torchrec's EmbeddingBagCollection; without id inputs, an empty `PlainTables`.

    Weights are zeros until `mmoe_rec.training.sharding.shard` (or a checkpoint) fills them. The forward pass takes a
    KeyedJaggedTensor and gives sums, to be read by `mean_embeddings`, as their order follows the sharding plan.
    """
    tables = used_tables(layout)
    if not tables:
        return PlainTables(layout)
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, PoolingType

    configs = [
        EmbeddingBagConfig(
            name=table.name,
            num_embeddings=table.rows,
            embedding_dim=padded_dim(table.dim),
            feature_names=[each.name for each in layout.lookup_inputs() if each.table == table.name],
            pooling=PoolingType.SUM,
            init_fn=nn.init.zeros_,  # torchrec's own would draw from the global generator, differently on each rank
        )
        for table in tables
    ]
    return EmbeddingBagCollection(tables=configs, device=torch.device(device))


def mean_embeddings(
    embeddings: Any, dims: dict[str, int], ragged: Sequence[str], shares: Tensor | None
) -> dict[str, Tensor]:
    """Mean embeddings from what a collection of either form gives: input name -> (B, dim) float32.

    embeddings: means by name; or sums, as `PooledEmbeddings` or torchrec's KeyedTensor. dims: width of each input's
    embedding; ragged, shares: see `Batch`, of the inputs whose sums have to be divided.
    """
    if isinstance(embeddings, dict):
        return embeddings
    names, widths, pooled = (
        embeddings
        if isinstance(embeddings, tuple)
        else (embeddings.keys(), embeddings.length_per_key(), embeddings.values())
    )
    # One split, whose gradient is one tensor; inputs picked one by one would each give a gradient as wide as all.
    parts = pooled.split(widths, dim=1)
    sums = {name: from_padded(part, dims[name]) for name, part in zip(names, parts, strict=True)}
    if shares is None:
        return sums
    return sums | {name: sums[name] * each[:, None] for name, each in zip(ragged, shares, strict=True)}


def pool_histories(
    embeddings: Mapping[str, Tensor],
    events: AttentionEvents,
    histories: Sequence[tuple[int, Sequence[str]]],
    rows: Tensor,
) -> tuple[dict[str, Tensor], AttentionEvents]:
    """The embeddings with the mean of each history, which is that of its first input, and the events with what they
    hold.

    embeddings: as `mean_embeddings` gives them, of each event, or of each place of lists; histories: the most events of
    a row of each, and its inputs; rows: (B, ...) what else the same rows have.
    """
    means, vectors, first = dict(embeddings), list[Tensor](), 0
    for (length, names), size in zip(histories, events.sizes, strict=True):
        row, place, later = (each[first : first + size] for each in (events.rows, events.positions, events.later))
        parts = []
        for name in names:
            own = embeddings.get(name)
            if own is None:  # of each place, (B, dim): (B * length, dim), of which some are no events
                by_row = torch.stack([embeddings[position_input(name, each)] for each in range(length)], dim=1)
                own = by_row.flatten(0, 1).index_select(0, row * length + place)
            parts.append(own)
        shares = parts[0] / (place + later + 1)[:, None]
        means[names[0]] = shares.new_zeros(len(rows), shares.shape[1]).index_add(0, row, shares)
        vectors.append(torch.cat(parts, dim=1))
        first += size
    return means, replace(events, vectors=tuple(vectors))


# How a table of any width is trained by kernels that take multiples of four columns only.
#
# fbgemm stores rows of D' columns, the width D rounded up to such a multiple; columns from D on are zeros, get
# no gradient and stay zeros. Row-wise Adagrad divides a row's step by the root of the mean square of its gradients, a
# mean that then is over D' columns and so too small by D / D'. Hence what is stored is the weights times sqrt(D' / D):
# steps do not depend on a gradient's scale, so a stored row moves by as much as any other, and the weights by sqrt(D /
# D') of that, which is what a table of D columns would do (but for Adagrad's epsilon of 1e-8).
#
# Only training stores tables so; a trained model, as it is served, started from or evaluated, has D columns.


COLUMN_MULTIPLE = 4


def padded_dim(dim: int) -> int:
    """Columns in which a table of that width is stored."""
    return -(-dim // COLUMN_MULTIPLE) * COLUMN_MULTIPLE


def to_padded(weights: Tensor) -> Tensor:
    """Rows (N, D) as they are stored: (N, D')."""
    dim = weights.shape[1]
    width = padded_dim(dim)
    return weights if width == dim else functional.pad(weights * math.sqrt(width / dim), (0, width - dim))


def from_padded(weights: Tensor, dim: int) -> Tensor:
    """Stored rows (N, D'), or means of such rows, as weights: (N, D)."""
    width = weights.shape[1]
    return weights if width == dim else weights[:, :dim] * math.sqrt(dim / width)


# Weights in int8: a quarter of the bytes of float32, and little more. Tables stay so in memory, and are read by rows.
#
# A row of numbers is a whole number from -127 to 127 for each, times one scale in bfloat16; so zeros stay zeros, and a
# number is off by at most half a scale. Rows of few numbers share a scale with rows beside them. On the tables of the
# model for Complete Journey, the root mean square of the error is .48% of that of the weights.


INT8_LIMIT = 127
MIN_WEIGHTS_PER_SCALE = 16  # numbers, at least, that share a scale
SCALES_SUFFIX = ".scales"  # what a file calls the scales of a weight, behind its name


def rows_per_scale(width: int) -> int:
    """How many rows of so many numbers share a scale."""
    return -(-MIN_WEIGHTS_PER_SCALE // max(1, width))


def quantize(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Float weights (..., D), their rows in order, as codes of that shape, int8, and scales (S,) bfloat16.

    Raises ValueError for a number that is not finite.
    """
    width = weights.shape[-1]
    rows = weights.detach().float().reshape(-1, width)
    if not rows.isfinite().all():
        raise ValueError("a number is not finite")
    together = rows_per_scale(width)
    blocks = functional.pad(rows, (0, 0, 0, -len(rows) % together)).reshape(-1, together * width)
    scales = (blocks.abs().amax(1) / INT8_LIMIT).bfloat16()
    steps = _of_rows(scales, len(rows), width)
    # A scale is 0 where all is 0, or so near to it that bfloat16 has nothing between.
    codes = torch.where(steps > 0, rows / steps, 0.0).round().clamp(-INT8_LIMIT, INT8_LIMIT).to(torch.int8)
    return codes.reshape(weights.shape), scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 weights of codes (..., D) and scales (S,)."""
    rows = codes.reshape(-1, codes.shape[-1])
    return (rows.float() * _of_rows(scales, *rows.shape)).reshape(codes.shape)


def _of_rows(scales: Tensor, rows: int, width: int) -> Tensor:
    """(rows, 1) float32: each row's scale."""
    return scales.float().repeat_interleave(rows_per_scale(width))[:rows, None]


class Int8EmbeddingBag(nn.Module):
    """An embedding table in int8, looked up as `nn.EmbeddingBag` is.

    codes: (N, D) int8; scales: (S,) bfloat16, as `quantize` gives them. Raises ValueError for shapes that don't fit.
    """

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = codes.shape  # as `nn.EmbeddingBag` calls them
        self._together = rows_per_scale(codes.shape[1])
        if scales.shape != (-(-len(codes) // self._together),):
            raise ValueError(f"{len(codes)} rows of {codes.shape[1]} numbers don't have {tuple(scales.shape)} scales")
        self.codes, self.scales = nn.Buffer(codes), nn.Buffer(scales)

    @property
    def weight(self) -> Tensor:
        """(N, D) float32: the whole table."""
        return dequantize(self.codes, self.scales)

    def rows(self, ids: Tensor) -> Tensor:
        """(...) int64 -> (..., D) float32."""
        flat = ids.flatten()
        scales = self.scales.index_select(0, flat if self._together == 1 else flat // self._together)
        rows = self.codes.index_select(0, flat).float() * scales.float().unsqueeze(1)
        return rows.view(*ids.shape, self.embedding_dim)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Ids (S,) and where each of B lists begins and ends (B + 1,) -> (B, D) float32, their means; 0 without ids."""
        places = torch.arange(len(ids), device=ids.device, dtype=offsets.dtype)
        return functional.embedding_bag(places, self.rows(ids), offsets, mode="mean", include_last_offset=True)


def table_weight_name(table: str) -> str:
    """What a file of weights calls a table."""
    return f"tables.embedding_bags.{table}.weight"


def pop_table(stored: dict[str, Tensor], name: str) -> nn.EmbeddingBag | Int8EmbeddingBag | None:
    """The table that a file's weights hold under a name, which are taken out; None where they hold none.

    Raises KeyError or ValueError for codes without scales that fit.
    """
    weight = stored.pop(name, None)
    if weight is None:
        return None
    if weight.dtype == torch.int8:
        return Int8EmbeddingBag(weight, stored.pop(name + SCALES_SUFFIX))
    return nn.EmbeddingBag.from_pretrained(weight, mode="mean", include_last_offset=True)


def to_float32(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All weights of a file as they are computed with: those in int8, and in half precision, as float32."""
    weights = {}
    for name, weight in stored.items():
        if weight.dtype == torch.int8:
            weights[name] = dequantize(weight, stored[name + SCALES_SUFFIX])
        elif not name.endswith(SCALES_SUFFIX):
            weights[name] = weight.float()
    return weights


def has_int8_weights(names: Iterable[str]) -> bool:
    """Whether some weights of a file are in int8, from the names in it."""
    return any(name.endswith(SCALES_SUFFIX) for name in names)
