"""Statistics of numbers that do not depend on the order of rows: a histogram of values rounded to 13 bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

_KEPT_BITS = 12  # of the fraction
_WAITING_AT_MOST = 64  # counted arrays, before they are added up
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
        self.missing = 0
        self._sums = np.empty(0), np.empty(0, np.int64)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, values: np.ndarray) -> None:
        """Counts (N,) float32 or float64 values; NaN and infinities count as missing, beyond +-1e150 as +-1e150."""
        finite = np.isfinite(values)
        if not finite.all():
            values = values[finite]
            self.missing += len(finite) - len(values)
        self._take([_counted(values)])

    def merge(self, other: NumberHistogram) -> None:
        """Adds what another histogram counted."""
        self.missing += other.missing
        self._take([other._sums, *other._waiting])

    def _take(self, counted: list[tuple[np.ndarray, np.ndarray]]) -> None:
        self._waiting += counted
        if len(self._waiting) > _WAITING_AT_MOST:
            self._sum()

    def _sum(self) -> tuple[np.ndarray, np.ndarray]:
        if self._waiting:
            parts = [self._sums, *self._waiting]
            values, inverse = np.unique(np.concatenate([each for each, _ in parts]), return_inverse=True)
            counts = np.bincount(inverse, np.concatenate([counts for _, counts in parts]), len(values))
            self._sums, self._waiting = (values, counts.astype(np.int64)), []
        return self._sums

    @property
    def values(self) -> np.ndarray:
        """(V,) float64 distinct rounded values, rising."""
        return self._sum()[0]

    @property
    def counts(self) -> np.ndarray:
        """(V,) int64 how often each occurs."""
        return self._sum()[1]

    def to_table(self) -> pa.Table:
        """value (null for missing ones) and count."""
        values = pa.array(np.append(self.values, np.nan), from_pandas=True)
        return pa.table({"value": values, "count": np.append(self.counts, self.missing)})

    @staticmethod
    def from_table(table: pa.Table) -> NumberHistogram:
        """The histogram that `to_table` gave."""
        histogram = NumberHistogram()
        counts = table["count"].to_numpy()
        histogram._sums = table["value"].to_numpy()[:-1], counts[:-1]
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


def _counted(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rounded values, float64, of (N,) finite float32 or float64 ones, and how often each is there."""
    whole, fraction = (np.int32, 23) if values.dtype == np.float32 else (np.int64, 52)
    dropped = fraction - _KEPT_BITS
    bits = values.view(whole) + (1 << (dropped - 1))
    np.right_shift(bits, dropped, out=bits)
    # As bits of numbers, zero is far from all others, which often lie so near to each other that each has a counter.
    other = bits[bits != 0]
    least = other.min(initial=np.iinfo(whole).max)
    span = int(other.max(initial=least)) - int(least) + 1
    if span > _SPAN_COUNTED:
        distinct, counts = np.unique(bits, return_counts=True)
    else:
        counts = np.bincount(other - least, minlength=span)
        found = np.flatnonzero(counts)
        zero = int(len(other) < len(bits))
        distinct = np.append(found + least, np.zeros(zero, np.int64))
        counts = np.append(counts[found], np.full(zero, len(bits) - len(other)))
    rounded = (distinct.astype(whole) << dropped).view(values.dtype).astype(np.float64)
    largest = min(_LARGEST, float(np.finfo(values.dtype).max))
    return np.clip(rounded, -largest, largest) + 0.0, counts  # 0 and -0 are one


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
        scaled = values - self.mean
        scaled /= self.deviation
        np.clip(scaled, -CLIP, CLIP, out=scaled)
        finite = np.isfinite(values)
        if not finite.all():
            scaled[~finite] = 0.0
        return scaled.astype(np.float32, copy=False)
