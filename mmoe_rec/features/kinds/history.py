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
from mmoe_rec.features.layout import Table
from mmoe_rec.features.vocabulary import ListedValues, Vocabulary, check_owner, meaning_of_ids
from mmoe_rec.log.rows import LogRows, maturity
from mmoe_rec.point_in_time.arrays import Ragged, SharedRagged, consecutive, one_array
from mmoe_rec.point_in_time.join import KnownEvents, LookUps, known_at, sorted_order
from mmoe_rec.point_in_time.memory import Memory, SeenEvents
from mmoe_rec.settings.columns import Section, Use
from mmoe_rec.settings.schema import Meaning, Once, Remembering, Schema

_FOREVER = np.iinfo(np.int64).max
LONGEST = 512  # list that attention looks at
_SECOND, _LONGEST_AGE = 1_000_000, 2**31 - 1
_AGES = np.unique(np.round(2 ** (np.arange(61) / 2)).astype(np.int64))
"""Seconds at which the buckets of ages begin but for the first: each is about 1.4 times as long as the one before."""


OUTCOMES = ("unknown", "unobserved", "no", "yes")
"""What an event says of a task, in the order of table rows; unknown: its label has not matured by the request."""


class EventTypes(Section):
    """What kind of event each row of a further log is."""

    column: str = Field(description="column of the log of events, such as event_type")
    values: Annotated[tuple[str, ...] | tuple[int, ...], Once] = Field(
        min_length=1, description="its values that are told apart, such as [view, cart]; all others count as one"
    )


class HistoryFeature(Remembering):
    """The user's last engaged candidates before the request, point in time, embedded and averaged."""

    fixed_role = "user"
    younger = Remembering.younger | {"ages", "attributes", "outcomes", "event_types"}

    kind: Literal["history"]
    of: str = Field(description="name of the candidate's id feature whose vocabulary and table are used")
    length: int = Field(20, ge=1, le=1000, description="number of last engaged candidates")
    at_least: float = Field(1.0, description="smallest label that counts as engaged")
    ages: bool = Field(False, description="each has its age too, from its time to the request's, in buckets")
    attributes: Annotated[tuple[str, ...], Once] = Field(
        (), description="further id features of the candidate, such as its brand, that each has too"
    )
    outcomes: Annotated[tuple[str, ...], Once] = Field(
        (), description="binary tasks whose outcome each has too, as far as it is known at the request"
    )
    event_types: EventTypes | None = Field(
        None, description="column of the log of events, and its values, that say what kind of event each is"
    )

    def reads(self) -> Mapping[str, Use]:
        """None: every row has the user's id."""
        return {}

    def event_reads(self, schema: Schema) -> Mapping[str, Use]:
        ids = [schema.features[name].reads() for name in (self.of, *self.attributes)]
        types: dict[str, Use] = {} if self.event_types is None else {self.event_types.column: "key"}
        return {schema.columns.user: "key", **reduce(or_, map(dict, ids)), **types}

    @property
    def tasks_read(self) -> tuple[str, ...]:
        return (*super().tasks_read, *self.outcomes)

    def parts(self, name: str) -> dict[str, str]:
        """Names of the ids that each event of a history of that name holds, of `of` first -> the id feature of each."""
        return {name: self.of, **{f"{name}_{each}": each for each in self.attributes}}

    @property
    def shares(self) -> str | None:
        return self.of

    def check(self, name: str, schema: Schema) -> None:
        """Raises ValueError as `Remembering.check`, and where `of` is not an id feature of the candidate."""
        super().check(name, schema)
        self.require(name, schema, "user", "it is a user's")
        check_owner(schema, name, "of", IdFeature, "candidate")
        for attribute in self.attributes:
            if attribute == self.of:
                raise ValueError(
                    f"feature '{name}' has '{attribute}' both as `of` and among its `attributes`: leave it out"
                )
            check_owner(schema, name, "attributes", IdFeature, "candidate", attribute)
        self._check_outcomes(name, schema)
        histories = {each: other for each, other in schema.features.items() if isinstance(other, HistoryFeature)}
        names = [*schema.features, *(part for each, other in histories.items() for part in other.inputs(each)[1:])]
        for part in self.inputs(name)[1:]:
            if names.count(part) > 1:
                raise ValueError(f"feature '{name}' has an input '{part}', and so has another feature: rename one")

    def _check_outcomes(self, name: str, schema: Schema) -> None:
        if self.outcomes and self.events is not None:
            raise ValueError(f"feature '{name}' has `outcomes`, but events have no labels: give `task` for `events`")
        if self.event_types is not None and self.events is None:
            raise ValueError(f"feature '{name}' has `event_types`, which only a history of `events` can have")
        binary = [each for each, task in schema.tasks.items() if task.kind == "binary"]
        if others := [each for each in self.outcomes if each not in binary]:
            raise ValueError(
                f"feature '{name}': '{others[0]}' of its `outcomes` is not a binary task; such tasks are: "
                f"{', '.join(binary) or 'none'}"
            )

    def inputs(self, name: str) -> list[str]:
        """Names of the inputs of a history of that name."""
        ends = [*self.outcomes, *["types"] * (self.event_types is not None), *["ages"] * self.ages]
        return [*self.parts(name), *(f"{name}_{each}" for each in ends)]

    def meaning(self, schema: Schema) -> Meaning:
        columns = (schema.columns.user, *schema.features[self.of].reads())
        parts = {each: meaning_of_ids(schema, columns, each) for each in self.attributes}
        name = next(name for name, each in schema.features.items() if each is self)
        if self.ages:
            parts[f"{name}_ages"] = Meaning(columns, row_name=_name_age, missing=False)
        for task in self.outcomes:
            read = (*columns, schema.tasks[task].label)
            parts[f"{name}_{task}"] = Meaning(read, row_name=lambda _, row: OUTCOMES[row], missing=False)
        if (types := self.event_types) is not None:
            named = ("other", *map(str, types.values))
            read = (*columns, types.column)
            parts[f"{name}_types"] = Meaning(read, row_name=lambda _, row: named[row], missing=False)
        return replace(meaning_of_ids(schema, columns, self.of), parts=parts)


class PooledHistory(HistoryFeature):
    """A history, and how a model makes one vector of it."""

    younger = HistoryFeature.younger | {"pooling"}

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


def _name_age(table: str, row: int) -> str:
    return f"under {_AGES[row]:,} s" if row < len(_AGES) else "older"


@dataclass(eq=False)
class HistoryMemory(Memory):
    """Candidates per user. items: (E,) int64 rows of the candidates' table; attributes: the same of further tables, of
    each of those."""

    items: np.ndarray
    attributes: tuple[np.ndarray, ...] = ()

    @staticmethod
    def empty(forget_after: int | None = None, attributes: int = 0) -> "HistoryMemory":
        none = np.empty(0, np.int64)
        events = KnownEvents(np.empty(0, np.uint64), none)
        return HistoryMemory(events, none, (none,) * attributes, forget_after=forget_after)

    def extended(self, key: np.ndarray, known: np.ndarray, *rows: np.ndarray) -> Self:
        """These events and further ones, (E,) uint64 and int64, and rows of items and attributes, in any order."""
        if not len(key):
            return self
        before = (self.events.key, self.events.known, self.items, *self.attributes)
        columns = [np.append(*each) for each in zip(before, (key, known, *rows), strict=True)]
        if self.attributes:  # which decide where all else is the same
            order = np.lexsort(columns[:2:-1])
            columns = [each[order] for each in columns]
        order = sorted_order(*columns[:3])
        key, known, items, *attributes = (each[order] for each in columns)
        return replace(self, events=KnownEvents(key, known), items=items, attributes=tuple(attributes))

    def merged(self, other: Self) -> Self:
        return self.extended(other.events.key, other.events.known, other.items, *other.attributes)

    def last_events(self, asked: LookUps, length: int) -> list[Ragged]:
        """The last `length` items that were known at N look-ups, oldest first; of one moment, in the items' order; then
        each attribute, and how many microseconds before the look-up each became known."""
        seen = SeenEvents(self, asked)
        parts = list(zip(seen.memories, seen.last_events(length), strict=True))
        each_part = [
            [column[index] for column in (memory.events.known, memory.items, *memory.attributes)]
            for memory, (index, _) in parts
        ]
        known, *rows = map(np.concatenate, zip(*each_part, strict=True))
        together = np.sum([lengths for _, (_, lengths) in parts], axis=0)
        lengths = together
        if len(parts) > 1 and len(known):
            number = np.concatenate([np.arange(len(asked)).repeat(lengths) for _, (_, lengths) in parts])
            lengths = np.minimum(together, length)
            last = consecutive(np.cumsum(together) - lengths, lengths)
            last = np.lexsort((*reversed(rows), known, number))[last]
            known, *rows = (each[last] for each in (known, *rows))
        since = seen.asked.time.repeat(lengths) - known
        return [Ragged(each, lengths.astype(np.int32)) for each in (*rows, since)]

    def compacted(self, moment: int, length: int) -> Self:
        """What requests at `moment` or later, which ask for `length` items, can ask for."""
        # The last `length` that are known by then; later events keep these in reach until they become known themselves.
        events = self.events
        known_by_then = np.add.reduceat(np.append(events.known <= moment, 0), events.starts[:-1])
        within_key = np.arange(len(events)) - events.starts[events.number]
        needed = within_key >= (known_by_then - length)[events.number]
        if self.lives is not None:
            needed &= ~self.lives.ended(moment)
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
    """Table rows of the last `length` candidates that the user engaged with, oldest first, and what else each holds.

    parts: names of results -> vocabulary, the history's own first, outcomes last; outcomes: of these, microseconds from
    a request until its label is known; ages: name of the result with the seconds since, or None.
    """

    feature: HistoryFeature
    together = True

    def __init__(self, name: str, feature: HistoryFeature, shared: Shared) -> None:
        self.parts: dict[str, Vocabulary | ListedValues] = {
            part: shared.vocabularies[of] for part, of in feature.parts(name).items()
        }
        if (types := feature.event_types) is not None:
            what = f"feature '{name}' has `event_types` of column '{types.column}', which"
            self.parts[f"{name}_types"] = ListedValues(f"{name}_types", types.values, what, others=True)
        # Events of one moment are in the order of their parts, in which no label may show before it is known.
        tasks = {each: max(1, maturity(shared.schema.tasks[each], shared.schema)) for each in feature.outcomes}
        self.outcomes = {f"{name}_{each}": tasks[each] for each in sorted(tasks, key=lambda each: tasks[each])}
        for part in self.outcomes:
            self.parts[part] = ListedValues(part, OUTCOMES, f"'{part}' of history '{name}'")
        self.ages = f"{name}_ages" if feature.ages else None
        self.schema = shared.schema
        super().__init__(name, feature, shared, (shared.schema.columns.user,))

    def empty(self) -> HistoryMemory:
        return HistoryMemory.empty(self.forget_after, len(self.parts) - 1)

    def events(self, rows: LogRows) -> pa.Table:
        """Engaged rows with the candidate's ids; each becomes visible only when its label is known."""
        engaged = np.flatnonzero(rows.labels(self.task, _FOREVER) >= self.feature.at_least)
        known = known_at(rows.times()[engaged], self.matures_after)
        columns = {
            _column(place): self._column(rows, part).take(pa.array(engaged)) for place, part in enumerate(self.parts)
        }
        return pa.table({"key": rows.hashes(self.by)[engaged], "known": known, **columns})

    def _column(self, rows: LogRows, part: str) -> pa.Array:
        """What a part encodes of N rows; of outcomes, what they are in the end."""
        if part in self.outcomes:
            labels = rows.labels(self.schema.tasks[part.removeprefix(f"{self.name}_")], _FOREVER)
            return pa.array(OUTCOMES).take(pa.array(np.where(np.isnan(labels), 1, 2 + labels).astype(np.int64)))
        vocabulary = self.parts[part]
        if isinstance(vocabulary, Vocabulary):
            return rows.column(vocabulary.feature.column)
        assert self.feature.event_types is not None
        return rows.column(self.feature.event_types.column)

    def extended(self, memory: HistoryMemory, events: pa.Table, in_order: bool = False) -> HistoryMemory:
        """The vocabularies must be complete by now."""
        rows = [each.encode(one_array(events[_column(place)])) for place, each in enumerate(self.parts.values())]
        return memory.extended(events["key"].to_numpy(), events["known"].to_numpy(), *rows)

    def compacted(self, memory: HistoryMemory, moment: int) -> HistoryMemory:
        return memory.compacted(moment, self.feature.length)

    def result_columns(self) -> Mapping[str, tuple[Use, pa.DataType | None]]:
        """Lists of ids under the feature's name, oldest first, and of what else each holds."""
        types = {name: None if each.id_type is None else pa.list_(each.id_type) for name, each in self.parts.items()}
        ages = {} if self.ages is None else {self.ages: pa.list_(pa.int64())}
        return {name: ("keys", each) for name, each in {**types, **ages}.items()}

    def distinct_results(self, memory: HistoryMemory, asked: LookUps) -> Mapping[str, Ragged]:
        *rows, since = memory.last_events(asked, self.feature.length)
        found = dict(zip(self.parts, rows, strict=True))
        age = known_at(since.values, self.matures_after)  # an event became known some time after it happened
        for part, known in self.outcomes.items():
            found[part] = replace(found[part], values=np.where(age >= known, found[part].values, 0))
        if self.ages is not None:
            seconds = age // _SECOND
            found[self.ages] = Ragged(np.clip(seconds, 0, _LONGEST_AGE), since.lengths)
        return found

    def outline(self) -> Outline:
        ids = {name: each.name for name, each in self.parts.items()}
        rows = {each.name: each.rows for each in self.parts.values() if isinstance(each, ListedValues)}
        if self.ages is not None:
            ids[self.ages], rows[self.ages] = self.ages, len(_AGES) + 1
        tables = tuple(Table(name, each, feature=self.feature.of) for name, each in rows.items())  # as wide as its own
        return Outline(tables=tables, ids=tuple((name, table, True) for name, table in ids.items()))

    def column_types(self) -> Mapping[str, pa.DataType]:
        """That of the column of event types, so that a server takes no others."""
        types = self.feature.event_types
        return {} if types is None else {types.column: pa.string() if isinstance(types.values[0], str) else pa.int64()}

    def encode(self, rows: LogRows) -> Inputs:
        """The last candidates. Columns with the names of the results, lists of ids and seconds, win."""
        if (given := self._given(rows)) is not None:
            lists = {name: ragged(each, self.feature.length, last=True) for name, each in given.items()}
            found = {name: Ragged(each.encode(lists[name][0]), lists[name][1]) for name, each in self.parts.items()}
            if self.ages is not None:
                found[self.ages] = Ragged(lists[self.ages][0].cast(pa.int64()).to_numpy(), lists[self.ages][1])
        else:
            found = {name: each.expand() for name, each in self.look_up(rows).items() if isinstance(each, SharedRagged)}
        if self.ages is not None:
            ages = found[self.ages]
            found[self.ages] = Ragged(np.searchsorted(_AGES, ages.values, side="right"), ages.lengths)
        return Inputs(dict(found))

    def _given(self, rows: LogRows) -> dict[str, pa.Array] | None:
        """The lists that came with the rows, None where none did. Raises UserError where they don't belong together."""
        names = list(self.result_columns())
        if not any(map(rows.has, names)):
            return None
        if lacking := [name for name in names if not rows.has(name)]:
            raise UserError(f"history '{self.name}' is given without '{lacking[0]}': give all of {', '.join(names)}")
        lists = {name: rows.column(name) for name in names}
        lengths = {name: each.value_lengths().fill_null(0) for name, each in lists.items() if not pt.is_null(each.type)}
        nulls = any(each.flatten().null_count for name, each in lists.items() if name in lengths)
        if len(names) > 1 and (nulls or len({each.to_numpy().tobytes() for each in lengths.values()}) > 1):
            raise UserError(
                f"history '{self.name}': lists of {', '.join(names)} must be equally long in each row, without nulls"
            )
        return lists

    def words(self, result: str, values: np.ndarray) -> list[Any]:
        """(N,) values of a result as the log has them: ids, None in the place of one without a row of its own; or
        seconds."""
        return self.parts[result].decode(values) if result in self.parts else values.tolist()

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
                words, offsets = self.words(name, known[name].values), known[name].offsets
                lists = [words[offsets[each] : offsets[each + 1]] for each in asked.number.tolist()]
            found[name] = np.empty(len(rows), object)
            found[name][:] = [each or None for each in lists]
        return found


def _column(place: int) -> str:
    """What events call the ids of a part."""
    return f"id{place or ''}"


KIND = Kind(HistoryFeature, PooledHistory, HistoryEncoder)
