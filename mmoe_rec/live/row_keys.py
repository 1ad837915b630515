"""Duplicate rows, found by unique keys in the journal's database while a batch is appended.

Whoever appends has the database to itself, so every row is judged once, in the journal's order, and the journal holds
only the rows that count. All processes that read a journal, and the files that are written of it, hold the same rows.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import sqlalchemy as sql
from sqlalchemy.engine import Connection

from mmoe_rec.log.columns import combine, hash_column, hash_rows, list_label_columns
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY, LogRows
from mmoe_rec.settings.schema import Schema

EVENT_ID = "event_id"
"""The column in which a caller may give an event's ID, where the log has no column of that name."""
REMEMBERED_DAYS = 30
"""A refresh forgets keys of rows that were accepted earlier than this before it."""
_AT_A_TIME = 1_000  # keys of a query; SQLite takes at most 32,766

METADATA = sql.MetaData()
BIG = sql.BigInteger().with_variant(sql.Integer, "sqlite")


def define_table(name: str, keys: str, /, **columns: Any) -> sql.Table:
    """Define a table of a journal whose primary key has the columns that `keys` lists, divided by spaces."""
    made = [
        sql.Column(column, kind, primary_key=column in keys.split(), autoincrement=False, nullable=False)
        for column, kind in columns.items()
    ]
    return sql.Table(f"journal_{name}", METADATA, *made)


KEYS = define_table("keys", "key", key=BIG, content=BIG, day=sql.Integer)
REQUESTS = define_table("requests", "request", request=BIG, user=BIG, time=BIG, day=sql.Integer)


@dataclass(frozen=True)
class RowKeys:
    """Keys of a batch's N rows.

    Attributes:
        time: Name of the column of request or event times.
        times: (N,) microseconds.
        keys: N tuples of keys. A row is known if one of its keys is.
        content: N hashes of the values that a duplicate repeats.
        requests: N requests with their users, None where requests have no IDs.
    """

    time: str
    times: np.ndarray
    keys: list[tuple[int, ...]]
    content: list[int]
    requests: list[tuple[int, int]] | None


@dataclass(frozen=True)
class Judged:
    """Outcomes of a batch's rows.

    Attributes:
        accepted: Numbers of the rows that count.
        times: Times of these rows, microseconds. All rows of a request get one time.
        counts: Rows by outcome: accepted, duplicate, conflict.
    """

    accepted: list[int]
    times: np.ndarray
    counts: Counter[str]


def find_keys(rows: LogRows, source: str | None, columns: Collection[str]) -> RowKeys:
    """Compute the keys of rows of a log.

    Args:
        rows: Rows of the interaction log, or of a log of events.
        source: Name of the log of events, None for the interaction log.
        columns: Columns that the schema reads of the log.
    """
    schema: Schema = rows.schema
    time = schema.columns.time if source is None else schema.events[source].time
    keys: list[tuple[int, ...]] = [()] * len(rows)
    if rows.has(EVENT_ID) and EVENT_ID not in columns:
        ids = rows.column(EVENT_ID)
        events = _signed(np.full(len(rows), _hash_text(f"event {source or ''}")), hash_column(ids))
        keys = [(key,) if valid else () for key, valid in zip(events, ids.is_valid().to_pylist(), strict=True)]
    requests = None
    if source is None:
        keys = [(*events, row) for events, row in zip(keys, _signed(rows.row_hashes()), strict=True)]
        if schema.columns.request is not None:
            users = _signed(rows.hashes([schema.columns.user]))
            requests = list(zip(_signed(rows.request_hashes()), users, strict=True))
    names = list_label_columns(schema) if source is None else columns
    content = hash_rows(pa.table({name: rows.column(name) for name in names}))
    return RowKeys(time, rows.times(time), keys, _signed(content), requests)


def _hash_text(text: str) -> np.uint64:
    return np.uint64(hash_column(pa.array([text]))[0])


def _signed(*hashes: np.ndarray) -> list[int]:
    """Combine (N,) uint64 hashes to integers that SQL can hold."""
    signed: list[int] = combine(hashes).view(np.int64).tolist()
    return signed


def judge(connection: Connection, keys: RowKeys, accepted_at: int) -> Judged:
    """Tell the rows of a batch that count from duplicates and conflicts, and remember their keys.

    A row with a known key is a duplicate if its content is equal, else a conflict. A row whose request came before with
    another user is a conflict, too. The rows of a request get the earliest time of the batch in which it began.
    """
    known = dict(_find(connection, KEYS.c.key, [KEYS.c.content], {key for own in keys.keys for key in own}))
    owners = dict[int, Any]()
    if keys.requests is not None:
        wanted = {request for request, _ in keys.requests}
        found = _find(connection, REQUESTS.c.request, [REQUESTS.c.user, REQUESTS.c.time], wanted)
        owners = {request: (user, time) for request, user, time in found}
    old_requests, counts, accepted = set(owners), Counter[str](), list[int]()
    new_keys, began = list[dict[str, int]](), dict[int, int]()
    day, times = accepted_at // MICROSECONDS_PER_DAY, keys.times.tolist()
    for row, (own, content) in enumerate(zip(keys.keys, keys.content, strict=True)):
        request, user = keys.requests[row] if keys.requests is not None else (0, 0)
        before = next((known[key] for key in own if key in known), None)
        if before is not None:
            counts["duplicate" if before == content else "conflict"] += 1
        elif keys.requests is not None and owners.setdefault(request, (user, 0))[0] != user:
            counts["conflict"] += 1
        else:
            accepted.append(row)
            known.update(dict.fromkeys(own, content))
            new_keys += [{"key": key, "content": content, "day": day} for key in own]
            began[request] = min(times[row], began.get(request, times[row]))
    _insert(connection, KEYS, new_keys)
    settled = keys.times[accepted]
    if keys.requests is not None:
        new = began.keys() - old_requests
        values = [
            {"request": each, "user": owners[each][0], "time": began[each], "day": day} for each in began if each in new
        ]
        _insert(connection, REQUESTS, values)
        of = [keys.requests[row][0] for row in accepted]
        settled = np.array([began[each] if each in new else owners[each][1] for each in of], np.int64)
    counts["accepted"] = len(accepted)
    return Judged(accepted, settled, counts)


def forget_keys(connection: Connection, now: int) -> None:
    """Forget the keys of rows that were accepted more than `REMEMBERED_DAYS` before a moment, microseconds."""
    for table in (KEYS, REQUESTS):
        connection.execute(sql.delete(table).where(table.c.day < now // MICROSECONDS_PER_DAY - REMEMBERED_DAYS))


def _find(
    connection: Connection, key: sql.Column[int], columns: list[sql.Column[int]], wanted: Collection[int]
) -> list[Any]:
    """Select the given columns of keys that are there, after the key."""
    some, found = sorted(wanted), list[Any]()
    for first in range(0, len(some), _AT_A_TIME):
        query = sql.select(key, *columns).where(key.in_(some[first : first + _AT_A_TIME]))
        found += map(tuple, connection.execute(query))
    return found


def _insert(connection: Connection, table: sql.Table, values: list[dict[str, int]]) -> None:
    if values:
        connection.execute(sql.insert(table), values)
