"""Which rows of a journal count: each row of a request and candidate once, in the journal's order.

Everything follows from the batches and their order alone, however they are read: so all processes that read a journal,
and the files that are written of it, hold the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from mmoe_rec.errors import UserError
from mmoe_rec.live.journal import Batch
from mmoe_rec.log.columns import UTC_MICROSECONDS, column_uses, event_uses
from mmoe_rec.log.hashing import combine, hash_column, mix
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


@dataclass
class Counts:
    """Rows by what became of them.

    accepted: they count; duplicate: they came before with the same labels; conflict: they came before with other
    labels, or their request is another user's. Of the accepted ones, out_of_order: earlier than a row before; old: so
    much earlier that whether they came before is not remembered.
    """

    accepted: int = 0
    duplicate: int = 0
    conflict: int = 0
    out_of_order: int = 0
    old: int = 0

    def add(self, other: Counts) -> None:
        """Adds other rows."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass(frozen=True)
class NewRows:
    """Rows that count, in the journal's order. table: the columns that the log must have, null where not given."""

    source: str | None
    table: pa.Table
    counts: Counts

    @staticmethod
    def together(parts: Sequence[NewRows]) -> NewRows:
        """Those of one log as one."""
        counts = Counts()
        for each in parts:
            counts.add(each.counts)
        tables = [each.table for each in parts]
        return NewRows(parts[0].source, pa.concat_tables(tables, promote_options="default").combine_chunks(), counts)

    def rows(self, schema: Schema) -> LogRows:
        """As features read them."""
        return LogRows(self.table, schema) if self.source is None else event_rows(self.table, schema, self.source)

    def late(self, schema: Schema, as_of: int) -> int:
        """How many rows had become known, by at least one label, at `as_of` (microseconds) already."""
        rows = self.rows(schema)
        if self.source is not None:
            return int((known_at(rows.times(), 0) <= as_of).sum())
        late = np.zeros(len(rows), bool)
        for task in schema.tasks.values():
            late |= ~np.isnan(rows.labels(task, _FOREVER)) & (known_at(rows.times(), maturity(task, schema)) <= as_of)
        return int(late.sum())


class _Source:
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
        self._uses: dict[str | None, dict[str, Use]] = {None: column_uses(schema)}
        self._uses |= {name: event_uses(schema, name) for name in schema.events}
        self._sources = {source: _Source() for source in self._uses}
        self.unknown: dict[str, int] = {}
        """Log of events that the schema does not have -> rows that were left out."""

    @property
    def sources(self) -> list[str | None]:
        """The logs that the schema has, None for the interaction log."""
        return list(self._uses)

    def __len__(self) -> int:
        """Keys that are remembered."""
        return sum(len(store) for source in self._sources.values() for store in source.stores.values())

    def filter(self, batches: Sequence[Batch]) -> dict[str | None, NewRows]:
        """The rows that count, by log; those of logs that the schema does not have are `unknown`.

        Raises UserError where the columns of batches do not fit the schema.
        """
        found = {}
        for batch in batches:
            if batch.source not in self._uses:
                self.unknown[str(batch.source)] = self.unknown.get(str(batch.source), 0) + len(batch)
        for source in self._uses:
            mine = [batch for batch in batches if batch.source == source]
            if mine:
                found[source] = self._filter(source, mine)
        return found

    def to_arrays(self, source: str | None) -> dict[str, np.ndarray]:
        """What is remembered of one log: the same for the same batches, in however many steps they came."""
        log = self._sources[source]
        arrays = {"newest": np.array(log.newest)}
        for store, keys in log.stores.items():
            columns = keys.to_arrays(self._since(log.newest))
            arrays |= {f"{store}.{column}": values for column, values in columns.items()}
        return arrays

    def restore(self, source: str | None, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes what `to_arrays` gave. Raises KeyError for anything else."""
        log = self._sources[source]
        log.newest = int(arrays["newest"])
        for store, keys in log.stores.items():
            begin = f"{store}."
            keys.restore({name.removeprefix(begin): each for name, each in arrays.items() if name.startswith(begin)})

    def newest(self, source: str | None) -> int:
        """The latest time of a log's rows so far, microseconds; the least int64 before there are any."""
        return self._sources[source].newest

    def _since(self, newest: int) -> int:
        return newest // MICROSECONDS_PER_DAY - self.forget_after_days

    def _filter(self, name: str | None, batches: Sequence[Batch]) -> NewRows:
        source, time = self._sources[name], self._time(name)
        table = self._together(name, batches)
        times = LogRows(table, self.schema).times(time)
        of = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
        before = np.maximum.accumulate(np.append(source.newest, times))[:-1]
        latest = np.full(len(batches), _NEVER)
        np.maximum.at(latest, of, times)
        latest = np.maximum(np.maximum.accumulate(latest), source.newest)
        # The batches of one latest day together: what is remembered is the same for all of them.
        day = latest // MICROSECONDS_PER_DAY
        edges = [0, *(np.flatnonzero(day[1:] != day[:-1]) + 1).tolist(), len(batches)]
        verdict, settled = np.zeros(len(times), np.int8), times.copy()
        hashed = _HashedRows.of(table, self.schema, name, self._uses[name])
        for begin, end in pairwise(edges):
            rows = np.flatnonzero((of >= begin) & (of < end))
            since = int(day[begin]) - self.forget_after_days
            if latest[begin] // MICROSECONDS_PER_DAY != source.newest // MICROSECONDS_PER_DAY:
                for known in source.stores.values():
                    known.forget(since)
            verdict[rows] = self._judge(source, hashed.take(rows), int(day[begin]), since)
            kept = rows[verdict[rows] == COUNTS]
            if hashed.request is not None:
                request, user = hashed.request[kept], hashed.user[kept]
                settled[kept] = _settle(
                    source.stores["requests"], request, user, times[kept], of[kept], int(day[begin]), since
                )
            source.newest = int(latest[end - 1])
        kept = np.flatnonzero(verdict == COUNTS)
        horizon = (before[kept] // MICROSECONDS_PER_DAY) - self.forget_after_days
        counts = Counts(
            len(kept),
            int((verdict == DUPLICATE).sum()),
            int((verdict == CONFLICT).sum()),
            int((times[kept] < before[kept]).sum()),
            int((times[kept] // MICROSECONDS_PER_DAY < horizon).sum()),
        )
        if (settled != times).any():
            table = table.set_column(table.column_names.index(time), time, pa.array(settled).cast(UTC_MICROSECONDS))
        table = table.select(list(self._uses[name]))
        return NewRows(name, table if len(kept) == len(times) else table.take(pa.array(kept)), counts)

    def _time(self, name: str | None) -> str:
        return self.schema.columns.time if name is None else self.schema.events[name].time

    def _together(self, name: str | None, batches: Sequence[Batch]) -> pa.Table:
        try:
            table = pa.concat_tables([batch.table for batch in batches], promote_options="default").combine_chunks()
        except pa.ArrowException as error:
            raise UserError(f"rows of the journal do not fit together: {str(error).splitlines()[0]}") from None
        for column in self._uses[name]:
            if column not in table.column_names:
                table = table.append_column(column, pa.nulls(len(table)))
        return table

    def _judge(self, source: _Source, rows: _HashedRows, day: int, since: int) -> np.ndarray:
        """(N,) what becomes of each row. Only those whose keys were seen, here or before, are looked at one by one."""
        looks = {name: _Look.up(source.stores[name], key, valid, since) for name, (key, valid) in rows.keys.items()}
        special = np.zeros(len(rows.content), bool)
        for look in looks.values():
            special |= look.found | look.repeated
        users: tuple[np.ndarray, np.ndarray] | None = None
        if rows.request is not None:
            known, values = source.stores["requests"].find(rows.request, since)
            users = known, values["user"]
            special |= _have_several_users(rows, known, values["user"])
        verdict = np.zeros(len(rows.content), np.int8)
        if special.any():
            verdict[special] = _judge_one_by_one(rows, looks, users, np.flatnonzero(special))
        for name, (key, valid) in rows.keys.items():
            new = np.flatnonzero((verdict == COUNTS) & valid)
            source.stores[name].add(key[new], day, since, content=rows.content[new])
        return verdict


@dataclass(frozen=True)
class _HashedRows:
    """N rows as hashes. content: (N,) uint32 of what a duplicate repeats; keys: store -> (N,) uint64 keys, and which
    rows have one; request, user: (N,) uint64 where requests have ids."""

    content: np.ndarray
    keys: dict[str, tuple[np.ndarray, np.ndarray]]
    request: np.ndarray | None
    user: np.ndarray

    @staticmethod
    def of(table: pa.Table, schema: Schema, name: str | None, uses: Mapping[str, str]) -> _HashedRows:
        rows, keys = LogRows(table, schema), {}
        every = np.ones(len(rows), bool)
        if rows.has(EVENT_ID) and EVENT_ID not in uses:
            events = rows.column(EVENT_ID)
            keys["events"] = hash_column(events), ~events.is_null().to_numpy(zero_copy_only=False)
        if name is not None:
            return _HashedRows(_content(rows, uses), keys, None, every)
        request = rows.request_hashes()
        keys["rows"] = rows.row_hashes(), every
        user = rows.hashes([schema.columns.user])
        return _HashedRows(_content(rows, _labels(schema)), keys, request if schema.columns.request else None, user)

    def take(self, places: np.ndarray) -> _HashedRows:
        """The rows at some places."""
        keys = {name: (key[places], valid[places]) for name, (key, valid) in self.keys.items()}
        request = None if self.request is None else self.request[places]
        return _HashedRows(self.content[places], keys, request, self.user[places])


def _labels(schema: Schema) -> dict[str, None]:
    """The columns that decide labels."""
    columns = dict.fromkeys(task.label for task in schema.tasks.values())
    return columns | {task.observed_when.column: None for task in schema.tasks.values() if task.observed_when}


def _content(rows: LogRows, columns: Mapping[str, object]) -> np.ndarray:
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


@dataclass(frozen=True)
class _Look:
    """Of N keys: which were found, their content then, and which are among them several times."""

    found: np.ndarray
    content: np.ndarray
    repeated: np.ndarray

    @staticmethod
    def up(known: KeyStore, key: np.ndarray, valid: np.ndarray, since: int) -> _Look:
        found, values = known.find(key, since)
        _, inverse, count = np.unique(key[valid], return_inverse=True, return_counts=True)
        repeated = np.zeros(len(key), bool)
        repeated[valid] = count[inverse] > 1
        return _Look(found & valid, values["content"], repeated)


def _have_several_users(rows: _HashedRows, known: np.ndarray, before: np.ndarray) -> np.ndarray:
    """(N,) whether some row of the same request has another user, here or before."""
    assert rows.request is not None
    _, first, inverse = np.unique(rows.request, return_index=True, return_inverse=True)
    other = (rows.user != rows.user[first][inverse]) | (known & (rows.user != before))
    several = np.zeros(len(first), bool)
    several[inverse[other]] = True
    return several[inverse]


def _judge_one_by_one(
    rows: _HashedRows, looks: Mapping[str, _Look], users: tuple[np.ndarray, np.ndarray] | None, places: np.ndarray
) -> list[int]:
    """What becomes of the rows at some places, in their order; the others have nothing to do with them."""
    seen: dict[str, dict[int, int]] = {name: {} for name in looks}
    user_of: dict[int, int] = {}
    verdicts = []
    for row in places.tolist():
        content, before = int(rows.content[row]), None
        for name, look in looks.items():
            key, valid = rows.keys[name]
            if before is None and valid[row]:
                before = int(look.content[row]) if look.found[row] else seen[name].get(int(key[row]))
        if before is not None:
            verdicts.append(DUPLICATE if before == content else CONFLICT)
            continue
        if users is not None and rows.request is not None:
            known, user = users
            request, mine = int(rows.request[row]), int(rows.user[row])
            if (int(user[row]) if known[row] else user_of.setdefault(request, mine)) != mine:
                verdicts.append(CONFLICT)
                continue
        for name, (key, valid) in rows.keys.items():
            if valid[row]:
                seen[name][int(key[row])] = content
        verdicts.append(COUNTS)
    return verdicts


def _settle(
    requests: KeyStore,
    request: np.ndarray,
    user: np.ndarray,
    times: np.ndarray,
    of: np.ndarray,
    day: int,
    since: int,
) -> np.ndarray:
    """(N,) times of rows' requests: the earliest in the batch (`of`, rising) with which a request began."""
    if not len(request):
        return times
    distinct, first, inverse = np.unique(request, return_index=True, return_inverse=True)
    begin = of[first]  # `first` is the first row, and batches rise
    earliest = np.full(len(distinct), _FOREVER)
    of_first = of == begin[inverse]
    np.minimum.at(earliest, inverse[of_first], times[of_first])
    known, values = requests.find(distinct, since)
    new = ~known
    requests.add(distinct[new], day, since, time=earliest[new], user=user[first][new])
    return np.where(known, values["time"], earliest)[inverse]


class KeyStore:
    """uint64 keys, each with the day on which it was added, int32, and values in columns of the given dtypes.

    Memory: 12 bytes a key, besides its values. Adding N keys one batch after the other takes O(N log N) in all.
    """

    def __init__(self, **dtypes: type[np.generic]) -> None:
        self._dtypes: dict[str, type[np.generic]] = {"key": np.uint64, "day": np.int32, **dtypes}
        self._levels: list[
            dict[str, np.ndarray]
        ] = []  # each sorted by key, and less than half as long as the one before

    def __len__(self) -> int:
        return sum(len(level["key"]) for level in self._levels)

    def find(self, keys: np.ndarray, since: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Whether each of (N,) keys was added on day `since` or later, (N,) bool; and its values, (N,) each."""
        found = np.zeros(len(keys), bool)
        values = {
            name: np.zeros(len(keys), dtype) for name, dtype in self._dtypes.items() if name not in ("key", "day")
        }
        for level in self._levels:
            place = np.minimum(np.searchsorted(level["key"], keys), len(level["key"]) - 1)
            here = (level["key"][place] == keys) & (level["day"][place] >= since)
            if here.any():
                found |= here
                for name, column in values.items():
                    column[here] = level[name][place[here]]
        return found, values

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
        self._levels = [_kept(level, level["day"] >= since) for level in self._levels]
        self._levels = [level for level in self._levels if len(level["key"])]

    def _merge(self, since: int) -> None:
        one, other = self._levels[-2:]
        del self._levels[-2:]
        both = {name: np.concatenate([one[name], other[name]]) for name in self._dtypes}
        # A key that is in both was added again once it counted as forgotten.
        both = _kept(both, both["day"] >= since)
        order = np.argsort(both["key"], kind="stable")
        if len(order):
            self._levels.append({name: column[order] for name, column in both.items()})

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


def _kept(level: dict[str, np.ndarray], mask: np.ndarray) -> dict[str, np.ndarray]:
    return level if mask.all() else {name: column[mask] for name, column in level.items()}
