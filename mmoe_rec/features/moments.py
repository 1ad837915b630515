"""Mean and deviation of labels: exact, beside outliers and far from zero too, so the same for any order of rows."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pyarrow as pa

from mmoe_rec.point_in_time.exact import BITS, ExactSums, whole_numbers

_LOW_BITS = 27  # of 53, so that products of the parts of two numbers fit into 54
_SCALE = 1088  # 2^-1088 divides every float64 number, and is a unit of `ExactSums`
_SMALL = 2.0**20  # squares of the rows read at a time add up within int64


class Moments:
    """Count, sum and sum of squares of numbers without rounding; a mergeable partial fit.

    total: in units of 2^-1088; squares: in units of 2^-2176.
    """

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0, 0

    def add(self, values: np.ndarray) -> None:
        """Takes (N,) float64 numbers; those that are not finite are left out."""
        finite = np.isfinite(values)
        if not finite.all():
            values = values[finite]
        self.count += len(values)
        if (np.abs(values) < _SMALL).all() and (values == np.rint(values)).all():
            whole = values.astype(np.int64)
            self.total += int(whole.sum()) << _SCALE
            self.squares += int(np.square(whole).sum()) << 2 * _SCALE
            return
        whole, exponent = whole_numbers(values)
        self.total += _sum(whole, exponent) >> _SCALE
        size = np.abs(whole)
        high, low = size >> _LOW_BITS, size & (2**_LOW_BITS - 1)
        for product, place in ((high * high, 2 * _LOW_BITS), (2 * high * low, _LOW_BITS), (low * low, 0)):
            self.squares += _sum(product, 2 * exponent + place)

    def merge(self, other: Moments) -> None:
        """Adds what another one took."""
        self.count, self.total, self.squares = (
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
        )

    def to_table(self) -> pa.Table:
        """One row: count, total, squares, the latter as decimal digits."""
        return pa.table({"count": [self.count], "total": [str(self.total)], "squares": [str(self.squares)]})

    @staticmethod
    def from_table(table: pa.Table) -> Moments:
        """The moments that `to_table` gave."""
        moments = Moments()
        (row,) = table.to_pylist()
        moments.count, moments.total, moments.squares = row["count"], int(row["total"]), int(row["squares"])
        return moments

    @property
    def mean(self) -> float:
        """The mean; 0 where there are no numbers."""
        return float(Fraction(self.total, self.count << _SCALE)) if self.count else 0.0

    @property
    def deviation(self) -> float:
        """The standard deviation, 1 where numbers are equal but for the last bits of a float64."""
        spread = self.count * self.squares - self.total**2  # count^2 times the variance
        if spread * 2**98 <= self.total**2:
            return 1.0
        more = max(0, 128 - spread.bit_length())
        return float(Fraction(math.isqrt(spread << 2 * more), self.count << _SCALE + more))


def _sum(whole: np.ndarray, exponent: np.ndarray) -> int:
    """The sum of `whole` times 2^`exponent`, in units of 2^-2176."""
    sums = ExactSums.of_scaled(whole, exponent).each(lambda limb: limb.sum(keepdims=True))
    return sum(int(limb[0]) << BITS * unit + 2 * _SCALE for unit, limb in zip(sums.units, sums.limbs, strict=True))
