"""Baselines for any data set: smoothed rates by hand, trees that learn what they should, and both beside a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from mmoe_rec.batches.encoded_rows import EncodedRows
from mmoe_rec.errors import UserError
from mmoe_rec.jobs import baselines, evaluate
from mmoe_rec.jobs.baselines import SMOOTHING, boost_trees, rate_candidates
from tests import commands
from tests.inference.small_model import SmallModel
from tests.log.small_logs import BASE, random_log


@pytest.mark.parametrize("of", [lambda number: number, lambda number: f"item {number}"])
def test_popularity_by_hand(of) -> None:
    candidates, others = ([of(each) for each in ids] for ids in ((-7, -7, -7, 5, 9), (-7, 5, 9, 1234)))
    found = rate_candidates(pa.array(candidates), np.array([1.0, 0.0, 1.0, 1.0, np.nan]), None, pa.array(others))
    overall = 3 / 4
    sums = [(2, 3), (1, 1), (0, 0), (0, 0)]
    np.testing.assert_allclose(found, [(a + SMOOTHING * overall) / (b + SMOOTHING) for a, b in sums])


def test_popularity_counts_rows_by_their_weights() -> None:
    """As if a row of weight 3 came three times."""
    random = np.random.default_rng(2)
    candidates, labels = random.integers(0, 5, 200), (random.random(200) < 0.3).astype(float)
    labels[random.random(200) < 0.1] = np.nan
    weights = random.integers(1, 4, 200)
    mine = rate_candidates(pa.array(candidates), labels, weights.astype(float), pa.array(range(6)))
    often = rate_candidates(pa.array(candidates.repeat(weights)), labels.repeat(weights), None, pa.array(range(6)))
    np.testing.assert_allclose(mine, often, rtol=1e-12)


NUMBER_AND_ID = np.array([False, True])


def tree_rows(seed: int, rows: int = 4000) -> tuple[np.ndarray, np.ndarray, None]:
    """A number with gaps, and an id from 600 values whose parity matters; large and negative ids."""
    generator = np.random.default_rng(seed)
    number = np.where(generator.random(rows) < 0.1, np.nan, generator.normal(size=rows))
    identity = generator.geometric(0.02, size=rows)
    logit = np.nan_to_num(number) + np.where(identity % 2 == 0, 1.5, -1.5)
    label = (generator.random(rows) < 1 / (1 + np.exp(-logit))).astype(float)
    return np.column_stack([number, identity * -1_000_000_007.0]), label, None


def test_trees_learn_from_numbers_and_categories() -> None:
    train, (x, y, _) = tree_rows(seed=0), tree_rows(seed=1)
    found, again = (boost_trees("binary", NUMBER_AND_ID, train, None, x, 15) for _ in range(2))
    assert roc_auc_score(y, found) > 0.8
    np.testing.assert_array_equal(found, again)


def test_rare_and_unseen_categories_are_one() -> None:
    x = np.column_stack([np.repeat(np.arange(1000.0), 3), np.zeros(3000)])
    x[:600, 0] = 7  # the most frequent value; all others but 253 of equal frequency are folded
    train = (x, (x[:, 0] == 7).astype(float), None)
    others = np.column_stack([[999.0, -5.0, 7.0, np.nan], np.zeros(4)])
    rare, unseen, frequent, missing = boost_trees("binary", np.array([True, False]), train, None, others, 5)
    assert rare == unseen < 0.5 < frequent
    assert np.isfinite(missing)


def test_trees_use_observed_rows_only_and_validation_rows_stop_them() -> None:
    x, y, _ = tree_rows(seed=2)
    unobserved = np.random.default_rng(0).random(len(y)) < 0.5
    masked = (x, np.where(unobserved, np.nan, y), None)
    left, right = (
        boost_trees("binary", NUMBER_AND_ID, each, None, x, 8)
        for each in (masked, (x[~unobserved], y[~unobserved], None))
    )
    np.testing.assert_array_equal(left, right)
    noise = np.random.default_rng(1).integers(0, 2, len(y)).astype(float)
    noise[::3] = np.nan
    stopped, full = (
        boost_trees("binary", NUMBER_AND_ID, (x, y, None), each, x, 80) for each in ((x, noise, None), None)
    )
    assert np.ptp(stopped) < np.ptp(full)


def test_trees_predict_values_of_a_regression() -> None:
    x, _, _ = tree_rows(seed=4)
    y = 3 + 2 * np.nan_to_num(x[:, 0])
    assert np.abs(boost_trees("regression", NUMBER_AND_ID, (x, y, None), None, x, 90) - y).mean() < 0.2


def test_what_can_not_be_learnt_is_told() -> None:
    x, unobserved = np.zeros((3, 1)), np.full(3, np.nan)
    for labels, sentence in ((unobserved, "no training row"), (np.array([1, 1, np.nan]), "expected both 0 and 1")):
        with pytest.raises(UserError, match=sentence):
            boost_trees("binary", np.array([False]), (x, labels, None), None, x)
    with pytest.raises(UserError, match="no training row has an observed label"):
        rate_candidates(pa.array([1, 2, 3]), unobserved, None, pa.array([1]))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return SmallModel(tmp_path_factory.mktemp("model"))


def run(model: SmallModel, *words: str) -> Path:
    commands.run("baselines", "--config", str(model.config()), *words)
    return Path(model.settings.data.work) / "baselines"


def test_a_model_stands_beside_what_it_has_to_beat(
    model: SmallModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(evaluate, "log_evaluation", lambda *_: None)
    out = run(model, "--model", str(model.folder))
    comparison = json.loads((out / "comparison.json").read_text())
    assert comparison["model"] == "model"
    assert list(comparison["against"]) == ["gradient boosting", "popularity"]
    evaluation = Path(model.settings.data.work) / "evaluation"
    assert (evaluation / "calibration_click.png").stat().st_size, "MLflow or not"
    mine = json.loads((evaluation / "metrics.json").read_text())
    assert json.loads((out / "metrics.json").read_text())["tasks"]["click"]["auc"] == mine["tasks"]["click"]["auc"]
    printed = capsys.readouterr().out
    assert "gradient boosting" in printed
    assert "report: " in printed
    assert "hold other rows" not in printed, "baselines are not sliced"


def test_popularity_is_the_rate_of_each_candidate(model: SmallModel) -> None:
    """By a loop over training rows; alone, without a model."""
    out = run(model)
    assert json.loads((out / "comparison.json").read_text())["model"] == baselines.TREES
    train, test = (pq.read_table(model.prepared.split(name)).to_pandas() for name in ("train", "test"))
    overall = train["label.click"].mean()
    sums = train.groupby("candidate")["label.click"].agg(["sum", "count"])
    rates = ((sums["sum"] + 20 * overall) / (sums["count"] + 20)).to_dict()
    test = test[test["label.click"].notna()]
    predicted = [rates.get(each, overall) for each in test["candidate"]]
    found = json.loads((out / "against" / "1" / "metrics.json").read_text())
    expected = roc_auc_score(test["label.click"], predicted)
    assert found["tasks"]["click"]["auc"]["value"] == pytest.approx(expected, abs=1e-9)


def test_rows_that_were_sampled_count_by_their_rate(tmp_path: Path) -> None:
    """As they do in the metrics: popularity is right in sum where candidates have many rows."""
    random, log = np.random.default_rng(0), random_log(0, rows=3000)
    rate = np.where(log["click"].to_numpy() == 1, 1.0, 0.2)
    kept = log.append_column("rate", pa.array(rate)).filter(pa.array(random.random(len(log)) < rate))
    model = SmallModel(
        tmp_path,
        log=[kept],
        columns={**BASE["columns"], "sampling_rate": "rate"},
        training={"sampling_correction": "weights"},
    )
    out = run(model)
    found = json.loads((out / "against" / "1" / "metrics.json").read_text())["tasks"]["click"]["calibration"]
    assert found["low"] <= 1.05
    assert 0.8 < found["value"] < 1.25


def test_of_many_rows_the_last_ones_are_taken(model: SmallModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are read at a time."""
    layout = model.prepared.layout
    rows = EncodedRows(model.prepared.split("train"), layout)
    whole = baselines._Inputs.read(rows, layout, ("candidate",))
    assert len(whole.x) == rows.rows
    monkeypatch.setattr(baselines, "ROWS_AT_A_TIME", 13)
    for most in (1, 7, rows.rows - 1, rows.rows, 10**9):
        last = baselines._Inputs.read(rows, layout, ("candidate",), most)
        taken = min(most, rows.rows)
        np.testing.assert_array_equal(last.x, whole.x[-taken:])
        np.testing.assert_array_equal(last.labels, whole.labels[-taken:])
        assert last.ids("candidate").equals(whole.ids("candidate")[-taken:])
