"""Mistakes that are made in practice, planted: each is seen in the report."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from sklearn.isotonic import IsotonicRegression

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation import evaluate
from mmoe_rec.evaluation.comparison import Results
from mmoe_rec.evaluation.evaluate import describe_training_overlap, evaluate_model
from mmoe_rec.evaluation.messages import find_suspicious_results
from mmoe_rec.evaluation.prediction_files import evaluate_predictions, parse_tasks
from mmoe_rec.evaluation.slices import slice_by_training_counts
from mmoe_rec.settings.sections import Evaluation, Split
from tests.inference.small_model import SmallModel
from tests.log.plain_tables import plain_settings
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
    out = folder.with_name("out")
    results = evaluate_predictions(parse_tasks(["bought"]), str(folder), out, Evaluation(resamples=200))
    return results, Page((out / "report.html").read_text(encoding="utf-8")).words


def checks(results: Results) -> list[str]:
    return [suspicious_result.check for suspicious_result in find_suspicious_results(results)]


def leak(frame: pd.DataFrame) -> pd.DataFrame:
    leaked = 0.98 * frame["label_bought"] + 0.02 * frame["predicted_bought"]
    return frame.assign(predicted_bought=np.clip(leaked, 0.001, 0.999))


def rank_as_score(frame: pd.DataFrame) -> pd.DataFrame:
    """Of which 1 is best."""
    return frame.assign(score=frame.groupby("request")["predicted_bought"].rank(ascending=False))


def shuffle_labels(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(label_bought=frame["label_bought"].sample(frac=1, random_state=0).to_numpy())


def join_other_requests(frame: pd.DataFrame) -> pd.DataFrame:
    """Of the same user, so that over all rows predictions still look good."""
    requests = frame.groupby("user")["request"].unique()
    following = {item: after for ids in requests for item, after in zip(ids, np.roll(ids, 1), strict=True)}
    by_row = frame.set_index(["request", "candidate"])["predicted_bought"]
    keys = pd.MultiIndex.from_arrays([frame["request"].map(following), frame["candidate"]])
    return frame.assign(predicted_bought=by_row.loc[keys].to_numpy())


def turn_users_round(frame: pd.DataFrame) -> pd.DataFrame:
    """Of a log without requests, users are told apart and their rows are not."""
    mean = frame.groupby("user")["predicted_bought"].transform("mean")
    turned = (1.3 * mean - 0.3 * frame["predicted_bought"]).clip(0.001)
    return frame.assign(predicted_bought=turned, request=np.arange(len(frame)))


@pytest.mark.parametrize(
    ("bug", "check", "message"),
    [
        (leak, "too good", "too good to be true: a feature may contain the label"),
        (rank_as_score, "score", "ranks the rows of requests worse than chance"),
        (
            lambda frame: frame.assign(predicted_bought=0.8 * frame["predicted_bought"]),
            "calibration",
            r"are off by 0\.[01]\d* on average",
        ),
        (shuffle_labels, "chance", "as after a join of labels or predictions to wrong rows"),
        (join_other_requests, "within requests", "joined to rows of other requests"),
        (turn_users_round, "within users", "but the rows of a user no better than by chance"),
    ],
)
def test_a_bug_is_seen(bug: Callable[[pd.DataFrame], pd.DataFrame], check: str, message: str, tmp_path: Path) -> None:
    results, words = report(bug(rows()), tmp_path / "in")
    assert check in checks(results)
    assert len(checks(results)) == 1 or check == "too good"
    assert re.search(message, words)


def fit_on_other_rows(frame: pd.DataFrame) -> pd.DataFrame:
    second = rows(1)
    fitted = IsotonicRegression(out_of_bounds="clip").fit(second["predicted_bought"], second["label_bought"])
    return frame.assign(predicted_bought=np.clip(fitted.predict(frame["predicted_bought"]), 0.001, 0.999))


def choose_one_a_request(frame: pd.DataFrame) -> pd.DataFrame:
    """Probabilities that sum to 1 over a request, of which one row is positive: sums agree by their making."""
    random = np.random.default_rng(0)
    logit = random.normal(size=(REQUESTS, CANDIDATES))
    chance = np.exp(logit) / np.exp(logit).sum(1, keepdims=True)
    chosen = (chance.cumsum(1) < random.random((REQUESTS, 1))).sum(1)
    label = (np.arange(CANDIDATES) == chosen[:, None]).ravel()
    return frame.assign(predicted_bought=chance.ravel(), label_bought=label)


def test_nothing_is_found_where_nothing_is_wrong(tmp_path: Path) -> None:
    right = [rows(0), rows(1), rows(2), fit_on_other_rows(rows()), choose_one_a_request(rows())]
    right.append(rows().assign(score=rows()["predicted_bought"]))
    for number, frame in enumerate(right):
        results, words = report(frame, tmp_path / str(number) / "in")
        assert checks(results) == []
        assert "Nothing suspicious found" in words


def test_rows_that_the_model_was_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings' split was moved back after the training."""
    monkeypatch.setattr(evaluate, "log_evaluation", lambda *_: None)
    model = SmallModel(tmp_path / "work")
    split = model.settings.split
    out = tmp_path / "out"
    fine = evaluate_model(model.settings, str(model.folder), out)
    assert "seen" not in checks(fine)
    end = split.train_end
    ends = {"train_end": end.replace(day=end.day - 3), "validation_end": end.replace(day=end.day - 1)}
    earlier = Split.model_validate(ends)
    settings = model.settings.model_copy(update={"split": earlier})
    settings = settings.model_copy(
        update={"data": settings.data.model_copy(update={"work_dir": str(tmp_path / "other")})}
    )
    actual = evaluate_model(settings, str(model.folder), out)
    assert checks(actual).count("seen") == 1
    words = Page((out / "report.html").read_text(encoding="utf-8")).words
    assert "it has seen labels of the measured rows" in " ".join(words.split())


def test_rows_that_a_column_splits_may_have_been_seen(tmp_path: Path) -> None:
    """Values are compared as text."""
    settings = plain_settings(tmp_path)
    split = settings.split.model_dump(mode="json")
    learnt = {"train": ["1", "4"], "validation": ["2"], "test": ["3"]}
    for changes, message in (
        (learnt, "chosen, on rows with 4 in column 'fold', and is measured on the same rows"),
        ({"column": "person"}, "column 'person' split, .* it may have seen"),
    ):
        trained = settings.model_copy(update={"split": Split.model_validate(split | changes)})
        (tmp_path / "settings.yaml").write_text(trained.to_yaml(), encoding="utf-8")
        (said,) = describe_training_overlap(settings, tmp_path)
        assert re.search(message, said), said


def test_new_users_are_one_slice() -> None:
    scored: Any = SimpleNamespace(users=pa.array([1, 2, 9]), candidates=None)
    slices = slice_by_training_counts(scored, {"user": pd.Series({1: 3, 2: 1})})
    actual = {by: {name: rows.tolist() for name, rows in item.items()} for by, item in slices.items()}
    assert actual == {
        "user": {"new": [2], "returning": [0, 1]},
        "training rows of the user": {"[1, 1]": [1], "(1, 3]": [0]},
    }


def test_models_are_compared_on_the_test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their own features; the page names both."""
    monkeypatch.setattr(evaluate, "log_evaluation", lambda *_: None)
    model, second = (
        SmallModel(tmp_path / "a"),
        SmallModel(tmp_path / "b", model={"experts": {"count": 2, "units": [4]}}),
    )
    out = tmp_path / "out"
    actual = evaluate_model(model.settings, str(model.folder), out, [str(second.folder)])
    comparison = json.loads((out / "metrics.json").read_text())["comparison"]
    assert (comparison["model"], list(comparison["against"])) == ("a/model", ["b/model"])
    separate: dict[str, Any] = comparison["against"]["b/model"]["groups"]["click"]["auc"]
    areas = [summary.tasks["click"].get("auc").value for summary in actual.summaries.values()]
    assert separate["value"] == pytest.approx(areas[0] - areas[1])
    words = Page((out / "report.html").read_text(encoding="utf-8")).words
    assert "Differences: a/model minus" in words
    assert "b/model" in words


def test_what_an_evaluation_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results among other things: a log would have a file more."""
    monkeypatch.setattr(evaluate, "log_evaluation", lambda *_: None)
    model = SmallModel(tmp_path / "work")
    (tmp_path / "file").write_text("mine")
    data, work = model.settings.data, tmp_path / "work"
    for place in (data.log, data.work_dir, work / "features", work / "features" / "train", tmp_path / "file"):
        with pytest.raises(UserError, match=r"which holds other things; name another|is a file; name a folder"):
            evaluate_model(model.settings, str(model.folder), place)
