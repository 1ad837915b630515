"""Embedding tables in two forms that give the same embeddings.

`PlainTables` is pure torch, for serving and single-process evaluation. `torchrec_tables` returns torchrec's collection
of tables, which `mmoe_rec.training.sharding` distributes over ranks. The collection pads weights (`padded_dim`).

Pass the output of either form to `mean_embeddings`. The result is the mean embedding of an input's IDs, or zero without
IDs. torchrec's collection only sums embeddings, because averaging is slow on some processors.
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

# New IDs start near zero, so that an ID that training has rarely seen adds almost nothing to a row.
INITIAL_STD = 0.01
# Number of rows in a block. Each block has its own random generator, so a rank draws only the blocks of its rows.
BLOCK_ROWS = 65_536
PooledEmbeddings = tuple[list[str], list[int], Tensor]
"""Names of inputs, their widths, and the sums of their embeddings side by side, (B, sum of widths) float32."""


def used_tables(layout: ModelLayout) -> list[EmbeddingTable]:
    """Return the tables that ID inputs look up, in layout order."""
    used = {column.table for column in layout.ids}
    return [table for table in layout.tables if table.name in used]


def initial_rows(table: EmbeddingTable, seed: int, first: int, last: int) -> Tensor:
    """Return initial weights (last - first, dim) float32 of a range of rows, which are the same for any sharding.

    Args:
        table: Table of the rows.
        seed: Seed.
        first: First row.
        last: End of the rows, exclusive.
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
    """One `torch.nn.EmbeddingBag` per table, the counterpart of torchrec's EmbeddingBagCollection."""

    def __init__(self, layout: ModelLayout, seed: int = 0) -> None:
        """Create the tables.

        Args:
            layout: Layout with the tables.
            seed: Seed of the weights.
        """
        super().__init__()
        self.embedding_bags = nn.ModuleDict()
        for table in used_tables(layout):
            weight = initial_rows(table, seed, 0, table.rows)
            bag = nn.EmbeddingBag.from_pretrained(weight, freeze=False, mode="mean", include_last_offset=True)
            self.embedding_bags[table.name] = bag
        self.table_of = {column.name: column.table for column in layout.ids}
        self._attended = {name for history in layout.attention for name, _ in layout.history_inputs(history)}

    def forward(self, ids: KeyedIds) -> dict[str, Tensor]:
        """Return the mean embeddings (B, dim) float32 of each input by name.

        For an input of a history that attention pools, return the embedding of each of the E events instead, (E, dim).
        """
        return {
            name: self.rows(table, ids.column(name)[0])
            if name in self._attended
            else self.embedding_bags[table](*ids.column(name))
            for name, table in self.table_of.items()
        }

    def rows(self, table: str, ids: Tensor) -> Tensor:
        """Return rows of a table, (..., dim) float32.

        Args:
            table: Name of the table.
            ids: (...) int64.
        """
        bag: Any = self.embedding_bags[table]
        return bag.rows(ids) if isinstance(bag, Int8EmbeddingBag) else functional.embedding(ids, bag.weight)


def torchrec_tables(layout: ModelLayout, device: torch.device | str = "meta") -> nn.Module:
    """Return a layout's tables as torchrec's EmbeddingBagCollection. Without ID inputs, return an empty `PlainTables`.

    Weights are zeros until `mmoe_rec.training.sharding.shard` or a checkpoint fills them.

    Args:
        layout: Layout with the tables.
        device: Device of the tables.
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
            feature_names=[column.name for column in layout.lookup_inputs() if column.table == table.name],
            pooling=PoolingType.SUM,
            init_fn=nn.init.zeros_,  # torchrec's default draws differently on each rank.
        )
        for table in tables
    ]
    return EmbeddingBagCollection(tables=configs, device=torch.device(device))


def mean_embeddings(
    embeddings: Any, dims: dict[str, int], ragged: Sequence[str], pooling_weights: Tensor | None
) -> dict[str, Tensor]:
    """Return the mean embedding of each input, from the output of `PlainTables` or of torchrec's tables.

    Args:
        embeddings: Output of the tables: means by name, or sums as `PooledEmbeddings` or torchrec's KeyedTensor.
        dims: Width of each input's embedding.
        ragged: Names of R inputs whose sums differ from means, see `Batch.ragged_inputs`.
        pooling_weights: (R, B) factors from sums to means, see `Batch.pooling_weights`.

    Returns:
        Input name -> (B, dim) float32.
    """
    if isinstance(embeddings, dict):
        return embeddings
    if not isinstance(embeddings, tuple):
        embeddings = embeddings.keys(), embeddings.length_per_key(), embeddings.values()
    names, widths, pooled = embeddings
    # Split once, so that the gradient is one tensor. Picking inputs one by one gives a full-width gradient for each.
    parts = pooled.split(widths, dim=1)
    sums = {name: from_padded(part, dims[name]) for name, part in zip(names, parts, strict=True)}
    if pooling_weights is None:
        return sums
    return sums | {name: sums[name] * weights[:, None] for name, weights in zip(ragged, pooling_weights, strict=True)}


def pool_histories(
    embeddings: Mapping[str, Tensor],
    events: AttentionEvents,
    histories: Sequence[tuple[int, Sequence[str]]],
    rows: Tensor,
) -> tuple[dict[str, Tensor], AttentionEvents]:
    """Return embeddings with the mean of each history, and events with their embeddings in `vectors`.

    Args:
        embeddings: Result of `mean_embeddings`. A history's inputs have the embedding of each event (plain tables), or
            of each position of the lists (sharded tables).
        events: Events of the rows.
        histories: Maximum length and inputs of each history. The mean gets the name of the first input.
        rows: Any tensor with B rows. Only the number of rows is read.
    """
    means, vectors = dict(embeddings), list[Tensor]()
    columns = (values.split(events.sizes) for values in (events.rows, events.positions, events.later))
    for (length, names), row, position, later in zip(histories, *columns, strict=True):
        parts = []
        for name in names:
            embedding = embeddings.get(name)
            if embedding is None:
                # Sharded tables give embeddings (B, dim) for each list position. Select the positions with events.
                by_row = torch.stack([embeddings[position_input(name, index)] for index in range(length)], dim=1)
                embedding = by_row.flatten(0, 1).index_select(0, row * length + position)
            parts.append(embedding)
        weighted = parts[0] / (position + later + 1)[:, None]
        means[names[0]] = weighted.new_zeros(len(rows), weighted.shape[1]).index_add(0, row, weighted)
        vectors.append(torch.cat(parts, dim=1))
    return means, replace(events, vectors=tuple(vectors))


# Padding for kernels that need a multiple of four columns.
#
# fbgemm stores a table of width D with D' columns, where D' is D rounded up to a multiple of four. The padding stays
# zero and gets no gradient.
#
# Row-wise Adagrad divides a row's gradient by the root mean square of the row's gradients. The zeros of the padding
# lower this root mean square by the factor sqrt(D / D'), so steps are too large by sqrt(D' / D). Stored weights are
# therefore the weights times sqrt(D' / D). A step of Adagrad doesn't depend on the scale of the gradient, so the
# weights move exactly as in a table of D columns (except for Adagrad's epsilon of 1e-8).
#
# Only tables in training are padded. A saved model has D columns.

COLUMN_MULTIPLE = 4


def padded_dim(dim: int) -> int:
    """Return the number of columns that training stores for a table of width `dim`."""
    return -(-dim // COLUMN_MULTIPLE) * COLUMN_MULTIPLE


def to_padded(weights: Tensor) -> Tensor:
    """Pad and scale weights (N, D) to the rows (N, D') that training stores."""
    dim = weights.shape[1]
    width = padded_dim(dim)
    return weights if width == dim else functional.pad(weights * math.sqrt(width / dim), (0, width - dim))


def from_padded(weights: Tensor, dim: int) -> Tensor:
    """Return the weights (N, D) of rows from `to_padded`, or their sums.

    Args:
        weights: (N, D'), stored rows or sums of stored rows.
        dim: Width D of the table.
    """
    width = weights.shape[1]
    return weights if width == dim else weights[:, :dim] * math.sqrt(dim / width)


# Weights in int8 take slightly more than a quarter of the bytes of float32, on disk and in memory.
#
# A weight is an integer code from -127 to 127, times a bfloat16 scale. Each row has its own scale, except that adjacent
# rows of a narrow table share one. Zeros stay zeros, and the error of a weight is at most half a scale. For the tables
# of the Complete Journey model, the root mean square of the error is 0.48% of the root mean square of the weights.

INT8_LIMIT = 127
MIN_WEIGHTS_PER_SCALE = 16
SCALES_SUFFIX = ".scales"  # In a file, the scales of weight NAME are called NAME.scales.


def rows_per_scale(width: int) -> int:
    """Return how many adjacent rows of an int8 table of this width share a scale."""
    return -(-MIN_WEIGHTS_PER_SCALE // max(1, width))


def quantize(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize weights to int8.

    Args:
        weights: (..., D) floats.

    Returns:
        Codes (..., D) int8, and scales (S,) bfloat16. Each scale belongs to `rows_per_scale` adjacent rows.

    Raises:
        ValueError: A number is not finite.
    """
    width = weights.shape[-1]
    rows = weights.detach().float().reshape(-1, width)
    if not rows.isfinite().all():
        raise ValueError("a number is not finite")
    height = rows_per_scale(width)
    blocks = functional.pad(rows, (0, 0, 0, -len(rows) % height)).reshape(-1, height * width)
    scales = (blocks.abs().amax(1) / INT8_LIMIT).bfloat16()
    steps = _row_scales(scales, len(rows), width)
    # A scale is 0 if all numbers are 0, or too small for bfloat16.
    codes = torch.where(steps > 0, rows / steps, 0.0).round().clamp(-INT8_LIMIT, INT8_LIMIT).to(torch.int8)
    return codes.reshape(weights.shape), scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 weights of quantized rows.

    Args:
        codes: (..., D) int8.
        scales: (S,) bfloat16.
    """
    rows = codes.reshape(-1, codes.shape[-1])
    return (rows.float() * _row_scales(scales, *rows.shape)).reshape(codes.shape)


def _row_scales(scales: Tensor, rows: int, width: int) -> Tensor:
    """Return each row's scale, (rows, 1) float32."""
    return scales.float().repeat_interleave(rows_per_scale(width))[:rows, None]


class Int8EmbeddingBag(nn.Module):
    """Embedding table in int8 with the lookup of `nn.EmbeddingBag`."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        """Create the table, or raise ValueError if the shapes don't match.

        Args:
            codes: (N, D) int8 from `quantize`.
            scales: (S,) bfloat16 from `quantize`.
        """
        super().__init__()
        self.num_embeddings, self.embedding_dim = codes.shape  # Names as in `nn.EmbeddingBag`.
        self._rows_per_scale = rows_per_scale(codes.shape[1])
        if scales.shape != (-(-len(codes) // self._rows_per_scale),):
            raise ValueError(f"{len(codes)} rows of {codes.shape[1]} numbers don't have {tuple(scales.shape)} scales")
        self.codes, self.scales = nn.Buffer(codes), nn.Buffer(scales)

    @property
    def weight(self) -> Tensor:
        """The whole table, (N, D) float32."""
        return dequantize(self.codes, self.scales)

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows, (...) int64 -> (..., D) float32."""
        flat = ids.flatten()
        scales = self.scales.index_select(0, flat if self._rows_per_scale == 1 else flat // self._rows_per_scale)
        rows = self.codes.index_select(0, flat).float() * scales.float().unsqueeze(1)
        return rows.view(*ids.shape, self.embedding_dim)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Return the means of B lists of rows, (B, D) float32, 0 for empty lists.

        Args:
            ids: (n,) row numbers of all lists.
            offsets: (B + 1,) start of each list in `ids`, and the end of the last list.
        """
        positions = torch.arange(len(ids), device=ids.device, dtype=offsets.dtype)
        return functional.embedding_bag(positions, self.rows(ids), offsets, mode="mean", include_last_offset=True)


def table_weight_name(table: str) -> str:
    """Return the name of a table's weight in a model's file of weights."""
    return f"tables.embedding_bags.{table}.weight"


def pop_table(stored: dict[str, Tensor], name: str) -> nn.EmbeddingBag | Int8EmbeddingBag | None:
    """Remove a table from `stored` and return it, or None if the table isn't there.

    Args:
        stored: Weights of a file by name.
        name: Name of the table's weight.

    Raises:
        KeyError: An int8 table has no scales.
        ValueError: An int8 table has the wrong number of scales.
    """
    weight = stored.pop(name, None)
    if weight is None:
        return None
    if weight.dtype == torch.int8:
        return Int8EmbeddingBag(weight, stored.pop(name + SCALES_SUFFIX))
    return nn.EmbeddingBag.from_pretrained(weight, mode="mean", include_last_offset=True)


def to_float32(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert all weights of a file to float32, from int8 and half precision."""
    weights = {}
    for name, weight in stored.items():
        if weight.dtype == torch.int8:
            weights[name] = dequantize(weight, stored[name + SCALES_SUFFIX])
        elif not name.endswith(SCALES_SUFFIX):
            weights[name] = weight.float()
    return weights


def has_int8_weights(names: Iterable[str]) -> bool:
    """Return whether weights with these names include int8 tables, which have scales."""
    return any(name.endswith(SCALES_SUFFIX) for name in names)
