"""What counts of a journal's rows, against a loop over them with dictionaries; however they are read."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmoe_rec.live.duplicates import Duplicates, KeyStore
from mmoe_rec.live.journal import Batch
from mmoe_rec.log.columns import UTC_MICROSECONDS
from mmoe_rec.settings.schema import Schema
from tests.log.small_logs import DAY, START, schema_of

FEATURES = {
    "item": {"kind": "id", "column": "item"},
    "viewed": {"kind": "counter", "events": "views", "by": ["user"], "outputs": ["positives"]},
    "clicked": {"kind": "counter", "task": "click", "by": ["item"]},
}
VIEWS = {"views": {"path": "views", "time": "at"}}


def _schema(request: str | None = "request", scope: str = "log") -> Schema:
    columns = {"user": "user", "candidate": "item", "time": "time", "request": request, "request_scope": scope}
    return schema_of(FEATURES, columns=columns, events=VIEWS)


def _batch(rows: Sequence[dict], source: str | None = None) -> Batch:
    """Days as times; columns that no row has are left out."""
    rows = [{"request": 1, "user": 1, "item": 1, "click": 0.0, "liked": None, "spent": 0.5, **row} for row in rows]
    if source is not None:
        rows = [{"user": row["user"], "at": row["time"], "event_id": row.get("event_id")} for row in rows]
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    time = "time" if source is None else "at"
    columns[time] = pa.array([START + round(day * DAY) for day in columns[time]]).cast(UTC_MICROSECONDS)
    for name in ("click", "liked", "spent"):
        if name in columns:
            columns[name] = pa.array(columns[name], pa.float64())
    return Batch(source, 0, pa.table(columns))


def _taken(duplicates: Duplicates, *batches: Batch) -> dict:
    taken = duplicates.filter(batches)[None]
    return {"items": taken.table["item"].to_pylist(), **taken.counts}


def _arrays(duplicates: Duplicates) -> dict[tuple[str | None, str], np.ndarray]:
    return {(log, name): each for log in duplicates.sources for name, each in duplicates.to_arrays(log).items()}


def _restore(duplicates: Duplicates, arrays: dict[tuple[str | None, str], np.ndarray]) -> None:
    for log in duplicates.sources:
        duplicates.restore(log, {name: each for (of, name), each in arrays.items() if of == log})


@pytest.mark.parametrize("name", ["click", "liked", "spent"])
def test_every_label_decides_whether_rows_are_equal(name):
    duplicates = Duplicates(_schema())
    pairs = ((0.0, 1.0, 1), (0.0, -0.0, 0), (None, 0.0, 1), (None, None, 0), (1.0, None, 1))
    for request, (before, after, conflict) in enumerate(pairs):
        rows = [_batch([{"request": request, "time": 1, name: value}]) for value in (before, after)]
        found = _taken(duplicates, *rows)
        assert (found["accepted"], found["conflict"], found["duplicate"]) == (1, conflict, 1 - conflict)


def test_without_request_ids_a_users_rows_of_one_instant_are_a_request():
    duplicates = Duplicates(_schema(request=None))
    rows = [{"item": 1, "time": 1}, {"item": 1, "time": 1.1}, {"item": 1, "time": 1, "user": 2}, {"item": 1, "time": 1}]
    assert _taken(duplicates, _batch(rows))["accepted"] == 3


def test_request_ids_of_a_user():
    rows = [{"time": 1}, {"time": 1, "user": 2}, {"time": 1, "user": 2}]
    found = _taken(Duplicates(_schema(scope="user")), _batch(rows))
    assert (found["accepted"], found["conflict"], found["duplicate"]) == (2, 0, 1)


def test_events_count_once_by_their_id():
    duplicates = Duplicates(_schema())
    rows = [
        {"time": 1, "event_id": id_, "user": user}
        for id_, user in ((1, 1), (2, 1), (1, 1), (1, 2), (None, 1), (None, 1))
    ]
    taken = duplicates.filter([_batch(rows, "views"), _batch([{"time": 1, "event_id": 1}])])
    assert taken["views"].counts == {"accepted": 4, "duplicate": 1, "conflict": 1, "out_of_order": 0, "old": 0}
    assert taken["views"].table.column_names == ["at", "user"]
    assert taken[None].counts["accepted"] == 1, "ids are a log's own"
    found = _taken(
        duplicates, _batch([{"time": 1, "event_id": 1, "request": 5}, {"time": 1, "event_id": 3, "request": 6}])
    )
    assert (found["duplicate"], found["accepted"]) == (1, 1)


def test_an_events_own_column_of_that_name_is_no_id():
    schema = schema_of(
        FEATURES, columns={"user": "user", "candidate": "item", "time": "time", "request": "event_id"}, events=VIEWS
    )
    rows = [{"event_id": 1, "item": item, "time": 1} for item in (1, 2, 2)]
    assert _taken(Duplicates(schema), _batch(rows))["items"] == [1, 2]


def test_late_rows_had_become_known_before():
    schema = _schema()
    rows = [
        {"time": 1, "item": 1, "click": 1.0},  # known at once
        {"time": 1, "item": 2, "click": None, "spent": None},  # never known
        {"time": 3, "item": 3, "request": 2},  # later
        {"time": 2, "item": 4, "request": 3, "click": None, "spent": None, "liked": 1.0},  # not observed
    ]
    taken = Duplicates(schema).filter([_batch(rows), _batch([{"time": 1}, {"time": 2}, {"time": 3}], "views")])
    moment = START + 2 * DAY
    assert taken[None].count_late(schema, moment) == 1
    assert taken[None].count_late(schema, START + DAY) == 0, "a label is known only after its instant"
    assert taken[None].count_late(schema, START + DAY + 1) == 1
    assert (taken["views"].count_late(schema, moment), taken["views"].count_late(schema, moment + 1)) == (1, 2)


def test_rows_of_unknown_logs_are_counted():
    duplicates = Duplicates(_schema())
    assert duplicates.filter(
        [_batch([{"time": 1}] * 3, "views"), Batch("other", 0, pa.table({"x": [1, 2]}))]
    ).keys() == {"views"}
    assert duplicates.unknown == {"other": 2}


def test_columns_that_lack_are_null_and_others_stay():
    taken = Duplicates(_schema()).filter([_batch([{"time": 1, "colour": "red", "event_id": 1}])])[None]
    assert taken.table["colour"].to_pylist() == ["red"]
    assert "event_id" not in taken.table.column_names
    table = _batch([{"time": 1}]).table.drop_columns(["liked"])
    assert Duplicates(_schema()).filter([Batch(None, 0, table)])[None].table["liked"].null_count == 1


class _Naive:
    """One row after the other, with dictionaries."""

    def __init__(self, days: int) -> None:
        self.days, self.newest = days, -(10**9)
        self.seen: dict = {}
        self.requests: dict = {}
        self.counts, self.rows = Counter(), list[tuple]()

    def take(self, rows: Sequence[dict]) -> None:
        before = self.newest
        self.newest = max(self.newest, *(row["time"] for row in rows))
        today = int(self.newest)
        since = today - self.days
        accepted = []
        for row in rows:
            content = (row["click"], row["spent"])
            keys = [("id", row["event_id"])] if row["event_id"] is not None else []
            keys.append(("row", row["request"], row["item"]))
            found = [self.seen[key][1] for key in keys if key in self.seen and self.seen[key][0] >= since]
            request = self.requests.get(row["request"])
            if found:
                self.counts["duplicate" if found[0] == content else "conflict"] += 1
            elif request is not None and request[0] >= since and request[1] != row["user"]:
                self.counts["conflict"] += 1
            else:
                old = int(row["time"]) < int(before) - self.days
                self.counts.update(accepted=1, out_of_order=row["time"] < before, old=old)
                self.seen |= dict.fromkeys(keys, (today, content))
                if request is None or request[0] < since:
                    self.requests[row["request"]] = (today, row["user"], None)
                accepted.append(row)
            before = max(before, row["time"])
        for row in accepted:
            day, user, time = self.requests[row["request"]]
            if time is None:
                time = min(each["time"] for each in accepted if each["request"] == row["request"])
                self.requests[row["request"]] = (day, user, time)
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


@settings(max_examples=300, deadline=None)
@given(
    batches=st.lists(st.lists(ROWS, min_size=1, max_size=6), min_size=1, max_size=12),
    days=st.integers(0, 3),
    data=st.data(),
)
def test_as_a_loop_over_rows_does(batches, days, data):
    """In reads of any size, and with what is remembered saved and restored between them."""
    shift = START % DAY / DAY
    naive = _Naive(days)
    for batch in batches:
        naive.take([{**row, "time": row["time"] + shift} for row in batch])
    schema = _schema()
    duplicates, whole = Duplicates(schema, days), Duplicates(schema, days)
    counts, rows, waiting = Counter(), list[tuple](), [_batch(batch) for batch in batches]
    everything = whole.filter(waiting)[None]
    while waiting:
        size = data.draw(st.integers(1, len(waiting)))
        taken = duplicates.filter(waiting[:size])[None]
        counts.update(taken.counts)
        days_of = (taken.rows(schema).times() - START) / DAY + shift
        columns = (taken.table[name].to_pylist() for name in ("request", "item", "user"))
        rows += zip(*columns, days_of.tolist(), strict=True)
        waiting = waiting[size:]
        if data.draw(st.booleans()):
            arrays = _arrays(duplicates)
            duplicates = Duplicates(schema, days)
            _restore(duplicates, arrays)
    assert counts == naive.counts == everything.counts
    assert [row[:3] for row in rows] == [row[:3] for row in naive.rows]
    np.testing.assert_allclose([row[3] for row in rows], [row[3] for row in naive.rows])
    one, other = _arrays(duplicates), _arrays(whole)
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


def test_memory_is_that_of_the_days_that_are_remembered():
    duplicates = Duplicates(_schema(), forget_after_days=2)
    sizes = []
    for day in range(40):
        rows = [{"time": day + part / 100, "request": 100 * day + part, "item": part} for part in range(50)]
        duplicates.filter([_batch(rows)])
        sizes.append(sum(len(each) for (_, name), each in _arrays(duplicates).items() if name.endswith("key")))
    assert max(sizes) == sizes[-1] == 2 * 3 * 50
    bytes_held = sum(values.nbytes for values in _arrays(duplicates).values())
    assert bytes_held < 50 * 3 * 60


@settings(max_examples=100, deadline=None)
@given(
    adds=st.lists(st.tuples(st.lists(st.integers(0, 60), max_size=30, unique=True), st.integers(0, 3)), max_size=25),
    days=st.integers(0, 6),
)
def test_known_keys_as_a_dictionary_has_them(adds, days):
    known, expected, day = KeyStore(value=np.int64), dict[int, tuple[int, int]](), 0
    every = np.arange(61, dtype=np.uint64)
    for keys, step in adds:
        day += step
        known.forget(day - days)
        found, values = known.find(every)
        assert found.tolist() == [key in expected and expected[key][0] >= day - days for key in range(61)]
        assert all(values["value"][key] == expected[key][1] for key in np.flatnonzero(found).tolist())
        new = [key for key in keys if not found[key]]
        known.add(np.array(new, np.uint64), day, value=np.array([key * 7 + day for key in new], np.int64))
        expected |= {key: (day, key * 7 + day) for key in new}
    alive = sorted(key for key, (of, _) in expected.items() if of >= day - days)
    assert known.to_arrays()["key"].tolist() == alive
