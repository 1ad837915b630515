"""Which rows of a journal count: each row of a request and candidate once, in the journal's order.

Everything follows from the batches and their order alone, however they are read: so all processes that follow a
journal, and the files that are written of it, hold the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
import pyarrow as pa

from mmoe_rec.errors import UserError
from mmoe_rec.journal.known import Known
from mmoe_rec.journal.records import Batch
from mmoe_rec.journal.verdicts import (
    CONFLICT,
    COUNTS,
    DUPLICATE,
    HashedRows,
    Look,
    of_several_users,
    one_by_one,
    settle,
)
from mmoe_rec.log.columns import UTC_MICROSECONDS, column_uses, event_uses
from mmoe_rec.log.reader import event_rows
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY, LogRows, maturity
from mmoe_rec.point_in_time.join import known_at
from mmoe_rec.settings.columns import Use
from mmoe_rec.settings.schema import Schema

FORGET_AFTER_DAYS = 30
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
class Taken:
    """Rows that count, in the journal's order. table: the columns that the log must have, null where not given."""

    source: str | None
    table: pa.Table
    counts: Counts

    @staticmethod
    def together(parts: Sequence[Taken]) -> Taken:
        """Those of one log as one."""
        counts = Counts()
        for each in parts:
            counts.add(each.counts)
        tables = [each.table for each in parts]
        return Taken(parts[0].source, pa.concat_tables(tables, promote_options="default").combine_chunks(), counts)

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
            "events": Known(content=np.uint32),
            "rows": Known(content=np.uint32),
            "requests": Known(time=np.int64, user=np.uint64),
        }


def array_names(source: str) -> list[str]:
    """The arrays in which `Duplicates.to_arrays` gives what is remembered of one log, "" for the interaction log."""
    stores = _Source().stores.items()
    return [f"{source}/newest", *(f"{source}/{name}/{column}" for name, store in stores for column in store.columns)]


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

    def take(self, batches: Sequence[Batch]) -> dict[str | None, Taken]:
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
                found[source] = self._take(source, mine)
        return found

    def to_arrays(self) -> dict[str, np.ndarray]:
        """What is remembered, as arrays: the same for the same batches, however they were taken."""
        arrays = {}
        for name, source in self._sources.items():
            prefix = f"{name or ''}/"
            arrays[f"{prefix}newest"] = np.array(source.newest)
            for store, known in source.stores.items():
                columns = known.to_arrays(self._since(source.newest))
                arrays |= {f"{prefix}{store}/{column}": values for column, values in columns.items()}
        return arrays

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes what `to_arrays` gave; logs that it does not know begin anew. Raises KeyError for anything else."""
        for name, source in self._sources.items():
            prefix = f"{name or ''}/"
            if f"{prefix}newest" in arrays:
                source.newest = int(arrays[f"{prefix}newest"])
                for store, known in source.stores.items():
                    begin = f"{prefix}{store}/"
                    known.restore({key[len(begin) :]: each for key, each in arrays.items() if key.startswith(begin)})

    def newest(self, source: str | None) -> int:
        """The latest time of a log's rows so far, microseconds; the least int64 before there are any."""
        return self._sources[source].newest

    def _since(self, newest: int) -> int:
        return newest // MICROSECONDS_PER_DAY - self.forget_after_days

    def _take(self, name: str | None, batches: Sequence[Batch]) -> Taken:
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
        hashed = HashedRows.of(table, self.schema, name, self._uses[name])
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
                settled[kept] = settle(
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
        return Taken(name, table if len(kept) == len(times) else table.take(pa.array(kept)), counts)

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

    def _judge(self, source: _Source, rows: HashedRows, day: int, since: int) -> np.ndarray:
        """(N,) what becomes of each row. Only those whose keys were seen, here or before, are looked at one by one."""
        looks = {name: Look.up(source.stores[name], key, valid, since) for name, (key, valid) in rows.keys.items()}
        special = np.zeros(len(rows.content), bool)
        for look in looks.values():
            special |= look.found | look.repeated
        users: tuple[np.ndarray, np.ndarray] | None = None
        if rows.request is not None:
            known, values = source.stores["requests"].find(rows.request, since)
            users = known, values["user"]
            special |= of_several_users(rows, known, values["user"])
        verdict = np.zeros(len(rows.content), np.int8)
        if special.any():
            verdict[special] = one_by_one(rows, looks, users, np.flatnonzero(special))
        for name, (key, valid) in rows.keys.items():
            new = np.flatnonzero((verdict == COUNTS) & valid)
            source.stores[name].add(key[new], day, since, content=rows.content[new])
        return verdict
