"""Exact sums of fractions, whatever the order in which they are added and taken away."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

_BITS = 32
_MASK = np.uint64(2**_BITS - 1)
_AT_A_TIME = 8192  # this many numbers stay in the processor's cache


class ExactSums:
    """N sums of float64 numbers without rounding, so that no order of adding and no difference of two loses anything.

    A number is a whole multiple of 2^-1074, cut into limbs: whole numbers of 2^(32 j), each below 2^32. Limbs are added
    up as int64, which is exact for 2^31 numbers; a sum is rounded once, when it is asked for, to the nearest float64.
    (The idea is Kulisch's long accumulator; carries wait until the rounding, as in Neal, "Fast exact summation using
    small and large superaccumulators", 2015.)

    units: the j of each of L limbs, rising, 0 among them; others are zero. limbs: (L, N) int64.
    """

    def __init__(self, units: Sequence[int], limbs: np.ndarray) -> None:
        self.units, self.limbs = tuple(units), limbs

    def __len__(self) -> int:
        return self.limbs.shape[1]

    @staticmethod
    def zeros(size: int, units: Collection[int] = ()) -> ExactSums:
        """Sums of nothing, with room for these units."""
        units = sorted({0, *units})
        return ExactSums(units, np.zeros((len(units), size), np.int64))

    @staticmethod
    def of(values: np.ndarray) -> ExactSums:
        """(N,) finite float64 numbers."""
        parts = [_split(values[start : start + _AT_A_TIME]) for start in range(0, len(values), _AT_A_TIME)]
        sums = ExactSums.zeros(len(values), set().union(*parts))
        for number, part in enumerate(parts):
            start = number * _AT_A_TIME
            for unit, limb in part.items():
                sums.limbs[sums.units.index(unit), start : start + _AT_A_TIME] = limb
        return sums

    @staticmethod
    def from_limbs(limbs: Mapping[int, np.ndarray], size: int) -> ExactSums:
        """unit -> (N,) int64."""
        sums = ExactSums.zeros(size, limbs)
        for unit, limb in zip(sums.units, sums.limbs, strict=True):
            if unit in limbs:
                limb[:] = limbs[unit]
        return sums

    def over(self, units: Collection[int]) -> ExactSums:
        """The same sums, with limbs for further units."""
        missing = set(units) - set(self.units)
        if not missing:
            return self
        wider = ExactSums.zeros(len(self), missing | set(self.units))
        wider.limbs[np.searchsorted(wider.units, self.units)] = self.limbs
        return wider

    def each(self, of: Callable[[np.ndarray], np.ndarray]) -> ExactSums:
        """What a linear function, of (N,) int64 to (K,) int64, makes of the sums."""
        return ExactSums(self.units, np.stack([of(limb) for limb in self.limbs]))

    def append(self, other: ExactSums) -> ExactSums:
        """These sums and others."""
        one, two = self.over(other.units), other.over(self.units)
        return ExactSums(one.units, np.concatenate([one.limbs, two.limbs], axis=1))

    def __add__(self, other: ExactSums) -> ExactSums:
        """The sums of both, one by one."""
        one, two = self.over(other.units), other.over(self.units)
        return ExactSums(one.units, one.limbs + two.limbs)

    def rounded(self) -> np.ndarray:
        """(N,) float64: the nearest to each sum, of two equally near, the even one; infinite beyond the largest."""
        limbs = [self.limbs[:, start : start + _AT_A_TIME] for start in range(0, len(self), _AT_A_TIME)]
        return np.concatenate([self._rounded(each) for each in limbs]) if limbs else np.empty(0)

    def _rounded(self, limbs: np.ndarray) -> np.ndarray:
        negative = self._digits(limbs)[-1] < 0
        sizes = _nearest(self._digits(np.where(negative, -limbs, limbs)), self.units[0])
        return np.where(negative, -sizes, sizes)

    def _digits(self, limbs: np.ndarray) -> np.ndarray:
        """(P, N) int64 whole numbers of 2^(32 j) from the first unit on, all from 0 to 2^32 - 1 but the last."""
        digits = np.zeros((self.units[-1] - self.units[0] + 2, limbs.shape[1]), np.int64)
        digits[np.array(self.units) - self.units[0]] = limbs
        for place in range(len(digits) - 1):
            digits[place + 1] += digits[place] >> _BITS
            digits[place] &= np.int64(_MASK)
        return digits


def _split(values: np.ndarray) -> dict[int, np.ndarray]:
    """Limbs, (N,) int64 by unit, of finite numbers."""
    fraction, exponent = np.frexp(values)
    whole, exponent = (fraction * 2.0**53).astype(np.int64), exponent.astype(np.int64) - 53
    size = np.abs(whole).view(np.uint64)
    unit, shift = exponent // _BITS, (exponent & (_BITS - 1)).view(np.uint64)
    low, high = (size & _MASK) << shift, (size >> np.uint64(_BITS)) << shift
    middle = (low >> np.uint64(_BITS)) + (high & _MASK)
    digits = (low & _MASK, middle & _MASK, (high >> np.uint64(_BITS)) + (middle >> np.uint64(_BITS)))
    signed = [np.where(whole < 0, -digit.view(np.int64), digit.view(np.int64)) for digit in digits]
    limbs: dict[int, np.ndarray] = {}
    least = unit.min()
    firsts = np.flatnonzero(np.bincount(unit - least)) + least
    for first in firsts.tolist():
        here = unit == first
        for j, digit in enumerate(signed, first):
            limb = digit if len(firsts) == 1 else np.where(here, digit, 0)
            if limb.any():
                limbs[j] = limbs[j] + limb if j in limbs else limb
    return limbs


def _nearest(digits: np.ndarray, unit: int) -> np.ndarray:
    """(N,) float64 nearest to numbers from 0 on, of (P, N) int64 digits, of which the first stand for 2^(32 unit)."""
    digits = np.concatenate([np.zeros((2, digits.shape[1]), np.int64), digits]).view(np.uint64)
    leading = len(digits) - 1 - np.argmax(digits[::-1] != 0, axis=0)
    leading = np.maximum(leading, 2)
    first, second, third = (np.take_along_axis(digits, (leading - back)[None], 0)[0] for back in range(3))
    below = np.logical_or.accumulate(digits != 0, axis=0)
    more = np.take_along_axis(below, np.maximum(leading - 3, 0)[None], 0)[0]
    # The first 64 bits, and whether there is anything below them, which decides ties when rounding to 53.
    empty = _BITS - np.frexp(first.astype(np.float64))[1].astype(np.uint64)
    head = (((first << np.uint64(_BITS)) | second) << empty) | (third >> (np.uint64(_BITS) - empty))
    more |= (third << empty) & _MASK != 0
    head = (head >> np.uint64(1)) | (head & np.uint64(1)) | more
    exponent = 1 - empty.astype(np.int64) + _BITS * (leading - 3 + unit)
    with np.errstate(over="ignore"):
        return np.ldexp(head.astype(np.int64).astype(np.float64), exponent)


def each_of(function: Callable[[np.ndarray], np.ndarray], values: Any) -> Any:
    """What a function makes of an array, or of each array of `values`; None of None."""
    return function(values) if isinstance(values, np.ndarray) else None if values is None else values.each(function)


def append(one: Any, other: Any) -> Any:
    """Arrays, or what consists of them, one after the other; None of None."""
    return np.append(one, other) if isinstance(one, np.ndarray) else None if one is None else one.append(other)
