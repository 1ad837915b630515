"""Statistics of numbers that do not depend on the order of rows: a histogram, exact until there are too many values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mmoe_rec.features.layout import DenseInput

MAX_DISTINCT_VALUES = 2**16
_MOST_DROPPED = 48  # 16 bits are left, so no more than 2^16 values
CLIP = 10.0
EDGE_COUNT = 17
_LARGEST = 1e150  # its square is still finite
_ROUNDING = 8 * np.finfo(np.float64).eps  # values that differ by less, relative to the largest, are one
_DROPPED = b"dropped_bits"
_FLOAT32_DROPS = 29  # last bits of a float64 that a float32 lacks
MIN_FREQUENT_ROWS, MAX_ROWS_PER_FREQUENT = 8, 1000
"""Rows that share a frequent value; and of how many rows it has at least one where a number is continuous."""


def float_keys(values: np.ndarray, dropped_bits: int) -> np.ndarray:
    """(N,) float64 -> (N,) int32, equal for values that are equal in float32 but for the last `dropped_bits` bits: a
    number that was rounded on its way, or read from text, keeps its key."""
    with np.errstate(over="ignore"):
        return (values.astype(np.float32) + np.float32(0)).view(np.int32) >> dropped_bits


@dataclass(frozen=True)
class _Counted:
    """(V,) rising int64 keys, the bits of float64 values without the last `dropped_bits`, and (V,) int64 counts of
    each."""

    keys: np.ndarray
    counts: np.ndarray
    dropped_bits: int

    def coarser(self, dropped_bits: int) -> "_Counted":
        """The counts with at least so many bits dropped. Dropping some and then more equals dropping all at once."""
        if dropped_bits <= self.dropped_bits:
            return self
        return _sum_counts(self.keys >> (dropped_bits - self.dropped_bits), self.counts, dropped_bits)

    def bounded(self) -> "_Counted":
        """The counts with as few bits dropped as leave no more than `MAX_DISTINCT_VALUES` keys."""
        fewest, enough = self.dropped_bits, _MOST_DROPPED
        if len(self.keys) <= MAX_DISTINCT_VALUES:
            return self
        while enough - fewest > 1:
            middle = (fewest + enough) // 2
            keys = self.keys >> (middle - self.dropped_bits)
            if 1 + np.count_nonzero(keys[1:] != keys[:-1]) > MAX_DISTINCT_VALUES:
                fewest = middle
            else:
                enough = middle
        return self.coarser(enough)


class NumberHistogram:
    """Counts of values: exact up to 65,536 different ones, beyond that by leading bits; a mergeable partial fit.

    Only as many last bits are dropped as it takes to bound the number of values; values that differ only in dropped
    bits are counted together. How many bits that takes follows from the values, whatever their order, and counts are
    integers: any order of rows and any partition give the same mean, deviation and quantiles.
    """

    def __init__(self) -> None:
        self.missing = 0
        self._counted = _Counted(np.empty(0, np.int64), np.empty(0, np.int64), 0)

    def add(self, values: np.ndarray) -> None:
        """Counts (N,) float32 or float64 values; NaN and infinities count as missing."""
        finite = np.isfinite(values)
        if not finite.all():
            values = values[finite]
            self.missing += len(finite) - len(values)
        values = np.sort(values)
        first = _first_of_each(values)
        bits = (values[first] + np.float64(0)).view(np.int64)  # 0 and -0 are one
        self._add(_Counted(bits, np.diff(first, append=len(values)), 0))

    def merge(self, other: "NumberHistogram") -> None:
        self.missing += other.missing
        self._add(other._counted)

    def _add(self, other: _Counted) -> None:
        dropped_bits = max(self._counted.dropped_bits, other.dropped_bits)
        parts = [each.coarser(dropped_bits) for each in (self._counted, other)]
        keys, counts = (np.concatenate([getattr(part, name) for part in parts]) for name in ("keys", "counts"))
        self._counted = _sum_counts(keys, counts, dropped_bits).bounded()

    @property
    def bins(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(V,) float64 least and largest number of each key, and how often it occurs, in the order of the numbers."""
        sums = self._counted
        inner = sums.keys << sums.dropped_bits  # nearest to zero
        outer = (inner | ((1 << sums.dropped_bits) - 1)).view(np.float64)
        inner = inner.view(np.float64)
        order = np.argsort(inner, kind="stable")  # as bits, negative numbers rise towards minus infinity
        negative = np.signbit(inner)
        least, largest = np.where(negative, outer, inner), np.where(negative, inner, outer)
        return least[order], largest[order], sums.counts[order]

    def to_table(self) -> pa.Table:
        """key (null for missing values) and count; the number of dropped bits is among the table's metadata."""
        sums = self._counted
        keys = pa.array(np.append(sums.keys, 0), mask=np.append(np.zeros(len(sums.keys), bool), True))
        table = pa.table({"key": keys, "count": np.append(sums.counts, self.missing)})
        return table.replace_schema_metadata({_DROPPED: str(sums.dropped_bits)})

    @staticmethod
    def from_table(table: pa.Table) -> "NumberHistogram":
        histogram = NumberHistogram()
        counts, keys = table["count"].to_numpy(), table["key"].combine_chunks().drop_null().to_numpy()
        histogram._counted = _Counted(keys, counts[:-1], int(table.schema.metadata[_DROPPED]))
        histogram.missing = int(counts[-1])
        return histogram

    def standardizer(self) -> "Standardizer":
        """Mean and deviation of the counted values; (0, 1) where there are none, deviation 1 where they are equal.

        Values beyond +-1e150 count as +-1e150.
        """
        least, largest, counts = self.bins
        middles = np.where((least == 0) | (largest == 0), 0.0, least + (largest - least) / 2)
        values = np.clip(middles, -_LARGEST, _LARGEST)
        if not len(values):
            return Standardizer(0.0, 1.0, self.missing > 0, ())
        # Sums of distances, not of values: differences may be small beside the values themselves.
        median = values[np.searchsorted(np.cumsum(counts), counts.sum() / 2)]
        mean = float(median + ((values - median) * counts).sum() / counts.sum())
        farthest = float(np.abs(values - mean).max())
        if farthest <= _ROUNDING * np.abs(values).max():
            return Standardizer(mean, 1.0, self.missing > 0, ())
        std = float(farthest * np.sqrt((np.square((values - mean) / farthest) * counts).sum() / counts.sum()))
        scaled = np.clip((_spread_quantiles(values, counts, EDGE_COUNT) - mean) / std, -CLIP, CLIP)
        return Standardizer(mean, std, self.missing > 0, tuple(np.unique(scaled.astype(np.float32) + 0).tolist()))

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> "NumberHistogram":
        """The histogram of what a function makes of the values; of values counted together, of their middle."""
        least, largest, counts = self.bins
        bits = (function(least / 2 + largest / 2) + np.float64(0)).view(np.int64)
        histogram = NumberHistogram()
        histogram.missing = self.missing
        histogram._counted = _sum_counts(bits, counts, 0)
        return histogram

    def frequent_values(self) -> "FrequentValues":
        """The values that many rows share.

        Many are `MIN_FREQUENT_ROWS`; where there are more different values than are kept, one row in
        `MAX_ROWS_PER_FREQUENT` too, which no value of a continuous number has.
        """
        least, largest, counts = self.bins
        dropped_bits = max(0, self._counted.dropped_bits - _FLOAT32_DROPS)
        keys, place = np.unique(
            float_keys(np.where(np.signbit(least), largest, least), dropped_bits), return_inverse=True
        )
        rows = np.bincount(place, counts, len(keys))
        often = np.flatnonzero(
            rows >= max(MIN_FREQUENT_ROWS, rows.sum() / MAX_ROWS_PER_FREQUENT if self._counted.dropped_bits else 0)
        )
        ids = np.empty(len(often), np.int64)
        ids[np.argsort(-rows[often], kind="stable")] = np.arange(1, len(often) + 1)
        return FrequentValues(keys[often], ids, dropped_bits)

    def bucket_edges(self, buckets: int) -> np.ndarray:
        """Rising inner edges that cut the values into `buckets` parts of about equal mass, fewer only of fewer values.

        No part is empty and a value that many rows share takes no edges from others: up to `buckets` different values
        all have a part of their own. An edge lies halfway between two values, so that a value rounded on its way,
        say to float32, falls into the same part.
        """
        least, largest, counts = self.bins
        ends = _equal_parts(counts, min(buckets, len(counts)))[:-1]
        low, high = largest[ends - 1], least[ends]
        return np.maximum(low, np.minimum(low / 2 + high / 2, np.nextafter(high, -np.inf)))


def _spread_quantiles(values: np.ndarray, counts: np.ndarray, count: int) -> np.ndarray:
    """Least, largest and `count` - 2 quantiles by the square root of each value's count.

    The root keeps edges for rare values where most rows share one value, as counters do at zero.
    """
    share = np.cumsum(np.sqrt(counts))
    positions = np.searchsorted(share, np.linspace(0.0, 1.0, count) * share[-1])
    return values[np.minimum(positions, len(values) - 1)]


def _equal_parts(counts: np.ndarray, parts: int) -> np.ndarray:
    """(parts,) int64 where each part of (V,) counts ends (exclusive); each has an equal share of what is left to it."""
    share = np.append(0, np.cumsum(counts))
    ends = np.zeros(parts + 1, np.int64)
    for part in range(parts):
        left = parts - part
        goal = share[ends[part]] + (share[-1] - share[ends[part]]) / left
        over = int(np.searchsorted(share, goal))
        nearest = over - (share[over] - goal > goal - share[over - 1])
        ends[part + 1] = min(max(nearest, ends[part] + 1), len(counts) - (left - 1))
    return ends[1:]


def _first_of_each(values: np.ndarray) -> np.ndarray:
    """(V,) int64 place of the first of each of V distinct values, of (N,) sorted ones."""
    return np.flatnonzero(np.append(len(values) > 0, values[1:] != values[:-1]))


def _sum_counts(keys: np.ndarray, counts: np.ndarray, dropped_bits: int) -> _Counted:
    if (keys[1:] > keys[:-1]).all():
        return _Counted(keys, counts, dropped_bits)
    order = np.argsort(keys, kind="stable")  # which merges runs that are sorted already
    keys = keys[order]
    first = _first_of_each(keys)
    return _Counted(keys[first], np.add.reduceat(counts[order], first) if len(first) else counts, dropped_bits)


@dataclass(frozen=True)
class FrequentValues:
    """keys: (V,) rising int32 `float_keys` of values; ids: (V,) int64 of each from 1 on, the most frequent first;
    dropped_bits: bits that the keys lack."""

    keys: np.ndarray
    ids: np.ndarray
    dropped_bits: int

    def find(self, values: np.ndarray) -> np.ndarray:
        """(N,) int64 ids of float64 values, 0 of others."""
        if not len(self.keys):
            return np.zeros(len(values), np.int64)
        keys = float_keys(values, self.dropped_bits)
        place = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(np.isfinite(values) & (self.keys[place] == keys), self.ids[place], 0)


@dataclass(frozen=True)
class Standardizer:
    """(x - mean) / deviation, clipped to +-10.

    has_missing: whether training rows had missing values; edges: rising quantiles of the standardised values, for
    piecewise-linear encoding.
    """

    mean: float
    std: float
    has_missing: bool
    edges: tuple[float, ...] = ()

    def apply(self, values: np.ndarray) -> np.ndarray:
        """(N,) float32 of float32 or float64 values; missing values become 0, the mean."""
        return _standardize(values, self.mean, self.std, np.isfinite(values))


def _standardize(
    values: np.ndarray, mean: float | np.ndarray, std: float | np.ndarray, finite: np.ndarray
) -> np.ndarray:
    """(values - mean) / deviation as float32 and within +-10, 0 where not `finite`: arrays that broadcast."""
    # In float64: differences may be small beside the values themselves.
    scaled = np.subtract(values, mean, dtype=np.float64)
    with np.errstate(over="ignore"):
        scaled /= std
    np.clip(scaled, -CLIP, CLIP, out=scaled)
    if not finite.all():
        scaled[~finite] = 0.0
    return scaled.astype(np.float32)


class DenseNumber:
    """A standardised number, with an indicator input where training rows had missing values."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.histogram = NumberHistogram()
        self.standardizer = Standardizer(0.0, 1.0, False)

    def finish_fit(self) -> None:
        """Turns the histogram into mean and deviation."""
        self.standardizer = self.histogram.standardizer()

    def inputs(self) -> tuple[DenseInput, ...]:
        number = DenseInput(self.name, edges=tuple(self.standardizer.edges))
        return (number, DenseInput(f"{self.name}_missing")) if self.standardizer.has_missing else (number,)


def standardize(numbers: Sequence[tuple[np.ndarray, DenseNumber]]) -> dict[str, np.ndarray]:
    """Return the dense inputs of values of several numbers, (N,) each, by name: (N,) float32 in one matrix."""
    values, scales = np.array([each for each, _ in numbers], np.float64), [each.standardizer for _, each in numbers]
    mean, std = (np.array([[getattr(each, name)] for each in scales]) for name in ("mean", "std"))
    finite = np.isfinite(values)
    inputs = {}
    rows = zip(numbers, _standardize(values, mean, std, finite), ~finite, strict=True)
    for (_, number), scaled, is_missing in rows:
        inputs[number.name] = scaled
        if number.standardizer.has_missing:
            inputs[f"{number.name}_missing"] = is_missing.astype(np.float32)
    return inputs
