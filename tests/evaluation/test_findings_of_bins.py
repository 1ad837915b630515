"""Probabilities that are right in sum and wrong nearly everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from mmoe_rec.evaluation.summary import summarise
from mmoe_rec.evaluation.sums import MeasuredTask, measure
from mmoe_rec.report.findings import findings


def found(slope: float, rows: int, seed: int, shift: float = 0.0) -> list[str]:
    """What is said of a model whose logits are so many times what they should be, and shifted."""
    random = np.random.default_rng(seed)
    logit = random.normal(0, 1.5, rows)
    label = random.random(rows) < 1 / (1 + np.exp(-logit))
    predicted = 1 / (1 + np.exp(-slope * logit - shift))
    users, requests = np.arange(rows) // 3, np.arange(rows)
    task = MeasuredTask("it", "binary", 1.0)
    summary = summarise(measure([task], users, requests, {"it": predicted}, {"it": label}, score=predicted), 100)
    assert 0.6 < summary["tasks"]["it"]["calibration"]["value"] < 1.6, "right in sum"
    return [each["message"] for each in findings(summary) if each["check"] == "calibration"]


@pytest.mark.parametrize("rows", [1_000, 20_000])
@pytest.mark.parametrize(
    ("slope", "why"),
    [
        (0.05, "they differ too little from each other, as after a short training"),
        (4.0, "they differ too much from each other, as of a model that knows its training rows too well"),
    ],
)
def test_probabilities_that_are_off_in_bins(rows: int, slope: float, why: str) -> None:
    (message,) = found(slope, rows, seed=0)
    assert "on average (ece), though right in sum" in message
    assert why in message


def test_what_is_off_in_sum_is_not_called_right() -> None:
    """Although by too little to be called too high."""
    (message,) = found(0.5, 20_000, seed=0, shift=0.35)
    assert "on average (ece), and in sum 1.1" in message


@pytest.mark.parametrize("rows", [150, 1_000, 20_000])
def test_right_probabilities_are_fine(rows: int) -> None:
    for seed in range(20):
        assert found(1.0, rows, seed) == []
