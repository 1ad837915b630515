"""Windows of time, such as those of splits."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

Window = tuple[int | None, int | None]
"""start <= time < end, microseconds since 1970 UTC; either may be open."""


def in_window(times: np.ndarray, window: Window) -> np.ndarray:
    """(N,) bool: start <= time < end, either open."""
    start, end = window
    inside = np.ones(len(times), bool)
    if start is not None:
        inside &= times >= start
    if end is not None:
        inside &= times < end
    return inside


def in_any(times: np.ndarray, windows: Iterable[Window]) -> np.ndarray:
    """(N,) bool: whether a time lies in one of several windows."""
    inside = np.zeros(len(times), bool)
    for window in windows:
        inside |= in_window(times, window)
    return inside
