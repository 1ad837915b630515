"""A replay beside a server that is right, and beside servers that are wrong in one way each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.jobs.places import logs_for
from mmoe_rec.live import logged_requests as names
from mmoe_rec.live import replay_server
from mmoe_rec.live.journal import Journal
from mmoe_rec.live.refresh import make_tables
from mmoe_rec.live.replay import ReplayOptions, ValueComparison, compare, describe, read_logged, replay
from mmoe_rec.live.replay_period import Period, read_period
from mmoe_rec.live.replay_server import Client, feed
from mmoe_rec.live.request_log import LogOptions
from mmoe_rec.log.reader import EventRows, Log
from mmoe_rec.server.app import Application
from tests.live.replayed_log import FROM, TO, model_of
from tests.log.small_logs import DAY
from tests.server.asking import ask, logging_app

PREDICTED = ("click", "liked", "spent", "score")
Plant = Callable[["InProcess"], None]


class InProcess(Client):
    """A server in this process, as a replay feeds it; sent: (log, events), asked: (position, request)."""

    def __init__(self, app: Application) -> None:
        super().__init__(0)
        self.app, self.sent, self.asked = app, list[tuple[str | None, pa.Table]](), list[tuple[Any, dict[str, Any]]]()

    def send(self, table: pa.Table, log: str | None = None) -> int:
        self.sent.append((log, table))
        return super().send(table, log)

    def rank(self, request: dict[str, Any], after: Any, explain: bool) -> dict[str, Any]:
        self.asked.append((after, request))
        return super().rank(request, after, explain)

    def _ask(self, method: str, page: str, body: bytes | None = None, kind: str = "application/json") -> dict[str, Any]:
        assert body is not None
        reply = ask(self.app, body, page=page, headers={"content-type": kind})
        assert reply.status == 200, reply.body
        return dict(reply.tree)


class World:
    """A model, a day of its log, and what a replay of it through a server in this process says."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.small = folder, model_of(folder / "small")
        make_tables(self.small.folder, self.small.settings, FROM, folder / "frozen")
        self.period = self.read_period(FROM, FROM + DAY)

    def read_period(self, start: int, end: int) -> Period:
        pipeline = FeaturePipeline.load(self.small.folder / "features", memories=False)
        scratch = self.folder / f"offline {start} {end}"
        scratch.mkdir()
        return read_period(logs_for(self.small.settings, pipeline), pipeline, (start, end), scratch)

    def replayed(
        self,
        scratch: Path,
        plant: Plant = lambda server: None,
        period: Period | None = None,
        **options: Any,
    ) -> tuple[dict[str, ValueComparison], InProcess]:
        period = period or self.period
        log = LogOptions(scratch / "requests", share=1.0)
        Journal(scratch / "journal.db").close()
        with logging_app(self.folder / "frozen", log, journal=scratch / "journal.db") as app:
            server = InProcess(app)
            plant(server)
            explanations = feed(period, server, options.pop("most", 50), **options)
        logged = read_logged(scratch / "requests", period)
        compared = compare(period, logged, Ranker.load(self.small.folder), explanations or None)
        return {each.name: each for each in compared}, server


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("replayed"))


def wrong(compared: dict[str, ValueComparison]) -> dict[str, int]:
    """The names that differ, with how often."""
    return {name: each.mismatches for name, each in compared.items() if each.mismatches}


def test_a_server_that_is_right_is_equal_in_all_values(world: World, tmp_path: Path) -> None:
    period = world.period
    compared, server = world.replayed(tmp_path)
    assert wrong(compared) == {}
    # Everything was compared, in every row.
    assert {each.compared for each in compared.values()} == {len(period.rows)}
    placement = {
        name for name in world.small.settings.features if world.small.settings.schema_.role_of(name) == "placement"
    }
    assert compared.keys() == (world.small.settings.features.keys() - placement) | {*PREDICTED}
    assert len(period.rows) > len(period.times) > 20
    # Each request waits for what was sent before it.
    assert sum(after is not None for after, _ in server.asked) >= len(period.times) - 2


def test_requests_come_after_all_that_happened_before_and_before_all_else(world: World, tmp_path: Path) -> None:
    period, small = world.period, world.small
    schema, happened, ties = small.settings.schema_, dict[str | None, list[int]](), 0
    left = {each.name: each.times.tolist() for each in period.logs}

    def plant(server: InProcess) -> None:
        def send(table: pa.Table, log: str | None) -> None:
            name = schema.columns.time if log is None else schema.events[log].time
            times = table[name].cast(pa.int64()).to_pylist()
            for each in times:
                left[log].remove(each)
            happened.setdefault(log, []).extend(times)
            if log is not None:
                ids = table["event_id"].to_pylist()
                assert len(set(ids)) == len(ids)

        def rank(request: dict[str, Any], after: Any, explain: bool) -> dict[str, Any]:
            nonlocal ties
            now = np.datetime64(request["context"]["time"].removesuffix("+00:00"), "us").astype(np.int64)
            assert all(each >= now for times in left.values() for each in times)
            ties += sum(times.count(now) for times in left.values())
            return ranked(request, after, explain)

        ranked = server.rank
        server.send, server.rank = send, rank  # type: ignore[method-assign]

    world.replayed(tmp_path, plant)
    assert ties > len(period.rows) / 2  # of requests' own rows, and of events at the same instant
    log = Log(small.settings.data.log, schema)
    for name in ("views", "carts"):
        there = np.concatenate([rows.times() for rows in EventRows(name, log).stream()])
        there = there[(there >= FROM) & (there < FROM + DAY)]
        assert sorted(happened[name]) == sorted(there[there < period.times[-1]].tolist())
        assert min(len(happened[name]), len(happened[None])) > 10


def test_labels_that_are_seen_before_they_mature_are_found(world: World, tmp_path: Path) -> None:
    def plant(server: InProcess) -> None:
        for name in ("user_brand_liked", "liked_items"):
            server.app.models.current.ranker.pipeline.memory_encoders[name].matures_after = 0

    compared, _ = world.replayed(tmp_path, plant, world.read_period(FROM, TO))
    assert (
        {"user_brand_liked", "liked_items"} <= wrong(compared).keys() <= {"user_brand_liked", "liked_items", *PREDICTED}
    )


def test_one_lost_event_is_found_and_its_values_are_shown(world: World, tmp_path: Path) -> None:
    def plant(server: InProcess) -> None:
        send, lost, positions = server.send, list[str](), [0]

        def losing(table: pa.Table, log: str | None) -> int:
            if log == "carts" and not lost:
                lost.append(log)
                table = table.slice(1)
            if len(table):
                positions.append(send(table, log))
            return positions[-1]

        server.send = losing  # type: ignore[method-assign]

    compared, _ = world.replayed(tmp_path, plant, explain=True)
    assert "carts" in wrong(compared)
    assert wrong(compared).keys() <= {"carts", *PREDICTED}
    for example in compared["carts"].examples:
        assert example["served"].keys() == example["offline"].keys() != set()
        assert example["served"] != example["offline"]


def test_one_wrong_value_is_found_and_nothing_else(world: World, tmp_path: Path) -> None:
    """A digest, a score, and predictions, also one that is so small that it may be wrong and nearly the same number."""
    world.replayed(tmp_path)
    logged, ranker = read_logged(tmp_path / "requests", world.period), Ranker.load(world.small.folder)
    changes = [("item_click", f"{names.DIGEST}item_click", 1, 1), ("score", names.SCORE, 1, 3e-5)]
    changes += [("click", f"{names.PREDICTED}click", 1, -3e-5), ("liked", f"{names.PREDICTED}liked", 1.01, 0)]
    for name, column, factor, more in changes:
        values = logged[column].to_numpy().copy()
        place = int(values.argmin())
        values[place] = values[place] * factor + more
        spoilt = logged.set_column(logged.column_names.index(column), column, pa.array(values))
        different = {each.name: each for each in compare(world.period, spoilt, ranker) if each.mismatches}
        assert different.keys() == {name}
        (example,) = different[name].examples
        assert example["candidate"] == logged["item"][place].as_py()


def test_ids_alone_show_attributes_that_differ(world: World, tmp_path: Path) -> None:
    """A candidate's brand in the log is another one in each row, so that the latest one is mostly not the row's."""
    compared, server = world.replayed(tmp_path, ids_only=True, most=2)
    assert {"user_brand_liked", "brand"} & wrong(compared).keys()
    assert not {"item", "item_click", "clicked", "seen", "carts"} & wrong(compared).keys()
    assert {part: set(columns) for part, columns in server.asked[0][1].items()} == {
        "user": {"user"},
        "context": {"time", "born"},
        "candidates": {"item"},
    }
    assert max(len(request["candidates"]["item"]) for _, request in server.asked) == 2


def test_batches_are_cut(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_server, "ROWS_AT_A_TIME", 2)
    compared, server = world.replayed(tmp_path)
    assert wrong(compared) == {}
    assert max(len(table) for _, table in server.sent) == 2


def test_what_cannot_be_replayed(world: World, tmp_path: Path) -> None:
    settings, model = world.small.settings, str(world.small.folder)

    def refused(start: int, end: int, model: str = model, requests: Path | None = None) -> str:
        with pytest.raises(UserError) as refused:
            replay(settings, ReplayOptions(start, end, model, requests))
        assert not (Path(settings.data.work) / "replay").exists()
        return str(refused.value)

    assert "is not before --to" in refused(FROM, FROM)
    assert "no row of the log was requested from 2024" in refused(FROM + 90 * DAY, FROM + 91 * DAY)
    assert "so a server would begin with nothing" in refused(FROM - 50 * DAY, TO)
    assert "holds no model" in refused(FROM, TO, "no/model")
    pq.write_table(pa.table({"user": [1]}), tmp_path / "x.parquet")
    assert "column 'served_request' is missing" in refused(FROM, TO, requests=tmp_path)


def test_logged_requests_of_a_server_are_compared_with_the_log(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of other versions, and those that the log does not hold, are counted."""
    small, requests = world.small, tmp_path / "requests"
    world.replayed(tmp_path)
    (file,) = requests.iterdir()
    table = pq.read_table(file)
    options = ReplayOptions(FROM, FROM + DAY, str(small.folder), requests, keep=tmp_path / "kept", values=True)
    with pytest.raises(UserError, match="the log has none of the requests"):
        replay(small.settings, options)
    version = table["served_artifact"].to_pylist()
    assert version
    from mmoe_rec.inference.artifact import version_of

    mine = pa.array([version_of(small.folder)] * (len(table) - 3) + version[-3:])
    item, digest = table["item"].to_numpy().copy(), table["served_digest_item_click"].to_numpy().copy()
    item[0], digest[1] = 12345, digest[1] + 1
    columns = {"served_artifact": mine, "item": pa.array(item), "served_digest_item_click": pa.array(digest)}
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, values)
    pq.write_table(table, file)
    capsys.readouterr()
    report = replay(small.settings, options)
    assert report["logged_rows"] == len(table) - 4
    assert {each["name"]: each["mismatches"] for each in report["values"] if each["mismatches"]} == {"item_click": 1}
    said = " ".join(capsys.readouterr().err.split())
    assert "3 logged rows were answered by other versions" in said
    assert f"does not have 1 of {len(table) - 3:,} logged rows" in said
    assert json.loads((tmp_path / "kept" / "replay.json").read_text())["mismatches"] == 1
    first, example, last = describe(report)
    assert first == f"feature 'item_click' differs in 1 of {len(table) - 4:,} rows"
    assert f"candidate {table['item'][1].as_py()}, at 2023-11-2" in example
    assert "served None, offline {'item_click" in example
    assert last.endswith(", 1 mismatches")
