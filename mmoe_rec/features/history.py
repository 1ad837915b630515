"""The `history` feature: the user's last engaged candidates before the request, point in time."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from mmoe_rec.features.encoded import Ragged
from mmoe_rec.features.encoder import Encoder, Inputs, Outline, State
from mmoe_rec.features.events import EventParts, KnownEvents, known_at
from mmoe_rec.features.ids import VocabularyOwner, ragged
from mmoe_rec.features.rows import LogRows, maturity
from mmoe_rec.schema import HistoryFeature, Task

_NEVER = np.iinfo(np.int64).max


class HistoryEncoder(Encoder):
    """Table rows of the last `length` candidates that the user engaged with, oldest first."""

    def __init__(self, name: str, feature: HistoryFeature, task: Task, owner: VocabularyOwner) -> None:
        self.source = feature.events
        self.name, self.feature, self.task, self.owner = name, feature, task, owner
        self._raw: list[tuple[np.ndarray, np.ndarray, pa.Array]] = []
        self._set(KnownEvents(np.empty(0, np.uint64), np.empty(0, np.int64)), np.empty(0, np.int64))

    def _set(self, events: KnownEvents, items: np.ndarray) -> None:
        self.events, self.items = events, items

    def remember(self, rows: LogRows) -> None:
        """Collects engaged rows of the whole log; each becomes visible only when its label is known."""
        engaged = np.flatnonzero(rows.labels(self.task, _NEVER) >= self.feature.at_least)
        users = rows.hashes([rows.schema.columns.user])[engaged]
        items = rows.column(self.owner.feature.column).take(pa.array(engaged))
        self._raw.append((users, known_at(rows.times()[engaged], maturity(self.task)), items))

    def finish_memory(self) -> None:
        """Orders the events; the owner's vocabulary is complete by now."""
        parts = EventParts()
        for users, known, items in self._raw:
            parts.add(users, known, self.owner.encode(items))
        self._raw = []
        key, known, items = parts.sorted()
        self._set(KnownEvents(key, known), items.astype(np.int64))

    def outline(self) -> Outline:
        """One id input with many ids a row, in the owner's table."""
        return Outline(ids=((self.name, self.owner.name, True),))

    def encode(self, rows: LogRows) -> Inputs:
        """Any number of table rows a row. A column with the feature's name, lists of candidate ids, wins."""
        if rows.has(self.name):
            values, lengths = ragged(rows.column(self.name), self.feature.length, last=True)
            return Inputs({self.name: Ragged(self.owner.encode(values), lengths)})
        groups = self.events.groups(rows.hashes([rows.schema.columns.user]))
        last = self.events.last(groups, self.events.as_of(rows.times()))
        first = np.maximum(self.events.group_starts(groups), last - self.feature.length + 1)
        lengths = np.where(last >= 0, last - first + 1, 0).astype(np.int32)
        ends = np.cumsum(lengths)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        return Inputs({self.name: Ragged(self.items[np.repeat(first, lengths) + within], lengths)})

    def state(self) -> State:
        """The events."""
        table = pa.table({"key": self.events.key, "known": self.events.known, "item": self.items})
        return State({"floor": self.events.floor}, {"events": table})

    def restore(self, state: State) -> None:
        """Takes saved events."""
        table = state.tables["events"]
        events = KnownEvents(table["key"].to_numpy(), table["known"].to_numpy(), state.values["floor"])
        self._set(events, table["item"].to_numpy())

    def latest(self, moment: int) -> State:
        """The events that requests at `moment` or later can ask for."""
        groups = np.arange(len(self.events.keys))
        last = self.events.last(groups, np.full(len(groups), moment))
        # Later events keep those before them in reach until they become known themselves.
        first = np.maximum(self.events.group_starts(groups), last - self.feature.length + 1)
        needed = np.arange(len(self.events)) >= np.repeat(first, np.diff(self.events.starts))
        table = self.state().tables["events"].filter(pa.array(needed))
        return State({"floor": self.events.later_floor(moment)}, {"events": table})
