"""Rows that repeat request and candidate of an earlier row, found by partitions of their keys."""

from __future__ import annotations

import numpy as np

from mmoe_rec.features.exchange import Exchange
from mmoe_rec.features.learn import DUPLICATES


def repeats(exchange: Exchange, partition: int) -> tuple[int, tuple[int, int] | None]:
    """Number of rows of a partition that repeat an earlier one, and the first such pair of row numbers."""
    table = exchange.receive_all(DUPLICATES, partition)
    if table is None:
        return 0, None
    key = table["key"].to_numpy()
    in_order = np.sort(key)
    if not (in_order[1:] == in_order[:-1]).any():
        return 0, None
    order = np.argsort(key, kind="stable")
    repeated = np.flatnonzero(in_order[1:] == in_order[:-1])
    row = table["row"].to_numpy()[order]
    first = repeated[np.argmin(row[repeated + 1])]
    return len(repeated), (int(row[first]), int(row[first + 1]))
