"""A replay beside a server that is right, and beside servers that are wrong in one way each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mmoe_rec.jobs.commands.live.replay import main
from mmoe_rec.jobs.replay.run import MISMATCHES, REPORT, Asked, replay
from mmoe_rec.log.rows import LogRows
from tests.inference.small_model import SmallModel
from tests.log.small_logs import DAY
from tests.replay.fake_server import FakeServer
from tests.replay.replayed_log import FROM

TO = FROM + DAY


def replayed(small: SmallModel, url: str, **more: Any) -> dict[str, Any]:
    """What a replay of a day finds."""
    return replay(small.settings, Asked(FROM, more.pop("end", TO), str(small.folder), url=url, **more))


def wrong(found: dict[str, Any]) -> dict[str, int]:
    """The values that differ, with how often."""
    return {each["name"]: each["mismatches"] for each in found["values"] if each["mismatches"]}


def test_a_server_that_is_right_is_equal_in_all_values(small: SmallModel, fake: FakeServer, url: str) -> None:
    found = replayed(small, url)
    assert wrong(found) == {}
    assert found["mismatches"] == 0
    # Everything was compared, in every row, and rows are of more than one day, request and candidate.
    counted = {each["name"]: each["compared"] for each in found["values"]}
    assert set(counted.values()) == {found["rows"]}
    assert found["compared"] == found["rows"] * len(counted)
    results = [name for each in fake.pipeline.memory_encoders.values() for name in each.result_names]
    assert counted.keys() == {*results, *("click", "liked", "spent", "score")}
    assert found["rows"] > found["requests"] > 20
    assert found["sent"]["accepted"] == fake.events == found["rows"] + sum(found["events"].values())
    assert min(found["events"].values()) > 10
    # Each request waits for what was sent before it.
    assert sum("?after=" in page for page in fake.seen if page.startswith("/invocations")) >= found["requests"] - 2


def test_a_server_that_learns_nothing_differs_in_what_happened_since(
    small: SmallModel, fake: FakeServer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "_learn", lambda source, rows: None)
    found = replayed(small, url)
    # But for histories of labels that mature late, as the log is short, nothing is as it was.
    assert wrong(found).keys() >= {"clicked", "seen", "item_click_rate", "seen_brand_rows", "carts_positives_1d"}
    assert "click" in wrong(found)


def test_labels_that_are_seen_before_they_mature_are_found(small: SmallModel, fake: FakeServer, url: str) -> None:
    for name in ("user_brand_liked", "liked_items"):
        fake.pipeline.memory_encoders[name].matures_after = 0
    found = wrong(replayed(small, url))
    assert {"user_brand_liked_rows", "liked_items"} <= found.keys()
    assert all(name.startswith("user_brand_liked") for name in found.keys() - {"liked_items", *PREDICTED})


PREDICTED = ("click", "liked", "spent", "score")


def test_one_lost_event_is_found(small: SmallModel, fake: FakeServer, url: str) -> None:
    lose, learn = [True], fake._learn

    def losing(source: str | None, rows: LogRows) -> None:
        if source == "carts" and lose and len(rows):
            rows = LogRows(rows.table.slice(1), rows.schema)
            lose.clear()
        learn(source, rows)

    fake._learn = losing  # type: ignore[method-assign]
    found = wrong(replayed(small, url))
    assert "carts_positives_1d" in found
    assert found.keys() <= {"carts_positives_1d", "carts_recency", *PREDICTED}


def _next_number(ranking: dict[str, Any]) -> None:
    """The counter of the best candidate is served as the next number that float32 can tell from it."""
    counters = ranking["explanations"][0]["counters"]
    counters["item_click_rate"] *= 1 + 2**-23


def _another_id(ranking: dict[str, Any]) -> None:
    ids = ranking["explanations"][0]["histories"]
    if ids["seen"]:
        ids["seen"] = ids["seen"][::-1] if ids["seen"] != ids["seen"][::-1] else ids["seen"][1:]


def _missing(ranking: dict[str, Any]) -> None:
    ranking["explanations"][-1]["counters"]["seen_brand_recency"] = None


def _other_score(ranking: dict[str, Any]) -> None:
    ranking["scores"][0] += 3e-5


def _other_prediction(ranking: dict[str, Any]) -> None:
    ranking["predictions"]["click"][0] -= 3e-5


def _other_small_prediction(ranking: dict[str, Any]) -> None:
    """One that is so small that it may be quite wrong, and yet be nearly the same number."""
    predicted = ranking["predictions"]["liked"]
    predicted[predicted.index(min(predicted))] *= 1.01


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (_next_number, "item_click_rate"),
        (_another_id, "seen"),
        (_missing, "seen_brand_recency"),
        (_other_score, "score"),
        (_other_prediction, "click"),
        (_other_small_prediction, "liked"),
    ],
)
def test_one_wrong_value_is_found_and_nothing_else(
    small: SmallModel,
    fake: FakeServer,
    url: str,
    tmp_path: Path,
    spoil: Callable[[dict[str, Any]], None],
    name: str,
) -> None:
    fake.spoil = spoil
    found = replayed(small, url, keep=tmp_path / "kept", end=FROM + DAY // 2)
    assert wrong(found).keys() == {name}
    assert json.loads((tmp_path / "kept" / REPORT).read_text()) == found
    kept = pq.read_table(tmp_path / "kept" / MISMATCHES).to_pylist()
    assert len(kept) == found["mismatches"] > 0
    (value,) = (each for each in found["values"] if each["name"] == name)
    for example, row in zip(value["examples"], kept, strict=False):
        assert row["value"] == name
        assert str(example["candidate"]) == row["candidate"]
        assert [json.dumps(example[each]) for each in ("served", "offline")] == [
            "null" if row[each] is None else row[each] for each in ("served", "offline")
        ]
        assert example["served"] != example["offline"]
    assert value["examples"][0].keys() == {"request", "user", "candidate", "time", "served", "offline"}


def test_where_a_value_comes_from(small: SmallModel, fake: FakeServer, url: str) -> None:
    sources = {each["name"]: each["source"] for each in replayed(small, url, end=FROM + DAY // 4)["values"]}
    assert sources["seen_brand_rows_2d"] == (
        "'seen_brand': events 'views' by user, brand, over all of the past, 0.5 days, 2 days"
    )
    assert sources["item_click_rows"].startswith("'item_click': task 'click' by item")
    assert sources["liked_items"] == "'liked_items': task 'liked' by user, the last 2 of 'item'"
    assert sources["score"] == "the model"


def test_the_command_tells_by_its_exit_code(
    small: SmallModel, fake: FakeServer, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.yaml").write_text(small.settings.to_yaml(), encoding="utf-8")
    words = ["--config", str(tmp_path / "settings.yaml"), "--model", str(small.folder), "--url", url]
    words += ["--from", "2023-11-20T22:13:20", "--to", "2023-11-21T04:13:20"]
    main(words)
    assert "equal to the last bit" in capsys.readouterr().out
    fake.spoil = _other_score
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 1
    out = capsys.readouterr().out
    assert "Mismatches" in out
    assert "served" in out


def test_the_same_period_again_finds_the_same(small: SmallModel, fake: FakeServer, url: str) -> None:
    one = replayed(small, url)
    # The server knows all events by now; they are sent again, and count once.
    again = replayed(small, url)
    assert wrong(one) == wrong(again) == {}
