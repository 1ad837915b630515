"""The `history` feature: the user's last engaged candidates before the request, point in time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from mmoe_rec.features.encoder import Inputs, MemoryEncoder, Outline, State
from mmoe_rec.features.ids import VocabularyOwner, ragged
from mmoe_rec.log.rows import LogRows, maturity
from mmoe_rec.point_in_time.arrays import one_array
from mmoe_rec.point_in_time.join import LookUps, known_at
from mmoe_rec.point_in_time.lists import Ragged, SharedRagged
from mmoe_rec.point_in_time.memory import HistoryMemory
from mmoe_rec.schema import HistoryFeature, Schema

_FOREVER = np.iinfo(np.int64).max


class HistoryEncoder(MemoryEncoder[HistoryMemory]):
    """Table rows of the last `length` candidates that the user engaged with, oldest first."""

    def __init__(self, name: str, feature: HistoryFeature, schema: Schema, owner: VocabularyOwner) -> None:
        self.source, self.user = feature.events, schema.columns.user
        self.name, self.feature, self.task, self.owner = name, feature, schema.source_task(feature), owner
        self.matures_after = maturity(self.task, schema)
        self.memory = HistoryMemory.empty()

    def events(self, rows: LogRows) -> pa.Table:
        """Engaged rows with the candidate's id; each becomes visible only when its label is known."""
        engaged = np.flatnonzero(rows.labels(self.task, _FOREVER) >= self.feature.at_least)
        known = known_at(rows.times()[engaged], self.matures_after)
        ids = rows.column(self.owner.feature.column).take(pa.array(engaged))
        return pa.table({"key": self.keys(rows)[engaged], "known": known, "id": ids})

    @property
    def by(self) -> tuple[str, ...]:
        """The user."""
        return (self.user,)

    def extended(self, memory: HistoryMemory, events: pa.Table, in_order: bool = False) -> HistoryMemory:
        """The owner's vocabulary must be complete by now."""
        items = self.owner.encode(one_array(events["id"]))
        return memory.extended(events["key"].to_numpy(), events["known"].to_numpy(), items)

    def compacted(self, memory: HistoryMemory, moment: int) -> HistoryMemory:
        """The last `length` candidates of each user as of `moment`, and what becomes known later."""
        return memory.compacted(moment, self.feature.length)

    def memory_from(self, columns: Mapping[str, np.ndarray], floor: int | None) -> HistoryMemory:
        """A saved memory."""
        return HistoryMemory.from_columns(columns, floor)

    @property
    def result_names(self) -> tuple[str, ...]:
        """One, of the feature's name."""
        return (self.name,)

    def known(self, memory: HistoryMemory, asked: LookUps) -> Mapping[str, Ragged]:
        """For each row, a list of table rows, of any length."""
        return {self.name: memory.last(asked, self.feature.length)}

    def outline(self) -> Outline:
        """One id input with many ids a row, in the owner's table."""
        return Outline(ids=((self.name, self.owner.name, True),))

    def encode(self, rows: LogRows) -> Inputs:
        """The last candidates. A column with the feature's name, lists of candidate ids, wins."""
        if rows.has(self.name):
            values, lengths = ragged(rows.column(self.name), self.feature.length, last=True)
            return Inputs({self.name: Ragged(self.owner.encode(values), lengths)})
        found = self.look_up(rows)[self.name]
        assert isinstance(found, SharedRagged)
        return Inputs({self.name: found.expand()})

    def state(self) -> State:
        """Nothing but the memory, which is saved by itself."""
        return State()
