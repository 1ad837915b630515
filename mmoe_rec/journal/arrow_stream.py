"""Rows that a caller sends as an Arrow IPC stream: bytes of unknown origin, which may not take any amount of memory.

Arrow itself reads compressed buffers, and dictionaries whose long words many rows share, into as much memory as
they ask for; and it takes offsets that point anywhere for granted until they are validated.
"""

from __future__ import annotations

import struct

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from mmoe_rec.errors import RequestError, quoted
from mmoe_rec.log.files import first_line

_RECORD_BATCH, _DICTIONARY_BATCH = 3, 2  # kinds of messages, in Arrow's Message.fbs
_END = b"\xff\xff\xff\xff\0\0\0\0"
MOST_TEXT_BYTES = 64 * 2**20
"""Characters of all columns of coded strings, of all rows together."""


def read_stream(data: bytes, most_rows: int) -> pa.Table:
    """The table of a stream, validated. Raises RequestError for anything else, or more rows."""
    try:
        _check_plain(data)
        batches, rows, source = [], 0, pa.BufferReader(data)
        with pa.ipc.open_stream(source) as reader:
            for field in reader.schema:
                if not _is_plain(field.type):
                    kind = str(field.type)[:60]
                    raise RequestError(f"column {quoted(field.name)} is of Arrow's type {kind}, which is not taken")
            for batch in reader:
                rows += batch.num_rows
                if rows > most_rows:
                    raise too_many(most_rows)
                batches.append(batch)
            table = pa.Table.from_batches(batches, reader.schema)
            _check_end(data, source.tell())
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, struct.error, IndexError, MemoryError) as error:
        raise RequestError(f"the body is no Arrow IPC stream that can be read: {first_line(error)[:200]}") from None
    return table


def too_many(most_rows: int) -> RequestError:
    """The error of more rows than may come together."""
    return RequestError(f"there are more than {most_rows:,} rows; send them in several calls")


def plain_columns(table: pa.Table) -> list[pa.ChunkedArray]:
    """A validated table's columns with their strings written out. Raises RequestError where that would be too much
    text."""
    columns, text = [], 0
    for name, column in zip(table.column_names, table.columns, strict=True):
        kind = column.type
        if pt.is_dictionary(kind) and _is_text(kind.value_type):
            text += sum(map(_text_bytes, column.chunks))
            if text > MOST_TEXT_BYTES:
                raise RequestError(f"column {quoted(name)} holds more than {MOST_TEXT_BYTES:,} bytes of text")
            column = pa.chunked_array([chunk.dictionary_decode() for chunk in column.chunks], kind.value_type)  # noqa: PLW2901
        columns.append(column)
    return columns


def _is_plain(kind: pa.DataType) -> bool:
    """Whether values of a type take no more memory once they are read than they do in the stream, or, where they are
    coded strings, as much as is counted."""
    if pt.is_list(kind) or pt.is_large_list(kind):
        return _is_value(kind.value_type)
    return _is_value(kind) or (pt.is_dictionary(kind) and _is_text(kind.value_type))


def _is_value(kind: pa.DataType) -> bool:
    numbers = pt.is_integer(kind) or pt.is_floating(kind) or pt.is_boolean(kind)
    return numbers or pt.is_timestamp(kind) or pt.is_date(kind) or pt.is_null(kind) or _is_text(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pt.is_string(kind) or pt.is_large_string(kind)


def _text_bytes(coded: pa.DictionaryArray) -> int:
    lengths = pc.binary_length(coded.dictionary).take(coded.indices)
    return int(pc.sum(lengths.cast(pa.int64())).as_py() or 0)


def _check_end(data: bytes, end: int) -> None:
    """Raises RequestError where the stream that was read up to a byte has no end, or is not all that was sent."""
    if not data[:end].endswith(_END):
        raise RequestError("the Arrow stream has no end marker, so it may be cut off; close its writer before sending")
    if end < len(data):
        raise RequestError(f"{len(data) - end:,} bytes follow the end of the Arrow stream; send one stream in a call")


def _check_plain(data: bytes) -> None:
    """Raises RequestError where a message of the stream is compressed."""
    for message in pa.ipc.MessageReader.open_stream(data):
        flat = message.metadata.to_pybytes()
        table = struct.unpack_from("<I", flat, 0)[0]
        kind = flat[_field(flat, table, 1)] if _field(flat, table, 1) else 0
        if kind in (_RECORD_BATCH, _DICTIONARY_BATCH):
            batch = _follow(flat, _field(flat, table, 2))
            if kind == _DICTIONARY_BATCH:
                batch = _follow(flat, _field(flat, batch, 1))
            if _field(flat, batch, 3):
                raise RequestError("the Arrow stream is compressed; send it without compression")


def _field(flat: bytes, table: int, number: int) -> int:
    """Place of a field of a table in a flatbuffer, 0 where it is not given."""
    entries = table - struct.unpack_from("<i", flat, table)[0]
    if 4 + 2 * number >= struct.unpack_from("<H", flat, entries)[0]:
        return 0
    offset = struct.unpack_from("<H", flat, entries + 4 + 2 * number)[0]
    return table + offset if offset else 0


def _follow(flat: bytes, place: int) -> int:
    return place + int(struct.unpack_from("<I", flat, place)[0])
