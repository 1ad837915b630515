"""Mean, standard deviation and quantiles of numbers, from histograms that can be merged in any order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mmoe_rec.features.layout import DenseInput

MAX_DISTINCT_VALUES = 2**16
# Dropping 48 bits of a float64 leaves 16 bits, so at most 2^16 values.
_MAX_DROPPED_BITS = 48
CLIP = 10.0
EDGE_COUNT = 17
# The square of this number is still finite.
_MAX_MAGNITUDE = 1e150
# Values count as equal if no value is farther from the mean than this fraction of the largest magnitude.
_ROUNDING = 8 * np.finfo(np.float64).eps
_DROPPED_BITS_KEY = b"dropped_bits"
# Number of trailing bits of a float64 that a float32 lacks.
_FLOAT32_DROPPED_BITS = 29
# A frequent value has at least 100 rows. If there are too many values to count exactly, it also has 1 row in 1000.
_MIN_FREQUENT_ROWS, _MAX_ROWS_PER_FREQUENT = 100, 1000


def _float_keys(values: np.ndarray, dropped_bits: int) -> np.ndarray:
    """Return the bits of float64 numbers as float32, without the last `dropped_bits` bits, as (N,) int32 keys."""
    with np.errstate(over="ignore"):
        return (values.astype(np.float32) + np.float32(0)).view(np.int32) >> dropped_bits


@dataclass(frozen=True)
class _Counts:
    """Counts of values by ascending keys. A key has the bits of a float64 without the last `dropped_bits` bits."""

    keys: np.ndarray
    counts: np.ndarray
    dropped_bits: int

    def coarser(self, dropped_bits: int) -> "_Counts":
        """Return the counts with at least `dropped_bits` bits dropped."""
        if dropped_bits <= self.dropped_bits:
            return self
        return _sum_counts(self.keys >> (dropped_bits - self.dropped_bits), self.counts, dropped_bits)

    def bounded(self) -> "_Counts":
        """Return counts with at most `MAX_DISTINCT_VALUES` keys. Drop no more of the last bits of keys than needed."""
        too_few, enough = self.dropped_bits, _MAX_DROPPED_BITS
        if len(self.keys) <= MAX_DISTINCT_VALUES:
            return self
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            keys = self.keys >> (middle - self.dropped_bits)
            if 1 + np.count_nonzero(keys[1:] != keys[:-1]) > MAX_DISTINCT_VALUES:
                too_few = middle
            else:
                enough = middle
        return self.coarser(enough)


class NumberHistogram:
    """Counts of numbers, exact for up to 65,536 distinct numbers.

    With more distinct numbers, the histogram drops as few of the last bits of all numbers as needed and counts the
    shortened numbers. So any order and partition of rows gives the same mean, standard deviation and quantiles.

    Attributes:
        missing: Number of missing values.
    """

    def __init__(self) -> None:
        self.missing = 0
        self._counts = _Counts(np.empty(0, np.int64), np.empty(0, np.int64), 0)

    def add(self, values: np.ndarray) -> None:
        """Count (N,) float32 or float64 `values`. NaN and infinities count as missing."""
        finite = np.isfinite(values)
        if not finite.all():
            values = values[finite]
            self.missing += len(finite) - len(values)
        values = np.sort(values)
        first = _distinct_indices(values)
        # Adding 0 turns -0 into 0.
        bits = (values[first] + np.float64(0)).view(np.int64)
        self._add(_Counts(bits, np.diff(first, append=len(values)), 0))

    def merge(self, histogram: "NumberHistogram") -> None:
        """Add the counts of another histogram."""
        self.missing += histogram.missing
        self._add(histogram._counts)

    def _add(self, new: _Counts) -> None:
        dropped_bits = max(self._counts.dropped_bits, new.dropped_bits)
        parts = [counts.coarser(dropped_bits) for counts in (self._counts, new)]
        keys, counts = (np.concatenate([getattr(part, name) for part in parts]) for name in ("keys", "counts"))
        self._counts = _sum_counts(keys, counts, dropped_bits).bounded()

    @property
    def bins(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Smallest number, largest number and row count of each of V bins, in ascending order, as three (V,) arrays."""
        total = self._counts
        # `inner` is the number of a bin nearest to zero, with zeros as dropped bits. `outer` has ones instead.
        inner = total.keys << total.dropped_bits
        outer = (inner | ((1 << total.dropped_bits) - 1)).view(np.float64)
        inner = inner.view(np.float64)
        # Sort again, because the bits of negative numbers ascend towards minus infinity.
        order = np.argsort(inner, kind="stable")
        negative = np.signbit(inner)
        smallest, largest = np.where(negative, outer, inner), np.where(negative, inner, outer)
        return smallest[order], largest[order], total.counts[order]

    def to_table(self) -> pa.Table:
        """Return a table with key (null for missing values) and count, and the dropped bits as metadata."""
        total = self._counts
        keys = pa.array(np.append(total.keys, 0), mask=np.append(np.zeros(len(total.keys), bool), True))
        table = pa.table({"key": keys, "count": np.append(total.counts, self.missing)})
        return table.replace_schema_metadata({_DROPPED_BITS_KEY: str(total.dropped_bits)})

    @staticmethod
    def from_table(table: pa.Table) -> "NumberHistogram":
        """Read a table that `to_table` returned."""
        histogram = NumberHistogram()
        counts, keys = table["count"].to_numpy(), table["key"].combine_chunks().drop_null().to_numpy()
        histogram._counts = _Counts(keys, counts[:-1], int(table.schema.metadata[_DROPPED_BITS_KEY]))
        histogram.missing = int(counts[-1])
        return histogram

    def standardizer(self) -> "Standardizer":
        """Return the mean and standard deviation of the counted values, clipped to +-1e150.

        Without values, the mean is 0. If all values are equal, or there are none, the standard deviation is 1.
        """
        smallest, largest, counts = self.bins
        middles = np.where((smallest == 0) | (largest == 0), 0.0, smallest + (largest - smallest) / 2)
        values = np.clip(middles, -_MAX_MAGNITUDE, _MAX_MAGNITUDE)
        if not len(values):
            return Standardizer(0.0, 1.0, self.missing > 0, ())
        # Sum distances from the median, because differences can be small relative to the values.
        median = values[np.searchsorted(np.cumsum(counts), counts.sum() / 2)]
        mean = float(median + ((values - median) * counts).sum() / counts.sum())
        farthest = float(np.abs(values - mean).max())
        if farthest <= _ROUNDING * np.abs(values).max():
            return Standardizer(mean, 1.0, self.missing > 0, ())
        std = float(farthest * np.sqrt((np.square((values - mean) / farthest) * counts).sum() / counts.sum()))
        scaled = np.clip((_spread_quantiles(values, counts, EDGE_COUNT) - mean) / std, -CLIP, CLIP)
        return Standardizer(mean, std, self.missing > 0, tuple(np.unique(scaled.astype(np.float32) + 0).tolist()))

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> "NumberHistogram":
        """Return the histogram of `function` applied to the numbers. The middle of a bin stands for its numbers."""
        smallest, largest, counts = self.bins
        bits = (function(smallest / 2 + largest / 2) + np.float64(0)).view(np.int64)
        histogram = NumberHistogram()
        histogram.missing = self.missing
        histogram._counts = _sum_counts(bits, counts, 0)
        return histogram

    def frequent_values(self) -> "FrequentValues":
        """Return the values that are frequent enough to get an embedding of their own."""
        smallest, largest, counts = self.bins
        dropped_bits = max(0, self._counts.dropped_bits - _FLOAT32_DROPPED_BITS)
        keys, inverse = np.unique(
            _float_keys(np.where(np.signbit(smallest), largest, smallest), dropped_bits), return_inverse=True
        )
        rows = np.bincount(inverse, counts, len(keys))
        frequent = np.flatnonzero(
            rows >= max(_MIN_FREQUENT_ROWS, rows.sum() / _MAX_ROWS_PER_FREQUENT if self._counts.dropped_bits else 0)
        )
        ids = np.empty(len(frequent), np.int64)
        ids[np.argsort(-rows[frequent], kind="stable")] = np.arange(1, len(frequent) + 1)
        return FrequentValues(keys[frequent], ids, dropped_bits)

    def bucket_edges(self, buckets: int) -> np.ndarray:
        """Return the ascending inner edges of `buckets` buckets with about equal numbers of rows.

        With at most `buckets` distinct values, each value has its own bucket. An edge lies halfway between two values,
        so that a value rounded to float32 falls into the same bucket.
        """
        smallest, largest, counts = self.bins
        ends = _equal_parts(counts, min(buckets, len(counts)))[:-1]
        low, high = largest[ends - 1], smallest[ends]
        return np.maximum(low, np.minimum(low / 2 + high / 2, np.nextafter(high, -np.inf)))


def _spread_quantiles(values: np.ndarray, counts: np.ndarray, count: int) -> np.ndarray:
    """Return `count` quantiles from the smallest to the largest value, weighted by the square root of counts.

    Without the root, most quantiles would be equal if most rows have the same value, such as 0 in a counter.
    """
    mass = np.cumsum(np.sqrt(counts))
    positions = np.searchsorted(mass, np.linspace(0.0, 1.0, count) * mass[-1])
    return values[np.minimum(positions, len(values) - 1)]


def _equal_parts(counts: np.ndarray, parts: int) -> np.ndarray:
    """Split counts into consecutive parts with about equal sums, and return the end (exclusive) of each part.

    The goal of a part is the sum of the remaining counts, divided by the number of remaining parts.
    """
    total = np.append(0, np.cumsum(counts))
    ends = np.zeros(parts + 1, np.int64)
    for part in range(parts):
        parts_left = parts - part
        goal = total[ends[part]] + (total[-1] - total[ends[part]]) / parts_left
        over = int(np.searchsorted(total, goal))
        nearest = over - (total[over] - goal > goal - total[over - 1])
        ends[part + 1] = min(max(nearest, ends[part] + 1), len(counts) - (parts_left - 1))
    return ends[1:]


def _distinct_indices(values: np.ndarray) -> np.ndarray:
    """Return the index of the first occurrence of each distinct value in a sorted array."""
    return np.flatnonzero(np.append(len(values) > 0, values[1:] != values[:-1]))


def _sum_counts(keys: np.ndarray, counts: np.ndarray, dropped_bits: int) -> _Counts:
    if (keys[1:] > keys[:-1]).all():
        return _Counts(keys, counts, dropped_bits)
    # A stable sort is fast here, because it merges sorted runs.
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    first = _distinct_indices(keys)
    return _Counts(keys[first], np.add.reduceat(counts[order], first) if len(first) else counts, dropped_bits)


@dataclass(frozen=True)
class FrequentValues:
    """Frequent values of a number and their rows in an embedding table.

    Attributes:
        keys: Bits of the V values as float32, without the last `dropped_bits` bits, as (V,) ascending int32.
        ids: (V,) int64 table rows. The most frequent value has row 1.
        dropped_bits: Number of dropped bits.
    """

    keys: np.ndarray
    ids: np.ndarray
    dropped_bits: int

    def find(self, values: np.ndarray) -> np.ndarray:
        """Return (N,) int64 table rows of float64 `values`, 0 for missing values and values that are not frequent."""
        if not len(self.keys):
            return np.zeros(len(values), np.int64)
        keys = _float_keys(values, self.dropped_bits)
        index = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(np.isfinite(values) & (self.keys[index] == keys), self.ids[index], 0)


@dataclass(frozen=True)
class Standardizer:
    """Standardization (x - mean) / std, clipped to +-10.

    Attributes:
        mean: Mean of the training values.
        std: Standard deviation of the training values.
        has_missing: Whether training rows had missing values.
        edges: Ascending quantiles of the standardized values, for piecewise-linear encoding.
    """

    mean: float
    std: float
    has_missing: bool
    edges: tuple[float, ...] = ()

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Return standardized `values` as float32. Missing values become 0, the mean."""
        return _standardize(values, self.mean, self.std, np.isfinite(values))


def _standardize(
    values: np.ndarray, mean: float | np.ndarray, std: float | np.ndarray, finite: np.ndarray
) -> np.ndarray:
    """Return (values - mean) / std as float32, clipped to +-10, and 0 for missing values."""
    # Subtract in float64, because differences can be small relative to the values.
    scaled = np.subtract(values, mean, dtype=np.float64)
    with np.errstate(over="ignore"):
        scaled /= std
    np.clip(scaled, -CLIP, CLIP, out=scaled)
    if not finite.all():
        scaled[~finite] = 0.0
    return scaled.astype(np.float32)


class DenseNumber:
    """A standardized number of a feature, and an indicator of missing values if training rows had some."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.histogram = NumberHistogram()
        self.standardizer = Standardizer(0.0, 1.0, False)

    def finish_fit(self) -> None:
        """Compute `standardizer` from the histogram."""
        self.standardizer = self.histogram.standardizer()

    def inputs(self) -> tuple[DenseInput, ...]:
        """Return the dense input and, if training rows had missing values, its indicator."""
        number = DenseInput(self.name, edges=tuple(self.standardizer.edges))
        return (number, DenseInput(f"{self.name}_missing")) if self.standardizer.has_missing else (number,)


def standardize(numbers: Sequence[tuple[np.ndarray, DenseNumber]]) -> dict[str, np.ndarray]:
    """Standardize (N,) values of each fitted number. Return (N,) float32 dense inputs by name.

    If training rows lacked values of a number, it also has the indicator `NAME_missing` (1 if missing, else 0).
    """
    values = np.array([column for column, _ in numbers], np.float64)
    scales = [number.standardizer for _, number in numbers]
    mean, std = (np.array([[getattr(scale, name)] for scale in scales]) for name in ("mean", "std"))
    finite = np.isfinite(values)
    inputs = {}
    rows = zip(numbers, _standardize(values, mean, std, finite), ~finite, strict=True)
    for (_, number), scaled, is_missing in rows:
        inputs[number.name] = scaled
        if number.standardizer.has_missing:
            inputs[f"{number.name}_missing"] = is_missing.astype(np.float32)
    return inputs
