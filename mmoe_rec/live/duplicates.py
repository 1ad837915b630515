"""Which rows of a journal count: each row of a request and candidate once, in the journal's order.

Everything follows from the batches and their order alone, however they are read: so all processes that read a journal,
and the files that are written of it, hold the same rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from mmoe_rec.errors import UserError
from mmoe_rec.live.journal import Batch
from mmoe_rec.log.columns import UTC_MICROSECONDS, column_uses, combine, event_uses, hash_column, mix
from mmoe_rec.log.files import first_line
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


def list_label_columns(schema: Schema) -> list[str]:
    """The columns that decide labels."""
    tasks = schema.tasks.values()
    conditions = [task.observed_when.column for task in tasks if task.observed_when]
    return list(dict.fromkeys([*(task.label for task in tasks), *conditions]))


@dataclass(frozen=True)
class NewRows:
    """Rows that count, in the journal's order. table: the columns that the log must have, null where not given.

    counts: all rows by what became of them. accepted: they count; duplicate: they came before with the same labels;
    conflict: they came before with other labels, or their request is another user's. Of the accepted ones,
    out_of_order: earlier than a row before; old: so much earlier that whether they came before is not remembered.
    """

    source: str | None
    table: pa.Table
    counts: Counter[str]

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


class _Memory:
    """What is remembered of one log.

    newest: latest time of its rows so far, microseconds; stores: rows by event id, and by request and candidate;
    requests by id.
    """

    def __init__(self) -> None:
        self.newest = _NEVER
        self.stores = {
            "events": KeyStore(content=np.uint32),
            "rows": KeyStore(content=np.uint32),
            "requests": KeyStore(time=np.int64, user=np.uint64),
        }


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
        self._memories = {source: _Memory() for source in self._uses}
        self.unknown: Counter[str] = Counter()
        """Log of events that the schema does not have -> rows that were left out."""

    def __len__(self) -> int:
        """Keys that are remembered."""
        return sum(len(store) for memory in self._memories.values() for store in memory.stores.values())

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
        memory = self._memories[source]
        arrays = {"newest": np.array(memory.newest)}
        for store, keys in memory.stores.items():
            columns = keys.to_arrays(memory.newest // MICROSECONDS_PER_DAY - self.forget_after_days)
            arrays |= {f"{store}.{column}": values for column, values in columns.items()}
        return arrays

    def restore(self, source: str | None, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes what `to_arrays` gave. Raises KeyError for anything else."""
        memory = self._memories[source]
        memory.newest = int(arrays["newest"])
        for store, keys in memory.stores.items():
            begin = f"{store}."
            keys.restore({name.removeprefix(begin): each for name, each in arrays.items() if name.startswith(begin)})

    def newest(self, source: str | None) -> int:
        """The latest time of a log's rows so far, microseconds; the least int64 before there are any."""
        return self._memories[source].newest

    def _filter(self, name: str | None, batches: Sequence[Batch]) -> NewRows:
        memory, uses = self._memories[name], self._uses[name]
        time = self.schema.columns.time if name is None else self.schema.events[name].time
        table = _concat(batches, uses)
        times = LogRows(table, self.schema).times(time)
        rows = _Rows.of(table, self.schema, name, uses, times, [len(batch) for batch in batches])
        before = np.maximum.accumulate(np.append(memory.newest, times))[:-1]
        latest = np.full(len(batches), memory.newest)
        np.maximum.at(latest, rows.batch, times)
        days = np.maximum.accumulate(latest) // MICROSECONDS_PER_DAY
        # The batches of one latest day together: what is remembered is the same for all of them.
        edges = [0, *(np.flatnonzero(days[1:] != days[:-1]) + 1).tolist(), len(batches)]
        verdict, settled = np.zeros(len(times), np.int8), times.copy()
        for begin, end in pairwise(edges):
            places, day = np.flatnonzero((rows.batch >= begin) & (rows.batch < end)), int(days[begin])
            since = day - self.forget_after_days
            if day != memory.newest // MICROSECONDS_PER_DAY:
                for store in memory.stores.values():
                    store.forget(since)
            verdict[places] = _judge(memory, rows.take(places), day, since)
            kept = places[verdict[places] == COUNTS]
            settled[kept] = _settle(memory.stores["requests"], rows.take(kept), day, since)
            memory.newest = max(memory.newest, int(times[places].max()))
        kept = np.flatnonzero(verdict == COUNTS)
        horizon = before[kept] // MICROSECONDS_PER_DAY - self.forget_after_days
        counts = Counter(
            accepted=len(kept),
            duplicate=int((verdict == DUPLICATE).sum()),
            conflict=int((verdict == CONFLICT).sum()),
            out_of_order=int((times[kept] < before[kept]).sum()),
            old=int((times[kept] // MICROSECONDS_PER_DAY < horizon).sum()),
        )
        if (settled != times).any():
            table = table.set_column(table.column_names.index(time), time, pa.array(settled).cast(UTC_MICROSECONDS))
        table = table.select(list(uses))
        return NewRows(name, table if len(kept) == len(times) else table.take(pa.array(kept)), counts)


def _concat(batches: Sequence[Batch], columns: Mapping[str, Use]) -> pa.Table:
    try:
        table = pa.concat_tables([batch.table for batch in batches], promote_options="default").combine_chunks()
    except pa.ArrowException as error:
        raise UserError(f"rows of the journal do not fit together: {first_line(error)}") from None
    for column in columns:
        if column not in table.column_names:
            table = table.append_column(column, pa.nulls(len(table)))
    return table


@dataclass(frozen=True)
class _Rows:
    """N rows as hashes. times: (N,) microseconds; batch: (N,) the number of each row's batch, rising; content: (N,)
    uint32 of what a duplicate repeats; keys: store -> (N,) uint64 keys, and which rows have one; request, user: (N,)
    uint64 where requests have ids."""

    times: np.ndarray
    batch: np.ndarray
    content: np.ndarray
    keys: dict[str, tuple[np.ndarray, np.ndarray]]
    request: np.ndarray | None = None
    user: np.ndarray | None = None

    @staticmethod
    def of(
        table: pa.Table, schema: Schema, name: str | None, uses: Mapping[str, Use], times: np.ndarray, sizes: list[int]
    ) -> _Rows:
        """name: of the log; sizes: of the batches."""
        rows, keys = LogRows(table, schema), {}
        if rows.has(EVENT_ID) and EVENT_ID not in uses:
            events = rows.column(EVENT_ID)
            keys["events"] = hash_column(events), ~events.is_null().to_numpy(zero_copy_only=False)
        if name is None:
            keys["rows"] = rows.row_hashes(), np.ones(len(rows), bool)
        batch = np.repeat(np.arange(len(sizes)), sizes)
        compared = list_label_columns(schema) if name is None else list(uses)
        hashed = _Rows(times, batch, _hash_content(rows, compared), keys)
        if name is not None or schema.columns.request is None:
            return hashed
        return replace(hashed, request=rows.request_hashes(), user=rows.hashes([schema.columns.user]))

    def take(self, places: np.ndarray) -> _Rows:
        """The rows at some places."""
        request, user = (None if each is None else each[places] for each in (self.request, self.user))
        keys = {name: (key[places], valid[places]) for name, (key, valid) in self.keys.items()}
        return _Rows(self.times[places], self.batch[places], self.content[places], keys, request, user)


def _hash_content(rows: LogRows, columns: Sequence[str]) -> np.ndarray:
    """(N,) uint32 hash of some columns' values."""
    hashes = []
    for name in columns:
        column = rows.column(name)
        if pt.is_floating(column.type):
            numbers = rows.numbers(name) + 0.0  # one zero
            hashes.append(np.where(np.isnan(numbers), hash_column(pa.nulls(1))[0], mix(numbers.view(np.uint64))))
        elif pt.is_timestamp(column.type):
            hashes.append(mix(rows.times(name).view(np.uint64)))
        else:
            hashes.append(hash_column(column))
    return (combine(hashes) >> np.uint64(32)).astype(np.uint32)


def _judge(memory: _Memory, rows: _Rows, day: int, since: int) -> np.ndarray:
    """(N,) what becomes of each row. Only those whose keys were seen, here or before, are looked at one by one."""
    special, seen, user_of = np.zeros(len(rows.content), bool), dict[str, dict[int, int]](), dict[int, int]()
    for name, (key, valid) in rows.keys.items():
        known, values = memory.stores[name].find(key, since)
        known &= valid
        special |= known
        special[valid] |= _count(key[valid]) > 1
        seen[name] = dict(zip(key[known].tolist(), values["content"][known].tolist(), strict=True))
    if rows.request is not None and rows.user is not None:
        known, values = memory.stores["requests"].find(rows.request, since)
        special |= known & (values["user"] != rows.user)
        special |= _count(rows.request) != _count(combine([rows.request, rows.user]))
        user_of = dict(zip(rows.request[known].tolist(), values["user"][known].tolist(), strict=True))
    verdict = np.zeros(len(rows.content), np.int8)
    for row in np.flatnonzero(special).tolist():
        content = int(rows.content[row])
        mine = [(seen[name], int(key[row])) for name, (key, valid) in rows.keys.items() if valid[row]]
        before = next((contents[at] for contents, at in mine if at in contents), None)
        if before is not None:
            verdict[row] = DUPLICATE if before == content else CONFLICT
            continue
        if rows.request is not None and rows.user is not None:
            user = int(rows.user[row])
            if user_of.setdefault(int(rows.request[row]), user) != user:
                verdict[row] = CONFLICT
                continue
        for contents, at in mine:
            contents[at] = content
    for name, (key, valid) in rows.keys.items():
        new = np.flatnonzero((verdict == COUNTS) & valid)
        memory.stores[name].add(key[new], day, since, content=rows.content[new])
    return verdict


def _count(keys: np.ndarray) -> np.ndarray:
    """(N,) how often each of (N,) keys is among them."""
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return counts[inverse]


def _settle(requests: KeyStore, rows: _Rows, day: int, since: int) -> np.ndarray:
    """(N,) times of rows' requests: the earliest in the batch with which a request began."""
    if rows.request is None or rows.user is None or not len(rows.times):
        return rows.times
    distinct, first, inverse = np.unique(rows.request, return_index=True, return_inverse=True)
    earliest = np.full(len(distinct), _FOREVER)
    of_first = rows.batch == rows.batch[first][inverse]  # `first` is the first row, and batches rise
    np.minimum.at(earliest, inverse[of_first], rows.times[of_first])
    known, values = requests.find(distinct, since)
    new = ~known
    requests.add(distinct[new], day, since, time=earliest[new], user=rows.user[first][new])
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

    def __len__(self) -> int:
        return sum(len(level["key"]) for level in self._levels)

    def find(self, keys: np.ndarray, since: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Whether each of (N,) keys was added on day `since` or later, (N,) bool; and its values, (N,) each."""
        is_there = np.zeros(len(keys), bool)
        values = {name: np.zeros(len(keys), dtype) for name, dtype in self._values.items()}
        for level in self._levels:
            place = np.minimum(np.searchsorted(level["key"], keys), len(level["key"]) - 1)
            here = (level["key"][place] == keys) & (level["day"][place] >= since)
            is_there |= here
            for name, column in values.items():
                column[here] = level[name][place[here]]
        return is_there, values

    def add(self, keys: np.ndarray, day: int, since: int, **values: np.ndarray) -> None:
        """Adds distinct keys, none of which `find` finds; forgets those before day `since` where they are merged."""
        if not len(keys):
            return
        order = np.argsort(keys)
        level = {"key": keys[order], "day": np.full(len(keys), day, np.int32)}
        self._levels.append(level | {name: column[order] for name, column in values.items()})
        while len(self._levels) > 1 and len(self._levels[-2]["key"]) < 2 * len(self._levels[-1]["key"]):
            self._merge(since)

    def forget(self, since: int) -> None:
        """Forgets the keys that were added before day `since`."""
        levels = [_filter_level(level, level["day"] >= since) for level in self._levels]
        self._levels = [level for level in levels if len(level["key"])]

    def _merge(self, since: int) -> None:
        one, other = self._levels[-2:]
        both = {name: np.concatenate([one[name], other[name]]) for name in self._dtypes}
        # A key that is in both was added again once it counted as forgotten.
        both = _filter_level(both, both["day"] >= since)
        order = np.argsort(both["key"], kind="stable")
        self._levels[-2:] = [{name: column[order] for name, column in both.items()}] if len(order) else []

    def to_arrays(self, since: int) -> dict[str, np.ndarray]:
        """All keys of day `since` or later, by key, with their days and values."""
        while len(self._levels) > 1:
            self._merge(since)
        self.forget(since)
        if not self._levels:
            return {name: np.empty(0, dtype) for name, dtype in self._dtypes.items()}
        return dict(self._levels[0])

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes what `to_arrays` gave."""
        level = {name: np.ascontiguousarray(arrays[name], dtype) for name, dtype in self._dtypes.items()}
        self._levels = [level] if len(level["key"]) else []


def _filter_level(level: dict[str, np.ndarray], mask: np.ndarray) -> dict[str, np.ndarray]:
    return level if mask.all() else {name: column[mask] for name, column in level.items()}
