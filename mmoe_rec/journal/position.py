"""Places in a journal."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mmoe_rec.errors import RequestError, quoted

_TEXT = re.compile(r"([1-9][0-9]{0,7})-([1-9][0-9]{0,14})", re.ASCII)
HEADER_BYTES = 32
"""Bytes of a segment before its first record."""


@dataclass(frozen=True, order=True)
class Position:
    """The end of a record, or the begin of a segment: later ones are greater. As text, SEGMENT-OFFSET.

    segment: number of the segment, from 1; offset: bytes from the begin of its file.
    """

    segment: int
    offset: int

    def __str__(self) -> str:
        return f"{self.segment}-{self.offset}"

    @staticmethod
    def begin(segment: int = 1) -> Position:
        """Before the first record of a segment."""
        return Position(segment, HEADER_BYTES)

    @staticmethod
    def parse(text: object) -> Position:
        """The position that `str` gave. Raises RequestError for anything else."""
        found = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if found is None or int(found[2]) < HEADER_BYTES:
            raise RequestError(f"{quoted(text)} is no position of a journal, such as '12-4096'")
        return Position(int(found[1]), int(found[2]))
