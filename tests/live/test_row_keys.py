"""The rows that a journal keeps, against a loop over them with dictionaries; however they are sent and read."""

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pytest
import sqlalchemy as sql
from hypothesis import given, settings
from hypothesis import strategies as st

from mmoe_rec.live.journal import _KEYS, _REQUESTS, KEY_RETENTION_DAYS, Batch, Journal
from mmoe_rec.live.journal_rows import JournalRows, join_by_log, make_batch
from mmoe_rec.log.columns import UTC_MICROSECONDS
from mmoe_rec.settings.schema import Schema
from tests.log.small_logs import DAY, START, schema_of

FEATURES = {
    "item": {"kind": "id", "column": "item"},
    "viewed": {"kind": "counter", "events": "views", "by": ["user"], "outputs": ["log_sum"]},
    "clicked": {"kind": "counter", "task": "click", "by": ["item"]},
}
VIEWS = {"views": {"path": "views", "time": "at"}}


def _schema(request: str | None = "request", scope: str = "log") -> Schema:
    columns = {"user": "user", "candidate": "item", "time": "time", "request": request, "request_scope": scope}
    return schema_of(FEATURES, columns=columns, events=VIEWS)


def _table(rows: Sequence[dict], log_name: str | None = None) -> pa.Table:
    """Days as times; columns that no row has are left out."""
    rows = [{"request": 1, "user": 1, "item": 1, "click": 0.0, "liked": None, "spent": 0.5, **row} for row in rows]
    if log_name is not None:
        rows = [{"user": row["user"], "at": row["time"], "event_id": row.get("event_id")} for row in rows]
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    time = "time" if log_name is None else "at"
    columns[time] = pa.array([START + round(day * DAY) for day in columns[time]]).cast(UTC_MICROSECONDS)
    for name in ("click", "liked", "spent"):
        if name in columns:
            columns[name] = pa.array(columns[name], pa.float64())
    return pa.table(columns)


class Taken:
    """A journal that takes rows of a schema's logs, and the rows that it then holds."""

    def __init__(self, address: object, schema: Schema) -> None:
        self.journal, self.schema = Journal(str(address)), schema

    def take(self, *tables: pa.Table, log_name: str | None = None) -> JournalRows:
        """Append tables, a batch each, and return the rows of them that count."""
        before = self.journal.last_position()
        self.journal.append(*(make_batch(log_name, table, self.schema) for table in tables))
        return join_by_log(self.journal.read(before), self.schema)[log_name]

    def rows_of(self, *tables: pa.Table) -> dict:
        """The items that count, and the number of duplicates."""
        before = self.journal.last_position()
        items = self.take(*tables).table["item"].to_pylist()
        return {"items": items, "duplicates": sum(item.duplicates for item in self.journal.read(before))}


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


def test_without_request_ids_a_users_rows_of_one_instant_are_a_request(journal):
    rows = [{"item": 1, "time": 1}, {"item": 1, "time": 1.1}, {"item": 1, "time": 1, "user": 2}, {"item": 1, "time": 1}]
    assert Taken(journal, _schema(request=None)).rows_of(_table(rows))["duplicates"] == 1


def test_request_ids_of_a_user(journal):
    rows = [{"time": 1}, {"time": 1, "user": 2}, {"time": 1, "user": 2}]
    assert Taken(journal, _schema(scope="user")).rows_of(_table(rows)) == {"items": [1, 1], "duplicates": 1}


def test_a_request_of_another_user_does_not_count(address):
    taken = Taken(address, _schema())
    actual = taken.rows_of(_table([{"time": 1, "item": 1}, {"time": 1, "item": 2, "user": 2}]))
    assert actual == {"items": [1], "duplicates": 1}
    actual = taken.rows_of(_table([{"time": 1, "item": 3, "user": 2}, {"time": 1, "item": 4}]))
    assert actual == {"items": [4], "duplicates": 1}


def test_events_count_once_by_their_id(address):
    taken = Taken(address, _schema())
    rows = [
        {"time": 1, "event_id": id_, "user": user}
        for id_, user in ((1, 1), (2, 1), (1, 1), (1, 2), (None, 1), (None, 1))
    ]
    views = taken.take(_table(rows, "views"), log_name="views")
    assert len(views.table) == 4
    assert views.table.column_names == ["at", "user"]
    assert taken.rows_of(_table([{"time": 1, "event_id": 1}]))["items"] == [1], "ids are a log's own"


def test_an_events_own_column_of_that_name_is_no_id(journal):
    schema = schema_of(
        FEATURES, columns={"user": "user", "candidate": "item", "time": "time", "request": "event_id"}, events=VIEWS
    )
    rows = [{"event_id": 1, "item": item, "time": 1} for item in (1, 2, 2)]
    assert Taken(journal, schema).rows_of(_table(rows))["items"] == [1, 2]


def test_batches_of_unknown_logs_are_left_out():
    batches = [Batch("views", 0, _table([{"time": 1}] * 3, "views")), Batch("other", 0, pa.table({"x": [1, 2]}))]
    assert join_by_log(batches, _schema()).keys() == {"views"}


def test_columns_that_lack_are_null_and_others_stay(journal):
    taken = Taken(journal, _schema()).take(_table([{"time": 1, "colour": "red", "event_id": 1}]))
    assert taken.table["colour"].to_pylist() == ["red"]
    assert "event_id" not in taken.table.column_names
    table = _table([{"time": 1, "request": 2}]).drop_columns(["liked"])
    assert Taken(journal, _schema()).take(table).table["liked"].null_count == 1


def test_calls_that_share_a_transaction_and_processes_know_each_others_rows(address):
    first, second = Taken(address, _schema()), Taken(address, _schema())
    tables = [_table([{"time": 1, "item": 1}]), _table([{"time": 1, "item": 1}, {"time": 1, "item": 2}])]
    assert first.rows_of(*tables)["items"] == [1, 2]
    assert second.rows_of(*tables) == {"items": [], "duplicates": 3}, "a batch of duplicates alone has a position"
    assert second.journal.last_position() == 4


def test_keys_are_forgotten_after_a_month(address, monkeypatch):
    taken, table, day = Taken(address, _schema()), _table([{"time": 1, "event_id": 3}]), 86_400_000_000
    taken.journal.append(make_batch(None, table, taken.schema, accepted_at=100 * day))
    for now, keys in ((100 + KEY_RETENTION_DAYS, 2), (101 + KEY_RETENTION_DAYS, 0)):
        monkeypatch.setattr(time, "time_ns", lambda now=now: now * day * 1_000)
        taken.journal.forget_old_keys()
        with taken.journal.read_transaction() as connection:
            assert len(connection.execute(sql.select(_KEYS)).all()) == keys
            assert len(connection.execute(sql.select(_REQUESTS)).all()) == keys // 2
    assert taken.rows_of(table)["items"] == [1]


class _Naive:
    """One row after the other, with dictionaries."""

    def __init__(self) -> None:
        self.seen: set = set()
        self.requests: dict = {}
        self.duplicates, self.rows = 0, list[tuple]()

    def take(self, rows: Sequence[dict]) -> None:
        accepted = []
        for row in rows:
            keys = [("id", row["event_id"])] if row["event_id"] is not None else []
            keys.append(("row", row["request"], row["item"]))
            user = self.requests.get(row["request"], (row["user"], None))[0]
            if self.seen.intersection(keys) or user != row["user"]:
                self.duplicates += 1
            else:
                self.seen.update(keys)
                self.requests.setdefault(row["request"], (row["user"], None))
                accepted.append(row)
        for row in accepted:
            user, time = self.requests[row["request"]]
            if time is None:
                time = min(item["time"] for item in accepted if item["request"] == row["request"])
                self.requests[row["request"]] = user, time
            self.rows.append((row["request"], row["item"], row["user"], time))


ROWS = st.fixed_dictionaries(
    {
        "request": st.integers(0, 5),
        "item": st.integers(0, 3),
        "user": st.sampled_from([1, 1, 1, 2]),
        "click": st.sampled_from([0.0, 1.0, None]),
        "spent": st.sampled_from([0.5, 1.5]),
        "event_id": st.one_of(st.none(), st.integers(0, 6)),
        "time": st.integers(0, 40).map(lambda eighths: eighths / 8),
    }
)


@settings(max_examples=100, deadline=None)
@given(batches=st.lists(st.lists(ROWS, min_size=1, max_size=6), min_size=1, max_size=12), data=st.data())
def test_as_a_loop_over_rows_does(batches, data):
    """In calls and reads of any size."""
    naive, schema = _Naive(), _schema()
    for batch in batches:
        naive.take(batch)
    with TemporaryDirectory() as folder:
        taken, waiting = Taken(f"{folder}/journal.db", schema), [_table(batch) for batch in batches]
        while waiting:
            size = data.draw(st.integers(1, len(waiting)))
            taken.take(*waiting[:size])
            waiting = waiting[size:]
        duplicates, rows, position = 0, list[tuple](), 0
        while read := taken.journal.read(position, max_rows=data.draw(st.integers(1, 20))):
            actual, position = join_by_log(read, schema)[None], read[-1].position
            duplicates += sum(item.duplicates for item in read)
            days = ((actual.to_log_rows(schema).times() - START) / DAY).tolist()
            rows += zip(*(actual.table[name].to_pylist() for name in ("request", "item", "user")), days, strict=True)
    assert duplicates == naive.duplicates
    assert [row[:3] for row in rows] == [row[:3] for row in naive.rows]
    np.testing.assert_allclose([row[3] for row in rows], [row[3] for row in naive.rows])
