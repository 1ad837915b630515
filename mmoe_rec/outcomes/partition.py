"""A partition of users: their logged requests and their events, joined to rows of the interaction log."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from mmoe_rec.errors import UserError
from mmoe_rec.log.columns import UTC_MICROSECONDS
from mmoe_rec.log.hashing import combine, hash_column
from mmoe_rec.outcomes.attribution import Owned, attribute, first_of_each, labels_of
from mmoe_rec.outcomes.plan import Plan
from mmoe_rec.outcomes.reading import microseconds_of
from mmoe_rec.request_log import names

# Columns that are added on the way: hashes of the request and its candidate, of the user's candidate, and the order.
KEY, PAIR, TIME, ID = "\0key", "\0pair", "\0time", "\0id"
ORDER = "\0order"


@dataclass(frozen=True)
class Requests:
    """N rows of requests: of one candidate of one request each, whose time is the request's first.

    table: as it was logged; request: (N,) uint64 hash of the id; time: (N,) int64.
    """

    table: pa.Table
    request: np.ndarray
    time: np.ndarray

    @staticmethod
    def of(table: pa.Table, plan: Plan, told: Counter[str], through: int) -> Requests:
        """Of logged rows; a candidate of a request that was logged again counts as it was in the last reply.

        through: requests that began by then are written, and left out.
        """
        columns = plan.settings.columns
        own = microseconds_of(table[columns.time].combine_chunks())
        request = hash_of(table, names.REQUEST)
        if columns.request_scope == "user":
            request = combine([hash_of(table, columns.user), request])
        number, distinct = pd.factorize(request)
        first = np.full(len(distinct), np.iinfo(np.int64).max)
        np.minimum.at(first, number, own)
        time = first[number]
        candidate = hash_of(table, columns.candidate)
        at = microseconds_of(table[names.AT].combine_chunks())
        rank = table[names.RANK].to_numpy()
        order = np.lexsort((-rank, at, candidate, request))
        last = np.append(
            (request[order][1:] != request[order][:-1]) | (candidate[order][1:] != candidate[order][:-1]), True
        )
        kept = np.sort(order[last[: len(order)]])
        told["rows that were logged again"] += len(table) - len(kept)
        late = (time <= through) & (own > through)
        told["rows of requests that were written before"] += int(late[kept].sum())
        kept = kept[time[kept] > through]
        # Of rows of one key and time the last one counts for events, whatever the order of the files.
        kept = kept[np.lexsort((rank[kept], request[kept], time[kept]))]
        return Requests(table.take(pa.array(kept)), request[kept], time[kept])

    def __len__(self) -> int:
        return len(self.time)

    def filter(self, mask: np.ndarray) -> Requests:
        """The rows where `mask` (N,) is true."""
        return Requests(self.table.filter(pa.array(mask)), self.request[mask], self.time[mask])


def hash_of(table: pa.Table, column: str) -> np.ndarray:
    """(N,) uint64 hashes of a column."""
    return hash_column(table[column].combine_chunks())


class Partition:
    """Joins a partition. through, until: requests later than the one, up to the other, are to be written, microseconds;
    told: is counted up."""

    def __init__(self, plan: Plan, through: int, until: int, told: Counter[str]) -> None:
        self.plan, self.through, self.until, self.told = plan, through, until, told

    def rows(self, logged: pa.Table, events: dict[str, pa.Table | None]) -> pa.Table:
        """The rows of the interaction log, with the columns KEY and ORDER, by which those of one time are ordered.

        logged: rows of requests; events: name -> what `sent_events` gave. Raises UserError for labels that a task can't
        have.
        """
        plan, outcomes, columns = self.plan, self.plan.outcomes, self.plan.settings.columns
        requests = Requests.of(logged, plan, self.told, self.through)
        wanted = int((requests.time <= self.until).sum())
        placed: dict[str, pa.Array] = {}
        if outcomes.shown is not None:
            owned, table = self._owned(outcomes.shown.events, requests, events)
            counted = owned.within(requests.time, outcomes.shown.microseconds)
            seen = first_of_each(owned, counted, len(requests))
            shown = seen >= 0
            requests = requests.filter(shown)
            at = pa.array(seen[shown])
            placed = {} if table is None else {name: table[name].combine_chunks().take(at) for name in plan.placement}
        elif outcomes.top is not None:
            requests = requests.filter(requests.table[names.RANK].to_numpy() <= outcomes.top)
        labels = self._labels(requests, events)
        ended = requests.time <= self.until
        self.told["rows that were not shown"] += wanted - int(ended.sum())
        self.told["requests"] += len(np.unique(requests.request[ended]))
        self.told["requests that wait"] += len(np.unique(requests.request[~ended]))
        made: dict[str, pa.Array] = {}
        if columns.request is not None:
            made[columns.request] = requests.table[names.REQUEST]
        for name in plan.inputs:
            made.setdefault(name, placed[name] if name in placed else self._input(name, requests))
        made[columns.time] = pa.array(requests.time).cast(UTC_MICROSECONDS)
        made |= {name: self._label_column(name, each) for name, each in labels.items()}
        if columns.sampling_rate is not None:
            made[columns.sampling_rate] = requests.table[names.SHARE]
        made[KEY], made[ORDER] = pa.array(requests.request), requests.table[names.RANK]
        return pa.table(made).filter(pa.array(ended))

    def _input(self, name: str, requests: Requests) -> pa.Array:
        if name in self.plan.placement:
            rank = self.plan.outcomes.rank
            return requests.table[names.RANK].cast(pa.int64()) if name == rank else pa.nulls(len(requests))
        return requests.table[name]

    def _owned(
        self, name: str, requests: Requests, events: dict[str, pa.Table | None]
    ) -> tuple[Owned, pa.Table | None]:
        """The events of a log, each once, and the rows that they belong to."""
        table, columns = events[name], self.plan.settings.columns
        if table is None:
            return Owned(np.empty(0, np.int64), np.empty(0, np.int64)), None
        candidate = hash_of(requests.table, columns.candidate)
        by_request = self.plan.events[name].settings.request is not None
        key = combine([requests.request if by_request else hash_of(requests.table, columns.user), candidate])
        owned = attribute(key, requests.time, table[KEY].to_numpy(), table[TIME].to_numpy())
        if by_request:
            early = (owned.owner < 0) & np.isin(table[KEY].to_numpy(), key)
            self.told[f"events '{name}' earlier than their request"] += int(early.sum())
        return owned, table

    def _labels(self, requests: Requests, events: dict[str, pa.Table | None]) -> dict[str, np.ndarray]:
        labels = {}
        found: dict[str, tuple[Owned, pa.Table | None]] = {}
        for name, source in self.plan.outcomes.labels.items():
            if source.events not in found:
                found[source.events] = self._owned(source.events, requests, events)
            owned, table = found[source.events]
            values = None if source.value is None or table is None else table[source.value].to_numpy()
            counted = owned.within(requests.time, source.microseconds)
            labels[name] = labels_of(source, owned, counted, values, len(requests))
            self._check(name, labels[name])
            self.told[f"rows with {name}"] += int(
                (np.bincount(owned.owner[counted], minlength=len(requests))[requests.time <= self.until] > 0).sum()
            )
        return labels

    def _check(self, name: str, labels: np.ndarray) -> None:
        for task, about in self.plan.settings.tasks.items():
            wrong = ~np.isnan(labels) & (labels != 0) & (labels != 1)
            if about.label == name and about.kind == "binary" and wrong.any():
                raise UserError(
                    f"outcomes.labels.{name} gives {labels[wrong][0]:g}, but the label of the binary task '{task}' is "
                    "0 or 1: name another column of values, leave `value` out, or make the task a regression"
                )

    def _label_column(self, name: str, labels: np.ndarray) -> pa.Array:
        column = pa.array(labels, from_pandas=True)
        of_a_task = any(task.label == name for task in self.plan.settings.tasks.values())
        return column if of_a_task or self.plan.outcomes.labels[name].value else column.cast(pa.int64())


def sent_events(
    table: pa.Table, plan: Plan, name: str, told: Counter[str], after: int, now: int
) -> tuple[pa.Table, np.ndarray]:
    """What a partition needs of a batch of events, by their times, and the hash of the user of each, (E,) uint64.

    Events that lack an id or a time are left out, and those that are later than `now`, or no later than `after`.
    """
    columns, events = plan.settings.columns, plan.events[name]
    section = events.settings
    key_columns = [columns.user, columns.candidate, *([section.request] if section.request else [])]
    time = microseconds_of(table[section.time].combine_chunks())
    null = np.zeros(len(table), bool)
    for each in (*key_columns, section.time):
        null |= table[each].combine_chunks().is_null().to_numpy(zero_copy_only=False)
    told[f"events '{name}' without {' or '.join(key_columns)}, or a time"] += int(null.sum())
    future = ~null & (time > now)
    told[f"events '{name}' in the future"] += int(future.sum())
    kept = ~null & ~future & (time > after)
    table, time = table.filter(pa.array(kept)), time[kept]
    user, candidate = hash_of(table, columns.user), hash_of(table, columns.candidate)
    first = user
    if section.request is not None:
        first = hash_of(table, section.request)
        if columns.request_scope == "user":
            first = combine([user, first])
    sent = {KEY: pa.array(combine([first, candidate])), TIME: pa.array(time)}
    if events.has_ids:
        sent[ID] = pa.array(hash_of(table, "event_id"))
    own = {*key_columns, section.time, "event_id"}
    sent |= {each: table[each] for each in events.source.uses if each not in own}
    for each in own & {source.value for source in plan.outcomes.labels.values() if source.events == name}:
        sent[each] = table[each].cast(pa.float64())
    return pa.table(sent), user


def each_once(table: pa.Table | None, told: Counter[str], name: str) -> pa.Table | None:
    """Events without those whose id another one has, of which the first in time counts, in an order of their own."""
    if table is None:
        return None
    order = np.lexsort((table[KEY].to_numpy(), table[TIME].to_numpy()))
    if ID in table.column_names:
        _, first = np.unique(table[ID].to_numpy()[order], return_index=True)
        told[f"events '{name}' that came again"] += len(order) - len(first)
        order = order[np.sort(first)]
    return table.take(pa.array(order))
