"""Whatever does not fit is one sentence, and nothing is written; what is left out is told."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from mmoe_rec.errors import UserError
from mmoe_rec.live.label_join import describe as lines_about
from mmoe_rec.live.label_join import join_labels
from tests.live.test_label_join import BY_REQUEST, BY_USER, drawn_world, joined
from tests.live.worlds import EVENT_TYPES, HOUR, NOW, START, World, naive, ordered, read_rows, settings, write_rows
from tests.log.small_logs import with_column


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = drawn_world(1)
    world.write(tmp_path)
    return world


def change(folder: Path, name: str, change: Any) -> None:
    """Writes each file of a folder again."""
    for file in (folder / name).glob("*.parquet"):
        pq.write_table(change(pq.read_table(file)), file)


def refused(folder: Path, outcomes: Any = BY_REQUEST, **options: Any) -> str:
    """The sentence with which a join is refused, which leaves nothing."""
    with pytest.raises(UserError) as actual:
        joined(folder, settings(outcomes), **options)
    assert "\n" not in str(actual.value)
    assert not [*folder.glob("out/run-*"), *folder.glob("out/.*")]
    return str(actual.value)


def _drop(*columns: str) -> Any:
    return lambda table: table.drop_columns(list(columns))


def _cast(column: str, kind: pa.DataType) -> Any:
    return lambda table: with_column(table, column, table[column].cast(kind))


WITHOUT_RANK = {name: value for name, value in BY_USER.items() if name != "rank"}
WITHOUT_SPENT = {**BY_REQUEST, "sources": {"clicked": BY_REQUEST["sources"]["clicked"]}}
SUMS = {**BY_USER, "sources": {**BY_USER["sources"], "clicked": {**BY_USER["sources"]["spent"], "combine": "sum"}}}


@pytest.mark.parametrize(
    ("name", "how", "outcomes", "sentence"),
    [
        (
            "events/clicks",
            _drop("user"),
            BY_REQUEST,
            "has no column 'user'. Its columns are: amount, at, event_id, item, page",
        ),
        ("events/impressions", _drop("slot"), BY_REQUEST, "has no column 'slot'"),
        (None, None, WITHOUT_RANK, "Set labels.shown to an event log with that column. If the column is the"),
        ("events/clicks", _cast("page", pa.string()), BY_REQUEST, "column 'page' of events 'clicks' contains string"),
        ("requests", _drop("price"), BY_REQUEST, "has no column 'price'"),
        (None, None, SUMS, "but the label of the binary task 'click' is 0 or 1"),
        (None, None, WITHOUT_SPENT, "labels.sources has no source for column 'spent'"),
    ],
)
def test_what_does_not_fit_is_refused(
    world: World, tmp_path: Path, name: str | None, how: Any, outcomes: Any, sentence: str
) -> None:
    if name is not None:
        change(tmp_path, name, how)
    assert sentence in refused(tmp_path, outcomes)


def test_files_that_can_not_be_read(world: World, tmp_path: Path) -> None:
    file = next((tmp_path / "events" / "clicks").iterdir())
    file.write_bytes(file.read_bytes()[:200])
    assert "is not a readable Parquet file" in refused(tmp_path)
    shutil.rmtree(tmp_path / "events" / "clicks")
    assert "events' has no folder 'clicks' of Parquet files" in refused(tmp_path)
    (tmp_path / "events" / "clicks").mkdir()
    assert "contains no *.parquet file" in refused(tmp_path)


def test_an_output_that_holds_something_else(world: World, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    assert "has files of other programs, such as 'notes.txt'" in refused(tmp_path)
    (tmp_path / "out" / "notes.txt").unlink()
    with pytest.raises(UserError, match="includes the files of --out"):
        join_labels(settings(BY_REQUEST), str(tmp_path), str(tmp_path / "events"), tmp_path / "requests" / "out")
    with pytest.raises(UserError, match="must be a local or mounted folder"):
        join_labels(settings(BY_REQUEST), str(tmp_path / "requests"), str(tmp_path / "events"), "s3://bucket/out")


def test_a_share_of_requests_needs_their_ids_in_events(world: World, tmp_path: Path) -> None:
    change(tmp_path, "requests", lambda table: with_column(table, "served_fraction", pa.array([0.1] * len(table))))
    assert "a fraction of 0.1 of all requests was logged" in refused(tmp_path, BY_USER)
    about = settings(BY_REQUEST, sampling_rate="rate")
    joined(tmp_path, about)
    assert {row["rate"] for row in read_rows(tmp_path / "out")} == {0.1}


@pytest.mark.parametrize(
    ("outcomes", "sentence"),
    [
        ({"sources": {"clicked": {"events": "views", "attribution_days": 1}}}, "sources.clicked.events names 'views'"),
        ({**BY_USER, "rank": "price"}, "labels.rank names 'price', which is not listed in roles.placement"),
        ({**BY_REQUEST, "top": 3}, "can't be combined with `top` or `rank`"),
        (
            {**BY_USER, "sources": {"clicked": {"events": "clicks", "attribution_days": 2}}},
            "Set tasks.click.label_delay_days to 2 or more",
        ),
        ({**BY_USER, "sources": {"liked": {"events": "clicks", "attribution_days": 1}}}, "Name one of clicked, spent"),
    ],
)
def test_wrong_settings(outcomes: Any, sentence: str) -> None:
    with pytest.raises(ValidationError) as actual:
        settings(outcomes)
    assert sentence in str(actual.value)


def test_events_that_lack_something_or_lie_in_the_future_are_reported(world: World, tmp_path: Path) -> None:
    for name in ("user", "item", "page", "at"):
        world.event("clicks", 0, 1, 1, page=1, slot=0, amount=1.0, event_id=10_000)
        world.events["clicks"][-1][name] = None
        world.events["clicks"][-1]["at"] = world.events["clicks"][-1]["at"] and START + 201 * HOUR
    world.event("clicks", 0, 20_000, 1, page=1, slot=0, amount=1.0, event_id=10_001)
    shutil.rmtree(tmp_path / "events")
    for name, rows in world.events.items():
        (tmp_path / "events" / name).mkdir(parents=True)
        write_rows(tmp_path / "events" / name / "all.parquet", rows, EVENT_TYPES)
    about = settings(BY_REQUEST)
    actual = joined(tmp_path, about)
    message = "events 'clicks' that are duplicates, are in the future or lack a value of user, item, at, page"
    assert actual.until < NOW  # by the last event that is not in the future
    world.events["clicks"] = world.events["clicks"][:-5]
    again = len(world.events["clicks"]) - len({(row["user"], row["event_id"]) for row in world.events["clicks"]})
    assert actual.counts[message] == again + 5
    assert ordered(read_rows(tmp_path / "out")) == ordered(naive(world, about, NOW))
    assert f"  {message}: {again + 5}" in lines_about(actual)


def test_a_log_of_events_that_stands_still_keeps_requests_waiting(tmp_path: Path) -> None:
    world = drawn_world(2)
    for name in ("impressions", "clicks", "orders"):
        world.events[name] = [event for event in world.events[name] if event["user"] != 99]
    world.events["clicks"] = [click for click in world.events["clicks"] if click["at"] < START + 30 * HOUR]
    world.event("impressions", 99, 500, 0, page=-1, slot=0, amount=1.0, event_id=-1)
    world.event("orders", 99, 500, 0, page=-1, slot=0, amount=1.0, event_id=-1)
    world.write(tmp_path)
    about, last = settings(BY_REQUEST), max(click["at"] for click in world.events["clicks"])
    actual = joined(tmp_path, about)
    assert actual.until == last - 3 * HOUR
    assert actual.waiting > 0
    assert ordered(read_rows(tmp_path / "out")) == ordered(naive(world, about, actual.until))
    joined(tmp_path, about, until=START + 500 * HOUR)  # whoever knows that all events are there says so
    assert ordered(read_rows(tmp_path / "out")) == ordered(naive(world, about, NOW))


def test_what_comes_too_late_is_reported_and_left_out(tmp_path: Path) -> None:
    world, about = drawn_world(3), settings(BY_REQUEST)
    world.write(tmp_path)
    joined(tmp_path, about)
    before = read_rows(tmp_path / "out")
    late = World()
    late.request(7_000, 1, 3, [0, 1])
    late.request(8_000, 1, 400, [0, 1])
    late.request(world.requests[-1]["served_request"], world.requests[-1]["user"], 0, [5])
    late.event("clicks", 1, 4, 0, page=7_000, slot=0, amount=1.0, event_id=20_001)
    for name in ("impressions", "clicks", "orders"):
        late.event(name, 99, 500, 0, page=-1, slot=0, amount=1.0, event_id=30_000)
        late.event("impressions", 1, 400, 0, page=8_000, slot=0, amount=1.0, event_id=30_001)
    late.write(tmp_path)
    actual = joined(tmp_path, about)
    assert {name: count for name, count in actual.counts.items() if "too late" in name} == {
        "rows of requests that came too late": 3,
        "events 'clicks' that came too late": 1,
    }
    assert "  rows of requests that came too late: 3" in lines_about(actual)
    rows = read_rows(tmp_path / "out")
    assert rows[: len(before)] == before
    assert [row["page"] for row in rows[len(before) :]] == [8_000]


def test_a_state_that_is_damaged_is_not_guessed(world: World, tmp_path: Path) -> None:
    joined(tmp_path, settings(BY_REQUEST))
    state = tmp_path / "out" / "run-000001" / "_state.json"
    assert json.loads(state.read_text())["through"] > START
    state.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="is missing or damaged: restore it"):
        joined(tmp_path, settings(BY_REQUEST))
