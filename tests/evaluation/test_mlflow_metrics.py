"""Our metrics as MLflow's: through `mlflow.models.evaluate`, beside scikit-learn."""

from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import log_loss, r2_score, roc_auc_score

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.mlflow_metrics import metrics_of_task


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    random = np.random.default_rng(0)
    request = np.repeat(np.arange(120), 5)
    predicted = random.integers(101, size=600) / 128
    return pd.DataFrame(
        {
            "user": request % 40,
            "request": [f"r{each}" for each in request],
            "predicted": predicted,
            "label": (random.random(600) < predicted).astype(int),
            "weight": random.choice([0.5, 2.0], 600),
        }
    )


@pytest.fixture
def tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    yield
    mlflow.set_tracking_uri(before)


@pytest.mark.usefixtures("tracked")
@pytest.mark.parametrize("weighted", [False, True])
def test_mlflow_evaluates_with_them(frame: pd.DataFrame, weighted: bool) -> None:
    weight = frame["weight"] if weighted else None
    metrics = metrics_of_task(frame["user"], frame["request"], weight=weight, resamples=50)
    given = {"predictions": "predicted", "targets": "label", "extra_metrics": metrics, "model_type": None}
    with mlflow.start_run():
        found = mlflow.models.evaluate(data=frame, evaluators="default", **given).metrics
    area = roc_auc_score(frame["label"], frame["predicted"], sample_weight=weight)
    loss = log_loss(frame["label"], frame["predicted"].clip(2.0**-23, 1), sample_weight=weight)
    assert found["auc/value"] == pytest.approx(area, abs=1e-12)
    assert found["auc/low"] < area < found["auc/high"]
    assert found["logloss/value"] == pytest.approx(loss, rel=1e-9)
    by_user = frame.groupby("user").filter(lambda rows: rows["label"].nunique() == 2).groupby("user")
    if not weighted:
        areas = by_user.apply(lambda rows: roc_auc_score(rows["label"], rows["predicted"]), include_groups=False)
        assert found["gauc_user/value"] == pytest.approx(np.average(areas, weights=by_user.size()), abs=1e-12)
    assert 0 < found["ndcg_at_5/value"] <= 1


def test_a_regression(frame: pd.DataFrame) -> None:
    found = metrics_of_task(frame["user"], frame["request"], kind="regression", resamples=20)
    metrics = {each.name: each for each in found}
    predicted, labels = frame["predicted"] * 10, frame["predicted"] * 9 + frame["label"]
    found = metrics["r2"].eval_fn(predicted, labels).aggregate_results["value"]
    assert found == pytest.approx(r2_score(labels, predicted), abs=1e-12)
    assert not metrics["rmse"].greater_is_better
    assert "auc" not in metrics


def test_other_predictions_are_computed_anew_and_what_is_undefined_has_no_value(frame: pd.DataFrame) -> None:
    (area,) = (each for each in metrics_of_task(frame["user"], frame["request"], resamples=20) if each.name == "auc")
    one, other, again = (
        area.eval_fn(predicted, frame["label"]).aggregate_results["value"]
        for predicted in (frame["predicted"], 1 - frame["predicted"], frame["predicted"])
    )
    assert one + other == pytest.approx(1, abs=1e-12)
    assert again == one
    assert area.eval_fn(frame["predicted"], np.ones(600)).aggregate_results == {}
    with pytest.raises((UserError, ValueError)):
        area.eval_fn(frame["predicted"][:10], frame["label"][:10])
