"""What is planted in random rows is found and named, and nothing is found where nothing is."""

import re

import numpy as np
import pandas as pd
import pytest

from mmoe_rec.profiling.health_findings import list_findings, predictive_power
from tests.profiling.encoded_data import (
    changed,
    drifting,
    feature,
    finding_messages,
    health_of_frames,
    part,
    random_frames,
)


def message(health: dict, check: str) -> str:
    """The one message of a check."""
    (sentence,) = [finding["message"] for finding in health["findings"] if finding["check"] == check]
    return sentence


def test_nothing_suspicious_is_found_in_plain_rows(tmp_path):
    health = health_of_frames(tmp_path, random_frames(5))
    assert health["findings"] == []
    assert health["headline"] == "nothing suspicious found"


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
    "tags": lambda frame: frame.update({"id.tags": [[item] for item in ids(frame)]}),
    "user_item": lambda frame: frame.update({"id.user_item": ids(frame)}),
}
"""A feature -> what makes its numbers, its missing values or its ids tell the label."""


@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_is_found(tmp_path, name):
    health = health_of_frames(tmp_path, changed(6, lambda _, frame: LEAKS[name](frame)))
    assert finding_messages(health, "leak") == [name]
    assert health["findings"][0]["severity"] == "problem"
    if name == "weight":
        for word in ("feature 'weight'", "(of 'weight')", "task 'click'", "1.000"):
            assert word in message(health, "leak")


def test_drift_is_found_in_numbers_and_ids(tmp_path):
    def drift(split: str, frame: pd.DataFrame) -> None:
        if split == "test":
            frame["dense.item_click_rate"] += 2
            frame["id.when_weekday"] = 1 + frame["id.when_weekday"] % 3

    health = health_of_frames(tmp_path, changed(9, drift))
    assert sorted(finding_messages(health, "drift")) == ["item_click", "when"]
    assert part(health, "item_click_rate")["psi"] > 1
    (sentence,) = (finding["message"] for finding in health["findings"] if finding["subject"] == "item_click")
    assert re.search(r"PSI \d\.\d\d: the fraction of values .* in 'item_click_rate' goes from", sentence)
    assert "set `window_days` to limit it" in sentence


@pytest.mark.parametrize(("split", "number", "needed"), [("test", 40, 50), ("validation", 80, 100)])
def test_labels_that_are_too_rare_are_found(tmp_path, split, number, needed):
    """So few rows of a split are positive. Half of the validation users must have enough."""

    def rare(of_split: str, frame: pd.DataFrame) -> None:
        if of_split == split:
            frame["label.click"] = (np.arange(len(frame)) < number).astype(float)

    health = health_of_frames(tmp_path, changed(16, rare))
    assert finding_messages(health, "rare") == ["click"]
    expected = f"task 'click' has {number} rows of its rarer label in {split} rows, and {needed} are needed"
    assert expected in message(health, "rare")


def test_ids_that_training_does_not_know_are_found(tmp_path):
    def shift(split: str, frame: pd.DataFrame) -> None:
        if split == "test":
            frame.loc[::3, "id.item"] = 2

    health = health_of_frames(tmp_path, changed(10, shift))
    assert finding_messages(health, "unknown") == ["item"]
    assert "of the IDs of feature 'item' in test rows" in message(health, "unknown")


def test_what_costs_most_comes_first(tmp_path):
    findings = health_of_frames(tmp_path, changed(14, drifting))["findings"]
    assert (findings[0]["check"], findings[0]["subject"]) == ("unknown", "item")
    assert findings[0]["cost"] == pytest.approx(0.51 + 0.49 * 0.2, abs=0.02)  # a fifth is unknown anyway
    costs = [finding["cost"] for finding in findings]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] >= 0


def test_costs_are_those_of_rows_and_importance(tmp_path):
    health = health_of_frames(tmp_path, random_frames(5))
    price = feature(health, "price")
    price |= {"auc": {"click": 0.75, "like": None}, "unknown": {"train": 0.0, "test": 0.4}}
    assert predictive_power(price) == 0.5
    # Only the last bin has more than twice the share that it had in training.
    bins = [{"train": 0.6, "test": 0.3}, {"train": 0.3, "test": 0.35}, {"train": 0.1, "test": 0.35}]
    price["inputs"][0] |= {"psi": 0.5, "bins": [item | {"bin": "x"} for item in bins]}
    for changes, unknown, drift in (
        ({}, 0.4 * 0.5, 0.25 * 0.5),
        ({"is_key": True}, 0.4, 0.25 * 0.5),
        ({"is_key": False, "auc": {"click": None}}, 0.4 * 0.3, 0),
    ):
        price |= changes
        assert {finding.check: finding.cost for finding in list_findings(health)} == pytest.approx(
            {"unknown": unknown, "drift": drift}
        )


def test_constants_and_rare_values_are_found(tmp_path):
    def empty(split: str, frame: pd.DataFrame) -> None:
        frame["dense.weight"] = 0.0
        frame["id.when_weekday"] = 3
        frame["dense.price_missing"] = np.arange(len(frame)) % 30 > 0

    health = health_of_frames(tmp_path, changed(11, empty))
    assert finding_messages(health, "constant") == ["weight", "when"]
    assert finding_messages(health, "coverage") == ["price"]
    assert "3.3% of the train rows and 3.3% of the test rows" in message(health, "coverage")


def test_rates_that_change_and_tasks_without_labels_are_found(tmp_path):
    def change(split: str, frame: pd.DataFrame) -> None:
        if split == "validation":
            frame["label.stars"] = np.nan
        if split == "test":
            frame.loc[frame.index % 4 > 0, "label.click"] = 0.0

    health = health_of_frames(tmp_path, changed(12, change))
    assert finding_messages(health, "rate") == ["click"]
    assert finding_messages(health, "labels") == ["stars"]
    assert part(health, "item")["auc"]["stars"] is None


def test_a_rate_that_differs_by_chance_is_not_found(tmp_path):
    def rare(split: str, frame: pd.DataFrame) -> None:
        frame["label.click"] = 0.0
        frame.loc[: {"train": 9, "validation": 1, "test": 10}[split], "label.click"] = 1.0

    assert finding_messages(health_of_frames(tmp_path, changed(13, rare)), "rate") == []


def test_files_left_out_are_a_problem(tmp_path):
    skipped = [{"file": "logs/x/7.parquet", "reason": "is truncated"}]
    health = health_of_frames(tmp_path, random_frames(14), skipped=skipped)
    assert health["findings"][0]["severity"] == "problem"
    assert message(health, "files") == "1 file of the log could not be used, such as 'logs/x/7.parquet' (is truncated)"
