"""What a pipeline has learnt since its memories were made: further events of counters and histories, in small levels.

`Live` never changes: one with more events is made beside it (`extended`), with all of its indexes, while requests are
answered with the one before, and then takes its place at once (`FeaturePipeline.with_live`). What is found in memories
and levels is, to the bit, what the memories would give if they had been extended by all of these events, for all times
that are no earlier than what the memories were compacted for. `forget_after_days` counts over both: an event may go on
with a life that a memory knows, or join two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mmoe_rec.features.encoder import MemoryEncoder
from mmoe_rec.features.kinds.counter import CounterEncoder
from mmoe_rec.point_in_time.histories import HistoryMemory
from mmoe_rec.point_in_time.live.layers import ForgetfulCounter, LayeredCounter, LayeredHistory
from mmoe_rec.point_in_time.live.layers_together import add_levels
from mmoe_rec.point_in_time.live.levels import CounterLevel, CounterLevels, grown
from mmoe_rec.point_in_time.memory import CounterMemory
from mmoe_rec.point_in_time.together import CounterQuestion, TogetherFound, salt_of

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
