"""Stable 64-bit hashes of columns, the same on every machine and in every process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from mmoe_rec.point_in_time.arrays import filled

_MISSING = np.uint64(0x9AE16A3B2F90404F)


def mix(values: np.ndarray) -> np.ndarray:
    """Bijective scrambling of (N,) uint64 (the finaliser of splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def hash_column(column: pa.Array) -> np.ndarray:
    """(N,) uint64 hashes of a column of int64 or strings, dictionary-coded or not; nulls share one hash."""
    if pt.is_null(column.type):
        return np.full(len(column), _MISSING)
    if pt.is_string(column.type) or pt.is_dictionary(column.type):
        encoded = column.dictionary_encode()
        words = encoded.dictionary.to_numpy(zero_copy_only=False).astype(object)
        import pandas as pd

        table = np.append(pd.util.hash_array(words, categorize=False).astype(np.uint64), _MISSING)
        return table[filled(encoded.indices, len(words)).to_numpy()]
    hashes = mix(filled(column, 0).to_numpy(zero_copy_only=False).astype(np.int64, copy=False).view(np.uint64))
    if column.null_count:
        hashes[column.is_null().to_numpy(zero_copy_only=False)] = _MISSING
    return hashes


def combine(hashes: Sequence[np.ndarray]) -> np.ndarray:
    """(N,) uint64 hash of the ordered combination of several (N,) hashes."""
    result = hashes[0]
    with np.errstate(over="ignore"):
        for each in hashes[1:]:
            result = mix(result * np.uint64(3) + each)
    return result
