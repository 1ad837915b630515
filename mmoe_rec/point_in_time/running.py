"""Running totals of sorted events, and arrays that may be exact sums or missing."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmoe_rec.point_in_time.exact import ExactSums
from mmoe_rec.point_in_time.join import KeyGroups


def running(values: np.ndarray | None, first: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """(K,) int64 sums of whole `values`, None where each is 1, from event `first` up to each of K `kept` ones."""
    if values is None:
        return kept + 1 - first
    total = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, dtype=np.int64, out=total[1:])
    return total[1:][kept] - total[first]


def running_labels(
    labels: np.ndarray | ExactSums | None, first: np.ndarray, kept: np.ndarray
) -> np.ndarray | ExactSums | None:
    """(K,) sums of labels as of `running`: float64 of whole numbers, or exact ones; None without labels."""
    if isinstance(labels, ExactSums):
        return labels.each(lambda limb: running(limb, first, kept))
    return None if labels is None else running(labels, first, kept).astype(np.float64, copy=False)


def at(values: np.ndarray, index: np.ndarray, nothing: int) -> np.ndarray:
    """(N,) values by their index, `nothing` for index -1; without a copy of all, as a request asks for few of many."""
    if not len(values):
        return np.full(len(index), nothing, values.dtype)
    found = values[np.maximum(index, 0)]
    if nothing:
        found[index < 0] = nothing
    else:
        found *= index >= 0  # no branches, which a processor would often guess wrongly
    return found


def appended(one: Any, other: Any) -> Any:
    """Arrays or exact sums, one behind the other; None where the first is missing."""
    if isinstance(one, ExactSums):
        return one.append(other)
    return None if one is None else np.append(one, other)


def taken(values: Any, index: np.ndarray) -> Any:
    """An array or exact sums by their index; None where they are missing."""
    if isinstance(values, ExactSums):
        return values.take(index)
    return None if values is None else values[index]


def running_latest(groups: KeyGroups, moments: np.ndarray) -> np.ndarray:
    """(E,) latest of the `moments` so far of each key: an event that came late may be earlier than what came before."""
    import pandas as pd

    return pd.Series(moments).groupby(groups.number).cummax().to_numpy()
