"""Which rows of a journal count: each row of a request and candidate once, in the journal's order.

Everything follows from the batches and their order alone, however they are read: so all processes that read a journal,
and the files that are written of it, hold the same rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from mmoe_rec.errors import UserError, first_line
from mmoe_rec.live.journal import Batch
from mmoe_rec.log.columns import UTC_MICROSECONDS, column_uses, combine, event_uses, hash_column, list_label_columns
from mmoe_rec.log.reader import event_rows
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY, LogRows, maturity
from mmoe_rec.point_in_time.join import known_at
from mmoe_rec.settings.columns import Use
from mmoe_rec.settings.schema import Schema

FORGET_AFTER_DAYS = 30
EVENT_ID = "event_id"
"""The column in which a caller may give an event's id, where the log has no column of that name."""
COUNTS, DUPLICATE, CONFLICT = 0, 1, 2
_NEVER, _FOREVER = np.iinfo(np.int64).min, np.iinfo(np.int64).max


def find_uses(schema: Schema) -> dict[str | None, dict[str, Use]]:
    """Log, None for the interaction log, -> its columns and what each is read as."""
    uses: dict[str | None, dict[str, Use]] = {None: column_uses(schema)}
    return uses | {name: event_uses(schema, name) for name in schema.events}


@dataclass(frozen=True)
class NewRows:
    """Rows that count, in the journal's order. table: the columns that the log must have, null where not given, and
    those that other models read.

    counts: all rows by what became of them. accepted: they count; duplicate: they came before with the same labels;
    conflict: they came before with other labels, or their request is another user's. Of the accepted ones,
    out_of_order: earlier than a row before; old: so much earlier that whether they came before is not remembered.
    """

    source: str | None
    table: pa.Table
    counts: Counter[str]

    @staticmethod
    def join(parts: Sequence[NewRows]) -> NewRows:
        """All rows of one log."""
        table = pa.concat_tables([each.table for each in parts], promote_options="default").combine_chunks()
        counts = Counter[str]()
        for each in parts:
            counts.update(each.counts)
        return NewRows(parts[0].source, table, counts)

    def rows(self, schema: Schema) -> LogRows:
        """The rows, as features read them."""
        return LogRows(self.table, schema) if self.source is None else event_rows(self.table, schema, self.source)

    def count_late(self, schema: Schema, as_of: int) -> int:
        """How many rows had become known, by at least one label, at `as_of` (microseconds) already."""
        rows = self.rows(schema)
        if self.source is not None:
            return int((known_at(rows.times(), 0) <= as_of).sum())
        late = np.zeros(len(rows), bool)
        for task in schema.tasks.values():
            late |= ~np.isnan(rows.labels(task, _FOREVER)) & (known_at(rows.times(), maturity(task, schema)) <= as_of)
        return int(late.sum())


class Duplicates:
    """Takes the batches of a journal in order, and remembers for `forget_after_days` which rows it has seen.

    The days are those of the rows: a row is forgotten once the latest time in the same log lies so much later than the
    latest time when it came.
    """

    def __init__(self, schema: Schema, forget_after_days: int = FORGET_AFTER_DAYS) -> None:
        self.schema, self.forget_after_days = schema, forget_after_days
        self._uses = find_uses(schema)
        self.sources = list(self._uses)
        """The logs that the schema has, None for the interaction log."""
        self.newest = dict.fromkeys(self._uses, _NEVER)
        """The latest time of each log's rows so far, microseconds; the least int64 before there are any."""
        # Rows by event id, and by request and candidate; requests by id.
        self._stores = {
            source: {
                "events": KeyStore(content=np.uint32),
                "rows": KeyStore(content=np.uint32),
                "requests": KeyStore(time=np.int64, user=np.uint64),
            }
            for source in self._uses
        }
        self.unknown: Counter[str] = Counter()
        """Log of events that the schema does not have -> rows that were left out."""

    def filter(self, batches: Sequence[Batch]) -> dict[str | None, NewRows]:
        """The rows that count, by log; those of logs that the schema does not have are `unknown`.

        Raises UserError where the columns of batches do not fit the schema.
        """
        by_log: dict[str | None, list[Batch]] = {}
        for batch in batches:
            by_log.setdefault(batch.source, []).append(batch)
        for source in by_log.keys() - self._uses.keys():
            self.unknown[str(source)] += sum(map(len, by_log[source]))
        return {source: self._filter(source, by_log[source]) for source in self._uses if source in by_log}

    def to_arrays(self, source: str | None) -> dict[str, np.ndarray]:
        """What is remembered of one log: the same for the same batches, in however many steps they came."""
        arrays = {"newest": np.array(self.newest[source])}
        for store, keys in self._stores[source].items():
            arrays |= {f"{store}.{column}": values for column, values in keys.to_arrays().items()}
        return arrays

    def restore(self, source: str | None, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes what `to_arrays` gave. Raises KeyError for anything else."""
        self.newest[source] = int(arrays["newest"])
        for store, keys in self._stores[source].items():
            begin = f"{store}."
            keys.restore({name.removeprefix(begin): each for name, each in arrays.items() if name.startswith(begin)})

    def _filter(self, name: str | None, batches: Sequence[Batch]) -> NewRows:
        time = self.schema.columns.time if name is None else self.schema.events[name].time
        table, sizes = _concat(batches, self._uses[name]), [len(batch) for batch in batches]
        starts, number = np.cumsum([0, *sizes]), np.repeat(np.arange(len(sizes)), sizes)
        times = LogRows(table, self.schema).times(time)
        latest = np.maximum.accumulate(np.maximum(np.maximum.reduceat(times, starts[:-1]), self.newest[name]))
        days = latest // MICROSECONDS_PER_DAY
        # The batches of one latest day together: what is remembered is the same for all of them.
        edges = [0, *(np.flatnonzero(days[1:] != days[:-1]) + 1).tolist(), len(batches)]
        parts = []
        for begin, end in pairwise(edges):
            rows = slice(*starts[[begin, end]].tolist())
            some = table.slice(rows.start, rows.stop - rows.start)
            parts.append(self._filter_day(name, time, some, times[rows], number[rows], int(days[begin])))
        return NewRows.join(parts)

    def _filter_day(
        self, name: str | None, time: str, table: pa.Table, times: np.ndarray, batch: np.ndarray, day: int
    ) -> NewRows:
        """The rows that count of batches until whose ends the latest time of the log lies on one day.

        time: the column of (N,) times; batch: (N,) the number of each row's batch, rising.
        """
        stores, uses, newest = self._stores[name], self._uses[name], self.newest[name]
        rows = LogRows(table, self.schema)
        if day != newest // MICROSECONDS_PER_DAY:
            for store in stores.values():
                store.forget(day - self.forget_after_days)
        keys, owners = dict[str, tuple[np.ndarray, np.ndarray]](), None
        if rows.has(EVENT_ID) and EVENT_ID not in uses:
            events = rows.column(EVENT_ID)
            keys["events"] = hash_column(events), ~events.is_null().to_numpy(zero_copy_only=False)
        if name is None:
            keys["rows"] = rows.row_hashes(), np.ones(len(rows), bool)
            if self.schema.columns.request is not None:
                owners = rows.request_hashes(), rows.hashes([self.schema.columns.user])
        content = rows.content_hashes(list_label_columns(self.schema) if name is None else list(uses))
        content = (content >> np.uint64(32)).astype(np.uint32)
        verdict = _judge(stores, content, keys, owners, day)
        kept = np.flatnonzero(verdict == COUNTS)
        taken = table.take(pa.array(kept)) if len(kept) < len(times) else table
        if owners is not None and len(kept):
            request, user = (each[kept] for each in owners)
            settled = _settle(stores["requests"], request, user, times[kept], batch[kept], day)
            if (settled != times[kept]).any():
                place = table.column_names.index(time)
                taken = taken.set_column(place, time, pa.array(settled).cast(UTC_MICROSECONDS))
        before = np.maximum.accumulate(np.append(newest, times))[:-1][kept]
        self.newest[name] = max(newest, int(times.max()))
        horizon = before // MICROSECONDS_PER_DAY - self.forget_after_days
        counts = Counter(
            accepted=len(kept),
            duplicate=int((verdict == DUPLICATE).sum()),
            conflict=int((verdict == CONFLICT).sum()),
            out_of_order=int((times[kept] < before).sum()),
            old=int((times[kept] // MICROSECONDS_PER_DAY < horizon).sum()),
        )
        others = (each for each in table.column_names if each not in uses and each != EVENT_ID)
        return NewRows(name, taken.select([*uses, *others]), counts)


def _concat(batches: Sequence[Batch], columns: Mapping[str, Use]) -> pa.Table:
    try:
        table = pa.concat_tables([batch.table for batch in batches], promote_options="default").combine_chunks()
    except pa.ArrowException as error:
        raise UserError(f"rows of the journal do not fit together: {first_line(error)}") from None
    for column in columns:
        if column not in table.column_names:
            table = table.append_column(column, pa.nulls(len(table)))
    return table


def _judge(
    stores: Mapping[str, KeyStore],
    content: np.ndarray,
    keys: Mapping[str, tuple[np.ndarray, np.ndarray]],
    owners: tuple[np.ndarray, np.ndarray] | None,
    day: int,
) -> np.ndarray:
    """(N,) what becomes of each row. Only those whose keys were seen, here or before, are looked at one by one.

    content: (N,) of what a duplicate repeats; keys: store -> (N,) keys, and which rows have one; owners: (N,) requests
    and (N,) users, where requests have ids.
    """
    special, seen, user_of = np.zeros(len(content), bool), dict[str, dict[int, int]](), dict[int, int]()
    for name, (key, valid) in keys.items():
        known, values = stores[name].find(key)
        known &= valid
        special |= known
        special[valid] |= _count(key[valid]) > 1
        seen[name] = dict(zip(key[known].tolist(), values["content"][known].tolist(), strict=True))
    if owners is not None:
        request, user = owners
        known, values = stores["requests"].find(request)
        special |= known & (values["user"] != user)
        special |= _count(request) != _count(combine([request, user]))
        user_of = dict(zip(request[known].tolist(), values["user"][known].tolist(), strict=True))
    verdict = np.zeros(len(content), np.int8)
    for row in np.flatnonzero(special).tolist():
        its = int(content[row])
        mine = [(seen[name], int(key[row])) for name, (key, valid) in keys.items() if valid[row]]
        before = next((contents[at] for contents, at in mine if at in contents), None)
        if before is not None:
            verdict[row] = DUPLICATE if before == its else CONFLICT
        elif owners is not None and user_of.setdefault(int(request[row]), int(user[row])) != int(user[row]):
            verdict[row] = CONFLICT
        else:
            for contents, at in mine:
                contents[at] = its
    for name, (key, valid) in keys.items():
        new = np.flatnonzero((verdict == COUNTS) & valid)
        stores[name].add(key[new], day, content=content[new])
    return verdict


def _count(keys: np.ndarray) -> np.ndarray:
    """(N,) how often each of (N,) keys is among them."""
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return counts[inverse]


def _settle(
    requests: KeyStore, request: np.ndarray, user: np.ndarray, times: np.ndarray, batch: np.ndarray, day: int
) -> np.ndarray:
    """(N,) times of rows' requests: the earliest in the batch with which a request began."""
    distinct, first, inverse = np.unique(request, return_index=True, return_inverse=True)
    earliest = np.full(len(distinct), _FOREVER)
    of_first = batch == batch[first][inverse]  # `first` is the first row, and batches rise
    np.minimum.at(earliest, inverse[of_first], times[of_first])
    known, values = requests.find(distinct)
    new = ~known
    requests.add(distinct[new], day, time=earliest[new], user=user[first][new])
    return np.where(known, values["time"], earliest)[inverse]


class KeyStore:
    """uint64 keys, each with the day on which it was added, int32, and values in columns of the given dtypes.

    Memory: 12 bytes a key, besides its values. Adding N keys one batch after the other takes O(N log N) in all.
    """

    def __init__(self, **dtypes: type[np.generic]) -> None:
        self._values = dtypes
        self._dtypes: dict[str, type[np.generic]] = {"key": np.uint64, "day": np.int32, **dtypes}
        # Each level is sorted by key, and less than half as long as the one before.
        self._levels: list[dict[str, np.ndarray]] = []

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Whether each of (N,) keys is there, (N,) bool; and its values, (N,) each."""
        is_there = np.zeros(len(keys), bool)
        values = {name: np.zeros(len(keys), dtype) for name, dtype in self._values.items()}
        for level in self._levels:
            place = np.minimum(np.searchsorted(level["key"], keys), len(level["key"]) - 1)
            here = level["key"][place] == keys
            is_there |= here
            for name, column in values.items():
                column[here] = level[name][place[here]]
        return is_there, values

    def add(self, keys: np.ndarray, day: int, **values: np.ndarray) -> None:
        """Adds distinct keys, none of which `find` finds."""
        if not len(keys):
            return
        order = np.argsort(keys)
        level = {"key": keys[order], "day": np.full(len(keys), day, np.int32)}
        self._levels.append(level | {name: column[order] for name, column in values.items()})
        while len(self._levels) > 1 and len(self._levels[-2]["key"]) < 2 * len(self._levels[-1]["key"]):
            self._merge()

    def forget(self, since: int) -> None:
        """Forgets the keys that were added before day `since`."""
        levels = []
        for level in self._levels:
            alive = level["day"] >= since
            levels.append(level if alive.all() else {name: column[alive] for name, column in level.items()})
        self._levels = [level for level in levels if len(level["key"])]

    def _merge(self) -> None:
        one, other = self._levels[-2:]
        both = {name: np.concatenate([one[name], other[name]]) for name in self._dtypes}
        order = np.argsort(both["key"], kind="stable")
        self._levels[-2:] = [{name: column[order] for name, column in both.items()}]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All keys in order, with their days and values."""
        while len(self._levels) > 1:
            self._merge()
        if not self._levels:
            return {name: np.empty(0, dtype) for name, dtype in self._dtypes.items()}
        return dict(self._levels[0])

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes what `to_arrays` gave."""
        level = {name: np.ascontiguousarray(arrays[name], dtype) for name, dtype in self._dtypes.items()}
        self._levels = [level] if len(level["key"]) else []
