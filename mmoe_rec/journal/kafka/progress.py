"""Up to which offset of its topic a replica goes, so that a message is taken in once, whatever process was killed.

A record holds the offset that it was taken from, so it is known as soon as the record is there. What leaves no record,
such as the begin of a segment, is told by the file `kafka.json`: the offset that comes next where the journal ends at a
given position. Where the journal ends elsewhere, the file says nothing, and the last record does.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import RequestError, UserError
from mmoe_rec.journal.position import HEADER_BYTES, Position
from mmoe_rec.journal.records import about_in
from mmoe_rec.journal.segments import last_record, segment_numbers, segment_path

FILE = "kafka.json"


def told(at: Position, next_offset: int) -> bytes:
    """The content of the file."""
    return json.dumps({"at": str(at), "next": next_offset}).encode()


def offset_in(payload: bytes) -> int:
    """The offset of the message that a record was. Raises ValueError, struct.error, KeyError or TypeError."""
    return int(about_in(payload)["offset"])


class Progress:
    """Of a replica in a folder; all is done while nobody else appends."""

    def __init__(self, folder: Path, journal_id: bytes) -> None:
        self._path, self._journal_id = folder / FILE, journal_id
        self._at, self._next = Position(0, 0), 0
        self._read: tuple[int, int, int] | None = None

    def next(self, end: Position) -> int:
        """The offset that comes next where the journal ends at a position.

        Raises UserError where that is not known, as in a folder whose files were copied at different times.
        """
        known = self._next if self._at == end else None
        if (found := self._changed_file()) is not None and found[0] == end:
            known = max(found[1], known or 0)
        if known is None:
            known = self._after_last_record(end)
        self._at, self._next = end, known
        return known

    def note(self, end: Position, next_offset: int) -> None:
        """A record was appended, which holds its offset."""
        self._at, self._next = end, next_offset

    def write(self, end: Position, next_offset: int) -> None:
        """Says so for what no record tells."""
        with atomic_file(self._path) as temporary:
            temporary.write_bytes(told(end, next_offset))

    def last_payload(self, end: Position) -> bytes | None:
        """The last record of the last segment that has one; None where none that is still there has."""
        for number in reversed(segment_numbers(self._path.parent)):
            size = segment_path(self._path.parent, number).stat().st_size
            at = end if number == end.segment else Position(number, size)  # a closed one is whole
            if number <= end.segment and (found := self._payload(Position.begin(number), at)) is not None:
                return found
        return None

    def _payload(self, start: Position, end: Position) -> bytes | None:
        if end.offset == HEADER_BYTES:
            return None
        file = os.open(segment_path(self._path.parent, end.segment), os.O_RDONLY)
        try:
            return last_record(file, self._journal_id, start, end)
        finally:
            os.close(file)

    def _after_last_record(self, end: Position) -> int:
        start = self._at if self._at.segment == end.segment and self._at < end else Position.begin(end.segment)
        payload = self._payload(start, end)
        try:
            return offset_in(payload or b"") + 1
        except (struct.error, ValueError, KeyError, TypeError):
            raise UserError(
                f"'{self._path}' does not say which offset of the topic follows {end}, the end of the journal: copy "
                "the folder of another machine anew, while nothing is appended to it"
            ) from None

    def _changed_file(self) -> tuple[Position, int] | None:
        """What the file says, unless it is known."""
        try:
            found = os.stat(self._path)
            version = found.st_ino, found.st_mtime_ns, found.st_size
            if version == self._read:
                return None
            about = json.loads(self._path.read_bytes())
            at, following = Position.parse(about["at"]), int(about["next"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RequestError):
            raise UserError(f"'{self._path}' is damaged; copy the folder of another machine") from None
        self._read = version
        return at, following
