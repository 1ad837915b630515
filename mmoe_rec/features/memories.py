"""What counters and histories remember: as files, with what has been learnt since, and asked together.

What a pipeline has learnt since its memories were made: further events of counters and histories, in small levels.

`Live` never changes: one with more events is made beside it (`extended`), with all of its indexes, while requests are
answered with the one before, and then takes its place at once (`FeaturePipeline.with_live`). What is found in memories
and levels is, to the bit, what the memories would give if they had been extended by all of these events, for all times
that are no earlier than what the memories were compacted for. `forget_after_days` counts over both: an event may go on
with a life that a memory knows, or join two.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmoe_rec.features.encoder import MemoryEncoder
from mmoe_rec.features.kinds.counter import CounterEncoder
from mmoe_rec.log.request_rows import FewRows, RequestRows
from mmoe_rec.point_in_time.histories import HistoryMemory
from mmoe_rec.point_in_time.layers import ForgetfulCounter, LayeredCounter, LayeredHistory
from mmoe_rec.point_in_time.levels import CounterLevel, CounterLevels, grown
from mmoe_rec.point_in_time.memory import CounterMemory, Memory
from mmoe_rec.point_in_time.together import (
    CounterQuestion,
    CountersTogether,
    TogetherFound,
    TogetherIndex,
    add_levels,
    salt_of,
)


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


Encoders = Mapping[str, MemoryEncoder[Any]]
_Events = tuple[np.ndarray, np.ndarray, np.ndarray]  # keys, moments and labels


class Live:
    """Levels of events beside the memories of a pipeline's counters and histories.

    rows: of all logs that were learnt; counters: levels of those whose labels are whole numbers, fractions: of the
    others, the largest level first; own: levels of each history, and of each counter that forgets, by its name;
    learnt: names of those that have events in any level.
    """

    def __init__(
        self,
        encoders: Encoders,
        rows: int = 0,
        counters: CounterLevels | None = None,
        fractions: CounterLevels | None = None,
        own: Mapping[str, tuple[Any, ...]] | None = None,
        learnt: frozenset[str] = frozenset(),
    ) -> None:
        self._encoders, self.rows, self._learnt = encoders, rows, learnt
        self._counters, self._fractions = counters or CounterLevels(), fractions or CounterLevels()
        self._own = dict(own or {})
        self._salts = {name: salt_of(place) for place, name in enumerate(encoders)}

    @staticmethod
    def none(encoders: Encoders) -> Live:
        """Nothing learnt. encoders: `memory_encoders` of a pipeline."""
        return Live(encoders)

    @property
    def events(self) -> int:
        """Of all counters and histories; those of one key and moment are one of a counter."""
        counted = sum(map(len, (*self._counters.levels, *self._fractions.levels)))
        return counted + sum(len(memory.events) for levels in self._own.values() for memory in levels)

    def extended(self, events: Mapping[str, pa.Table], rows: int | None = None) -> Live:
        """With further events, in any order: name of a counter or history -> as its `events` gives them.

        rows: of the logs that these are of, which are counted; by default the most that one of them has. Raises
        UserError for ids of another type than those of the vocabulary.
        """
        fractions: list[_Events] = []
        counters: list[_Events] = []
        own = dict(self._own)
        for name, table in events.items():
            encoder = self._encoders[name]
            if isinstance(encoder, CounterEncoder) and encoder.forget_after is None:
                (fractions if encoder.has_fractions else counters).append(self._salted(name, encoder, table))
            elif len(table):
                new = encoder.extended(encoder.empty(), table)
                levels = grown(own.get(name, ()), new, _merged, size=lambda memory: len(memory.events))
                own[name] = tuple(map(_indexed, levels))
        if rows is None:
            rows = max(map(len, events.values()), default=0)
        return Live(
            self._encoders,
            self.rows + rows,
            _grown(self._counters, counters),
            _grown(self._fractions, fractions),
            own,
            self._learnt.union(name for name, table in events.items() if len(table)),
        )

    def _salted(self, name: str, encoder: CounterEncoder, table: pa.Table) -> _Events:
        """Keys, moments and labels of a counter's events; an event without a label counts as a positive one."""
        key = table["key"].to_numpy() ^ self._salts[name]
        label = np.ones(len(table), np.int8) if encoder.source is not None else table["label"].to_numpy()
        return key, table["known"].to_numpy(), label

    def knows(self, name: str) -> bool:
        """Whether there are further events of a counter or history."""
        return name in self._learnt

    def memory(self, name: str) -> Any:
        """What answers for a counter or history: its memory, with levels where there are any."""
        encoder = self._encoders[name]
        if not (levels := self._levels_of(name)):
            return encoder.memory
        if not isinstance(encoder, CounterEncoder):
            return LayeredHistory(encoder.memory, levels)
        if encoder.forget_after is not None:
            return ForgetfulCounter(encoder.memory, levels)
        return LayeredCounter(encoder.memory, levels, self._salts[name])

    def answers_alone(self, name: str) -> bool:
        """Whether there may be further events of a history or counter that `add` does not know."""
        encoder = self._encoders[name]
        mixed = isinstance(encoder, CounterEncoder) and encoder.forget_after is None and not encoder.has_fractions
        return not mixed and self.knows(name)

    def _levels_of(self, name: str) -> tuple[Any, ...]:
        encoder = self._encoders[name]
        if isinstance(encoder, CounterEncoder) and encoder.forget_after is None:
            return (self._fractions if encoder.has_fractions else self._counters).levels
        return self._own.get(name, ())

    def add(self, names: Sequence[str], questions: Sequence[CounterQuestion], found: Sequence[TogetherFound]) -> None:
        """Adds what is known of counters, none of which `answers_alone`, to what their memories answer."""
        some = [number for number, name in enumerate(names) if name in self._learnt]
        salts = [self._salts[names[number]] for number in some]
        add_levels(self._counters, [questions[number] for number in some], salts, [found[number] for number in some])


def _grown(levels: CounterLevels, events: Sequence[_Events]) -> CounterLevels:
    if not events:
        return levels
    return levels.extended(CounterLevel.of(*map(np.concatenate, zip(*events, strict=True))))


def _merged(one: Any, other: Any) -> CounterMemory | HistoryMemory:
    if isinstance(one, CounterMemory):
        return one.merged(other)
    merged: HistoryMemory = one.extended(other.events.key, other.events.known, other.items)
    return merged


def _indexed(memory: Any) -> Any:
    """The same memory, for whose index, and lives, no request has to wait."""
    assert len(memory.events.index.keys) + 1 == len(memory.events.starts)
    assert memory.lives is None or len(memory.lives.before) == len(memory.events)
    return memory


class MemoriesTogether:
    """The memories of a pipeline's counters and histories, as they are now."""

    def __init__(self, encoders: Mapping[str, MemoryEncoder[Any]]) -> None:
        self._encoders = encoders
        self._memories: list[Memory] = [each.memory for each in encoders.values()]
        # Sums of fractions go by limbs, so such counters answer for themselves.
        self._counters = {
            name: each for name, each in encoders.items() if isinstance(each, CounterEncoder) and not each.has_fractions
        }
        self._index = TogetherIndex([memory.events for memory in self._memories])
        self._together = CountersTogether([each.memory for each in self._counters.values()])

    def are_current(self) -> bool:
        """Whether the encoders still have the memories that they had."""
        return all(each.memory is own for each, own in zip(self._encoders.values(), self._memories, strict=True))

    def look_up(self, rows: RequestRows, of_requests: Collection[str], live: Live | None = None) -> None:
        """Notes in rows the results of counters, and for histories where the rows' keys are, or results.

        of_requests: names of the encoders that ask once a request; live: what is known besides the memories. What the
        rows give themselves is not looked up.
        """
        asking: dict[str, FewRows] = {}
        for name, encoder in self._encoders.items():
            asked = rows.shared if name in of_requests else rows
            if not all(map(asked.has, encoder.precomputed())):
                asking[name] = asked
        self._index.find(
            [
                (self._encoders[name].memory.events, each.look_ups(self._encoders[name].by))
                for name, each in asking.items()
            ]
        )
        alone = {name for name in asking if live is not None and live.answers_alone(name)}
        together = asking.keys() - alone
        counters = [(encoder, asking[name]) for name, encoder in self._counters.items() if name in together]
        questions = [encoder.question(each.look_ups(encoder.by)) for encoder, each in counters]
        answers = self._together.answer(questions)
        if live is not None:
            live.add([encoder.name for encoder, _ in counters], questions, answers)
            for name in alone:
                encoder, asked = self._encoders[name], asking[name]
                asked.results |= encoder.results(live.memory(name), asked.look_ups(encoder.by))
        for (encoder, asked), found in zip(counters, answers, strict=True):
            asked.results |= encoder.answered(found)
