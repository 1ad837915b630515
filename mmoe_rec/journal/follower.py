"""Reading a journal as it grows, in any number of processes."""

from __future__ import annotations

import os
import time
import zlib
from pathlib import Path

import pyarrow as pa

from mmoe_rec.errors import RequestError, UserError
from mmoe_rec.journal.folder import FolderLock, open_folder
from mmoe_rec.journal.position import HEADER_BYTES, Position
from mmoe_rec.journal.records import Batch, decode
from mmoe_rec.journal.segments import (
    HEAD_BYTES,
    Head,
    check_begin,
    read_end,
    read_head,
    record_after,
    segment_numbers,
    segment_path,
    whole_end,
)

ROWS_AT_A_TIME = 65_536
_BYTES_AT_A_TIME = 2**20
SECONDS_BETWEEN_LOOKS = 0.02


class Follower:
    """Reads what is new since a position. It needs no right to write, and holds up nobody.

    position: up to where it has read, from the first segment that is there on unless given; ends: of the records that
    the last `read` gave.

    Raises:
        UserError: the folder holds no journal, or can't be read.
        RequestError: the position is none of this journal.
    """

    def __init__(self, folder: str | Path, position: Position | None = None) -> None:
        self.folder = Path(os.path.realpath(folder))
        self._journal_id = open_folder(self.folder, create=False)
        self._lock = FolderLock(self.folder)
        self._file: tuple[int, int] | None = None  # number of a segment and its descriptor
        self.position = position or Position.begin(segment_numbers(self.folder)[0])
        self.ends: list[Position] = []
        if position is not None:
            self.check(position)

    @property
    def id(self) -> str:
        """The journal's id, 32 hexadecimal digits."""
        return self._journal_id.hex()

    def check(self, position: Position) -> None:
        """Raises RequestError for a position that is beyond the end, or none of this journal."""
        if position > (end := self.end()):
            raise RequestError(
                f"position {position} lies beyond the journal's end, {end}; it may be of another journal"
            )
        first = segment_numbers(self.folder)[0]
        if position.segment < first:
            raise RequestError(
                f"position {position} lies in a segment that was removed; the journal begins at {Position.begin(first)}"
            )
        file, limit = self._open(position.segment), self._limit(position.segment, end)
        if position.offset not in (HEADER_BYTES, limit):
            head = read_head(self._journal_id, position, os.pread(file, HEAD_BYTES, position.offset))
            if head is None or position.offset + HEAD_BYTES + head.length > limit:
                raise RequestError(f"position {position} is not the end of a record of the journal")

    def end(self) -> Position:
        """The end of what was appended for good. Reads one small file, where nothing was lost."""
        for _ in range(2):  # it may just be written
            if (found := read_end(self.folder, self._journal_id)) is not None:
                return found
        with self._lock.alone(shared=True):
            if (found := read_end(self.folder, self._journal_id)) is not None:
                return found
            number = segment_numbers(self.folder)[-1]
            start = self.position if self.position.segment == number else Position.begin(number)
            file = self._open(number)
            return whole_end(file, self._journal_id, start, os.fstat(file).st_size)

    def wait(self, seconds: float) -> bool:
        """Waits until the journal ends elsewhere than it was read up to, or so many seconds; gives whether it does."""
        until = time.monotonic() + seconds
        while self.end() == self.position:
            left = until - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(left, SECONDS_BETWEEN_LOOKS))
        return True

    def read(self, most_rows: int = ROWS_AT_A_TIME, through: int | None = None) -> list[Batch]:
        """The next batches, of about so many rows: whole records, until there are as many. None: nothing is new.

        through: the last segment to read.

        Raises UserError where the journal is damaged, naming file and byte, or where segments were removed; the
        position stays before what can't be read.
        """
        end, rows, found = self.end(), 0, list[Batch]()
        self.ends = []
        if through is not None:
            end = min(end, Position.begin(through + 1))
        if end < self.position and through is None:
            raise UserError(
                f"the journal '{self.folder}' ends at {end}, but was read up to {self.position}: what was acknowledged "
                "is lost; restore its files from a copy"
            )
        while rows < most_rows and self.position < end:
            try:
                limit = self._limit(self.position.segment, end)
                if self.position.offset == limit:
                    self.position = Position.begin(self.position.segment + 1)
                    continue
                records = self._records(limit, most_rows - rows)
            except UserError:
                if found:  # the next read says so
                    break
                raise
            for batches, position in records:
                found += batches
                rows += sum(map(len, batches))
                self.position = position
                self.ends.append(position)
        return found

    def close(self) -> None:
        """Closes the files; they are opened again when needed."""
        self._lock.close()
        if self._file is not None:
            os.close(self._file[1])
            self._file = None

    def _limit(self, segment: int, end: Position) -> int:
        """Up to which byte a segment can be read: all of a closed one."""
        return end.offset if segment == end.segment else os.fstat(self._open(segment)).st_size

    def _records(self, limit: int, most_rows: int) -> list[tuple[list[Batch], Position]]:
        """Some of the next records, at least one, of one segment."""
        at, rows, found = self.position, 0, list[tuple[list[Batch], Position]]()
        if at.offset > limit:
            raise self._damaged(Position(at.segment, limit), limit)
        file = self._open(at.segment)
        data = os.pread(file, min(_BYTES_AT_A_TIME, limit - at.offset), at.offset)
        begin = at.offset
        while rows < most_rows and at.offset < limit:
            place = at.offset - begin
            head = read_head(self._journal_id, at, data[place : place + HEAD_BYTES])
            if head is None or at.offset + HEAD_BYTES + head.length > limit:
                if found:
                    break  # the rest comes with the next bytes, or can't be read
                raise self._damaged(at, limit)
            record = HEAD_BYTES + head.length
            if place + record > len(data):
                if found:
                    break
                data = os.pread(file, record, at.offset)
            batches = _decoded(head, data, place + HEAD_BYTES)
            if batches is None:
                if found:
                    break
                raise self._damaged(at, limit)
            at = Position(at.segment, at.offset + record)
            rows += sum(map(len, batches))
            found.append((batches, at))
        return found

    def _open(self, number: int) -> int:
        if self._file is not None and self._file[0] == number:
            return self._file[1]
        path = segment_path(self.folder, number)
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise UserError(
                f"'{path}' is not there any more; to go on, start with the tables of a model that holds it"
            ) from None
        except OSError as error:
            raise UserError(f"'{path}' can't be read: {error.strerror}") from None
        try:
            check_begin(path, os.pread(file, HEADER_BYTES, 0), self._journal_id, number)
        except UserError:
            os.close(file)
            raise
        if self._file is not None:
            os.close(self._file[1])
        self._file = number, file
        return file

    def _damaged(self, at: Position, limit: int) -> UserError:
        path = segment_path(self.folder, at.segment)
        later = record_after(self._open(at.segment), self._journal_id, at, limit)
        rest = f"; the next record that can be read is at byte {later.offset:,}" if later else ""
        self.close()  # so that it is opened again when it was restored
        return UserError(f"'{path}' is damaged at byte {at.offset:,}: restore it from a copy{rest}")


def _decoded(head: Head, data: bytes, place: int) -> list[Batch] | None:
    """The batches of a record whose payload begins at a place of `data`; None where it is damaged."""
    if place + head.length > len(data):
        return None
    payload = pa.py_buffer(data).slice(place, head.length)
    return decode(payload) if zlib.crc32(payload) == head.crc else None
