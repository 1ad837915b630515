"""Weights in int8 against a loop over rows in numpy, which rounds to bfloat16 by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mmoe_rec.model.tables import SCALES, Int8Bag, dequantised, in_float32, quantised, rows_a_scale, take_table


def bfloat16(value: np.float32) -> np.float32:
    """The nearest number of 8 bits, the even one of two."""
    bits = int(np.float32(value).view(np.uint32))
    bits += 0x7FFF + ((bits >> 16) & 1)
    return np.uint32(bits & 0xFFFF0000).view(np.float32)


def naive(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, the scale of each row, and the weights that they stand for."""
    rows, width = weights.shape
    together = next(count for count in range(1, 17) if count * width >= 16)
    codes, scales = np.zeros(weights.shape, np.int8), np.zeros(rows, np.float32)
    for first in range(0, rows, together):
        block = weights[first : first + together]
        scale = bfloat16(np.abs(block).max() / np.float32(127))
        scales[first : first + together] = scale
        if scale > 0:
            codes[first : first + together] = np.clip(np.rint(block / scale), -127, 127)
    return codes, scales, codes.astype(np.float32) * scales[:, None]


def drawn(seed: int, rows: int, width: int) -> np.ndarray:
    """Rows of many sizes, from 1e-36 to 1e36, some of them constant or zero."""
    random = np.random.default_rng(seed)
    weights = random.normal(size=(rows, width)) * 10.0 ** random.integers(-36, 37, (rows, 1))
    weights[random.random(rows) < 0.2] = 0.0
    constant = random.random(rows) < 0.2
    weights[constant] = weights[constant, :1]
    return weights.astype(np.float32)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 8, 15, 16, 17, 64])
def test_equals_a_loop_over_rows(width: int) -> None:
    for rows in (1, 2, 3, 50):
        weights = drawn(width, rows, width)
        codes, scales = quantised(torch.from_numpy(weights))
        expected_codes, expected_scales, expected = naive(weights)
        assert (codes.dtype, scales.dtype) == (torch.int8, torch.bfloat16)
        np.testing.assert_array_equal(codes.numpy(), expected_codes)
        np.testing.assert_array_equal(
            scales.float().repeat_interleave(rows_a_scale(width))[:rows].numpy(), expected_scales
        )
        np.testing.assert_array_equal(dequantised(codes, scales).numpy(), expected)


def test_numbers_too_small_for_a_scale_become_zeros() -> None:
    weights = torch.full((3, 16), 1e-40)
    weights[1] = torch.linspace(-1, 1, 16)
    found = dequantised(*quantised(weights))
    assert found.isfinite().all()
    assert (found[[0, 2]] == 0).all()
    assert torch.equal(found[1] == 0, torch.zeros(16, dtype=torch.bool))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    weights = torch.zeros(40, 4)
    weights[33, 2] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantised(weights)


@pytest.mark.parametrize("width", [3, 4, 16, 24])
def test_look_ups_are_those_of_a_table_of_floats(width: int) -> None:
    random = np.random.default_rng(width)
    codes, scales = quantised(torch.from_numpy(random.normal(size=(37, width))))
    bag = Int8Bag(codes, scales)
    plain = nn.EmbeddingBag.from_pretrained(dequantised(codes, scales), mode="mean", include_last_offset=True)
    lengths = random.integers(0, 5, 60)
    ids, offsets = torch.from_numpy(random.integers(0, 37, lengths.sum())), np.concatenate([[0], np.cumsum(lengths)])
    assert torch.equal(bag(ids, torch.from_numpy(offsets)), plain(ids, torch.from_numpy(offsets)))
    assert torch.equal(bag.rows(ids), plain.weight[ids])
    assert torch.equal(bag.weight, plain.weight)
    nothing = torch.zeros(0, dtype=torch.int64)
    assert bag.rows(nothing).shape == (0, width)
    assert torch.equal(bag(nothing, torch.zeros(3, dtype=torch.int64)), torch.zeros(2, width))


def test_scales_that_do_not_fit_are_refused() -> None:
    codes, scales = quantised(torch.randn(9, 4))
    with pytest.raises(ValueError, match="9 rows of 4 numbers"):
        Int8Bag(codes, scales[:-1])
    with pytest.raises(KeyError):
        take_table({"t": codes}, "t")


def test_a_file_is_read_as_floats() -> None:
    codes, scales = quantised(torch.randn(9, 4))
    half, full = torch.randn(3, 4).bfloat16(), torch.randn(5)
    stored = {"table": codes, "table" + SCALES: scales, "half": half, "full": full}
    found = in_float32(stored)
    assert {name: each.dtype for name, each in found.items()} == dict.fromkeys(("table", "half", "full"), torch.float32)
    assert torch.equal(found["table"], dequantised(codes, scales))
    assert torch.equal(found["half"].bfloat16(), half)
    assert torch.equal(found["full"], full)
