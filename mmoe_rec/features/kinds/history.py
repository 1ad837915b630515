"""The kind `history`: the user's last engaged candidates before the request, point in time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from mmoe_rec.features.encoder import Inputs, Kind, MemoryEncoder, Outline, Shared
from mmoe_rec.features.kinds.id import IdFeature
from mmoe_rec.features.kinds.ids import ragged
from mmoe_rec.features.vocabulary import check_owner, meaning_of_ids, owners
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time.arrays import Ragged, SharedRagged, one_array
from mmoe_rec.point_in_time.histories import HistoryMemory
from mmoe_rec.point_in_time.join import AnyLookUps, known_at
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
        possible = [each for each in owners(schema, IdFeature) if schema.role_of(each) == "candidate"]
        check_owner(name, "of", self.of, possible, "an id feature of the candidate")

    def meaning(self, schema: Schema) -> Meaning:
        return meaning_of_ids(schema, (schema.columns.user, *schema.features[self.of].reads()), self.of)


class HistoryEncoder(MemoryEncoder[HistoryMemory]):
    """Table rows of the last `length` candidates that the user engaged with, oldest first."""

    feature: HistoryFeature

    def __init__(self, name: str, feature: HistoryFeature, shared: Shared) -> None:
        super().__init__(name, feature, shared, (shared.schema.columns.user,))
        self.owner = shared.owners[feature.of]

    def empty(self) -> HistoryMemory:
        return HistoryMemory.empty(self.forget_after)

    def memory_from(self, columns: Mapping[str, np.ndarray], floor: int | None) -> HistoryMemory:
        return HistoryMemory.from_columns(columns, floor, self.forget_after)

    def events(self, rows: LogRows) -> pa.Table:
        """Engaged rows with the candidate's id; each becomes visible only when its label is known."""
        engaged = np.flatnonzero(rows.labels(self.task, _FOREVER) >= self.feature.at_least)
        known = known_at(rows.times()[engaged], self.matures_after)
        ids = rows.column(self.owner.feature.column).take(pa.array(engaged))
        return pa.table({"key": rows.hashes(self.by)[engaged], "known": known, "id": ids})

    def extended(self, memory: HistoryMemory, events: pa.Table, in_order: bool = False) -> HistoryMemory:
        """The owner's vocabulary must be complete by now."""
        items = self.owner.encode(one_array(events["id"]))
        return memory.extended(events["key"].to_numpy(), events["known"].to_numpy(), items)

    def compacted(self, memory: HistoryMemory, moment: int) -> HistoryMemory:
        return memory.compacted(moment, self.feature.length)

    def result_columns(self) -> Mapping[str, tuple[Use, pa.DataType | None]]:
        """Lists of ids under the feature's name, oldest first."""
        known = self.owner.id_type
        return {self.name: ("keys", None if known is None else pa.list_(known))}

    def distinct_results(self, memory: HistoryMemory, asked: AnyLookUps) -> Mapping[str, Ragged]:
        return {self.name: memory.last(asked, self.feature.length)}

    def outline(self) -> Outline:
        return Outline(ids=((self.name, self.owner.name, True),))

    def encode(self, rows: LogRows) -> Inputs:
        """The last candidates. A column with the feature's name, lists of candidate ids, wins."""
        if rows.has(self.name):
            values, lengths = ragged(rows.column(self.name), self.feature.length, last=True)
            return Inputs({self.name: Ragged(self.owner.encode(values), lengths)})
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
            ids, offsets = self.owner.vocabulary.decode(known.values), known.offsets
            lists = [ids[offsets[each] : offsets[each + 1]] for each in asked.number.tolist()]
        result = np.empty(len(rows), object)
        result[:] = [each or None for each in lists]
        return {self.name: result}


KIND = Kind(HistoryFeature, HistoryFeature, HistoryEncoder)
