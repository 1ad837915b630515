"""What is sent to a server, in which order, and again where it does not answer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.jobs.places import logs_for
from mmoe_rec.jobs.replay import feeding, run
from mmoe_rec.jobs.replay.client import Client
from mmoe_rec.jobs.replay.feeding import Requests, steps
from mmoe_rec.jobs.replay.offline import Period, read_period
from mmoe_rec.jobs.replay.run import Asked, replay
from mmoe_rec.log.reader import EventRows, Log
from tests.inference.small_model import SmallModel
from tests.log.small_logs import DAY, random_log, write_log
from tests.replay.fake_server import FakeServer
from tests.replay.replayed_log import FROM, TO, model_of
from tests.replay.test_comparing import replayed, wrong


@pytest.fixture(scope="module")
def period(small: SmallModel, tmp_path_factory: pytest.TempPathFactory) -> Period:
    pipeline = FeaturePipeline.load(small.folder / "features", memories=False)
    return read_period(logs_for(small.settings, pipeline), pipeline, (FROM, TO), tmp_path_factory.mktemp("offline"))


def _times(small: SmallModel, table: pa.Table, log: str | None) -> list[int]:
    schema = small.settings.schema_
    return table[schema.columns.time if log is None else schema.events[log].time].cast(pa.int64()).to_pylist()


def _events(step: feeding.Step) -> list[tuple[str | None, pa.Table]]:
    return [(batches.log, table) for batches in step.events for table in batches.tables]


def test_a_period_holds_every_row_and_event_once(small: SmallModel, period: Period) -> None:
    log = Log(small.settings.data.log, small.settings.schema_)
    times = np.concatenate([rows.times() for rows in log.stream()])
    assert len(period.rows) == ((times >= FROM) & (times < TO)).sum() > 150
    sent: dict[str | None, list[int]] = {None: [], "views": [], "carts": []}
    ids: dict[str | None, list[str]] = {"views": [], "carts": []}
    for step in steps(period):
        for name, table in _events(step):
            sent[name] += _times(small, table, name)
            ids.get(name, []).extend(table["event_id"].to_pylist() if name else [])
    for name in ("views", "carts"):
        there = np.concatenate([rows.times() for rows in EventRows(name, log).stream()])
        assert sorted(sent[name]) == sorted(there[(there >= FROM) & (there < TO)].tolist())
        assert len(set(ids[name])) == len(ids[name]) == len(sent[name])
    assert sorted(sent[None]) == period.rows.times().tolist()


def test_a_request_comes_after_all_that_happened_before_it_and_before_all_else(
    small: SmallModel, period: Period
) -> None:
    left = {each.name: each.times.tolist() for each in (period.interactions, *period.events)}
    asked, ties = [], 0
    for step in steps(period):
        for name, table in _events(step):
            for each in _times(small, table, name):
                left[name].remove(each)
        for number in step.requests:
            now = int(period.times[number])
            asked.append(number)
            assert all(each >= now for times in left.values() for each in times)
            ties += sum(times.count(now) for times in left.values())
    assert asked == list(range(len(period.times)))
    assert not any(left.values())
    assert ties > len(period.rows)  # of its own rows, and of events at the same instant


def test_batches_are_cut(monkeypatch: pytest.MonkeyPatch, period: Period) -> None:
    monkeypatch.setattr(feeding, "ROWS_AT_A_TIME", 2)
    tables = [table for step in steps(period) for _, table in _events(step)]
    assert max(map(len, tables)) == 2
    assert sum(map(len, tables)) == sum(len(each.times) for each in (period.interactions, *period.events))


def test_requests_hold_what_a_caller_knows(small: SmallModel, period: Period) -> None:
    body = Requests(period, small.settings.schema_).body(feeding.Part(0, 2))
    assert {part: set(columns) for part, columns in body.items()} == {
        "user": {"user", "age"},
        "context": {"time", "born"},
        "candidates": {"item", "brand", "price", "tags"},
    }
    rows = period.rows.table.slice(0, 2).to_pylist()
    assert body["candidates"]["item"] == [each["item"] for each in rows]
    assert body["context"]["time"] == rows[0]["time"].isoformat()
    ids = Requests(period, small.settings.schema_, ids_only=True).body(feeding.Part(0, 2))
    assert {part: set(columns) for part, columns in ids.items()} == {
        "user": {"user"},
        "context": {"time", "born"},
        "candidates": {"item"},
    }


def test_long_requests_are_asked_for_in_parts(small: SmallModel, period: Period) -> None:
    requests = Requests(period, small.settings.schema_, most=2)
    parts = requests.parts(range(len(period.times)))
    assert [place for part in parts for place in range(part.start, part.end)] == list(range(len(period.rows)))
    assert max(part.end - part.start for part in parts) == 2
    assert {part.start for part in parts} > set(period.starts[:-1].tolist())


def test_rows_of_a_request_that_differ_are_told(tmp_path: Path) -> None:
    small = model_of(tmp_path)
    log = random_log(1, 700)  # whose ages are drawn row by row
    write_log(tmp_path / "log", log.slice(0, 300), log.slice(300))
    pipeline = FeaturePipeline.load(small.folder / "features", memories=False)
    (tmp_path / "scratch").mkdir()
    period = read_period(logs_for(small.settings, pipeline), pipeline, (FROM, TO), tmp_path / "scratch")
    table = period.rows.table
    pairs = list(zip(table["user"].to_pylist(), table["time"].to_pylist(), table["age"].to_pylist(), strict=True))
    expected = len({each[:2] for each in pairs if len({age for *key, age in pairs if tuple(key) == each[:2]}) > 1})
    assert Requests(period, small.settings.schema_).differing()["age"] == expected > 0


def test_attributes_that_change_are_counted(small: SmallModel, period: Period) -> None:
    expected = {}
    for column, ids in (("age", "user"), ("brand", "item"), ("price", "item"), ("tags", "item")):
        before: dict[object, object] = {}
        rows = 0
        for row in period.rows.table.to_pylist():
            rows += row[ids] in before and before[row[ids]] != row[column]
            before[row[ids]] = row[column]
        expected[column] = ids, rows
    assert all(rows for _, rows in expected.values())
    assert Requests(period, small.settings.schema_, ids_only=True).changed() == expected
    assert Requests(period, small.settings.schema_).changed() == {}, "a server is sent them"


@pytest.mark.parametrize("status", [0, 503])
def test_what_was_not_answered_is_sent_again_and_counts_once(
    small: SmallModel, fake: FakeServer, url: str, status: int
) -> None:
    asked: list[str] = []

    def trouble(page: str) -> int | None:
        asked.append(page)
        return status if len(asked) % 3 == 1 else None

    fake.trouble = trouble
    found = replayed(small, url, end=FROM + DAY // 2)
    assert wrong(found) == {}
    assert found["sent_again"] == sum(place % 3 == 0 for place in range(len(asked))) > 10
    if status == 0:  # all of these had been taken
        assert fake.events > found["rows"] + sum(found["events"].values())


def test_a_server_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client("http://127.0.0.1:9", patience_s=0.2)
    with pytest.raises(UserError, match=r"there is no server at http://127.0.0.1:9 \(ConnectionRefusedError"):
        client.version()
    for address in ("127.0.0.1:80", "ftp://here", "http://"):
        with pytest.raises(UserError, match="is no address of a server"):
            Client(address)
    calls = []

    def check() -> None:
        calls.append(time.monotonic())
        raise UserError("it has ended")

    with pytest.raises(UserError, match="it has ended"):
        Client("http://127.0.0.1:9", check=check).version()
    assert len(calls) == 1


def _refused(small: SmallModel, start: int, end: int, **more: Any) -> str:
    with pytest.raises(UserError) as refused:
        replay(small.settings, Asked(start, end, str(small.folder), url="http://127.0.0.1:9", **more))
    assert not (Path(small.settings.data.work) / "replay").exists()
    return str(refused.value)


def test_periods_that_cannot_be_replayed(small: SmallModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is not before --to" in _refused(small, FROM, FROM)
    assert "no row of the log was requested from 2024" in _refused(small, FROM + 90 * DAY, FROM + 91 * DAY)
    assert "so a server would begin with nothing" in _refused(small, FROM - 50 * DAY, TO)
    with pytest.raises(UserError, match="holds no model"):
        replay(small.settings, Asked(FROM, TO, "no/model"))
    assert run.REPORT == "replay.json"


def test_a_refusal_is_told(small: SmallModel, fake: FakeServer, url: str) -> None:
    fake.trouble = lambda page: 400 if page.startswith("/invocations") else None
    with pytest.raises(UserError, match=r"does not take what is sent to /invocations.*400: in a sentence"):
        replayed(small, url)


def test_a_server_of_another_model_is_told(small: SmallModel, fake: FakeServer, url: str) -> None:
    fake.spoil = lambda ranking: ranking["explanations"][0]["counters"].update(other=1.0)
    with pytest.raises(UserError, match="do not have the same features and tasks"):
        replayed(small, url)
