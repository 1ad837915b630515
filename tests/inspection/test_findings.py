"""What is planted in random rows is found and named, and nothing is found where nothing is."""

import numpy as np
import pandas as pd
import pytest

from mmoe_rec.inspection.findings import LEAST, find, importance
from tests.inspection.encoded_data import changed, feature, found, health_of_frames, part, random_frames


def message(health: dict, check: str) -> str:
    """The one message of a check."""
    (told,) = [each["message"] for each in health["findings"] if each["check"] == check]
    return told


def test_nothing_suspicious_is_found_in_plain_rows(tmp_path):
    health = health_of_frames(tmp_path, random_frames(5))
    assert health["findings"] == []
    assert health["sentences"][0] == "nothing suspicious found"
    assert health["sentences"][1].startswith("AUC of click: a gain below 0.0")  # the other task is a regression
    assert set(health["forecasts"]) == {"click"}


def sign(frame: pd.DataFrame) -> None:
    frame["dense.weight"] = np.where(frame["label.click"] == 1, -frame["dense.weight"] - 1, frame["dense.weight"])


def missing(frame: pd.DataFrame) -> None:
    frame["dense.price_missing"] = frame["label.click"] == 0
    frame.loc[frame["dense.price_missing"], "dense.price"] = 0.0


def ids(frame: pd.DataFrame) -> pd.Series:
    return (np.random.default_rng(0).integers(5, 40, len(frame)) + 40 * frame["label.click"]).astype(int)


LEAKS = {
    "weight": sign,
    "price": missing,
    "item": lambda frame: frame.update({"id.item": ids(frame)}),
    "tags": lambda frame: frame.update({"id.tags": [[each] for each in ids(frame)]}),
    "user_item": lambda frame: frame.update({"id.user_item": ids(frame)}),
}
"""A feature -> what makes its numbers, its missing values or its ids tell the label."""


@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_is_found(tmp_path, name):
    health = health_of_frames(tmp_path, changed(6, lambda _, frame: LEAKS[name](frame)))
    assert found(health, "leak") == [name]
    assert health["findings"][0]["severity"] == "problem"
    if name == "weight":
        for word in ("feature 'weight'", "column 'weight'", "task 'click'", "1.000"):
            assert word in message(health, "leak")


def test_drift_is_found_in_numbers_and_ids(tmp_path):
    def drift(split: str, frame: pd.DataFrame) -> None:
        if split == "test":
            frame["dense.item_click_rate"] += 2
            frame["id.when_weekday"] = 1 + frame["id.when_weekday"] % 3

    health = health_of_frames(tmp_path, changed(9, drift))
    assert sorted(found(health, "drift")) == ["item_click", "when"]
    assert part(health, "item_click_rate")["psi"] > 1
    counter, rate = feature(health, "item_click"), part(health, "item_click_rate")
    total = {**rate, "name": "item_click_positives", "psi": rate["psi"] + 1}
    advice = "; a count of all of the past grows with any log"
    for inputs, name, end in (([rate], "rate", ""), ([total, rate], "rate", ""), ([total], "positives", advice)):
        counter["inputs"] = inputs
        (told,) = (each["message"] for each in find(health) if each["about"] == "item_click")
        assert f"by its input 'item_click_{name}': the share of values" in told
        assert told.endswith(end or "%")
    assert overrides(health["findings"], "item_click") == ["--split.train_start 2024-01-08"]
    assert overrides(find(health), "item_click") == [
        "--features.item_click.window_days '[5]'",
        "--split.train_start 2024-01-08",
    ]


def overrides(findings: list[dict], about: str) -> list[str]:
    """What is advised about something, as overrides."""
    advice = [each for finding in findings if finding["about"] == about for each in finding["advice"]]
    return [each["override"] for each in advice if each["override"]]


def test_ids_that_are_seen_too_seldom_are_found(tmp_path):
    """Each of 60 ids has two training rows; in test, ids are others."""

    def few(split: str, frame: pd.DataFrame) -> None:
        frame["id.item"] = 2 if split == "train" else 5 + np.arange(len(frame)) % 20
        frame.loc[:119, "id.item"] = 25 + np.arange(120) % 60

    health = health_of_frames(tmp_path, changed(15, few))
    assert found(health, "seldom") == ["item"]
    assert "has 2.0 training rows on average" in message(health, "seldom")
    (finding,) = (each for each in health["findings"] if each["check"] == "seldom")
    assert overrides([finding], "item") == ["--features.item.min_count 5"]
    assert finding["cost"] == pytest.approx(max(importance(feature(health, "item")), LEAST))


def test_labels_that_are_too_rare_are_found_with_a_split_that_has_more(tmp_path):
    """40 of 3,000 test rows, which begin on the 27th and take ten days, are positive."""

    def rare(split: str, frame: pd.DataFrame) -> None:
        if split == "test":
            frame["label.click"] = (np.arange(len(frame)) < 40).astype(float)

    health = health_of_frames(tmp_path, changed(16, rare))
    assert found(health, "rare") == ["click"]
    assert "task 'click' has 40 rows of its rarer label in test rows, and 50 are needed" in message(health, "rare")
    assert overrides(health["findings"], "click") == ["--split.validation_end 2024-01-22"]
    assert health["forecasts"] == {"click": None}
    assert health["sentences"][1] == "AUC of click: the rows have too few labels, or users, for an interval"


def test_what_tells_only_users_apart_is_found(tmp_path):
    def of_users(split: str, frame: pd.DataFrame) -> None:
        random = np.random.default_rng(len(frame))
        user = frame["user"].to_numpy()
        frame["label.click"] = (user % 2 + random.logistic(size=len(frame)) > 1).astype(float)
        frame["dense.weight"] = (user % 2).astype(float)

    health = health_of_frames(tmp_path, changed(17, of_users))
    assert found(health, "within users") == ["click"]
    assert "--evaluation.decide_by gauc_user" in overrides(health["findings"], "click")
    assert 0.45 < health["forecasts"]["click"]["gauc_user"] < 0.55 < health["forecasts"]["click"]["auc"]


def test_candidates_that_are_drawn_beside_the_positive_one_are_found(tmp_path):
    def draw(split: str, frame: pd.DataFrame) -> None:
        click = (np.arange(len(frame)) % 4 == 0).astype(float)
        frame["label.click"] = np.where(frame["request"] < 0.96 * len(frame) / 4, click, 0.0)

    health = health_of_frames(tmp_path, changed(18, draw))
    assert found(health, "drawn") == ["click"]
    same = health["overview"]["same_share"]
    assert same["click"] == [0.25, 0.96, 1500]
    same["click"] = [0.25, 0.94, 1500]
    assert [each for each in find(health) if each["check"] == "drawn"] == []
