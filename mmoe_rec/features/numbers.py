"""Statistics of numbers that do not depend on the order of rows: a histogram of values rounded to 13 bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

_DROPPED_BITS = np.int64(40)
CLIP = 10.0
EDGES = 17
_SPAN_COUNTED = 2**18
_LARGEST = 1e150  # its square is still finite


class NumberHistogram:
    """Counts of values rounded to a relative precision of 2^-13; a mergeable partial fit.

    Rounding bounds the number of distinct values, so memory does not grow with the log, and counts are integers, so
    any order of rows and any partition give the same mean, deviation and quantiles.
    """

    def __init__(self) -> None:
        self.values = np.empty(0)
        self.counts = np.empty(0, np.int64)
        self.missing = 0

    def add(self, values: np.ndarray) -> None:
        """Counts (N,) float32 or float64 values; NaN and infinities count as missing, beyond +-1e150 as +-1e150."""
        finite = np.isfinite(values)
        if not finite.all():
            values = values[finite]
            self.missing += len(finite) - len(values)
        rounded, counts = _counted(_rounded(values))
        self._merge(np.clip(_value(rounded), -_LARGEST, _LARGEST), counts)

    def _merge(self, values: np.ndarray, counts: np.ndarray) -> None:
        merged, inverse = np.unique(np.concatenate([self.values, values]), return_inverse=True)
        self.counts = np.bincount(inverse, np.concatenate([self.counts, counts]), len(merged)).astype(np.int64)
        self.values = merged

    def merge(self, other: NumberHistogram) -> None:
        """Adds what another histogram counted."""
        self.missing += other.missing
        self._merge(other.values, other.counts)

    def to_table(self) -> pa.Table:
        """value (null for missing ones) and count."""
        values = pa.array(np.append(self.values, np.nan), from_pandas=True)
        return pa.table({"value": values, "count": np.append(self.counts, self.missing)})

    @staticmethod
    def from_table(table: pa.Table) -> NumberHistogram:
        """The histogram that `to_table` gave."""
        histogram = NumberHistogram()
        counts = table["count"].to_numpy()
        histogram.values, histogram.counts = table["value"].to_numpy()[:-1], counts[:-1]
        histogram.missing = int(counts[-1])
        return histogram

    def standardiser(self) -> Standardiser:
        """Mean and deviation of the counted values; (0, 1) where there are none, deviation 1 where they are equal."""
        total = self.counts.sum()
        if total == 0:
            return Standardiser(0.0, 1.0, self.missing > 0, ())
        mean = float((self.values * self.counts).sum() / total)
        deviation = float(np.sqrt((np.square(self.values - mean) * self.counts).sum() / total))
        if deviation <= 1e-12 * np.abs(self.values).max():
            return Standardiser(mean, 1.0, self.missing > 0, ())
        scaled = np.clip((self._spread_quantiles(EDGES) - mean) / deviation, -CLIP, CLIP)
        return Standardiser(mean, deviation, self.missing > 0, tuple(np.unique(scaled.astype(np.float32)).tolist()))

    def _spread_quantiles(self, count: int) -> np.ndarray:
        """Least, largest and `count` - 2 quantiles by the square root of each value's count.

        The root keeps edges for rare values where most rows share one value, as counters do at zero.
        """
        share = np.cumsum(np.sqrt(self.counts))
        positions = np.searchsorted(share, np.linspace(0.0, 1.0, count) * share[-1])
        return self.values[np.minimum(positions, len(self.values) - 1)]

    def quantiles(self, buckets: int) -> np.ndarray:
        """Sorted distinct inner edges, at most `buckets` - 1, that cut the values into parts of equal mass."""
        if not len(self.values):
            return np.empty(0)
        share = np.cumsum(self.counts) / self.counts.sum()
        positions = np.searchsorted(share, np.arange(1, buckets) / buckets)
        return np.unique(self.values[np.minimum(positions, len(self.values) - 1)])


def _rounded(values: np.ndarray) -> np.ndarray:
    """(N,) int64 the first 24 bits of (N,) float64 values, rounded: sign, exponent and 12 of the fraction."""
    bits = values.astype(np.float64).view(np.int64)
    bits += np.int64(1) << (_DROPPED_BITS - np.int64(1))
    bits >>= _DROPPED_BITS
    return bits


def _value(rounded: np.ndarray) -> np.ndarray:
    """(N,) float64 values of `_rounded` ones; 0 and -0 are one."""
    return (rounded << _DROPPED_BITS).view(np.float64) + 0.0


def _counted(whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct numbers of an (N,) int64 array, rising, and how often each is there."""
    # As bits of numbers, zero is far from all others, which often lie so near to each other that each has a counter.
    other = whole[whole != 0]
    least = other.min(initial=np.iinfo(np.int64).max)
    span = int(other.max(initial=least)) - int(least) + 1
    if span > _SPAN_COUNTED:
        return np.unique(whole, return_counts=True)
    counts = np.bincount(other - least, minlength=span)
    found = np.flatnonzero(counts)
    distinct, counts = found + least, counts[found]
    if len(other) < len(whole):
        place = np.searchsorted(distinct, 0)
        distinct, counts = np.insert(distinct, place, 0), np.insert(counts, place, len(whole) - len(other))
    return distinct, counts


@dataclass(frozen=True)
class Standardiser:
    """(x - mean) / deviation, clipped to +-10.

    has_missing: whether training rows had missing values; edges: rising quantiles of the standardised values, for
    piecewise-linear encoding.
    """

    mean: float
    deviation: float
    has_missing: bool
    edges: tuple[float, ...] = ()

    def apply(self, values: np.ndarray) -> np.ndarray:
        """(N,) float32; missing values become 0, the mean."""
        scaled = np.clip((values - self.mean) / self.deviation, -CLIP, CLIP)
        return np.where(np.isfinite(values), scaled, 0.0).astype(np.float32)
