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
from mmoe_rec.features.encoder import EncoderContext, FeatureKind, Inputs, InputSpec, PointInTimeEncoder
from mmoe_rec.features.kinds.id import IdFeature
from mmoe_rec.features.kinds.ids import truncate_lists
from mmoe_rec.features.vocabulary import check_table_owner, meaning_of_ids
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time.arrays import DedupedRagged, Ragged, concat_ranges, one_array
from mmoe_rec.point_in_time.join import EventStore, Lookups, SortedEvents, availability_times
from mmoe_rec.settings.log_columns import ColumnUse
from mmoe_rec.settings.schema import EventFeature, InputSemantics, Schema, Unique

_FOREVER = np.iinfo(np.int64).max
MAX_ATTENTION_LENGTH = 512  # list that attention looks at


class HistoryFeature(EventFeature):
    """The user's last engaged candidates before the request, point in time, embedded and averaged."""

    fixed_role = "user"
    kind: Literal["history"]
    of: str = Field(description="name of the candidate's id feature whose vocabulary and table are used")
    length: int = Field(20, ge=1, le=1000, description="number of last engaged candidates")
    min_label: float = Field(1.0, description="smallest label that counts as engaged")
    attributes: Annotated[tuple[str, ...], Unique] = Field(
        (), description="further id features of the candidate, such as its brand, that each has too"
    )
    pooling: Literal["mean", "attention"] = Field(
        "mean",
        description="mean of the vectors of events; attention: besides, a small network looks at each event together "
        "with the candidate, and at the order of events",
    )

    @model_validator(mode="after")
    def _not_too_long(self) -> Self:
        if self.pooling == "attention" and self.length > MAX_ATTENTION_LENGTH:
            raise ValueError(
                f"attention looks at no more than {MAX_ATTENTION_LENGTH} events: set `length` lower, or "
                "`pooling` to mean"
            )
        return self

    def reads(self) -> Mapping[str, ColumnUse]:
        """None: every row has the user's id."""
        return {}

    def event_reads(self, schema: Schema) -> Mapping[str, ColumnUse]:
        ids = [schema.features[name].reads() for name in (self.of, *self.attributes)]
        return {schema.columns.user: "key", **reduce(or_, map(dict, ids))}

    def parts(self, name: str) -> dict[str, str]:
        """Names of the inputs of a history of that name, of `of` first -> the id feature of each."""
        return {name: self.of, **{f"{name}_{each}": each for each in self.attributes}}

    @property
    def table_owner(self) -> str | None:
        return self.of

    def check(self, name: str, schema: Schema) -> None:
        """Raises ValueError as `EventFeature.check`, and where `of` is not an id feature of the candidate."""
        super().check(name, schema)
        self.require_column(name, schema, "user", "it is a user's")
        check_table_owner(schema, name, "of", self.of, IdFeature, "candidate")
        for attribute in self.attributes:
            check_table_owner(schema, name, "attributes", attribute, IdFeature, "candidate")

    def semantics(self, schema: Schema) -> InputSemantics:
        columns = (schema.columns.user, *schema.features[self.of].reads())
        parts = {each: meaning_of_ids(schema, columns, each) for each in self.attributes}
        return replace(meaning_of_ids(schema, columns, self.of), parts=parts)


@dataclass(eq=False)
class HistoryStore(EventStore):
    """Candidates per user. items: (E,) int64 rows of the candidates' table; attributes: the same of further tables."""

    items: np.ndarray
    attributes: tuple[np.ndarray, ...] = ()

    @staticmethod
    def empty(attributes: int = 0) -> "HistoryStore":
        none = np.empty(0, np.int64)
        events = SortedEvents(np.empty(0, np.uint64), none)
        return HistoryStore(events, none, (none,) * attributes)

    def extended(self, key: np.ndarray, available_at: np.ndarray, *rows: np.ndarray) -> Self:
        """These events and further ones, (E,) uint64 and int64, and rows of items and attributes, in any order."""
        if not len(key):
            return self
        before = (self.events.key, self.events.available_at, self.items, *self.attributes)
        columns = [np.append(*each) for each in zip(before, (key, available_at, *rows), strict=True)]
        order = np.lexsort(columns[::-1])  # of one moment, by item and attributes
        key, available_at, items, *attributes = (each[order] for each in columns)
        return replace(self, events=SortedEvents(key, available_at), items=items, attributes=tuple(attributes))

    def merged(self, other: Self) -> Self:
        return self.extended(other.events.key, other.events.available_at, other.items, *other.attributes)

    def last_events(self, lookups: Lookups, length: int) -> list[Ragged]:
        """The last `length` items that were known at N look-ups, oldest first; of one moment, in the items' order; then
        each attribute."""
        lookups, parts, of_parts = lookups.clamp_times(self.compacted_at), [], []
        stores: list[HistoryStore] = [self, *self.levels]
        for store in stores:
            join = store.join(lookups)
            last = join.last()
            lengths = np.clip(last + 1 - join.first, 0, length)
            index = concat_ranges(last + 1 - lengths, lengths)
            parts.append([column[index] for column in (store.events.available_at, store.items, *store.attributes)])
            of_parts.append(lengths)
        available_at, *rows = map(np.concatenate, zip(*parts, strict=True))
        together = lengths = np.sum(of_parts, axis=0)
        if self.levels and len(available_at):
            number = np.concatenate([np.arange(len(lookups)).repeat(lengths) for lengths in of_parts])
            lengths = np.minimum(together, length)
            last = concat_ranges(np.cumsum(together) - lengths, lengths)
            last = np.lexsort((*reversed(rows), available_at, number))[last]
            rows = [each[last] for each in rows]
        return [Ragged(each, lengths.astype(np.int32)) for each in rows]

    def compacted(self, moment: int, length: int) -> Self:
        """What requests at `moment` or later, which ask for `length` items, can ask for."""
        # The last `length` that are known by then; later events keep these in reach until they become known themselves.
        events = self.events
        known_by_then = np.add.reduceat(np.append(events.available_at <= moment, 0), events.starts[:-1])
        within_key = np.arange(len(events)) - events.starts[events.group_ids]
        needed = within_key >= (known_by_then - length)[events.group_ids]
        attributes, compacted_at = tuple(each[needed] for each in self.attributes), self._later_floor(moment)
        return replace(
            self, events=events.take(needed), items=self.items[needed], attributes=attributes, compacted_at=compacted_at
        )

    def to_columns(self) -> dict[str, np.ndarray]:
        columns = {"key": self.events.key, "available_at": self.events.available_at, "item": self.items}
        return columns | {f"attribute{place}": each for place, each in enumerate(self.attributes)}

    def with_columns(self, columns: Mapping[str, np.ndarray], compacted_at: int | None) -> Self:
        attributes = tuple(columns[f"attribute{place}"] for place in range(len(self.attributes)))
        events = SortedEvents(columns["key"], columns["available_at"])
        return replace(self, events=events, items=columns["item"], attributes=attributes, compacted_at=compacted_at)


class HistoryEncoder(PointInTimeEncoder[HistoryStore]):
    """Table rows of the last `length` candidates that the user engaged with, oldest first, and of their attributes.

    parts: names of results -> vocabulary, the history's own first.
    """

    feature: HistoryFeature

    def __init__(self, name: str, feature: HistoryFeature, shared: EncoderContext) -> None:
        self.parts = {part: shared.vocabularies[of] for part, of in feature.parts(name).items()}
        super().__init__(name, feature, shared, (shared.schema.columns.user,))

    def empty(self) -> HistoryStore:
        return HistoryStore.empty(len(self.parts) - 1)

    def events(self, rows: LogRows) -> pa.Table:
        """Engaged rows with the candidate's ids; each becomes visible only when its label is known."""
        engaged = np.flatnonzero(rows.labels(self.task, _FOREVER) >= self.feature.min_label)
        available_at = availability_times(rows.times()[engaged], self.label_delay_us)
        columns = {
            _column(place): rows.column(each.feature.column).take(pa.array(engaged))
            for place, each in enumerate(self.parts.values())
        }
        return pa.table({"key": rows.hashes(self.key_columns)[engaged], "available_at": available_at, **columns})

    def extended(self, store: HistoryStore, events: pa.Table, is_sorted: bool = False) -> HistoryStore:
        """The vocabularies must be complete by now."""
        rows = [each.encode(one_array(events[_column(place)])) for place, each in enumerate(self.parts.values())]
        return store.extended(events["key"].to_numpy(), events["available_at"].to_numpy(), *rows)

    def compacted(self, store: HistoryStore, moment: int) -> HistoryStore:
        return store.compacted(moment, self.feature.length)

    def result_columns(self) -> Mapping[str, tuple[ColumnUse, pa.DataType | None]]:
        """Lists of ids under the feature's name, oldest first, and of their attributes."""
        types = {name: None if each.id_type is None else pa.list_(each.id_type) for name, each in self.parts.items()}
        return {name: ("keys", each) for name, each in types.items()}

    def distinct_results(self, store: HistoryStore, lookups: Lookups) -> Mapping[str, Ragged]:
        return dict(zip(self.parts, store.last_events(lookups, self.feature.length), strict=True))

    def input_spec(self) -> InputSpec:
        return InputSpec(ids=tuple((name, each.name, True) for name, each in self.parts.items()))

    def encode(self, rows: LogRows) -> Inputs:
        """The last candidates. Columns with the names of the results, lists of ids, win."""
        if (given := self._given(rows)) is not None:
            lists = {name: truncate_lists(each, self.feature.length, last=True) for name, each in given.items()}
            found = {name: Ragged(each.encode(lists[name][0]), lists[name][1]) for name, each in self.parts.items()}
        else:
            found = {
                name: each.expand() for name, each in self.look_up(rows).items() if isinstance(each, DedupedRagged)
            }
        return Inputs(dict(found))

    def _given(self, rows: LogRows) -> dict[str, pa.Array] | None:
        """The lists that came with the rows, None where none did. Raises UserError where they don't belong together."""
        names = list(self.result_columns())
        if not any(map(rows.has_column, names)):
            return None
        lists = {name: rows.column(name) for name in names if rows.has_column(name)}
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
        given, lookups = self._given(rows), rows.lookups(self.key_columns)
        known = {} if given is not None else self.distinct_results(self.store, lookups)
        for name in self.result_columns():
            lists: list[Any]
            if given is not None:
                own = given[name].to_pylist()
                lists = [[each for each in ids or () if each is not None][-self.feature.length :] for ids in own]
            else:
                words, offsets = self.parts[name].decode(known[name].values), known[name].offsets
                lists = [words[offsets[each] : offsets[each + 1]] for each in lookups.inverse.tolist()]
            found[name] = np.empty(len(rows), object)
            found[name][:] = [each or None for each in lists]
        return found


def _column(place: int) -> str:
    """What events call the ids of a part."""
    return f"id{place or ''}"


KIND = FeatureKind(HistoryFeature, HistoryEncoder)
