"""What becomes of rows whose keys came before: as hashes, many at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from mmoe_rec.journal.known import Known
from mmoe_rec.log.hashing import combine, hash_column, mix
from mmoe_rec.log.rows import LogRows
from mmoe_rec.settings.schema import Schema

EVENT_ID = "event_id"
"""The column in which a caller may give an event's id, where the log has no column of that name."""
COUNTS, DUPLICATE, CONFLICT = 0, 1, 2
_FOREVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class HashedRows:
    """N rows as hashes. content: (N,) uint32 of what a duplicate repeats; keys: store -> (N,) uint64 keys, and which
    rows have one; request, user: (N,) uint64 where requests have ids."""

    content: np.ndarray
    keys: dict[str, tuple[np.ndarray, np.ndarray]]
    request: np.ndarray | None
    user: np.ndarray

    @staticmethod
    def of(table: pa.Table, schema: Schema, name: str | None, uses: Mapping[str, str]) -> HashedRows:
        rows, keys = LogRows(table, schema), {}
        every = np.ones(len(rows), bool)
        if rows.has(EVENT_ID) and EVENT_ID not in uses:
            events = rows.column(EVENT_ID)
            keys["events"] = hash_column(events), ~events.is_null().to_numpy(zero_copy_only=False)
        if name is not None:
            return HashedRows(_content(rows, uses), keys, None, every)
        request = rows.request_hashes()
        keys["rows"] = rows.row_hashes(), every
        user = rows.hashes([schema.columns.user])
        return HashedRows(_content(rows, _labels(schema)), keys, request if schema.columns.request else None, user)

    def take(self, places: np.ndarray) -> HashedRows:
        """The rows at some places."""
        keys = {name: (key[places], valid[places]) for name, (key, valid) in self.keys.items()}
        request = None if self.request is None else self.request[places]
        return HashedRows(self.content[places], keys, request, self.user[places])


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
class Look:
    """Of N keys: which were found, their content then, and which are among them several times."""

    found: np.ndarray
    content: np.ndarray
    repeated: np.ndarray

    @staticmethod
    def up(known: Known, key: np.ndarray, valid: np.ndarray, since: int) -> Look:
        found, values = known.find(key, since)
        _, inverse, count = np.unique(key[valid], return_inverse=True, return_counts=True)
        repeated = np.zeros(len(key), bool)
        repeated[valid] = count[inverse] > 1
        return Look(found & valid, values["content"], repeated)


def of_several_users(rows: HashedRows, known: np.ndarray, before: np.ndarray) -> np.ndarray:
    """(N,) whether some row of the same request has another user, here or before."""
    assert rows.request is not None
    _, first, inverse = np.unique(rows.request, return_index=True, return_inverse=True)
    other = (rows.user != rows.user[first][inverse]) | (known & (rows.user != before))
    several = np.zeros(len(first), bool)
    several[inverse[other]] = True
    return several[inverse]


def one_by_one(
    rows: HashedRows, looks: Mapping[str, Look], users: tuple[np.ndarray, np.ndarray] | None, places: np.ndarray
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


def settle(
    requests: Known,
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
