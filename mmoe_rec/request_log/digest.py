"""A hash of what a model reads of a row, so that it can be told whether the same row has the same features elsewhere.

It is computed from encoded inputs, ids as integers and numbers by the bits of their float32, so that served and
offline rows agree exactly if every input does. The hash is multilinear (Lemire and Kaser 2014): the sum over inputs of
value times a fixed odd number, modulo 2^64, then mixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mmoe_rec.log.hashing import mix
from mmoe_rec.point_in_time.lists import Ragged

Values = Mapping[str, np.ndarray | Ragged]


def digests(ids: Values, dense: Mapping[str, np.ndarray], names: tuple[Sequence[str], Sequence[str]]) -> np.ndarray:
    """(N,) int64 hashes of N rows.

    ids: name -> (N,) integers, or `Ragged`; dense: name -> (N,) float32; names: of the ids and of the numbers that
    count, in the order of a layout, placement left out as it is absent in serving.
    """
    columns = [_ids(ids[name]) for name in names[0]]
    rows = len(columns[0]) if columns else len(dense[names[1][0]])
    numbers = np.empty((rows, len(names[1])), np.float32)
    for place, name in enumerate(names[1]):
        numbers[:, place] = dense[name]
    values = np.column_stack([*columns, numbers.view(np.uint32).astype(np.uint64)])
    factors = mix(np.arange(values.shape[1], dtype=np.uint64)) | np.uint64(1)
    with np.errstate(over="ignore"):
        return mix((values + np.uint64(1)) @ factors).view(np.int64)


def _ids(ids: np.ndarray | Ragged) -> np.ndarray:
    if not isinstance(ids, Ragged):
        return ids.astype(np.int64).view(np.uint64)
    ends = np.cumsum(ids.lengths, dtype=np.int64)
    starts = ends - ids.lengths
    within = np.arange(len(ids.values)) - np.repeat(starts, ids.lengths)
    with np.errstate(over="ignore"):
        each = mix(ids.values.astype(np.int64).view(np.uint64) + mix(within.astype(np.uint64)))
        sums = np.append(np.uint64(0), np.cumsum(each, dtype=np.uint64))
        return mix(sums[ends] - sums[starts] + ids.lengths.astype(np.uint64))
