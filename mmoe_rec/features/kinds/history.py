"""The kind `history`: the user's last engaged candidates before the request, point in time."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.types as pt
from pydantic import Field, model_validator

from mmoe_rec.errors import UserError
from mmoe_rec.features.encoder import Inputs, Kind, MemoryEncoder, Outline, Shared
from mmoe_rec.features.kinds.id import IdFeature
from mmoe_rec.features.kinds.ids import ragged
from mmoe_rec.features.vocabulary import check_owner, meaning_of_ids
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time.arrays import Ragged, SharedRagged, consecutive, one_array
from mmoe_rec.point_in_time.join import KnownEvents, LookUps, Memory, known_at
from mmoe_rec.settings.log_columns import Use
from mmoe_rec.settings.schema import Meaning, Once, Remembering, Schema

_FOREVER = np.iinfo(np.int64).max
LONGEST = 512  # list that attention looks at


class HistoryFeature(Remembering):
    """The user's last engaged candidates before the request, point in time, embedded and averaged."""

    fixed_role = "user"
    kind: Literal["history"]
    of: str = Field(description="name of the candidate's id feature whose vocabulary and table are used")
    length: int = Field(20, ge=1, le=1000, description="number of last engaged candidates")
    min_label: float = Field(1.0, description="smallest label that counts as engaged")
    attributes: Annotated[tuple[str, ...], Once] = Field(
        (), description="further id features of the candidate, such as its brand, that each has too"
    )
    pooling: Literal["mean", "attention"] = Field(
        "mean",
        description="mean of the vectors of events; attention: besides, a small network looks at each event together "
        "with the candidate, and at the order of events",
    )

    @model_validator(mode="after")
    def _not_too_long(self) -> Self:
        if self.pooling == "attention" and self.length > LONGEST:
            raise ValueError(
                f"attention looks at no more than {LONGEST} events: set `length` lower, or `pooling` to mean"
            )
        return self

    def reads(self) -> Mapping[str, Use]:
        """None: every row has the user's id."""
        return {}

    def event_reads(self, schema: Schema) -> Mapping[str, Use]:
        ids = [schema.features[name].reads() for name in (self.of, *self.attributes)]
        return {schema.columns.user: "key", **reduce(or_, map(dict, ids))}

    def parts(self, name: str) -> dict[str, str]:
        """Names of the inputs of a history of that name, of `of` first -> the id feature of each."""
        return {name: self.of, **{f"{name}_{each}": each for each in self.attributes}}

    @property
    def shares(self) -> str | None:
        return self.of

    def check(self, name: str, schema: Schema) -> None:
        """Raises ValueError as `Remembering.check`, and where `of` is not an id feature of the candidate."""
        super().check(name, schema)
        self.require(name, schema, "user", "it is a user's")
        check_owner(schema, name, "of", self.of, IdFeature, "candidate")
        for attribute in self.attributes:
            check_owner(schema, name, "attributes", attribute, IdFeature, "candidate")

    def meaning(self, schema: Schema) -> Meaning:
        columns = (schema.columns.user, *schema.features[self.of].reads())
        parts = {each: meaning_of_ids(schema, columns, each) for each in self.attributes}
        return replace(meaning_of_ids(schema, columns, self.of), parts=parts)


@dataclass(eq=False)
class HistoryMemory(Memory):
    """Candidates per user. items: (E,) int64 rows of the candidates' table; attributes: the same of further tables."""

    items: np.ndarray
    attributes: tuple[np.ndarray, ...] = ()

    @staticmethod
    def empty(attributes: int = 0) -> "HistoryMemory":
        none = np.empty(0, np.int64)
        events = KnownEvents(np.empty(0, np.uint64), none)
        return HistoryMemory(events, none, (none,) * attributes)

    def extended(self, key: np.ndarray, known: np.ndarray, *rows: np.ndarray) -> Self:
        """These events and further ones, (E,) uint64 and int64, and rows of items and attributes, in any order."""
        if not len(key):
            return self
        before = (self.events.key, self.events.known, self.items, *self.attributes)
        columns = [np.append(*each) for each in zip(before, (key, known, *rows), strict=True)]
        order = np.lexsort(columns[::-1])  # of one moment, by item and attributes
        key, known, items, *attributes = (each[order] for each in columns)
        return replace(self, events=KnownEvents(key, known), items=items, attributes=tuple(attributes))

    def merged(self, other: Self) -> Self:
        return self.extended(other.events.key, other.events.known, other.items, *other.attributes)

    def last_events(self, asked: LookUps, length: int) -> list[Ragged]:
        """The last `length` items that were known at N look-ups, oldest first; of one moment, in the items' order; then
        each attribute."""
        asked, parts, of_parts = asked.as_of(self.floor), [], []
        memories: list[HistoryMemory] = [self, *self.levels]
        for memory in memories:
            join = memory.join(asked)
            last = join.last()
            lengths = np.clip(last + 1 - join.first, 0, length)
            index = consecutive(last + 1 - lengths, lengths)
            parts.append([column[index] for column in (memory.events.known, memory.items, *memory.attributes)])
            of_parts.append(lengths)
        known, *rows = map(np.concatenate, zip(*parts, strict=True))
        together = lengths = np.sum(of_parts, axis=0)
        if self.levels and len(known):
            number = np.concatenate([np.arange(len(asked)).repeat(lengths) for lengths in of_parts])
            lengths = np.minimum(together, length)
            last = consecutive(np.cumsum(together) - lengths, lengths)
            last = np.lexsort((*reversed(rows), known, number))[last]
            rows = [each[last] for each in rows]
        return [Ragged(each, lengths.astype(np.int32)) for each in rows]

    def compacted(self, moment: int, length: int) -> Self:
        """What requests at `moment` or later, which ask for `length` items, can ask for."""
        # The last `length` that are known by then; later events keep these in reach until they become known themselves.
        events = self.events
        known_by_then = np.add.reduceat(np.append(events.known <= moment, 0), events.starts[:-1])
        within_key = np.arange(len(events)) - events.starts[events.number]
        needed = within_key >= (known_by_then - length)[events.number]
        attributes, floor = tuple(each[needed] for each in self.attributes), self._later_floor(moment)
        return replace(self, events=events.take(needed), items=self.items[needed], attributes=attributes, floor=floor)

    def to_columns(self) -> dict[str, np.ndarray]:
        columns = {"key": self.events.key, "known": self.events.known, "item": self.items}
        return columns | {f"attribute{place}": each for place, each in enumerate(self.attributes)}

    def with_columns(self, columns: Mapping[str, np.ndarray], floor: int | None) -> Self:
        attributes = tuple(columns[f"attribute{place}"] for place in range(len(self.attributes)))
        events = KnownEvents(columns["key"], columns["known"])
        return replace(self, events=events, items=columns["item"], attributes=attributes, floor=floor)


class HistoryEncoder(MemoryEncoder[HistoryMemory]):
    """Table rows of the last `length` candidates that the user engaged with, oldest first, and of their attributes.

    parts: names of results -> vocabulary, the history's own first.
    """

    feature: HistoryFeature

    def __init__(self, name: str, feature: HistoryFeature, shared: Shared) -> None:
        self.parts = {part: shared.vocabularies[of] for part, of in feature.parts(name).items()}
        super().__init__(name, feature, shared, (shared.schema.columns.user,))

    def empty(self) -> HistoryMemory:
        return HistoryMemory.empty(len(self.parts) - 1)

    def events(self, rows: LogRows) -> pa.Table:
        """Engaged rows with the candidate's ids; each becomes visible only when its label is known."""
        engaged = np.flatnonzero(rows.labels(self.task, _FOREVER) >= self.feature.min_label)
        known = known_at(rows.times()[engaged], self.matures_after)
        columns = {
            _column(place): rows.column(each.feature.column).take(pa.array(engaged))
            for place, each in enumerate(self.parts.values())
        }
        return pa.table({"key": rows.hashes(self.by)[engaged], "known": known, **columns})

    def extended(self, memory: HistoryMemory, events: pa.Table, in_order: bool = False) -> HistoryMemory:
        """The vocabularies must be complete by now."""
        rows = [each.encode(one_array(events[_column(place)])) for place, each in enumerate(self.parts.values())]
        return memory.extended(events["key"].to_numpy(), events["known"].to_numpy(), *rows)

    def compacted(self, memory: HistoryMemory, moment: int) -> HistoryMemory:
        return memory.compacted(moment, self.feature.length)

    def result_columns(self) -> Mapping[str, tuple[Use, pa.DataType | None]]:
        """Lists of ids under the feature's name, oldest first, and of their attributes."""
        types = {name: None if each.id_type is None else pa.list_(each.id_type) for name, each in self.parts.items()}
        return {name: ("keys", each) for name, each in types.items()}

    def distinct_results(self, memory: HistoryMemory, asked: LookUps) -> Mapping[str, Ragged]:
        return dict(zip(self.parts, memory.last_events(asked, self.feature.length), strict=True))

    def outline(self) -> Outline:
        return Outline(ids=tuple((name, each.name, True) for name, each in self.parts.items()))

    def encode(self, rows: LogRows) -> Inputs:
        """The last candidates. Columns with the names of the results, lists of ids, win."""
        if (given := self._given(rows)) is not None:
            lists = {name: ragged(each, self.feature.length, last=True) for name, each in given.items()}
            found = {name: Ragged(each.encode(lists[name][0]), lists[name][1]) for name, each in self.parts.items()}
        else:
            found = {name: each.expand() for name, each in self.look_up(rows).items() if isinstance(each, SharedRagged)}
        return Inputs(dict(found))

    def _given(self, rows: LogRows) -> dict[str, pa.Array] | None:
        """The lists that came with the rows, None where none did. Raises UserError where they don't belong together."""
        names = list(self.result_columns())
        if not any(map(rows.has, names)):
            return None
        lists = {name: rows.column(name) for name in names if rows.has(name)}
        held = [each for each in lists.values() if not pt.is_null(each.type)]
        lengths = {each.value_lengths().fill_null(0).to_numpy().tobytes() for each in held}
        nulls = any(each.flatten().null_count for each in held)
        if len(lists) < len(names) or (len(names) > 1 and (nulls or len(lengths) > 1)):
            raise UserError(
                f"history '{self.name}': give all of {', '.join(names)}, as lists that are equally long in each row, "
                "without nulls"
            )
        return lists

    def explain(self, rows: LogRows) -> Mapping[str, np.ndarray]:
        """The last candidates in the log's words, oldest first; None for an empty list. Columns with the names of the
        results win."""
        found = {}
        given, asked = self._given(rows), rows.look_ups(self.by)
        known = {} if given is not None else self.distinct_results(self.memory, asked)
        for name in self.result_columns():
            lists: list[Any]
            if given is not None:
                own = given[name].to_pylist()
                lists = [[each for each in ids or () if each is not None][-self.feature.length :] for ids in own]
            else:
                words, offsets = self.parts[name].decode(known[name].values), known[name].offsets
                lists = [words[offsets[each] : offsets[each + 1]] for each in asked.number.tolist()]
            found[name] = np.empty(len(rows), object)
            found[name][:] = [each or None for each in lists]
        return found


def _column(place: int) -> str:
    """What events call the ids of a part."""
    return f"id{place or ''}"


KIND = Kind(HistoryFeature, HistoryEncoder)
