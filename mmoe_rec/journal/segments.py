"""Files of a journal: how they are called, and how records lie in a segment.

    FOLDER/
        journal.json                what the folder is: format and id
        types.json                  the type of each column, from the first row on that has it
        end                         the end of what was written for good
        segment-00000001.journal    the oldest segment
        segment-00000002.journal    the one that is appended to

A segment begins with 32 bytes: 8 that name the format, the journal's id, and the segment's number. Records follow, each
with a head of 16 bytes: 4 that mark it, the length of its payload and the payload's CRC-32, and a CRC-32 over the
journal's id, the place of the record, and these two. So a head is found to be damaged without its payload, and bytes
that lie elsewhere, or belong to another journal, are no record. Lengths are multiples of 8.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from mmoe_rec.errors import UserError
from mmoe_rec.journal.position import Position

FORMAT = 1
SEGMENT_BYTES = 64 * 2**20
MOST_PAYLOAD_BYTES = 2**28

_NAME = re.compile(r"segment-([0-9]{8})\.journal", re.ASCII)
_FORMAT_BYTES = b"MMOEJRN1"
_SEGMENT = struct.Struct("<8s16sQ")
_MARK = b"\xb5Rec"
_HEAD = struct.Struct("<4sIII")
_PLACE = struct.Struct("<QQII")
_END = struct.Struct("<8s16sQQ")
_CRC = struct.Struct("<Q")
_SEARCHED_BYTES = 2**20


def segment_path(folder: Path, number: int) -> Path:
    """The file of a segment."""
    return folder / f"segment-{number:08d}.journal"


def segment_numbers(folder: Path) -> list[int]:
    """The segments that are there, in order. Raises UserError where there is none, or one is missing between others."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise UserError(f"the journal '{folder}' can't be read: {error.strerror}") from None
    numbers = sorted(int(found[1]) for found in map(_NAME.fullmatch, names) if found)
    if not numbers:
        raise UserError(f"the journal '{folder}' has no segments; restore them from a copy")
    for expected, number in enumerate(numbers, numbers[0]):
        if number != expected:
            raise UserError(
                f"the journal '{folder}' has no '{segment_path(folder, expected).name}', though it has later ones; "
                "restore it from a copy"
            )
    return numbers


def segment_begin(journal_id: bytes, number: int) -> bytes:
    """The first bytes of a segment."""
    return _SEGMENT.pack(_FORMAT_BYTES, journal_id, number)


def check_begin(path: Path, begin: bytes, journal_id: bytes, number: int) -> None:
    """Raises UserError where a file begins otherwise than a segment of that number of that journal."""
    if begin == segment_begin(journal_id, number):
        return
    if begin[:8] != _FORMAT_BYTES:
        raise UserError(f"'{path}' is damaged at byte 0: it does not begin as a segment does; restore it from a copy")
    _, other, found = _SEGMENT.unpack(begin)
    what = f"segment {found}" if other == journal_id else f"a segment of another journal ({other.hex()})"
    raise UserError(f"'{path}' is {what}; put back the file that belongs there")


def framed(journal_id: bytes, at: Position, payload: bytes) -> bytes:
    """A record at a position."""
    crc = zlib.crc32(payload)
    return _HEAD.pack(_MARK, len(payload), crc, _head_crc(journal_id, at, len(payload), crc)) + payload


def _head_crc(journal_id: bytes, at: Position, length: int, crc: int) -> int:
    return zlib.crc32(_PLACE.pack(at.segment, at.offset, length, crc), zlib.crc32(journal_id))


HEAD_BYTES = _HEAD.size


@dataclass(frozen=True)
class Head:
    """length: bytes of the payload; crc: its CRC-32."""

    length: int
    crc: int


def read_head(journal_id: bytes, at: Position, data: bytes | memoryview) -> Head | None:
    """The head of a record at a position; None where `data` is none."""
    if len(data) < HEAD_BYTES:
        return None
    mark, length, crc, head_crc = _HEAD.unpack_from(data)
    if mark != _MARK or head_crc != _head_crc(journal_id, at, length, crc):
        return None
    return Head(length, crc)


def whole_end(file: int, journal_id: bytes, start: Position, size: int) -> Position:
    """The end of the last whole record from `start` on in the first `size` bytes of a segment (a descriptor).

    All heads are checked, and the payload of the last record: only that one may be torn.
    """
    at, last = start, None
    while (head := read_head(journal_id, at, os.pread(file, HEAD_BYTES, at.offset))) is not None:
        end = at.offset + HEAD_BYTES + head.length
        if end > size:
            break
        last, at = (at, head), Position(at.segment, end)
    if last is not None and zlib.crc32(_read(file, last[1].length, last[0].offset + HEAD_BYTES)) != last[1].crc:
        return last[0]
    return at


def last_record(file: int, journal_id: bytes, start: Position, end: Position) -> bytes | None:
    """The payload of the last record between two positions of a segment (a descriptor); None where there is none."""
    at, last = start, None
    while at < end and (head := read_head(journal_id, at, os.pread(file, HEAD_BYTES, at.offset))) is not None:
        last, at = (at, head), Position(at.segment, at.offset + HEAD_BYTES + head.length)
    return None if last is None else _read(file, last[1].length, last[0].offset + HEAD_BYTES)


def _read(file: int, size: int, offset: int) -> bytes:
    return os.pread(file, size, offset)


def record_after(file: int, journal_id: bytes, start: Position, size: int) -> Position | None:
    """The begin of the first whole record after `start` that lies in the first `size` bytes; None if there is none."""
    at = start.offset + 1
    while at < size:
        data = os.pread(file, _SEARCHED_BYTES + HEAD_BYTES, at)
        place = data.find(_MARK)
        while 0 <= place < _SEARCHED_BYTES:
            found = Position(start.segment, at + place)
            head = read_head(journal_id, found, data[place : place + HEAD_BYTES])
            if head is not None and found.offset + HEAD_BYTES + head.length <= size:
                payload = _read(file, head.length, found.offset + HEAD_BYTES)
                if zlib.crc32(payload) == head.crc:
                    return found
            place = data.find(_MARK, place + 1)
        at += _SEARCHED_BYTES
    return None


def end_bytes(journal_id: bytes, end: Position) -> bytes:
    """The content of the file `end`."""
    text = _END.pack(_FORMAT_BYTES, journal_id, end.segment, end.offset)
    return text + _CRC.pack(zlib.crc32(text))


def read_end(folder: Path, journal_id: bytes) -> Position | None:
    """What the file `end` says; None where it is missing, or of another journal, or just being written."""
    try:
        file = os.open(folder / "end", os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        data = os.read(file, _END.size + _CRC.size)
    finally:
        os.close(file)
    text = data[: _END.size]
    if len(data) != _END.size + _CRC.size or _CRC.unpack(data[_END.size :])[0] != zlib.crc32(text):
        return None
    _, found, segment, offset = _END.unpack(text)
    return Position(segment, offset) if found == journal_id else None
