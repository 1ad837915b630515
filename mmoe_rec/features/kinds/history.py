"""The kind `history`: the user's last engaged candidates before the request, point in time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from mmoe_rec.features.encoder import Inputs, Kind, MemoryEncoder, Outline, Shared
from mmoe_rec.features.kinds.id import IdFeature
from mmoe_rec.features.kinds.ids import ragged
from mmoe_rec.features.vocabulary import check_owner, meaning_of_ids
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time.arrays import Ragged, SharedRagged, consecutive, one_array
from mmoe_rec.point_in_time.join import KnownEvents, LookUps, known_at, sorted_order
from mmoe_rec.point_in_time.memory import Memory, SeenEvents
from mmoe_rec.settings.columns import Use
from mmoe_rec.settings.schema import Meaning, Remembering, Schema

_FOREVER = np.iinfo(np.int64).max


class HistoryFeature(Remembering):
    """The user's last engaged candidates before the request, point in time, embedded and averaged."""

    fixed_role = "user"

    kind: Literal["history"]
    of: str = Field(description="name of the candidate's id feature whose vocabulary and table are used")
    length: int = Field(20, ge=1, le=1000, description="number of last engaged candidates")
    at_least: float = Field(1.0, description="smallest label that counts as engaged")

    def reads(self) -> Mapping[str, Use]:
        """None: every row has the user's id."""
        return {}

    def event_reads(self, schema: Schema) -> Mapping[str, Use]:
        return {schema.columns.user: "key", **schema.features[self.of].reads()}

    @property
    def shares(self) -> str | None:
        return self.of

    def check(self, name: str, schema: Schema) -> None:
        """Raises ValueError as `Remembering.check`, and where `of` is not an id feature of the candidate."""
        super().check(name, schema)
        self.require(name, schema, "user", "it is a user's")
        check_owner(schema, name, "of", IdFeature, "candidate")

    def meaning(self, schema: Schema) -> Meaning:
        return meaning_of_ids(schema, (schema.columns.user, *schema.features[self.of].reads()), self.of)


@dataclass(eq=False)
class HistoryMemory(Memory):
    """Candidates per user. items: (E,) int64 rows of the candidates' table."""

    items: np.ndarray

    @staticmethod
    def empty(forget_after: int | None = None) -> HistoryMemory:
        """Nothing remembered."""
        none = np.empty(0, np.int64)
        return HistoryMemory(KnownEvents(np.empty(0, np.uint64), none), none, forget_after=forget_after)

    def extended(self, key: np.ndarray, known: np.ndarray, items: np.ndarray) -> HistoryMemory:
        """These events and further ones, (E,) uint64, int64 and int64, in any order."""
        if not len(key):
            return self
        key, known = np.append(self.events.key, key), np.append(self.events.known, known)
        items = np.append(self.items, items)
        order = sorted_order(key, known, items)
        return replace(self, events=KnownEvents(key[order], known[order]), items=items[order])

    def merged(self, other: HistoryMemory) -> HistoryMemory:
        return self.extended(other.events.key, other.events.known, other.items)

    def last(self, asked: LookUps, length: int) -> Ragged:
        """The last `length` items that were known at N look-ups, oldest first; of one moment, in the items' order."""
        seen = SeenEvents(self, asked)
        parts = list(zip(seen.memories, seen.last_events(length), strict=True))
        items = np.concatenate([memory.items[index] for memory, (index, _) in parts])
        together = np.sum([lengths for _, (_, lengths) in parts], axis=0)
        if len(parts) == 1 or not len(items):
            return Ragged(items, together.astype(np.int32))
        number = np.concatenate([np.arange(len(asked)).repeat(lengths) for _, (_, lengths) in parts])
        known = np.concatenate([memory.events.known[index] for memory, (index, _) in parts])
        lengths = np.minimum(together, length)
        last = consecutive(np.cumsum(together) - lengths, lengths)
        return Ragged(items[np.lexsort((items, known, number))[last]], lengths.astype(np.int32))

    def compacted(self, moment: int, length: int) -> HistoryMemory:
        """What requests at `moment` or later, which ask for `length` items, can ask for."""
        # The last `length` that are known by then; later events keep these in reach until they become known themselves.
        events = self.events
        known_by_then = np.add.reduceat(np.append(events.known <= moment, 0), events.starts[:-1])
        within_key = np.arange(len(events)) - events.starts[events.number]
        needed = within_key >= (known_by_then - length)[events.number]
        if self.lives is not None:
            needed &= ~self.lives.ended(moment)
        return replace(self, events=events.take(needed), items=self.items[needed], floor=self._later_floor(moment))

    def to_columns(self) -> dict[str, np.ndarray]:
        return {"key": self.events.key, "known": self.events.known, "item": self.items}

    def with_columns(self, columns: Mapping[str, np.ndarray], floor: int | None) -> HistoryMemory:
        return replace(self, events=KnownEvents(columns["key"], columns["known"]), items=columns["item"], floor=floor)


class HistoryEncoder(MemoryEncoder[HistoryMemory]):
    """Table rows of the last `length` candidates that the user engaged with, oldest first."""

    feature: HistoryFeature

    def __init__(self, name: str, feature: HistoryFeature, shared: Shared) -> None:
        super().__init__(name, feature, shared, (shared.schema.columns.user,))
        self.vocabulary = shared.vocabularies[feature.of]

    def empty(self) -> HistoryMemory:
        return HistoryMemory.empty(self.forget_after)

    def events(self, rows: LogRows) -> pa.Table:
        """Engaged rows with the candidate's id; each becomes visible only when its label is known."""
        engaged = np.flatnonzero(rows.labels(self.task, _FOREVER) >= self.feature.at_least)
        known = known_at(rows.times()[engaged], self.matures_after)
        ids = rows.column(self.vocabulary.feature.column).take(pa.array(engaged))
        return pa.table({"key": rows.hashes(self.by)[engaged], "known": known, "id": ids})

    def extended(self, memory: HistoryMemory, events: pa.Table, in_order: bool = False) -> HistoryMemory:
        """The vocabulary must be complete by now."""
        items = self.vocabulary.encode(one_array(events["id"]))
        return memory.extended(events["key"].to_numpy(), events["known"].to_numpy(), items)

    def compacted(self, memory: HistoryMemory, moment: int) -> HistoryMemory:
        return memory.compacted(moment, self.feature.length)

    def result_columns(self) -> Mapping[str, tuple[Use, pa.DataType | None]]:
        """Lists of ids under the feature's name, oldest first."""
        known = self.vocabulary.id_type
        return {self.name: ("keys", None if known is None else pa.list_(known))}

    def distinct_results(self, memory: HistoryMemory, asked: LookUps) -> Mapping[str, Ragged]:
        return {self.name: memory.last(asked, self.feature.length)}

    def outline(self) -> Outline:
        return Outline(ids=((self.name, self.vocabulary.name, True),))

    def encode(self, rows: LogRows) -> Inputs:
        """The last candidates. A column with the feature's name, lists of candidate ids, wins."""
        if rows.has(self.name):
            values, lengths = ragged(rows.column(self.name), self.feature.length, last=True)
            return Inputs({self.name: Ragged(self.vocabulary.encode(values), lengths)})
        lists = self.look_up(rows)[self.name]
        assert isinstance(lists, SharedRagged)
        return Inputs({self.name: lists.expand()})

    def explain(self, rows: LogRows) -> Mapping[str, np.ndarray]:
        """The last candidates' ids, None in the place of one without a row of its own, oldest first; None for an empty
        list. A column with the feature's name wins."""
        lists: list[Any]
        if rows.has(self.name):
            given = rows.column(self.name).to_pylist()
            lists = [[each for each in ids or () if each is not None][-self.feature.length :] for ids in given]
        else:
            asked = rows.look_ups(self.by)
            known = self.memory.last(asked, self.feature.length)
            ids, offsets = self.vocabulary.decode(known.values), known.offsets
            lists = [ids[offsets[each] : offsets[each + 1]] for each in asked.number.tolist()]
        result = np.empty(len(rows), object)
        result[:] = [each or None for each in lists]
        return {self.name: result}


KIND = Kind(HistoryFeature, HistoryFeature, HistoryEncoder)
