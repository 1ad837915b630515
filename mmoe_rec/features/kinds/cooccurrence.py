"""The feature kind `cooccurrence`: how often the candidate followed the user's last candidates, over all users.

The counts are the item-to-item counts of collaborative filtering (Linden et al., "Amazon.com recommendations", IEEE
Internet Computing 2003). The event store holds only the last events of each user, and all counts follow from these
events. So a count doesn't depend on the order in which events arrive, or on the time at which a store is compacted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from mmoe_rec.features.encoder import EncoderContext, FeatureKind, PointInTimeEncoder
from mmoe_rec.features.kinds.counter import CounterStore, LookupTotals
from mmoe_rec.features.kinds.history import NO_CUTOFF, HistoryStore
from mmoe_rec.features.numeric_statistics import DenseNumber
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY, LogRows
from mmoe_rec.point_in_time.arrays import concat_ranges
from mmoe_rec.point_in_time.join import Lookups, SortedEvents, availability_times, find_keys
from mmoe_rec.settings.log_columns import ColumnUse
from mmoe_rec.settings.schema import Days, EventFeature, InputSemantics, Schema

_CODE_BITS = np.uint64(32)
_FOREVER = np.iinfo(np.int64).max
_LOOKUPS_AT_ONCE = 65_536


class CooccurrenceFeature(EventFeature):
    """How often the candidate followed the user's last candidates, among the last events of all users.

    The count of a past candidate is the number of times that any user had it and then, at most `last` events later, the
    candidate to rank. The inputs are log(1 + x) of three numbers x: the sum of the counts over the user's last
    candidates, the largest count, and the sum after each count is divided by the popularity of both candidates.
    """

    fixed_role = "candidate"
    kind: Literal["cooccurrence"]
    last: int = Field(20, ge=1, le=1000, description="number of the user's last events to compare with the candidate")
    max_events: int = Field(100, ge=1, le=10_000, description="number of last events of each user that count")
    min_label: float = Field(1.0, description="smallest label that counts")
    window_days: Days | None = Field(None, description="maximum age of events that count; null means all of the past")

    @model_validator(mode="after")
    def _check_last(self) -> Self:
        if self.last > self.max_events:
            raise ValueError(f"`last` {self.last} is larger than `max_events` {self.max_events}. Set a lower `last`.")
        return self

    def reads(self) -> Mapping[str, ColumnUse]:
        """Return no columns, because the IDs of user and candidate are read for every row."""
        return {}

    def event_reads(self, schema: Schema) -> Mapping[str, ColumnUse]:
        return dict.fromkeys((schema.columns.user, schema.columns.candidate), "key")

    def check(self, name: str, schema: Schema) -> None:
        """Raise ValueError if the task or event log doesn't exist, or if the log lacks users, candidates or times."""
        super().check(name, schema)
        for purpose in ("user", "candidate"):
            self.require_column(name, schema, purpose, "it counts candidates of the same user")

    def semantics(self, schema: Schema) -> InputSemantics:
        return InputSemantics((schema.columns.user, schema.columns.candidate))

    @property
    def window(self) -> int | None:
        """Maximum age of events in microseconds, None without a limit."""
        return None if self.window_days is None else round(self.window_days * MICROSECONDS_PER_DAY)


@dataclass(eq=False)
class CooccurrenceStore(HistoryStore):
    """Last events of users, with one candidate each, and counts of pairs of candidates.

    Attributes:
        feature: Settings of the feature.
        change: Changes of the counts by the events of a level. None if the store is not a level.
    """

    feature: CooccurrenceFeature = field(kw_only=True)
    change: CounterStore | None = None

    def merged(self, store: Self) -> Self:
        merged = super().merged(store)
        if self.change is None or store.change is None:
            return merged
        return replace(merged, change=self.change.merged(store.change))

    def with_levels(self, levels: Sequence[Self]) -> Self:
        _ = self.counts  # Count before the copy, so that all copies share the counts.
        return super().with_levels(levels)

    def of_users(self, users: np.ndarray) -> Self:
        """Return one store with the events of some `users` (distinct, ascending) in this store and its levels."""
        parts = []
        for store in (self, *self.levels):
            _, groups = find_keys(store.events.unique_keys, users)
            starts = store.events.starts
            index = concat_ranges(starts[groups], starts[groups + 1] - starts[groups])
            parts.append((store.events.key[index], store.events.available_at[index], store.items[index]))
        empty = replace(self, events=self.events.take(np.empty(0, np.int64)), items=self.items[:0], change=None)
        return empty.extended(*map(np.concatenate, zip(*parts, strict=True)))

    @cached_property
    def counts(self) -> CounterStore:
        """Counts of all pairs in this store without its levels. For a level, the changes of counts."""
        return self.count_pairs() if self.change is None else self.change

    def count_pairs(self, candidates: np.ndarray | None = None) -> CounterStore:
        """Count pairs of candidates, and the events of each candidate. `rows` fall when events no longer count.

        The upper 32 bits of a key are the code of the earlier candidate. The lower 32 bits are the code of the later
        candidate, or 0 for the number of events of the earlier candidate.

        Args:
            candidates: Codes of the later candidates of the pairs to count, uint64. None counts all pairs.
        """
        feature, group, time = self.feature, self.events.group_ids, self.events.available_at
        since, codes = self.compacted_at, self.items.view(np.uint64)
        # An event no longer counts once `max_events` later events are available, or when it is too old.
        end = np.full(len(self), _FOREVER)
        later = np.flatnonzero(group[feature.max_events :] == group[: -feature.max_events])
        end[later] = time[later + feature.max_events]
        if feature.window is not None:
            end = np.minimum(end, time + feature.window)
        if since is not None:
            time = np.maximum(time, since)
        is_counted = np.ones(len(self), bool) if candidates is None else np.isin(codes, candidates)
        keys, times, steps = [], [], []
        for distance in range(feature.last + 1):
            first = np.flatnonzero(group[distance:] == group[: -distance or None])
            if not len(first):  # No user has this many events.
                break
            first = first[time[first + distance] < end[first]]
            if distance:
                same_time = first[self.events.available_at[first + distance] == self.events.available_at[first]]
                earlier, later = np.append(first, same_time + distance), np.append(first + distance, same_time)
                counted = is_counted[later]
                earlier, later = earlier[counted], later[counted]
                key = (codes[earlier] << _CODE_BITS) | codes[later]
            else:
                earlier, later, key = first, first, codes[first] << _CODE_BITS
            added, removed = np.maximum(time[earlier], time[later]), np.minimum(end[earlier], end[later])
            ends = np.flatnonzero(removed < _FOREVER)
            keys += [key, key[ends]]
            times += [added, removed[ends]]
            steps += [np.ones(len(key), np.int32), np.full(len(ends), -1, np.int32)]
        counts = CounterStore.empty(labels=False)
        if not keys:
            return counts
        return counts.with_steps(np.concatenate(keys), np.concatenate(times), np.concatenate(steps))


class CooccurrenceEncoder(PointInTimeEncoder[CooccurrenceStore]):
    """Encoder of counts of the candidate after the user's last candidates.

    A code of a user or candidate is the upper half of a 64-bit hash, so two IDs may rarely share a code. The key of a
    lookup consists of the codes of candidate and user.
    """

    feature: CooccurrenceFeature
    needs_all_keys = True

    def __init__(self, name: str, feature: CooccurrenceFeature, context: EncoderContext) -> None:
        columns = context.schema.columns
        super().__init__(name, feature, context, (columns.user, columns.candidate))
        names = [f"{name}_{output}" for output in ("sum", "max", "normalized")]
        self.numbers = {output: DenseNumber(output) for output in names}

    def empty(self) -> CooccurrenceStore:
        events = SortedEvents(np.empty(0, np.uint64), np.empty(0, np.int64))
        return CooccurrenceStore(events, events.available_at, feature=self.feature)

    def _codes(self, rows: LogRows) -> list[np.ndarray]:
        """Return codes of users and of candidates, both (N,) uint64 from 1 to 2^32 - 1."""
        return [np.maximum(rows.hashes([column]) >> _CODE_BITS, np.uint64(1)) for column in self.key_columns]

    def keys(self, rows: LogRows) -> np.ndarray:
        user, candidate = self._codes(rows)
        return (candidate << _CODE_BITS) | user

    def lookups(self, rows: LogRows) -> Lookups:
        return rows.make_lookups(self.keys(rows), rows.times())

    def events(self, rows: LogRows) -> pa.Table:
        """Return one event for each row with a label of at least `min_label`, a user and a candidate."""
        counts = rows.labels(self.task, NO_CUTOFF) >= self.feature.min_label
        for column in self.key_columns:
            counts &= rows.column(column).is_valid().to_numpy(zero_copy_only=False)
        user, candidate = (codes[counts] for codes in self._codes(rows))
        available_at = availability_times(rows.times()[counts], self.label_delay_us)
        return pa.table({"key": user << _CODE_BITS, "available_at": available_at, "item": candidate.view(np.int64)})

    def extended(self, store: CooccurrenceStore, events: pa.Table, is_sorted: bool = False) -> CooccurrenceStore:
        """Return a store with additional events.

        Args:
            store: Store to extend. It is not modified.
            events: Table that `events` returned.
            is_sorted: Not used.
        """
        return store.extended(*(events[name].to_numpy() for name in ("key", "available_at", "item")))

    def live_level(self, store: CooccurrenceStore, events: pa.Table) -> CooccurrenceStore:
        level = self.extended(self.empty(), events)
        before = store.of_users(level.events.unique_keys)
        counts = before.counts
        change = before.merged(level).counts.merged(replace(counts, rows=-counts.rows))
        return replace(level, change=change.without_zero_steps())

    def compacted(self, store: CooccurrenceStore, moment: int) -> CooccurrenceStore:
        return store.compacted(moment, self.feature.max_events, self.feature.window)

    def distinct_results(self, store: CooccurrenceStore, lookups: Lookups) -> Mapping[str, np.ndarray]:
        """Return log(1 + x) of each number x of D lookups.

        `normalized` is the sum of count(a, c) / sqrt(count(a) count(c)) over the user's last candidates a, for the
        candidate c. The cosine similarity of items has the same divisor (Sarwar et al., "Item-based collaborative
        filtering recommendation algorithms", WWW 2001).
        """
        lookups = lookups.clamp_times(store.compacted_at)
        candidates = lookups.key >> _CODE_BITS
        # A task of a build looks up some candidates, so it counts only their pairs. A server has counted all pairs.
        counts = store.counts if store is self.store else store.count_pairs(np.unique(candidates))
        counts = counts.with_levels([level.counts for level in store.levels])
        make = Lookups.sort if lookups.is_sorted else Lookups.one_per_row

        def count(keys: np.ndarray, times: np.ndarray) -> np.ndarray:
            of_keys = make(keys, times)
            return LookupTotals(counts, of_keys).totals(None)[0][of_keys.inverse]

        parts = []
        for start in range(0, len(lookups), _LOOKUPS_AT_ONCE):
            rows = slice(start, start + _LOOKUPS_AT_ONCE)
            times, later = lookups.time[rows], candidates[rows]
            users = Lookups.sort(lookups.key[rows] << _CODE_BITS, times)
            (lists,) = store.last_events(users, self.feature.last, self.feature.window)
            earlier, user = lists.values.view(np.uint64) << _CODE_BITS, np.arange(len(users)).repeat(lists.lengths)
            # Combine each event of a user with all rows of this user. Neighboring keys are then similar and found fast.
            by_user, rows_of_users = np.lexsort((later, users.inverse)), np.bincount(users.inverse)
            repeats = rows_of_users[user]
            row = by_user[concat_ranges((np.cumsum(rows_of_users) - rows_of_users)[user], repeats)]
            event = np.arange(len(user)).repeat(repeats)
            together = count(earlier[event] | later[row], times[row])
            found = np.flatnonzero(together)
            row, event, together = row[found], event[found], together[found]
            popularity = count(earlier, users.time[user])[event] * count(later << _CODE_BITS, times)[row]
            largest = np.zeros(len(times))
            np.maximum.at(largest, row, together)
            normalized = np.bincount(row, together / np.sqrt(popularity), len(times))
            sums = np.bincount(row, together, len(times))
            parts.append([np.log1p(values) for values in (sums, largest, normalized)])
        results = map(np.concatenate, zip(*parts, strict=True)) if parts else [np.empty(0)] * len(self.numbers)
        return dict(zip(self.numbers, results, strict=True))


KIND = FeatureKind(CooccurrenceFeature, CooccurrenceEncoder)
