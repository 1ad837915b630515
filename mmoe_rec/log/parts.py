"""Parts of a log, each a task for a worker, and what reading them tells about the log's files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mmoe_rec.log.checks import BadFile, LogFile, PathColumns


@dataclass(frozen=True)
class Piece:
    """Consecutive row groups of one file, their number of rows, and the columns in the file's path."""

    address: str
    groups: tuple[int, ...]
    in_path: PathColumns
    rows: int


@dataclass(frozen=True)
class LogPart:
    """Consecutive rows of a log; `start` is the number of the first."""

    start: int
    rows: int
    pieces: tuple[Piece, ...]


def cut(files: Sequence[LogFile], rows_per_part: int) -> list[LogPart]:
    """The files as parts of at least `rows_per_part` rows (except the last), cut between row groups."""
    parts: list[LogPart] = []
    pieces: list[Piece] = []
    start, rows = 0, 0

    def finish() -> None:
        nonlocal start, rows
        if pieces:
            parts.append(LogPart(start, rows, tuple(pieces)))
        pieces.clear()
        start, rows = start + rows, 0

    for file in files:
        groups: list[int] = []
        rows_before = rows
        for group, group_rows in enumerate(file.group_rows):
            if not group_rows:
                continue
            groups.append(group)
            rows += group_rows
            if rows >= rows_per_part:
                pieces.append(Piece(file.address, tuple(groups), file.in_path, rows - rows_before))
                finish()
                groups, rows_before = [], 0
        if groups:
            pieces.append(Piece(file.address, tuple(groups), file.in_path, rows - rows_before))
    finish()
    return parts


@dataclass
class Noticed:
    """What reading parts of a log tells about its files.

    bad: problems of files that can't be used; spans: file -> first and last time of its rows, microseconds.
    """

    bad: list[BadFile] = field(default_factory=list)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add_times(self, address: str, times: np.ndarray) -> None:
        """Takes note of the times of (N,) rows of a file."""
        if len(times):
            first, last = int(times.min()), int(times.max())
            before = self.spans.get(address, (first, last))
            self.spans[address] = min(first, before[0]), max(last, before[1])
