"""The feature kind `history`: the last candidates that the user engaged with before the request."""

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

NO_CUTOFF = np.iinfo(np.int64).max
MAX_ATTENTION_LENGTH = 512


class HistoryFeature(EventFeature):
    """The last candidates that the user engaged with, as available at the request, embedded and pooled."""

    fixed_role = "user"
    kind: Literal["history"]
    of: str = Field(description="name of the candidate's id feature whose vocabulary and table are used")
    length: int = Field(20, ge=1, le=1000, description="number of last engaged candidates to keep")
    min_label: float = Field(1.0, description="smallest label that counts as engaged")
    attributes: Annotated[tuple[str, ...], Unique] = Field(
        (), description="further id features of the engaged candidates, such as the brand"
    )
    pooling: Literal["mean", "attention"] = Field(
        "mean",
        description="mean: mean of the vectors of events; attention: the mean, and a small network that compares "
        "events with the candidate and reads their order",
    )

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if self.pooling == "attention" and self.length > MAX_ATTENTION_LENGTH:
            raise ValueError(
                f"attention looks at no more than {MAX_ATTENTION_LENGTH} events: set `length` lower, or "
                "`pooling` to mean"
            )
        return self

    def reads(self) -> Mapping[str, ColumnUse]:
        """Return no columns, because the user's id, which is the key, is read for every row."""
        return {}

    def event_reads(self, schema: Schema) -> Mapping[str, ColumnUse]:
        ids = [schema.features[name].reads() for name in (self.of, *self.attributes)]
        return {schema.columns.user: "key", **reduce(or_, map(dict, ids))}

    def parts(self, name: str) -> dict[str, str]:
        """Return input -> id feature for the inputs of the history `name`: first `of`, then the `attributes`."""
        return {name: self.of, **{f"{name}_{attribute}": attribute for attribute in self.attributes}}

    @property
    def table_owner(self) -> str | None:
        return self.of

    def check(self, name: str, schema: Schema) -> None:
        """Raise ValueError if the feature doesn't fit other sections of the settings."""
        super().check(name, schema)
        self.require_column(name, schema, "user", "it lists events of a user")
        check_table_owner(schema, name, "of", self.of, IdFeature, "candidate")
        for attribute in self.attributes:
            check_table_owner(schema, name, "attributes", attribute, IdFeature, "candidate")

    def semantics(self, schema: Schema) -> InputSemantics:
        columns = (schema.columns.user, *schema.features[self.of].reads())
        parts = {attribute: meaning_of_ids(schema, columns, attribute) for attribute in self.attributes}
        return replace(meaning_of_ids(schema, columns, self.of), parts=parts)


@dataclass(eq=False)
class HistoryStore(EventStore):
    """Candidates that users engaged with, in E events of one candidate each.

    Attributes:
        items: (E,) int64 rows of the candidates in their embedding table.
        attributes: For each attribute, (E,) int64 rows in its embedding table.
    """

    items: np.ndarray
    attributes: tuple[np.ndarray, ...] = ()

    @staticmethod
    def empty(attributes: int = 0) -> "HistoryStore":
        """Return a store without events, whose candidates have this number of attributes."""
        empty = np.empty(0, np.int64)
        events = SortedEvents(np.empty(0, np.uint64), empty)
        return HistoryStore(events, empty, (empty,) * attributes)

    def extended(self, key: np.ndarray, available_at: np.ndarray, *rows: np.ndarray) -> Self:
        """Return a store with E additional events in any order.

        Args:
            key: (E,) uint64 keys.
            available_at: (E,) int64 microseconds at which the events become available.
            rows: (E,) int64 table rows of the items, then (E,) int64 table rows of each attribute.
        """
        if not len(key):
            return self
        before = (self.events.key, self.events.available_at, self.items, *self.attributes)
        columns = [np.append(*pair) for pair in zip(before, (key, available_at, *rows), strict=True)]
        # Events with equal keys and times are ordered by item and attributes, whatever order they arrived in.
        order = np.lexsort(columns[::-1])
        key, available_at, items, *attributes = (column[order] for column in columns)
        return replace(self, events=SortedEvents(key, available_at), items=items, attributes=tuple(attributes))

    def merged(self, store: Self) -> Self:
        return self.extended(store.events.key, store.events.available_at, store.items, *store.attributes)

    def last_events(self, lookups: Lookups, length: int, window: int | None = None) -> list[Ragged]:
        """Return lists of table rows, first of the last items available at D lookups, then of each attribute.

        In a list, the oldest item comes first. Items with equal times are ordered by table row.

        Args:
            lookups: D lookups.
            length: Maximum number of items per lookup.
            window: Maximum age of items in microseconds, None without a limit.
        """
        lookups, parts, part_lengths = lookups.clamp_times(self.compacted_at), [], []
        stores: list[HistoryStore] = [self, *self.levels]
        for store in stores:
            join = store.join(lookups)
            last = join.last()
            first = join.first if window is None else np.maximum(join.first, join.last(window) + 1)
            lengths = np.clip(last + 1 - first, 0, length)
            index = concat_ranges(last + 1 - lengths, lengths)
            parts.append([column[index] for column in (store.events.available_at, store.items, *store.attributes)])
            part_lengths.append(lengths)
        available_at, *rows = map(np.concatenate, zip(*parts, strict=True))
        merged_lengths = lengths = np.sum(part_lengths, axis=0)
        if self.levels and len(available_at):
            lookup = np.concatenate([np.arange(len(lookups)).repeat(lengths) for lengths in part_lengths])
            lengths = np.minimum(merged_lengths, length)
            last = concat_ranges(np.cumsum(merged_lengths) - lengths, lengths)
            last = np.lexsort((*reversed(rows), available_at, lookup))[last]
            rows = [column[last] for column in rows]
        return [Ragged(column, lengths.astype(np.int32)) for column in rows]

    def compacted(self, moment: int, length: int, window: int | None = None) -> Self:
        """Return a store without the events that requests from `moment` on can't see.

        Args:
            moment: Earliest time of later requests in microseconds.
            length: Maximum number of items per request.
            window: Maximum age of items in microseconds, None without a limit.
        """
        # Keep the last `length` events that are available at `moment`, because a request sees them until later events
        # become available.
        events = self.events
        available_count = np.add.reduceat(np.append(events.available_at <= moment, 0), events.starts[:-1])
        within_key = np.arange(len(events)) - events.starts[events.group_ids]
        needed = within_key >= (available_count - length)[events.group_ids]
        if window is not None:
            needed &= events.available_at > moment - window
        columns = {name: column[needed] for name, column in self.to_columns().items()}
        return self.with_columns(columns, self._compaction_time(moment))

    def to_columns(self) -> dict[str, np.ndarray]:
        columns = {"key": self.events.key, "available_at": self.events.available_at, "item": self.items}
        return columns | {f"attribute{index}": attribute for index, attribute in enumerate(self.attributes)}

    def with_columns(self, columns: Mapping[str, np.ndarray], compacted_at: int | None) -> Self:
        """Return a store with the events in `columns` instead.

        Args:
            columns: Columns of the events, as from `to_columns`.
            compacted_at: Time of the last compaction in microseconds, None without compaction.
        """
        attributes = tuple(columns[f"attribute{index}"] for index in range(len(self.attributes)))
        events = SortedEvents(columns["key"], columns["available_at"])
        return replace(self, events=events, items=columns["item"], attributes=attributes, compacted_at=compacted_at)


class HistoryEncoder(PointInTimeEncoder[HistoryStore]):
    """Encoder of the last `length` candidates that the user engaged with, oldest first, and their attributes.

    Attributes:
        parts: Vocabularies of the candidates and then of each attribute, by the name of the input and result.
    """

    feature: HistoryFeature

    def __init__(self, name: str, feature: HistoryFeature, context: EncoderContext) -> None:
        self.parts = {part: context.vocabularies[owner] for part, owner in feature.parts(name).items()}
        super().__init__(name, feature, context, (context.schema.columns.user,))

    def empty(self) -> HistoryStore:
        return HistoryStore.empty(len(self.parts) - 1)

    def events(self, rows: LogRows) -> pa.Table:
        """Return one event for each row in which the user engaged. Items and attributes are ids, not table rows."""
        engaged = np.flatnonzero(rows.labels(self.task, NO_CUTOFF) >= self.feature.min_label)
        available_at = availability_times(rows.times()[engaged], self.label_delay_us)
        columns = {
            _event_column(index): rows.column(vocabulary.feature.column).take(pa.array(engaged))
            for index, vocabulary in enumerate(self.parts.values())
        }
        return pa.table({"key": rows.hashes(self.key_columns)[engaged], "available_at": available_at, **columns})

    def extended(self, store: HistoryStore, events: pa.Table, is_sorted: bool = False) -> HistoryStore:
        """Return a store with additional events. The vocabularies must be fitted.

        Args:
            store: Store to extend. It is not modified.
            events: Table that `events` returned.
            is_sorted: Not used.
        """
        rows = [
            vocabulary.encode(one_array(events[_event_column(index)]))
            for index, vocabulary in enumerate(self.parts.values())
        ]
        return store.extended(events["key"].to_numpy(), events["available_at"].to_numpy(), *rows)

    def compacted(self, store: HistoryStore, moment: int) -> HistoryStore:
        return store.compacted(moment, self.feature.length)

    def result_columns(self) -> Mapping[str, tuple[ColumnUse, pa.DataType | None]]:
        id_types = {name: vocabulary.id_type for name, vocabulary in self.parts.items()}
        return {name: ("keys", None if dtype is None else pa.list_(dtype)) for name, dtype in id_types.items()}

    def distinct_results(self, store: HistoryStore, lookups: Lookups) -> Mapping[str, Ragged]:
        return dict(zip(self.parts, store.last_events(lookups, self.feature.length), strict=True))

    def input_spec(self) -> InputSpec:
        return InputSpec(ids=tuple((name, vocabulary.name, True) for name, vocabulary in self.parts.items()))

    def encode(self, rows: LogRows) -> Inputs:
        """Return lists of the last candidates and of their attributes. Lists in the request take precedence."""
        if (given := self._given(rows)) is not None:
            lists = {name: truncate_lists(ids, self.feature.length, last=True) for name, ids in given.items()}
            inputs = {
                name: Ragged(vocabulary.encode(lists[name][0]), lists[name][1])
                for name, vocabulary in self.parts.items()
            }
        else:
            results = self.look_up(rows)
            inputs = {name: lists.expand() for name, lists in results.items() if isinstance(lists, DedupedRagged)}
        return Inputs(dict(inputs))

    def _given(self, rows: LogRows) -> dict[str, pa.Array] | None:
        """Return the lists in the request by name, None if it has none. Raise UserError if they don't match."""
        names = list(self.result_columns())
        if not any(map(rows.has_column, names)):
            return None
        lists = {name: rows.column(name) for name in names if rows.has_column(name)}
        non_null = [ids for ids in lists.values() if not pt.is_null(ids.type)]
        lengths = {ids.value_lengths().fill_null(0).to_numpy().tobytes() for ids in non_null}
        nulls = any(ids.flatten().null_count for ids in non_null)
        if len(lists) < len(names) or (len(names) > 1 and (nulls or len(lengths) > 1)):
            raise UserError(
                f"history '{self.name}': give all of {', '.join(names)}, as lists that are equally long in each row, "
                "without nulls"
            )
        return lists

    def explain(self, rows: LogRows) -> Mapping[str, np.ndarray]:
        """Return (N,) lists of the log's ids by name, None for an empty list. Lists in the request take precedence."""
        results = {}
        given, lookups = self._given(rows), self.lookups(rows)
        stored = {} if given is not None else self.distinct_results(self.store, lookups)
        for name in self.result_columns():
            lists: list[Any]
            if given is not None:
                columns = given[name].to_pylist()
                lists = [[key for key in ids or () if key is not None][-self.feature.length :] for ids in columns]
            else:
                ids, offsets = self.parts[name].decode(stored[name].values), stored[name].offsets
                lists = [ids[offsets[index] : offsets[index + 1]] for index in lookups.inverse.tolist()]
            results[name] = np.empty(len(rows), object)
            results[name][:] = [ids or None for ids in lists]
        return results


def _event_column(index: int) -> str:
    """Return the name of the event column with the candidates (index 0) or with an attribute (from index 1 on)."""
    return f"id{index or ''}"


KIND = FeatureKind(HistoryFeature, HistoryEncoder)
