"""Slices by columns of the log, features or not, and the rows of a split, beside pandas and scikit-learn."""

import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.metrics import roc_auc_score

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.evaluate import evaluate_model, score_split
from mmoe_rec.evaluation.slices import MISSING, RowSlicer
from mmoe_rec.settings.load import load_settings
from mmoe_rec.tracking.registry import resolve_model
from tests.commands import read_metrics, run
from tests.pipelines.learnable_log import learnable_log, settings_tree
from tests.pipelines.short_trainings import FIRST_DAY, LENIENT, RATES, SMALL, World
from tests.report.parsed import Page

pytestmark = pytest.mark.thorough


def log_of(rows: int) -> pa.Table:
    """With columns that no feature reads; no row lies where sorting by time would put it."""
    log, random = learnable_log(rows=rows), np.random.default_rng(3)
    device = np.array(["phone", "tablet", None], object)[random.choice(3, rows, p=[0.5, 0.3, 0.2])]
    stock = np.where(random.random(rows) < 0.1, np.nan, random.gamma(2.0, size=rows))
    log = log.append_column("device", pa.array(device)).append_column("stock", pa.array(stock))
    log = log.append_column("words", pa.array([["a"]] * rows))
    return log.take(pa.array(random.permutation(rows)))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("slices")
    (folder / "log").mkdir()
    log = log_of(6_000)
    for number in range(3):
        pq.write_table(log.slice(number * 2_000, 2_000), folder / "log" / f"{number}.parquet", row_group_size=700)
    tree = settings_tree(folder, split=FIRST_DAY, training=SMALL | RATES, evaluation=LENIENT)
    (folder / "first.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    world = World(folder)
    world.train()
    return world


def evaluated(world: World, *words: str, out: Path) -> pd.DataFrame:
    config = ["--config", str(world.folder / "first.yaml"), "--model", "models:/learnable@champion"]
    run("evaluate", *config, "--out", str(out), *words)
    return pd.read_parquet(out / "slices.parquet")


def areas(table: pd.DataFrame, by: str, task: str = "click") -> dict[str, float]:
    mine = table[(table["by"] == by) & (table["metric"] == "auc") & (table["group"] == task)]
    return dict(zip(mine["slice"], mine["value"], strict=True))


def joined(world: World, out: Path) -> pd.DataFrame:
    """The rows that were measured, with the log's columns, by another join."""
    log = pd.concat(pd.read_parquet(path) for path in sorted((world.folder / "log").glob("*.parquet")))
    rows = pd.read_parquet(out / "predictions.parquet").rename(columns={"candidate": "item"})
    return rows.merge(log[["request", "item", "device", "stock", "slot"]], on=["request", "item"], validate="1:1")


def area(rows: pd.DataFrame) -> float:
    return float(roc_auc_score(rows["label_click"], rows["predicted_click"]))


@pytest.mark.parametrize("split", ["test", "validation"])
def test_rows_are_sliced_by_columns_that_no_feature_reads(world: World, split: str, tmp_path: Path) -> None:
    words = ("--slices", "device", "bucket(stock, 3)", "--split", split)
    table, rows = evaluated(world, *words, out=tmp_path / "out"), joined(world, tmp_path / "out")
    of_device = {name: area(item) for name, item in rows.groupby("device")}
    assert areas(table, "device") == pytest.approx(of_device | {MISSING: area(rows[rows["device"].isna()])}, abs=1e-9)
    counts = table[(table["by"] == "device") & (table["group"] == "click") & (table["metric"] == "auc")]
    assert counts["rows"].sum() == len(rows)
    known = rows[rows["stock"].notna()].sort_values("stock", ignore_index=True)
    ends = [math.ceil(len(known) * third / 3) for third in range(4)]
    thirds = [area(known[first:last]) for first, last in pairwise(ends)]
    assert list(areas(table, "bucket(stock, 3)").values())[:3] == pytest.approx(thirds, abs=1e-9)


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ("colour", r"0\.parquet' has no column 'colour'.* Its columns are: .* \(slices\)"),
        ("words", r"column 'words' must hold integers, numbers or strings.*\(slices\)"),
        ("bucket(device, 3)", "column 'device' of the log holds string, and buckets are of numbers"),
    ],
)
def test_columns_that_cannot_be_sliced_by(world: World, slices: str, message: str, tmp_path: Path) -> None:
    settings = load_settings(str(world.folder / "first.yaml"), ["--evaluation.slices", f'["{slices}"]'])
    with pytest.raises(UserError, match=message):
        evaluate_model(settings, "models:/learnable@champion", tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_rows_that_the_log_no_longer_has_are_reported(world: World, tmp_path: Path) -> None:
    """Encoded rows outlive the files of a log."""
    settings = load_settings(str(world.folder / "first.yaml"), ["--evaluation.slices", '["device"]'])
    scored = score_split(settings, resolve_model("models:/learnable@champion", world.uri), "it")
    second = settings.model_copy(update={"data": settings.data.model_copy(update={"log": str(tmp_path / "log")})})
    (tmp_path / "log").mkdir()
    log = pq.read_table(world.folder / "log")
    last = log.filter(pa.compute.equal(log["request"], pa.compute.max(log["request"])))
    pq.write_table(log.filter(pa.compute.less(log["request"], last["request"][0])), tmp_path / "log" / "0.parquet")
    model = world.folder / "work" / "model"
    columns = RowSlicer(second, model)
    pq.write_table(log, tmp_path / "log" / "again.parquet")
    actual = []
    for asked in (settings, second):  # the second has a file that came again, whose rows count once
        columns_of_all = RowSlicer(asked, model)
        actual.append({name: rows.tolist() for name, rows in columns_of_all.find(scored)["device"].items()})
    assert actual[0] == actual[1]
    (tmp_path / "log" / "again.parquet").unlink()
    with pytest.raises(UserError, match=f"of the {len(scored.users):,} rows that are measured, the log '.*' has "):
        columns.find(scored)


def test_a_country_that_is_ranked_worse_than_by_chance_is_named_and_not_promoted(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A signal that says much of clicks turns round in one of five countries once training rows have ended."""
    log, random = learnable_log(rows=24_000), np.random.default_rng(3)
    country, click = np.array([*"ABCDE"])[log["user"].to_numpy() % 5], log["click"].to_numpy()
    turned = (country == "E") & (log["time"].to_numpy() >= np.datetime64("2024-03-07"))
    signal = np.where(turned, -0.25, 1.0) * 0.9 * (2 * click - 1) + random.normal(size=len(click))
    log = log.append_column("country", pa.array(country)).append_column("signal", pa.array(signal))
    world, words = World(tmp_path), ["--config", str(tmp_path / "first.yaml")]
    (tmp_path / "log").mkdir()
    pq.write_table(log, tmp_path / "log" / "0.parquet")
    for signals in ({}, {"signal": {"kind": "numeric", "column": "signal"}}):
        tree = settings_tree(tmp_path, split={"train_end": "2024-03-07", "validation_end": "2024-03-09"})
        tree["features"] |= signals
        tree["roles"] |= {"context": ["country"], "candidate": ["item", "price", *signals]}
        tree["training"] |= {"calibration": "temperature"}
        tree["evaluation"] = {"max_metric_drop": 0.02, "resamples": 200, "slices": ["country"]}
        (tmp_path / "first.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
        world.train()
    message = r"'{}' is not accepted as better, although .*: in slice country: E \([\d,]+ rows\): auc of click is 0.4"
    assert re.search(message.format("this model"), capsys.readouterr().out)
    assert world.champion_version() == "1"
    with pytest.raises(SystemExit):
        run("promote", *words, "--challenger", "2")
    assert re.search(message.format("version 2"), capsys.readouterr().out)
    assert "in slice country: E" in Page((tmp_path / "work/promotion/report.html").read_text(encoding="utf-8")).words
    run("promote", *words, "--challenger", "2", "--evaluation.guardrail_slices", '["user"]')
    assert world.champion_version() == "2"


# The rows of a split


def described(world: World, *words: str) -> str:
    """The words of the page of an evaluation, which lies where the settings say."""
    out = world.folder / "work" / ("evaluation_validation" if "validation" in words else "evaluation")
    run("evaluate", "--config", world.folder / "first.yaml", "--model", "models:/learnable@champion", *words)
    return " ".join(Page((out / "report.html").read_text(encoding="utf-8")).words.split())


@pytest.mark.parametrize("split", ["test", "validation"])
def test_the_rows_of_a_split_with_their_predictions(
    world: World, split: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Beside scikit-learn, and beside the metrics of the file of predictions."""
    described(world, "--split", split)
    out = world.folder / "work" / ("evaluation" if split == "test" else "evaluation_validation")
    assert f"predictions: {out / 'predictions.parquet'}" in capsys.readouterr().out
    mine, rows = read_metrics(out), pd.read_parquet(out / "predictions.parquet")
    encoded = pd.read_parquet(world.folder / "work" / "features" / "encoded" / split)
    assert len(rows) == len(encoded) == mine["rows"]
    for task in ("click", "liked"):
        np.testing.assert_array_equal(rows[f"label_{task}"], encoded[f"label.{task}"].astype(float))
        known = rows.dropna(subset=f"label_{task}")
        area = roc_auc_score(known[f"label_{task}"], known[f"predicted_{task}"])
        assert mine["tasks"][task]["auc"]["value"] == pytest.approx(area, abs=1e-9)
    words = ["--config", str(world.folder / "first.yaml"), "--predictions", str(out / "predictions.parquet")]
    run("evaluate", *words, "--out", str(tmp_path / "out"))  # though the log calls its candidates otherwise
    theirs = read_metrics(tmp_path / "out")
    for task in ("click", "liked"):
        for name in ("auc", "gauc_request", "logloss", "ndcg_at_5"):
            assert theirs["tasks"][task][name] == pytest.approx(mine["tasks"][task][name], abs=1e-6)
    assert theirs["score"]["ndcg_at_5"]["value"] == pytest.approx(mine["score"]["ndcg_at_5"]["value"], abs=1e-6)


def test_validation_rows_have_charts_of_their_own(world: World) -> None:
    champion = world.champion()
    assert champion is not None
    described(world)
    before = world.client.get_run(champion.run_id).data.metrics
    words = described(world, "--split", "validation")
    assert "on validation rows" in words
    assert "from 2024-03-06 00:00 UTC to 2024-03-08 00:00 UTC" in words
    assert "these rows selected the state of the model" in words
    after = world.client.get_run(champion.run_id).data.metrics
    assert {name for name in after if name.startswith("test/")} == {name for name in before if name.startswith("test/")}
    mine = read_metrics(world.folder / "work" / "evaluation_validation")["tasks"]["click"]["auc"]
    assert after["validation_rows/click.auc"] == pytest.approx(mine["value"])
    assert after["validation_rows/intervals/click.auc.low"] == pytest.approx(mine["low"])
