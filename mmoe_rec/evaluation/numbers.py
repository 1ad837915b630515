"""Differences as text: those that stand together have as many decimals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_DECIMALS = 4
_MOST_DECIMALS = 7  # what is smaller is written like 1.5e-08


def number(value: float, sign: bool = True) -> str:
    """A difference: with four decimals, or two digits if it is small; whole from 1,000 on."""
    return numbers(value, sign=sign)[0]


def numbers(*values: float, sign: bool = True) -> list[str]:
    """Differences that stand together, such as one and the ends of its interval.

    The largest decides on the decimals, and there are more where one that is not 0 would else look like it.
    """
    sizes = [abs(each) for each in values if each]
    if not sizes:
        return ["0"] * len(values)
    decimals = max(_decimals(max(sizes)), -_exponent(min(sizes)) if min(sizes) >= max(sizes) / 1000 else 0)
    form = f"+.{decimals}f" if decimals <= _MOST_DECIMALS else "+#.2g"
    form = form if max(sizes) < 1000 else "+,.0f"
    shown = ["0" if each == 0 else format(each, form) for each in values]
    return shown if sign else [each.removeprefix("+") for each in shown]


def with_interval(apart: Mapping[str, Any]) -> str:
    """A difference's `value`, and `low` to `high` where it has an interval."""
    if apart["low"] is None:
        return number(apart["value"])
    value, low, high = numbers(apart["value"], apart["low"], apart["high"])
    return f"{value} ({low} to {high})"


def once_corrected(apart: Mapping[str, Any]) -> str:
    """What explains a difference that is not shown, although 0 is outside of its interval, if it is one."""
    outside = apart["low"] is not None and (apart["low"] > 0 or apart["high"] < 0)
    return ", once corrected for the number of comparisons" if outside else ""


def _decimals(size: float) -> int:
    """Of a number of this size alone."""
    return _DECIMALS if size >= 0.00095 else 1 - _exponent(size)


def _exponent(size: float) -> int:
    """Of ten, in scientific notation with two digits."""
    return int(f"{size:.1e}".partition("e")[2]) if math.isfinite(size) else 0
