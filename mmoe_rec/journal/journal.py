"""Appending to a journal: by any number of threads and processes, durable before it is acknowledged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from mmoe_rec.atomic import atomic_file, flush_files
from mmoe_rec.errors import RequestError, UserError
from mmoe_rec.journal.folder import FolderLock, open_folder
from mmoe_rec.journal.position import HEADER_BYTES, Position
from mmoe_rec.journal.records import Batch, encode
from mmoe_rec.journal.segments import (
    MOST_PAYLOAD_BYTES,
    SEGMENT_BYTES,
    check_begin,
    end_bytes,
    framed,
    read_end,
    record_after,
    segment_begin,
    segment_numbers,
    segment_path,
    whole_end,
)
from mmoe_rec.progress import say

_sync = getattr(os, "fdatasync", os.fsync)


class Journal:
    """A journal that is appended to. Threads may share it, and a process that is forked may go on with it.

    folder: made if it is not there; segment_bytes: a segment of this size is closed before the next record.

    Raises UserError where the folder holds something else, or can't be written to.
    """

    def __init__(self, folder: str | Path, segment_bytes: int = SEGMENT_BYTES, create: bool = True) -> None:
        self.folder = Path(os.path.realpath(folder))
        self.segment_bytes = segment_bytes
        self._id = open_folder(self.folder, create)
        self._lock = FolderLock(self.folder)
        self._file: int | None = None
        self._end = Position(0, 0)
        self._types: dict[str, dict[str, str]] = {}
        self._types_read: tuple[int, int, int] | None = None
        self.torn = 0
        """Records that were dropped here, as they were not whole."""
        if not os.access(self.folder, os.W_OK):
            raise UserError(f"nothing can be appended to the journal '{self.folder}': it may not be written to")
        try:
            self.end()
        except BaseException:
            self.close()
            raise

    @property
    def id(self) -> str:
        """The journal's id, 32 hexadecimal digits."""
        return self._id.hex()

    def append(self, *batches: Batch) -> Position:
        """Appends batches as one record, all or nothing; gives the position after it once it is on disk.

        Batches without rows are left out; without any, the position is the journal's end.

        Raises:
            RequestError: a column is of another type than in earlier rows. Rows are counted from 0 in their batch.
            UserError: nothing was appended: the disk is full, fails, or holds a damaged journal.
        """
        batches = tuple(each for each in batches if len(each))
        payload = encode(batches)
        if len(payload) > MOST_PAYLOAD_BYTES:
            raise RequestError(f"the rows take {len(payload):,} bytes; a record holds at most {MOST_PAYLOAD_BYTES:,}")
        with self.alone() as end:
            return self.put(batches, payload) if batches else end

    def end(self) -> Position:
        """The position after the last record, after looking for what others have appended."""
        with self.alone() as end:
            return end

    def close_segment(self) -> int:
        """Closes the segment that is appended to, unless it is empty; gives the number of the last closed one, or 0."""
        with self.alone():
            return self.close_last().segment - 1

    @contextmanager
    def alone(self) -> Iterator[Position]:
        """While nobody else appends; gives the position after the last record."""
        with self._lock.alone() as changed:
            self._catch_up(changed)
            yield self._end

    def close(self) -> None:
        """Closes the files; the journal opens them again when it is used."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self._lock.close()

    # All that follows is done under the lock, within `alone`.

    def put(self, batches: Sequence[Batch], payload: bytes) -> Position:
        """Appends batches that have rows, of which a payload was made; the rest as in `append`."""
        self._note_types(batches)
        if self._end.offset >= self.segment_bytes:
            self._next_segment()
        self._write(payload)
        return self._end

    def close_last(self) -> Position:
        """Closes the segment that is appended to, unless it is empty; gives the journal's end then."""
        if self._end.offset > HEADER_BYTES:
            self._next_segment()
        return self._end

    def _catch_up(self, changed: bool) -> None:
        """Goes to the end of what is there. A last record that is not whole was never acknowledged: it is dropped."""
        if changed and self._file is not None:
            if open_folder(self.folder, create=False) != self._id:
                raise UserError(f"the journal '{self.folder}' was replaced by another one; start again")
            self._forget()
        try:
            if self._file is None or not self._is_last():
                self._forget()
                self._open_last()
            assert self._file is not None
            size = os.fstat(self._file).st_size
            if size != self._end.offset:
                self._take_in(size)
        except OSError as error:
            raise self._failed(error) from None

    def _forget(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _is_last(self) -> bool:
        """Whether the open file is still the one of its name, and no other process has closed the segment."""
        assert self._file is not None
        if segment_path(self.folder, self._end.segment + 1).exists():
            return False
        try:
            there = os.stat(segment_path(self.folder, self._end.segment))
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(self._file))

    def _open_last(self) -> None:
        number = segment_numbers(self.folder)[-1]
        path = segment_path(self.folder, number)
        self._file = os.open(path, os.O_RDWR)
        begin = os.pread(self._file, HEADER_BYTES, 0)
        check_begin(path, begin, self._id, number)
        self._end = Position.begin(number)
        self._take_in(os.fstat(self._file).st_size)

    def _take_in(self, size: int) -> None:
        """Takes in what others have appended, `size` bytes in all."""
        assert self._file is not None
        path, acknowledged = segment_path(self.folder, self._end.segment), read_end(self.folder, self._id)
        end = whole_end(self._file, self._id, self._end, size) if size >= self._end.offset else self._end
        least = self._end if acknowledged is None else max(self._end, acknowledged)
        if size < self._end.offset or end < least:
            raise UserError(
                f"'{path}' is damaged at byte {min(size, end.offset):,}: records up to {least} were acknowledged; "
                "restore the file from a copy"
            )
        if end.offset < size:
            if (later := record_after(self._file, self._id, end, size)) is not None:
                raise UserError(
                    f"'{path}' is damaged at byte {end.offset:,}, and whole records follow at byte {later.offset:,}; "
                    "restore the file from a copy"
                )
            os.ftruncate(self._file, end.offset)
            self.torn += 1
            say(
                f"journal '{self.folder}': the last record was not whole and never acknowledged, so it was dropped "
                f"({size - end.offset:,} bytes from byte {end.offset:,} of '{path.name}')"
            )
        if end != acknowledged:
            _sync(self._file)
            self._acknowledge(end)
        self._end = end

    def _write(self, payload: bytes) -> None:
        assert self._file is not None
        record, start = framed(self._id, self._end, payload), self._end
        end = Position(start.segment, start.offset + len(record))
        try:
            written = 0
            while written < len(record):
                written += os.pwrite(self._file, memoryview(record)[written:], start.offset + written)
            _sync(self._file)
            self._acknowledge(end)
            self._end = end
        except BaseException as error:
            if read_end(self.folder, self._id) != end:
                # Of what can't be undone, the next one to append finds out.
                with suppress(OSError):
                    os.ftruncate(self._file, start.offset)
                    _sync(self._file)
            if isinstance(error, OSError):
                raise self._failed(error) from None
            raise

    def _next_segment(self) -> None:
        assert self._file is not None
        number = self._end.segment + 1
        temporary = self.folder / ".segment.tmp"
        try:
            _sync(self._file)
            temporary.write_bytes(segment_begin(self._id, number))
            flush_files([temporary])
            os.rename(temporary, segment_path(self.folder, number))
            flush_files([self.folder])
            self._forget()
            self._open_last()
        except OSError as error:
            raise self._failed(error) from None

    def _acknowledge(self, end: Position) -> None:
        """Lets followers read up to here. Found out anew where it is lost, so it need not be flushed."""
        file = os.open(self.folder / "end", os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.pwrite(file, end_bytes(self._id, end), 0)
        finally:
            os.close(file)

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"nothing was appended to the journal '{self.folder}': {error.strerror or error}")

    def _note_types(self, batches: Sequence[Batch]) -> None:
        """Raises RequestError where a column is of another type than before: its hashes, too, would be others."""
        if (fresh := self.check_types(batches)) is not None:
            try:
                with atomic_file(self.folder / "types.json") as file:
                    file.write_text(json.dumps(fresh, indent=1), encoding="utf-8")
            except OSError as error:
                raise self._failed(error) from None

    def check_types(self, batches: Sequence[Batch]) -> dict[str, dict[str, str]] | None:
        """The types of columns with those of batches, None where all are known.

        Raises RequestError where one is another than before.
        """
        path = self.folder / "types.json"
        try:
            found = os.stat(path)
            version = (found.st_ino, found.st_mtime_ns, found.st_size)
        except FileNotFoundError:
            version = None
        if version is None or version != self._types_read:
            self._types, self._types_read = column_types(self.folder), version
        fresh = False
        types = {source: dict(columns) for source, columns in self._types.items()}
        for batch in batches:
            mine = types.setdefault(batch.source or "", {})
            for field in batch.table.schema:
                if not pt.is_null(field.type):
                    if (known := mine.get(field.name)) is None:
                        mine[field.name], fresh = str(field.type), True
                    elif known != str(field.type):
                        row = _first_value(batch.table.column(field.name))
                        raise RequestError(
                            f"row {row}: column '{field.name}' holds {field.type}, but {known} in earlier rows of this "
                            "journal"
                        )
        return types if fresh else None


def _first_value(values: pa.ChunkedArray) -> int:
    """The first row that has a value, which an empty list has not; 0 where none has."""
    kind = values.type
    if pt.is_list(kind) or pt.is_large_list(kind):
        has = pc.fill_null(pc.greater(pc.list_value_length(values), 0), False)
    else:
        has = pc.is_valid(values)
    return max(pc.index(has, True).as_py(), 0)


def column_types(folder: str | Path) -> dict[str, dict[str, str]]:
    """Log of events, "" for the interaction log -> the types of the columns that a journal's rows have of it.

    Raises UserError where that can't be read.
    """
    path = Path(folder) / "types.json"
    try:
        found: dict[str, dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        raise UserError(f"'{path}' is damaged; restore it from a copy") from None
    return found
