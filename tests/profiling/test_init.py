"""mmoe-rec init: how it is corrected, and what it never replaces."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.commands import refuse, run
from tests.log.small_logs import random_log


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pq.write_table(random_log(1, rows=2000), "shop.parquet")
    run("init", "shop.parquet")
    return tmp_path / "shop.yaml"


def test_init_replaces_its_own_file_but_nothing_that_a_person_wrote(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("init", "shop.parquet", "--leave-out", "price", "--timezone", "Europe/Berlin")
    assert "replaced: the settings made by " in capsys.readouterr().out
    message = yaml.safe_load(shop.read_text())
    assert "price" not in str(message["roles"])
    assert message["features"]["request_time"]["timezone"] == "Europe/Berlin"
    (shop.parent / "other.parquet").write_bytes((shop.parent / "shop.parquet").read_bytes())
    assert "has the settings of 'shop.parquet'" in refuse(capsys, "init", "other.parquet", "--out", "shop.yaml")
    for text in (shop.read_text().replace("trees: {}", "trees: {leaves: 15}"), "name: shop\n"):
        shop.write_text(text)
        assert "Name another --out" in refuse(capsys, "init", "shop.parquet")
        assert shop.read_text() == text


def test_init_says_how_many_guesses_are_marked(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    run("init", "shop.parquet")
    message = re.search(r"with (\d+) guess", "".join(capsys.readouterr()))
    assert message is not None
    settings = shop.read_text().partition("# checksum: ")[2]
    assert int(message[1]) == settings.count("# check")


def test_a_log_without_lists_may_repeat_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A repeated row stops no training. The context is counted alone and with candidates."""
    random = np.random.default_rng(0)
    user, item, clicked, page = (random.integers(0, most, 12_000) for most in (200, 90, 2, 8))
    time = pa.array(1_700_000_000 + 60 * np.arange(12_000)).cast(pa.timestamp("s"))
    pages = [f"page {entry}" for entry in page]
    log = pa.table({"user_id": user, "item_id": item, "time": time, "page": pages, "clicked": clicked})
    pq.write_table(pa.concat_tables([log, log.slice(7, 1)]), tmp_path / "shop.parquet")
    run("init", tmp_path / "shop.parquet", "--out", tmp_path / "shop.yaml")
    assert "1 of 12,001 rows repeat a candidate of their request" in "".join(capsys.readouterr())
    settings = yaml.safe_load((tmp_path / "shop.yaml").read_text())
    assert settings["data"]["on_duplicates"] == "keep"
    counted = [feature["by"] for feature in settings["features"].values() if feature["kind"] == "counter"]
    assert ["page"] in counted
    assert ["item_id", "page"] in counted


def test_a_column_that_some_files_lack_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = random_log(1, rows=2000)
    (tmp_path / "log").mkdir()
    pq.write_table(log, tmp_path / "log" / "a.parquet")
    pq.write_table(log.drop_columns(["price"]), tmp_path / "log" / "b.parquet")
    run("init", tmp_path / "log", "--out", tmp_path / "shop.yaml")
    assert "b.parquet' has no such column" in "".join(capsys.readouterr())
    assert "price" not in str(yaml.safe_load((tmp_path / "shop.yaml").read_text()))


@pytest.mark.parametrize(
    ("users", "items", "expected"),
    [(200, 90, [{"kind": "cooccurrence", "task": "clicked"}]), (6_000, 90, []), (9, 9_000, [])],
)
def test_pairs_are_counted_if_users_and_candidates_come_back(
    tmp_path: Path, users: int, items: int, expected: list[dict]
) -> None:
    """Of two tasks, the more frequent one counts."""
    random, size = np.random.default_rng(0), 12_000
    user, item = random.integers(0, users, size), random.integers(0, items, size)
    time = pa.array(1_700_000_000 + 60 * np.arange(size)).cast(pa.timestamp("s"))
    clicked, bought = random.random(size) < 0.4, random.random(size) < 0.1
    labels = {name: values.astype(int) for name, values in {"bought": bought, "clicked": clicked}.items()}
    log = pa.table({"user_id": user, "item_id": item, "time": time, **labels})
    pq.write_table(log, tmp_path / "shop.parquet")
    run("init", tmp_path / "shop.parquet", "--out", tmp_path / "shop.yaml")
    features = yaml.safe_load((tmp_path / "shop.yaml").read_text())["features"]
    assert [feature for feature in features.values() if feature["kind"] == "cooccurrence"] == expected
