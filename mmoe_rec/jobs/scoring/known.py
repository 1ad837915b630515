"""Rows of a part of the log with what counters and histories knew before each of their requests."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mmoe_rec.features.encoder import Results
from mmoe_rec.log.parts import LogPart
from mmoe_rec.log.reader import LogReader
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time.join import Window, in_window
from mmoe_rec.preprocessing.requests import OneTimeReader
from mmoe_rec.preprocessing.results import ResultReader, take

ROWS_AT_A_TIME = 16_384


def known_rows(
    reader: LogReader | OneTimeReader, results: ResultReader | None, window: Window, part: LogPart
) -> Iterator[tuple[np.ndarray, LogRows]]:
    """The rows of a part that lie in the window, some at a time, with their numbers in the log, (N,) int64.

    results: what `Steps` looked up for the window, None where rows come without.
    """
    first = part.start
    for rows in reader.read(part):
        wanted = in_window(rows.times(), window)
        numbers, first = first + np.flatnonzero(wanted), first + len(rows)
        if not len(numbers):
            continue
        known: Results = {} if results is None else results.of(first - len(rows), wanted)
        inside = rows.filter(wanted).table
        for start in range(0, len(numbers), ROWS_AT_A_TIME):
            some = np.arange(start, min(start + ROWS_AT_A_TIME, len(numbers)))
            table = inside.slice(start, len(some))
            yield numbers[some], LogRows(table, rows.schema, take(known, some) if known else None)
