"""Mistakes that are made in practice, planted: each is seen in the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.results import Results
from mmoe_rec.jobs import evaluate
from mmoe_rec.jobs.evaluate import evaluate_model
from mmoe_rec.jobs.metrics import MeasureOptions, measure_predictions
from mmoe_rec.jobs.prediction_files import columns_of_tasks
from mmoe_rec.report.findings import find_all
from mmoe_rec.settings.sections import Split
from tests.inference.small_model import SmallModel
from tests.report.parsed import Page

USERS, REQUESTS, CANDIDATES = 300, 1500, 8


def rows(seed: int = 0) -> pd.DataFrame:
    """Requests of a good, calibrated model."""
    random = np.random.default_rng(seed)
    request = np.repeat(np.arange(REQUESTS), CANDIDATES)
    user = random.integers(USERS, size=REQUESTS)[request]
    logit = -1 + random.normal(0, 1, USERS)[user] + random.normal(0, 1.2, len(request))
    label = random.random(len(request)) < 1 / (1 + np.exp(-logit))
    return pd.DataFrame(
        {
            "user": user,
            "request": request,
            "candidate": np.tile(np.arange(CANDIDATES), REQUESTS),
            "label_bought": label,
            "predicted_bought": 1 / (1 + np.exp(-logit)),
        }
    )


def report(frame: pd.DataFrame, folder: Path) -> tuple[Results, str]:
    """What is found, and the words of the page."""
    folder.mkdir(parents=True)
    frame.to_parquet(folder / "rows.parquet", index=False)
    results = measure_predictions(
        columns_of_tasks(["bought"]), str(folder), folder.with_name("out"), MeasureOptions(200)
    )
    return results, Page((folder.with_name("out") / "report.html").read_text(encoding="utf-8")).words


def checks(results: Results) -> list[str]:
    return [each.check for each in find_all(results)]


def test_nothing_is_found_where_nothing_is_wrong(tmp_path: Path) -> None:
    for seed in range(3):
        results, words = report(rows(seed), tmp_path / str(seed) / "in")
        assert checks(results) == []
        assert "Nothing suspicious found" in words


def test_a_leaked_label_column(tmp_path: Path) -> None:
    frame = rows()
    frame["predicted_bought"] = np.clip(0.98 * frame["label_bought"] + 0.02 * frame["predicted_bought"], 0.001, 0.999)
    results, words = report(frame, tmp_path / "in")
    assert "too good" in checks(results)
    assert "too good to be true: a feature may hold the outcome" in words


def test_a_score_the_wrong_way_round(tmp_path: Path) -> None:
    """A rank given as the score, of which 1 is best."""
    frame = rows()
    right = frame.assign(score=frame["predicted_bought"])
    assert checks(report(right, tmp_path / "right" / "in")[0]) == []
    wrong = right.assign(score=frame.groupby("request")["predicted_bought"].rank(ascending=False))
    results, words = report(wrong, tmp_path / "wrong" / "in")
    assert checks(results) == ["score"]
    assert "ranks the rows of requests worse than chance" in words


def test_probabilities_of_another_unit(tmp_path: Path) -> None:
    frame = rows()
    frame["predicted_bought"] *= 0.8
    (found,) = find_all(report(frame, tmp_path / "in")[0])
    assert found.message.endswith("training.calibration corrects them, and so may longer training")
    assert "too low in all ranges that tell" in found.message


def test_shuffled_labels(tmp_path: Path) -> None:
    frame = rows()
    frame["label_bought"] = frame["label_bought"].sample(frac=1, random_state=0).to_numpy()
    results, words = report(frame, tmp_path / "in")
    assert checks(results) == ["chance"]
    assert "as where labels or predictions were joined to the wrong rows" in words


def test_predictions_joined_to_the_wrong_request(tmp_path: Path) -> None:
    """To another one of the same user, so that over all rows they still look good."""
    frame = rows()
    requests = frame.groupby("user")["request"].unique()
    following = {each: after for ids in requests for each, after in zip(ids, np.roll(ids, 1), strict=True)}
    by_row = frame.set_index(["request", "candidate"])["predicted_bought"]
    asked = pd.MultiIndex.from_arrays([frame["request"].map(following), frame["candidate"]])
    frame["predicted_bought"] = by_row.loc[asked].to_numpy()
    results, words = report(frame, tmp_path / "in")
    assert (results.first.summary.tasks["bought"].get("auc").low or 0) > 0.55
    assert checks(results) == ["requests"]
    assert "the rows of a request no better than by chance" in words
    assert "joined to rows of other requests" in words


@pytest.mark.parametrize("how", ["isotonic", "two points"])
def test_a_calibration_fitted_on_the_rows_that_it_is_measured_on(how: str, tmp_path: Path) -> None:
    frame = rows()
    given, label = frame["predicted_bought"].to_numpy() ** 1.5, frame["label_bought"].to_numpy()
    if how == "isotonic":
        frame["predicted_bought"] = IsotonicRegression(out_of_bounds="clip").fit(given, label).predict(given)
    else:
        logit = np.log(given / (1 - given))[:, None]
        frame["predicted_bought"] = LogisticRegression(C=1e9, tol=1e-12).fit(logit, label).predict_proba(logit)[:, 1]
    results, words = report(frame, tmp_path / "in")
    assert checks(results) == ["fitted"]
    assert "their calibration was fitted on these rows" in words


def test_a_calibration_fitted_on_other_rows_is_fine(tmp_path: Path) -> None:
    frame, other = rows(), rows(1)
    fitted = IsotonicRegression(out_of_bounds="clip").fit(other["predicted_bought"], other["label_bought"])
    frame["predicted_bought"] = np.clip(fitted.predict(frame["predicted_bought"]), 0.001, 0.999)
    assert checks(report(frame, tmp_path / "in")[0]) == []


def test_rows_that_the_model_was_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings' split was moved back after the training."""
    monkeypatch.setattr(evaluate, "log_evaluation", lambda *_: None)
    model = SmallModel(tmp_path / "work")
    split = model.settings.split
    out = tmp_path / "out"
    fine = evaluate_model(model.settings, str(model.folder), out)
    assert "seen" not in checks(fine.results)
    earlier = Split.model_validate(
        {
            "train_end": split.train_end.replace(day=split.train_end.day - 3),
            "validation_end": split.train_end.replace(day=split.train_end.day - 1),
        }
    )
    settings = model.settings.model_copy(update={"split": earlier})
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"work": str(tmp_path / "other")})})
    found = evaluate_model(settings, str(model.folder), out).results
    assert checks(found).count("seen") == 1
    words = Page((out / "report.html").read_text(encoding="utf-8")).words
    assert "it has seen labels that it is measured by" in " ".join(words.split())


def test_models_are_compared_on_the_test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their own features; the page names both, and who is new and who returns is sliced."""
    monkeypatch.setattr(evaluate, "log_evaluation", lambda *_: None)
    model, other = SmallModel(tmp_path / "a"), SmallModel(tmp_path / "b", model={"experts": {"count": 2, "units": [4]}})
    out = tmp_path / "out"
    found = evaluate_model(model.settings, str(model.folder), out, [str(other.folder)]).results
    comparison = json.loads((out / "comparison.json").read_text())
    assert (comparison["model"], list(comparison["against"])) == ("a/model", ["b/model"])
    apart: dict[str, Any] = comparison["against"]["b/model"]["groups"]["click"]["auc"]
    areas = [each.tasks["click"].get("auc").value for each in found.summaries.values()]
    assert apart["value"] == pytest.approx(areas[0] - areas[1])
    figures = pd.read_parquet(out / "metrics.parquet")
    of_click = figures[(figures["group"] == "click") & (figures["metric"] == "auc")]
    assert of_click["value"].tolist() == pytest.approx([*areas, areas[0] - areas[1]])
    assert of_click["less"].fillna("").tolist() == ["", "", "b/model"]
    slices = pd.read_parquet(out / "slices.parquet")
    clicks = slices[(slices["group"] == "click") & (slices["metric"] == "auc") & (slices["beside"] == "all rows")]
    by_user = clicks[clicks["by"] == "user"]
    assert by_user["rows"].sum() == found.first.summary.tasks["click"].counts["rows"]
    words = Page((out / "report.html").read_text(encoding="utf-8")).words
    assert "a/model" in words
    assert "minus b/model" in words


def test_the_first_model_is_not_scored_twice_by_another_name(tmp_path: Path) -> None:
    model = SmallModel(tmp_path / "a")
    with pytest.raises(UserError, match="are the same model"):
        evaluate_model(model.settings, str(model.folder), tmp_path / "out", [f"{model.folder}/"])


def test_requests_with_one_positive_each_are_not_called_fitted(tmp_path: Path) -> None:
    """Probabilities that sum to 1 over a request, of which one row is positive: sums agree by their making."""
    random = np.random.default_rng(0)
    logit = random.normal(size=(REQUESTS, CANDIDATES))
    chance = np.exp(logit) / np.exp(logit).sum(1, keepdims=True)
    chosen = (chance.cumsum(1) < random.random((REQUESTS, 1))).sum(1)
    frame = rows()
    frame["predicted_bought"] = chance.ravel()
    frame["label_bought"] = (np.arange(CANDIDATES) == chosen[:, None]).ravel()
    assert checks(report(frame, tmp_path / "in")[0]) == []


@pytest.mark.parametrize("where", ["log", "work", "work/features", "work/features/train", "file"])
def test_results_do_not_lie_where_other_things_do(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log would have a file more, and a folder of features would wait for itself."""
    monkeypatch.setattr(evaluate, "log_evaluation", lambda *_: None)
    model = SmallModel(tmp_path / "work")
    (tmp_path / "file").write_text("mine")
    place = {"log": model.settings.data.log, "work": model.settings.data.work}.get(where, str(tmp_path / where))
    with pytest.raises(UserError, match=r"which holds other things; name another|is a file; name a folder"):
        evaluate_model(model.settings, str(model.folder), place)
