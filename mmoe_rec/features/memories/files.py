"""Memories as Parquet files in a folder of feature state, `NAME.memory/part-NUMBER.parquet`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmoe_rec.features.encoder import MemoryEncoder
from mmoe_rec.point_in_time.memory import Memory


def write_memory(memory: Memory, folder: Path, feature: str, part: int = 0) -> None:
    """Writes a memory, or part number `part` of it by key, into a folder of feature state."""
    metadata = None if memory.floor is None else {"floor": str(memory.floor)}
    columns = {name: pa.array(column) for name, column in memory.to_columns().items()}
    # Columns declared to have no nulls are written faster; the statistics are for `read_memory` by keys.
    schema = pa.schema([pa.field(name, column.type, nullable=False) for name, column in columns.items()], metadata)
    parts = _memory_folder(folder, feature)
    parts.mkdir(exist_ok=True)
    table, path = pa.table(list(columns.values()), schema=schema), parts / f"part-{part:05d}.parquet"
    pq.write_table(table, path, compression="lz4", use_dictionary=False, write_statistics=["key"])


def exact_from(folder: Path) -> int | None:
    """The latest `floor` of all memories in a folder of feature state: from that moment (microseconds) on, all of them
    know what was known then. None where any moment can be asked for."""
    found = [_floor(pq.read_schema(path)) for path in sorted(folder.glob("*.memory/part-00000.parquet"))]
    return max((each for each in found if each is not None), default=None)


def _floor(schema: pa.Schema) -> int | None:
    floor = (schema.metadata or {}).get(b"floor")
    return None if floor is None else int(floor)


def memory_parts(folder: Path, feature: str) -> list[Path]:
    """The files of a memory that `write_memory` wrote, in order. Raises FileNotFoundError where there are none."""
    parts = sorted(_memory_folder(folder, feature).glob("part-*.parquet"))
    if not parts:
        raise FileNotFoundError(f"there is nothing that feature '{feature}' remembers")
    return parts


def read_memory(encoder: MemoryEncoder[Any], folder: Path, keys: pc.Expression | None = None) -> Memory:
    """The memory of a feature that was written into a folder of state, or the events of some keys of it.

    A part is read at a time, so that no more memory is taken than the events need.
    """
    parts = memory_parts(folder, encoder.name)
    schema = pq.read_schema(parts[0])
    tables = (pq.read_table(part, filters=keys, use_threads=False) for part in parts)
    if keys is None:
        columns = _filled(schema, sum(pq.read_metadata(part).num_rows for part in parts), tables)
    else:
        found = pa.concat_tables(tables)
        columns = {name: found[name].to_numpy() for name in found.column_names}
    return encoder.memory_from(columns, _floor(schema))


def remembered_bytes(folder: Path) -> dict[str, int]:
    """Bytes that the events of each counter and history in a folder of state take in memory, without indexes."""
    sizes = {}
    for memory in sorted(folder.glob("*.memory")):
        feature = memory.name.removesuffix(".memory")
        parts = [pq.ParquetFile(part) for part in memory_parts(folder, feature)]
        widths = [field.type.bit_width // 8 for field in parts[0].schema_arrow]
        sizes[feature] = sum(widths) * sum(part.metadata.num_rows for part in parts)
    return sizes


def _filled(schema: pa.Schema, rows: int, tables: Iterable[pa.Table]) -> dict[str, np.ndarray]:
    columns = {field.name: np.empty(rows, field.type.to_pandas_dtype()) for field in schema}
    start = 0
    for table in tables:
        for name, column in columns.items():
            column[start : start + len(table)] = table[name].to_numpy()
        start += len(table)
    return columns


def _memory_folder(folder: Path, feature: str) -> Path:
    return folder / f"{feature}.memory"
