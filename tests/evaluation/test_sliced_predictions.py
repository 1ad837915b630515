"""Slices of predictions in files, by any column, however the files are cut."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from mmoe_rec.evaluation.slices import MISSING, OTHERS, SliceSpec
from tests.commands import run
from tests.evaluation.test_planted_bugs import rows


def frame(seed: int = 0) -> pd.DataFrame:
    actual, random = rows(seed), np.random.default_rng(seed)
    actual["device"] = np.array(["phone", "tablet", None], object)[random.choice(3, len(actual), p=[0.6, 0.3, 0.1])]
    actual["price"] = np.where(random.random(len(actual)) < 0.1, np.nan, random.lognormal(size=len(actual)))
    actual["shop"] = random.integers(1, 40, len(actual))
    return actual


def measured(actual: pd.DataFrame, folder: Path, *slices: str) -> pd.DataFrame:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(3):
        actual.iloc[number::3].to_parquet(folder / f"{number}.parquet", index=False, row_group_size=997)
    out = folder.with_name("out")
    words = ["--predictions", str(folder), "--tasks", "bought", "--resamples", "50", "--out", str(out)]
    run("evaluate", *words, *(["--slices", *slices] if slices else []))
    return pd.read_parquet(out / "slices.parquet")


def areas(table: pd.DataFrame, by: str) -> dict[str, float]:
    mine = table[(table["by"] == by) & (table["metric"] == "auc")]
    return dict(zip(mine["slice"], mine["value"], strict=True))


def area(actual: pd.DataFrame) -> float:
    return float(roc_auc_score(actual["label_bought"], actual["predicted_bought"]))


def test_slices_are_those_of_the_rows_however_these_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmoe_rec.evaluation.prediction_files.FEATURE_BATCH_ROWS", 400)
    actual = frame()
    table = measured(actual, tmp_path / "in", "device", "bucket(price, 4)", "shop")
    of_device = {name: area(actual[actual["device"] == name]) for name in ("phone", "tablet")}
    assert areas(table, "device") == pytest.approx(of_device | {MISSING: area(actual[actual["device"].isna()])})
    known = actual[actual["price"].notna()]
    quarters = pd.qcut(known["price"], 4, labels=False)
    by_price = areas(table, "bucket(price, 4)")
    names = [name for name in by_price if name != MISSING]
    assert len(names) == 4
    of_quarters = [area(known[quarters == index]) for index in range(4)]
    assert [by_price[name] for name in names] == pytest.approx(of_quarters, abs=0.003)
    assert {name[1:-1].split(", ")[1] for name in names} <= {f"{price:.6g}" for price in known["price"]}
    assert names[0].startswith(f"[{known['price'].min():.6g}, ")
    assert names[-1].endswith(f", {known['price'].max():.6g}]")
    often = actual["shop"].value_counts()
    shops = areas(table, "shop")
    assert len(shops) == 21
    assert shops.keys() - {OTHERS} <= set(often.index.astype(str))
    rest = actual[~actual["shop"].astype(str).isin(shops.keys())]
    assert shops[OTHERS] == pytest.approx(area(rest))
    devices = table[(table["by"] == "device") & (table["metric"] == "auc")]
    assert devices["rows"].sum() == len(actual)


def test_models_are_compared_in_slices_of_the_same_rows(tmp_path: Path) -> None:
    """A rank is each model's own: what a model shows first is better by construction than what another one shows."""
    sides = [frame(), frame()]
    for seed, (name, actual) in enumerate(zip(("mine", "theirs"), sides, strict=True)):
        noise = np.random.default_rng(seed).normal(size=len(actual))
        actual["score"] = actual["predicted_bought"] = 1 / (1 + np.exp(-noise - actual["label_bought"]))
        actual["rank"] = actual.groupby("request")["score"].rank(ascending=False, method="first").astype(int)
        (tmp_path / name).mkdir()
        actual.to_parquet(tmp_path / name / "0.parquet", index=False)
    words = ["--predictions", str(tmp_path / "mine"), "--compare-to", str(tmp_path / "theirs"), "--tasks", "bought"]
    run("evaluate", *words, "--out", str(tmp_path / "out"), "--resamples", "20", "--slices", "rank", "device")
    table = pd.read_parquet(tmp_path / "out" / "slices.parquet")
    assert set(table[table["by"] == "rank"]["compared_to"]) == {"all rows"}
    assert set(table[table["by"] == "device"]["compared_to"]) == {"all rows", "theirs"}


def test_columns_of_the_path_are_sliced_by(tmp_path: Path) -> None:
    actual = frame()
    actual["device"] = actual["device"].fillna("none")
    expected = {name: area(item) for name, item in actual.groupby("device")}
    for name, item in actual.groupby("device"):
        (tmp_path / "in" / f"device={name}").mkdir(parents=True)
        item.drop(columns="device").to_parquet(tmp_path / "in" / f"device={name}" / "0.parquet", index=False)
    words = ["--predictions", str(tmp_path / "in"), "--tasks", "bought", "--resamples", "20", "--slices", "device"]
    run("evaluate", *words, "--out", str(tmp_path / "out"))
    assert areas(pd.read_parquet(tmp_path / "out" / "slices.parquet"), "device") == pytest.approx(expected)


def test_a_column_that_is_no_slice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    actual = frame()
    actual["id"] = np.arange(len(actual))
    actual["tags"] = [["a"]] * len(actual)
    for word, message in (
        ("id", r"column 'id' has more than 1,000 values, such as '0': too many to .* slice by 'bucket\(id, 10\)'"),
        ("nowhere", r"in/0.parquet' has no column 'nowhere', by which --slices groups rows"),
        ("tags", r"in/0.parquet': column 'tags' holds list<.*>, which rows can't be sliced by \(--slices\)"),
        ("bucket(device, 3)", r"column 'device' holds .*string, and buckets are of numbers"),
        ("bucket(price)", r"--slices bucket\(price\): expected 'bucket\(COLUMN, N\)', such as 'bucket\(price, 10\)'"),
        ("bucket(price, 1)", r"--slices bucket\(price, 1\): expected 2 to 100 buckets"),
    ):
        with pytest.raises(SystemExit) as ended:
            measured(actual, tmp_path / "in", word)
        assert ended.value.code == 2
        assert re.search(message, capsys.readouterr().err), word
        assert not (tmp_path / "out").exists()


@given(
    values=st.lists(st.one_of(st.none(), st.integers(-5, 5), st.floats(-1e9, 1e9)), min_size=1, max_size=60),
    buckets=st.integers(2, 6),
)
@settings(max_examples=60, deadline=None)
def test_every_row_is_in_one_bucket_and_buckets_are_even(values: list[Any], buckets: int) -> None:
    by = SliceSpec.parse(f"bucket(x, {buckets})")
    read = by.read(pa.array([None if value is None else float(value) for value in values], pa.float64()))
    actual = by.find_slices(read)
    places = np.sort(np.concatenate(list(actual.values())))
    np.testing.assert_array_equal(places, np.arange(len(values)))
    known = [value for value in values if value is not None]
    assert set(actual.get(MISSING, [])) == {place for place, value in enumerate(values) if value is None}
    largest = max((known.count(item) for item in known), default=0)
    for name, mine in actual.items():
        if name != MISSING:
            assert len(mine) <= len(known) / buckets + largest + 1


def test_no_two_slices_have_one_name() -> None:
    late = pa.array(1.7e9 + np.arange(1000.0))
    by = SliceSpec.parse("bucket(at, 10)")
    actual = by.find_slices(late)
    assert len(actual) == 10
    assert sum(map(len, actual.values())) == 1000
    words = pa.array(["(missing)", "(all others)", "a", None])
    by = SliceSpec.parse("word")
    actual = by.find_slices(words)
    assert {name: item.tolist() for name, item in actual.items()} == {
        "'(all others)'": [1],
        "'(missing)'": [0],
        "a": [2],
        "(missing)": [3],
    }
