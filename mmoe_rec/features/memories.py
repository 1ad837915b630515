"""What counters and histories remember: as files, and with what a server has learnt since.

`Live` is what a pipeline has learnt since its memories were made: further events of counters and histories, in small
levels. It never changes: one with more events is made beside it (`extended`), with all of its indexes, while requests
are answered with the one before, and then takes its place at once (`FeaturePipeline.with_live`). What is found in
memories and levels is, to the bit, what the memories would give if they had been extended by all of these events, for
all times that are no earlier than what the memories were compacted for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmoe_rec.features.encoder import MemoryEncoder
from mmoe_rec.features.kinds.counter import CounterEncoder
from mmoe_rec.log.request_rows import RequestRows
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time.counters import CounterLevels, CounterMemory, salt_of
from mmoe_rec.point_in_time.memory import Memory, grown


def write_memory(memory: Memory, folder: Path, feature: str, part: int = 0) -> None:
    """Writes a memory, or part number `part` of it by key, into a folder of feature state."""
    metadata = None if memory.floor is None else {"floor": str(memory.floor)}
    columns = {name: pa.array(column) for name, column in memory.to_columns().items()}
    # Columns declared to have no nulls are written faster; the statistics are for `read_memory` by keys.
    schema = pa.schema([pa.field(name, column.type, nullable=False) for name, column in columns.items()], metadata)
    parts = folder / f"{feature}.memory"
    parts.mkdir(exist_ok=True)
    table, path = pa.table(list(columns.values()), schema=schema), parts / f"part-{part:05d}.parquet"
    pq.write_table(table, path, compression="lz4", use_dictionary=False, write_statistics=["key"])


def exact_from(folder: Path) -> int | None:
    """The latest `floor` of all memories in a folder of feature state: from that moment (microseconds) on, all of them
    know what was known then. None where any moment can be asked for."""
    floors = [_floor(pq.read_schema(path)) for path in sorted(folder.glob("*.memory/part-00000.parquet"))]
    return max((each for each in floors if each is not None), default=None)


def _floor(schema: pa.Schema) -> int | None:
    floor = (schema.metadata or {}).get(b"floor")
    return None if floor is None else int(floor)


def memory_parts(folder: Path, feature: str) -> list[Path]:
    """The files of a memory that `write_memory` wrote, in order. Raises FileNotFoundError where there are none."""
    parts = sorted((folder / f"{feature}.memory").glob("part-*.parquet"))
    if not parts:
        raise FileNotFoundError(f"there is nothing that feature '{feature}' remembers")
    return parts


def read_memory(encoder: MemoryEncoder[Any], folder: Path, keys: pc.Expression | None = None) -> Memory:
    """The memory of a feature that was written into a folder of state, or the events of some keys of it.

    A part is read at a time, so that no more memory is taken than the events need.
    """
    parts = memory_parts(folder, encoder.name)
    schemas = [pq.read_schema(part) for part in parts]
    schema = pa.unify_schemas(schemas)  # a part lacks limbs of exact sums that are zero in all of its rows
    tables: Iterable[pa.Table] = (pq.read_table(part, filters=keys, use_threads=False) for part in parts)
    if keys is None:
        rows = sum(pq.read_metadata(part).num_rows for part in parts)
    else:
        tables = list(tables)
        rows = sum(map(len, tables))
    columns = {field.name: np.zeros(rows, field.type.to_pandas_dtype()) for field in schema}
    start = 0
    for table in tables:
        for name in table.column_names:
            columns[name][start : start + len(table)] = table[name].to_numpy()
        start += len(table)
    return encoder.memory_from(columns, _floor(schemas[0]))


def remembered_bytes(folder: Path) -> dict[str, int]:
    """Bytes that the events of each counter and history in a folder of state take in memory, without indexes."""
    sizes = {}
    for memory in sorted(folder.glob("*.memory")):
        feature = memory.name.removesuffix(".memory")
        parts = [pq.ParquetFile(part) for part in memory_parts(folder, feature)]
        schema = pa.unify_schemas([part.schema_arrow for part in parts])
        widths = [field.type.bit_width // 8 for field in schema]
        sizes[feature] = sum(widths) * sum(part.metadata.num_rows for part in parts)
    return sizes


class Live:
    """Levels of events beside the memories of a pipeline's counters and histories.

    encoders: `memory_encoders` of a pipeline; rows: of all logs that were learnt; shared: levels of all counters whose
    labels are whole numbers and that forget nothing; own: levels of each other counter and of each history, by its
    name; learnt: names of those that have events in any level.
    """

    def __init__(
        self,
        encoders: Mapping[str, MemoryEncoder[Any]],
        rows: int = 0,
        shared: CounterLevels | None = None,
        own: Mapping[str, tuple[Memory, ...]] | None = None,
        learnt: frozenset[str] = frozenset(),
    ) -> None:
        self._encoders, self.rows, self._learnt = encoders, rows, learnt
        self._shared, self._own = shared or CounterLevels(), dict(own or {})
        self._salts = {name: salt_of(place) for place, name in enumerate(encoders)}

    def extended(self, rows: Mapping[str | None, LogRows]) -> Live:
        """What is known with further rows of the interaction log (None) and of logs of events, which have only the
        columns that counters and histories read of events. Raises UserError for ids of another type than those of the
        vocabulary."""
        own, learnt, together = dict(self._own), set(self._learnt), []
        for name, encoder in self._encoders.items():
            if encoder.source not in rows or not len(events := encoder.events(rows[encoder.source])):
                continue
            learnt.add(name)
            if isinstance(encoder, CounterEncoder) and encoder.shares_levels:
                # An event without a label counts as a positive one.
                label = np.ones(len(events), np.int8) if encoder.label is None else events["label"].to_numpy()
                together.append((events["key"].to_numpy() ^ self._salts[name], events["known"].to_numpy(), label))
            else:
                new = encoder.extended(encoder.empty(), events)
                own[name] = grown(own.get(name, ()), new, lambda one, two: one.merged(two))
        shared = self._shared
        if together:
            shared = shared.extended(*map(np.concatenate, zip(*together, strict=True)))
        count = sum(map(len, rows.values()))
        return Live(self._encoders, self.rows + count, shared, own, frozenset(learnt))

    def encoder_of(self, name: str) -> MemoryEncoder[Any]:
        """A counter or history that knows these events besides its memory."""
        encoder = self._encoders[name]
        if name not in self._learnt:
            return encoder
        encoder = copy(encoder)
        if isinstance(encoder, CounterEncoder) and encoder.shares_levels:
            encoder.memory = encoder.memory.with_shared(self._shared, self._salts[name], encoder.windows)
        else:
            encoder.memory = encoder.memory.with_levels(self._own[name])
        return encoder

    def find(self, encoders: Mapping[str, MemoryEncoder[Any]], rows: RequestRows, of_requests: Collection[str]) -> None:
        """Notes in the look-ups of rows what the shared levels know, in one pass for all counters.

        encoders: those that `encoder_of` gave; of_requests: names of those that ask once a request.
        """
        asked = []
        for name in self._learnt:
            memory = encoders[name].memory
            if isinstance(memory, CounterMemory) and memory.shared is not None:
                asking = rows.shared if name in of_requests else rows
                asked.append((memory, asking.look_ups(encoders[name].by)))
        if asked:
            for (memory, look_ups), later in zip(asked, self._shared.find(asked), strict=True):
                look_ups.later[memory] = later
