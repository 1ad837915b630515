"""Weights in int8: a quarter of the bytes of float32, and little more. Tables stay so in memory, and are read by rows.

A row of numbers is a whole number from -127 to 127 for each, times one scale in bfloat16; so zeros stay zeros, and a
number is off by at most half a scale. Rows of few numbers share a scale with rows beside them. On the tables of the
model for Complete Journey, the root mean square of the error is .48% of that of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

LARGEST = 127
SHARING = 16  # numbers, at least, that share a scale
SCALES = ".scales"  # what a file calls the scales of a weight, behind its name


def rows_a_scale(width: int) -> int:
    """How many rows of so many numbers share a scale."""
    return -(-SHARING // max(1, width))


def quantised(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Float weights (..., D), their rows in order, as codes of that shape, int8, and scales (S,) bfloat16.

    Raises ValueError for a number that is not finite.
    """
    width = weights.shape[-1]
    rows = weights.detach().float().reshape(-1, width)
    if not rows.isfinite().all():
        raise ValueError("a number is not finite")
    together = rows_a_scale(width)
    blocks = functional.pad(rows, (0, 0, 0, -len(rows) % together)).reshape(-1, together * width)
    scales = (blocks.abs().amax(1) / LARGEST).bfloat16()
    steps = _of_rows(scales, len(rows), width)
    # A scale is 0 where all is 0, or so near to it that bfloat16 has nothing between.
    codes = torch.where(steps > 0, rows / steps, 0.0).round().clamp(-LARGEST, LARGEST).to(torch.int8)
    return codes.reshape(weights.shape), scales


def dequantised(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 weights of codes (..., D) and scales (S,)."""
    rows = codes.reshape(-1, codes.shape[-1])
    return (rows.float() * _of_rows(scales, *rows.shape)).reshape(codes.shape)


def _of_rows(scales: Tensor, rows: int, width: int) -> Tensor:
    """(rows, 1) float32: each row's scale."""
    return scales.float().repeat_interleave(rows_a_scale(width))[:rows, None]


class Int8Bag(nn.Module):
    """An embedding table in int8, looked up as `nn.EmbeddingBag` is.

    codes: (N, D) int8; scales: (S,) bfloat16, as `quantised` gives them. Raises ValueError for shapes that don't fit.
    """

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = codes.shape  # as `nn.EmbeddingBag` calls them
        self._together = rows_a_scale(codes.shape[1])
        if scales.shape != (-(-len(codes) // self._together),):
            raise ValueError(f"{len(codes)} rows of {codes.shape[1]} numbers don't have {tuple(scales.shape)} scales")
        self.codes: Tensor
        self.scales: Tensor
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @property
    def weight(self) -> Tensor:
        """(N, D) float32: the whole table."""
        return dequantised(self.codes, self.scales)

    def rows(self, ids: Tensor) -> Tensor:
        """(S,) int64 -> (S, D) float32."""
        places = ids if self._together == 1 else ids // self._together
        return self.codes.index_select(0, ids).float() * self.scales.index_select(0, places).float().unsqueeze(1)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Ids (S,) and where each of B lists begins and ends (B + 1,) -> (B, D) float32, their means; 0 without ids."""
        places = torch.arange(len(ids), device=ids.device, dtype=offsets.dtype)
        return functional.embedding_bag(places, self.rows(ids), offsets, mode="mean", include_last_offset=True)


def take_table(stored: dict[str, Tensor], name: str) -> nn.EmbeddingBag | Int8Bag | None:
    """The table that a file's weights hold under a name, which are taken out; None where they hold none.

    Raises KeyError or ValueError for codes without scales that fit.
    """
    weight = stored.pop(name, None)
    if weight is None:
        return None
    if weight.dtype == torch.int8:
        return Int8Bag(weight, stored.pop(name + SCALES))
    return nn.EmbeddingBag.from_pretrained(weight, mode="mean", include_last_offset=True)


def in_float32(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All weights of a file as they are computed with: those in int8, and in half precision, as float32."""
    weights = {}
    for name, weight in stored.items():
        if weight.dtype == torch.int8:
            weights[name] = dequantised(weight, stored[name + SCALES])
        elif not name.endswith(SCALES):
            weights[name] = weight.float()
    return weights


def some_in_int8(names: Iterable[str]) -> bool:
    """Whether some weights of a file are in int8, from the names in it."""
    return any(name.endswith(SCALES) for name in names)
