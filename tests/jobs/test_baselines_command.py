"""Baselines for any data set: what they predict, by whom they are stopped, and beside a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from mmoe_rec.batches.encoded_rows import EncodedRows
from mmoe_rec.jobs import baselines, evaluate
from tests import commands
from tests.inference.small_model import SmallModel
from tests.log.small_logs import BASE, random_log


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
    mine = json.loads((Path(model.settings.data.work) / "evaluation" / "metrics.json").read_text())
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
