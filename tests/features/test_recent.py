"""Latest values that move on with rows, against a loop over all rows."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mmoe_rec.features.latest import LatestParts, RecentValues
from mmoe_rec.log.request_rows import Stored
from mmoe_rec.log.rows import LogRows
from tests.log.small_logs import DAY, START, log_rows, random_log, schema_of

FEATURES: dict[str, Any] = {
    "item": {"kind": "id", "column": "item"},
    "brand": {"kind": "id", "column": "brand"},
    "price": {"kind": "numeric", "column": "price"},
    "tags": {"kind": "ids", "column": "tags"},
    "age": {"kind": "id", "column": "age"},
}
SCHEMA = schema_of(FEATURES)
AS_OF = START + 5 * DAY
ATTRIBUTES = {"user": ["user", "age"], "candidate": ["item", "brand", "price", "tags"]}


def _rank(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple((each is not None, repr(each) if isinstance(each, list) else each) for each in values)


def _latest(rows: list[dict[str, Any]], columns: list[str]) -> dict[Any, tuple[int, tuple[Any, ...]]]:
    found: dict[Any, tuple[int, tuple[Any, ...]]] = {}
    for row in rows:
        values = tuple(row[name] for name in columns)
        time = int(np.datetime64(row["time"].replace(tzinfo=None), "us").astype(np.int64))
        before = found.get(values[0])
        if before is None or (time, _rank(values)) >= (before[0], _rank(before[1])):
            found[values[0]] = time, values
    return found


def _naive(
    before: list[dict[str, Any]], after: list[dict[str, Any]], columns: list[str], timed: bool
) -> dict[Any, Any]:
    """What is known of each key: the latest of all rows; where times of old rows are not known, old rows, then those
    that are later than all of them, or of keys that the old rows do not have."""
    old = _latest(before, columns)
    if timed:
        return {key: values for key, (_, values) in _latest([*before, *after], columns).items()}
    new = _latest([row for row in after if row[columns[0]] not in old or _time(row) > AS_OF], columns)
    return {key: values for key, (_, values) in (old | new).items()}


def _time(row: dict[str, Any]) -> int:
    return int(np.datetime64(row["time"].replace(tzinfo=None), "us").astype(np.int64))


def _values(column: Any) -> list[Any]:
    return (column.array() if isinstance(column, Stored) else column).to_pylist()


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("strings", [False, True])
@pytest.mark.parametrize("role", ["user", "candidate"])
@pytest.mark.parametrize("seed", range(6))
def test_rows_in_any_batches_are_as_all_rows_at_once(seed: int, role: Any, strings: bool, timed: bool) -> None:
    rng = np.random.default_rng(seed)
    table = random_log(seed, rows=250, strings=strings)
    early = table["time"].cast(pa.int64()).to_numpy() <= AS_OF
    late = rng.random(250) < 0.1  # rows of the past that come with the new ones
    before, after = table.filter(pa.array(early & ~late)), table.filter(pa.array(~early | late))
    after = after.take(pa.array(rng.permutation(len(after))))
    columns = ATTRIBUTES[role]
    parts = LatestParts(SCHEMA, role)
    parts.add(log_rows(before.slice(0, 60), SCHEMA))  # so that many keys are new
    latest, times = parts.latest()
    recent = RecentValues(columns[0], latest, times if timed else None)
    start = 0
    while start < len(after):
        size = int(rng.integers(1, 30))
        recent = recent.with_changes(recent.changes(log_rows(after.slice(start, size), SCHEMA), SCHEMA, AS_OF))
        start += size
    want = _naive(before.slice(0, 60).to_pylist(), after.to_pylist(), columns, timed)
    keys = table[columns[0]].unique()
    asked = pa.concat_arrays([keys, keys.slice(0, 3)])
    found = recent.completed({columns[0]: asked})
    key_column = found[columns[0]]
    assert isinstance(key_column, Stored)
    for name, place in zip(columns[1:], range(1, len(columns)), strict=True):
        expected = [want[key][place] if key in want else None for key in asked.to_pylist()]
        assert _values(found[name]) == expected, name
    assert key_column.unknown.tolist() == [key not in want for key in asked.to_pylist()]


def test_what_functions_make_of_values_moves_on(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = log_rows(random_log(2, rows=80), SCHEMA)
    parts = LatestParts(SCHEMA, "candidate")
    parts.add(LogRows(rows.table.slice(0, 40), SCHEMA))
    base = parts.finish()
    recent = RecentValues(base.key, base.table)
    keys = rows.column("item")

    def lengths(values: pa.Array) -> np.ndarray:
        return np.array([-1 if each is None else len(each) for each in values.to_pylist()])

    def asked() -> tuple[list[int], list[int]]:
        column = recent.completed({"item": keys})["tags"]
        assert isinstance(column, Stored)
        return column.each(lengths).tolist(), lengths(column.array()).tolist()

    first = asked()
    assert first[0] == first[1]
    recent = recent.with_changes(recent.changes(LogRows(rows.table.slice(40), SCHEMA), SCHEMA, START))
    later = asked()
    assert later[0] == later[1] != first[1]
