"""Batches of accepted rows as bytes: the payload of a record.

A payload is one batch after the other, each as

    length of its metadata, length of its rows   two unsigned 32-bit integers, little endian
    metadata                                     JSON: source, accepted_at, rows; filled with blanks to a multiple of 8
    rows                                         an Arrow IPC stream of one record batch, filled up likewise
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

_LENGTHS = struct.Struct("<II")
_ALIGNED = 8


@dataclass(frozen=True)
class Batch:
    """Rows that were accepted together.

    source: name of the log of events, None for the interaction log; accepted_at: microseconds since 1970 UTC, by the
    clock of the server; table: columns in canonical types (see `mmoe_rec.log.columns`).
    """

    source: str | None
    accepted_at: int
    table: pa.Table

    def __len__(self) -> int:
        return self.table.num_rows


def encode(batches: Sequence[Batch]) -> bytes:
    """The payload of batches that have rows."""
    parts = []
    for batch in batches:
        about = {"source": batch.source, "accepted_at": batch.accepted_at, "rows": len(batch)}
        metadata = json.dumps(about).encode()
        metadata += b" " * (-len(metadata) % _ALIGNED)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.table.schema) as writer:
            writer.write_table(batch.table.combine_chunks())
        rows = sink.getvalue().to_pybytes()
        rows += b"\0" * (-len(rows) % _ALIGNED)
        parts += [_LENGTHS.pack(len(metadata), len(rows)), metadata, rows]
    return b"".join(parts)


def decode(payload: pa.Buffer) -> list[Batch] | None:
    """The batches of a payload, whose columns share its memory. None where it holds something else."""
    found, at = [], 0
    try:
        while at < payload.size:
            metadata_bytes, rows_bytes = _LENGTHS.unpack(payload[at : at + _LENGTHS.size])
            at += _LENGTHS.size
            about = json.loads(payload[at : at + metadata_bytes].to_pybytes())
            at += metadata_bytes
            table = pa.ipc.open_stream(payload[at : at + rows_bytes]).read_all()
            at += rows_bytes
            if at > payload.size:
                return None
            if table.num_rows != about["rows"]:
                return None
            found.append(Batch(about["source"], about["accepted_at"], table))
    except (struct.error, ValueError, KeyError, TypeError, pa.ArrowException, OSError):
        return None
    return found
