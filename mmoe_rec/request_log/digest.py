"""Hashes of what a model reads of a row, one for each feature, so that served and offline rows can be compared.

They are computed from encoded inputs, ids as integers and numbers by the bits of their float32, so that served and
offline rows agree exactly if every input does. A hash is multilinear (Lemire and Kaser 2014): the sum over inputs of
value times a fixed odd number, modulo 2^64, then mixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter

import numpy as np

from mmoe_rec.features.layout import IdInput, Layout
from mmoe_rec.log.hashing import mix
from mmoe_rec.point_in_time.lists import Ragged


def digests(
    ids: Mapping[str, np.ndarray | Ragged], dense: Mapping[str, np.ndarray], layout: Layout
) -> dict[str, np.ndarray]:
    """Feature -> (N,) int32 hashes of N rows, without placement, which is absent in serving.

    ids: name of an input -> (N,) integers, or `Ragged`; dense: name -> (N,) float32.
    """
    of_ids = [each for each in layout.ids if not each.placement]
    inputs = [*of_ids, *(each for each in layout.dense if not each.placement)]
    inputs.sort(key=attrgetter("feature"))
    columns = [_numbers(ids[each.name] if isinstance(each, IdInput) else dense[each.name]) for each in inputs]
    names, starts = np.unique([each.feature for each in inputs], return_index=True)
    factors = mix(np.arange(len(inputs), dtype=np.uint64)) | np.uint64(1)
    with np.errstate(over="ignore"):
        hashes = mix(np.add.reduceat((np.column_stack(columns) + np.uint64(1)) * factors, starts, axis=1))
    return dict(zip(names.tolist(), (hashes >> np.uint64(32)).astype(np.uint32).view(np.int32).T, strict=True))


def _numbers(values: np.ndarray | Ragged) -> np.ndarray:
    """(N,) uint64, one for each row."""
    if not isinstance(values, Ragged):
        if values.dtype == np.float32:
            return np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
        return values.astype(np.int64).view(np.uint64)
    ends = np.cumsum(values.lengths, dtype=np.int64)
    starts = ends - values.lengths
    within = np.arange(len(values.values)) - np.repeat(starts, values.lengths)
    with np.errstate(over="ignore"):
        each = mix(values.values.astype(np.int64).view(np.uint64) + mix(within.astype(np.uint64)))
        sums = np.append(np.uint64(0), np.cumsum(each, dtype=np.uint64))
        return mix(sums[ends] - sums[starts] + values.lengths.astype(np.uint64))
