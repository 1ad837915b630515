"""JoinResult rows are those of plain loops, over any number of runs, and each request is written once."""

import math
import random
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.live import label_join as joining
from mmoe_rec.live.label_join import JoinResult, join_labels
from mmoe_rec.log.columns import UTC_MICROSECONDS
from mmoe_rec.settings.sections import Settings
from tests.live.worlds import HOUR, NOW, START, World, naive, ordered, read_rows, settings

BY_REQUEST = {
    "events": {
        "impressions": {"time": "at", "request": "page"},
        "clicks": {"time": "at", "request": "page"},
        "orders": {"time": "at", "request": "page"},
    },
    "shown": {"events": "impressions", "attribution_days": 0.25},
    "sources": {
        "clicked": {"events": "clicks", "attribution_days": 0.125},
        "spent": {"events": "orders", "attribution_days": 1, "value": "amount", "combine": "sum", "default": None},
    },
}
BY_USER = {
    "events": {"clicks": {"time": "at"}, "orders": {"time": "at"}},
    "top": 3,
    "rank": "slot",
    "sources": {
        "clicked": {"events": "clicks", "attribution_days": 0.125},
        "spent": {"events": "orders", "attribution_days": 1, "value": "amount", "combine": "last", "default": 0},
    },
}
MIXED = {
    "events": {**BY_REQUEST["events"], "orders": {"time": "at"}},
    "shown": BY_REQUEST["shown"],
    "sources": {
        "clicked": BY_REQUEST["sources"]["clicked"],
        "spent": {"events": "orders", "attribution_days": 0.5, "value": "amount", "combine": "max"},
    },
}


def drawn_world(seed: int, user_ids: bool = False, repeats: bool = False) -> World:
    """Few users and items, so that many events could belong to several requests; times lie on a grid, so that many are
    equal and some lie on the edges of windows; events come twice, early, late, and for what was never requested; some
    name another user than the request's. repeats: a user's ids of events come again with other events."""
    draw = random.Random(seed)
    world = World()
    hours = [number / 2 for number in range(120)]
    pages: list[tuple[Any, int, float, list[int]]] = []
    taken, ids = set(), set[tuple[int, int]]()
    for number in range(40):
        user, hour = draw.randrange(3), draw.choice(hours)
        if (user, hour) in taken:  # of two requests of one instant, either could claim an event
            continue
        taken.add((user, hour))
        items = draw.sample(range(6), draw.randint(1, 5))
        page = sum(entry[1] == user for entry in pages) if user_ids else number
        pages.append((page, user, hour, items))
        world.request(page, user, hour, items)
        if draw.random() < 0.2:  # sent again, a moment later or of an earlier time, with other candidates
            again = hour if draw.random() < 0.5 else hour + 0.25
            world.request(page, user, again, draw.sample(range(6), 3), at=hour + 0.26)
    for number in range(300):
        name = draw.choice(["impressions", "impressions", "clicks", "orders"])
        page, user, hour, items = draw.choice(pages)
        hour += draw.choice([-0.5, 0, 0.25, 0.5, 1, 3, 3.5, 6, 12, 24, 25])
        item = draw.choice(items) if draw.random() < 0.9 else draw.randrange(8)
        amount = draw.choice([None, math.nan, 1.0, 2.5, 10.0])
        user = draw.choice([user] * 9 + [draw.randrange(3)])  # now and then another one than the request's
        event_id = draw.randrange(200)  # which several users have
        if not repeats and (user, event_id) in ids:
            event_id = 200 + number
        ids.add((user, event_id))
        more = {"page": page, "slot": draw.randrange(4), "amount": amount, "event_id": event_id}
        world.event(name, user, hour + number * 1e-7, item, **more)
        if draw.random() < 0.2:
            world.event(name, user, hour + number * 1e-7, item, **more)
    for name in ("impressions", "clicks", "orders"):  # of another user, so that all before is known
        world.event(name, 99, 200, 0, page=-1, slot=0, amount=1.0, event_id=-1)
    return world


def joined(folder: Path, about: Any, **options: Any) -> JoinResult:
    return join_labels(about, str(folder / "requests"), str(folder / "events"), folder / "out", now=NOW, **options)


@pytest.mark.parametrize(
    ("outcomes", "scope"),
    [(BY_REQUEST, "log"), (BY_USER, "log"), (MIXED, "log"), (BY_REQUEST, "user")],
    ids=["by request", "by user", "mixed", "by a user's own ids of requests"],
)
@pytest.mark.parametrize("seed", range(6))
def test_rows_are_those_of_plain_loops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcomes: dict[str, Any], scope: str, seed: int
) -> None:
    monkeypatch.setattr(joining, "ROWS_PER_FILE", 20)  # several partitions and files
    world = drawn_world(seed, user_ids=scope == "user", repeats=True)
    world.write(tmp_path, seed=seed)
    about = settings(outcomes, request_scope=scope)
    actual = joined(tmp_path, about)
    rows = read_rows(tmp_path / "out")
    assert ordered(rows) == ordered(naive(world, about, NOW))
    assert actual.rows == len(rows) > 20
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)
    assert len([*(tmp_path / "out").glob("run-*/*.parquet")]) > 1
    assert 0 < sum(row["clicked"] for row in rows) < len(rows)
    assert len({row["spent"] for row in rows}) > 2


def test_times_may_be_integers_and_requests_have_no_column(tmp_path: Path) -> None:
    """Of a log that counts seconds, and whose requests are a user's rows of one instant."""
    world, about = drawn_world(4), settings(BY_USER, request=False, time_unit="s")
    for rows in world.events.values():
        for row in rows:
            row["at"] = (row["at"] // 1_000_000 + row["event_id"] % 1_000) * 1_000_000  # no two of one instant
    world.write(tmp_path)
    for file in (tmp_path / "events").rglob("*.parquet"):
        table = pq.read_table(file)
        seconds = pa.array(table["at"].cast(pa.int64()).to_numpy() // 1_000_000)
        pq.write_table(table.set_column(table.column_names.index("at"), "at", seconds), file, row_group_size=5)
    edge = START + 30 * HOUR
    joined(tmp_path, about, until=edge + 24 * HOUR)
    assert ordered(read_rows(tmp_path / "out")) == ordered(naive(world, about, edge))
    joined(tmp_path, about)
    assert ordered(read_rows(tmp_path / "out")) == ordered(naive(world, about, NOW))
    assert "page" not in read_rows(tmp_path / "out")[0]


@pytest.mark.parametrize("outcomes", [BY_REQUEST, BY_USER, MIXED], ids=["by request", "by user", "mixed"])
@pytest.mark.parametrize("seed", range(4))
def test_runs_write_each_request_once_and_in_order(tmp_path: Path, outcomes: dict[str, Any], seed: int) -> None:
    """Files come day by day: what is written after each is what loops over all rows give, up to what had ended."""
    world, about = drawn_world(seed), settings(outcomes)
    edges = [START + round(hours * HOUR) for hours in (0, 20, 40, 40.5, 70, 90, 210)]
    for name in (item for item, given in outcomes["events"].items() if "request" not in given):
        again = random.Random(seed).sample(world.events[name][:-1], 20)  # sent again, with a later time
        world.events[name] += [{**row, "at": row["at"] + 26 * HOUR} for row in again]
    before: list[Any] = []
    for since, until in pairwise(edges):
        for name in outcomes["events"]:  # something always happens, so that all before is known
            world.event(name, 99, (until - 1 - START) / HOUR, 0, page=-1, slot=0, amount=1.0, event_id=until)
        world.write(tmp_path, since=since, until=until, seed=seed)
        actual = joined(tmp_path, about)
        rows = read_rows(tmp_path / "out")
        assert rows[: len(before)] == before
        assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)
        assert max((row["time"] for row in rows), default=0) <= until - 1 - 24 * HOUR * (outcomes is not MIXED)
        assert (actual.folder is None) == (len(rows) == len(before))
        assert joined(tmp_path, about).folder is None
        before = rows
    assert ordered(before) == ordered(naive(world, about, NOW))
    assert len([*(tmp_path / "out").glob("run-*")]) >= 3


def test_names_and_types_are_the_users(tmp_path: Path) -> None:
    """Folders with quotes and brackets; columns whose names differ by case, or are words of SQL; ids as strings and
    negative integers; decimals, lists, dictionaries, other time zones, and events without an id of their own."""
    folder = tmp_path / 'it\'s [a] "log"?*'
    items, hour = [-(2**62), 7], timedelta(hours=1)
    begin = datetime(2024, 3, 11, 6, 0, 0, 123_457, tzinfo=timezone(timedelta(hours=5)))
    requests = {
        "select": pa.array(["o'hara"] * 2).dictionary_encode(),
        "item": items,
        "time": pa.array([begin] * 2, pa.timestamp("ns", "Asia/Karachi")),
        "Price": pa.array([Decimal("1.50"), None]),
        "price": [2.5, float("nan")],
        "tags": [["a", None], []],
        "served_request": ["page; --"] * 2,
        "served_at": pa.array([begin] * 2),
        "served_rank": pa.array([1, 2], pa.int32()),
        "served_fraction": [1.0, 1.0],
    }
    clicks = {
        "select": ["o'hara"] * 4 + ["end"],
        "item": [*items, 7, 7, 7],
        "at": [begin, begin + hour, begin + hour, begin + 2 * hour, begin + 1000 * hour],
        "amount": pa.array([Decimal("3.25"), Decimal("0.10"), Decimal("0.20"), None, None]),
        "event_id": pa.array([5, None, None, 5, 6]),  # one comes again; two have no id, and both count
    }
    for name, columns in (("requests", requests), ("events/clicks", clicks)):
        (folder / name).mkdir(parents=True)
        pq.write_table(pa.table(columns), folder / name / "part '0'.parquet")
    source = {"events": "clicks", "attribution_days": 1}
    labels = {"clicked": source, "spent": {**source, "value": "amount", "combine": "sum", "default": None}}
    about = settings({"events": {"clicks": {"time": "at"}}, "sources": labels}, placed=False, user="select")
    features = {f"{name}_1": {"kind": "numeric", "column": entry} for name, entry in (("a", "Price"), ("b", "price"))}
    tree = about.model_dump(mode="json", exclude_unset=True, by_alias=True)
    tree["features"] = features | {"tags": {"kind": "ids", "column": "tags", "dim": 4, "max_length": 3}}
    tree["roles"] = {"candidate": ["Price", "price", "tags"]}
    joined(folder, Settings.model_validate(tree))
    (file,) = (folder / "out").glob("run-*/*.parquet")
    rows = pq.read_table(file)
    assert rows.schema.field("time").type == UTC_MICROSECONDS
    first, second = rows.to_pylist()
    assert first["time"] == second["time"] == begin
    assert [(row["select"], row["item"], row["page"]) for row in (first, second)] == [
        ("o'hara", item, "page; --") for item in items
    ]
    assert (first["Price"], second["Price"], first["price"]) == (1.5, None, 2.5)
    assert second["price"] is None or second["price"] != second["price"]
    assert (first["tags"], second["tags"]) == (["a", None], [])
    assert (first["clicked"], first["spent"]) == (1, 3.25)
    assert (second["clicked"], second["spent"]) == (1, pytest.approx(0.3))
