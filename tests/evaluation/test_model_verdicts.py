"""The verdict on two models: what makes it, what holds a model back, and what it says."""

from __future__ import annotations

from typing import Any

import pytest

from mmoe_rec.evaluation.comparison import Rule, verdict
from mmoe_rec.evaluation.numbers import number, numbers


def apart(value: float | None, reach: float | None = None, p: float | None = None) -> dict[str, Any]:
    low, high = (None, None) if value is None or reach is None else (value - reach, value + reach)
    found = p if p is not None else (None if reach is None or value is None else 0.01 if abs(value) > reach else 0.5)
    told = {"value": value, "low": low, "high": high, "p": found, "p_corrected": found, "detectable": reach}
    return told | {"error": None if reach is None else reach / 1.96, "effective_users": 1e9}


def compared(objective: dict[str, Any], better: str = "higher", **groups: Any) -> dict[str, Any]:
    told = {"name": "mean auc of bought, liked", "metric": "auc", "groups": ["bought", "liked"], "better": better}
    effective = dict.fromkeys(("bought", "liked", "spent", "score"), 1e9)
    against = {"old": {"objective": objective, "groups": groups}}
    return {"model": "new", "effective_users": effective, "objective": told, "against": against}


def summary(calibration: float = 1.0, reach: float | None = 0.1) -> dict[str, Any]:
    low, high = (None, None) if reach is None else (calibration - reach, calibration + reach)
    task = {"kind": "binary", "calibration": {"value": calibration, "low": low, "high": high}}
    return {"tasks": {"bought": task, "spent": {"kind": "regression"}}}


SAME = {"new": summary(), "old": summary()}


def kind(found: dict[str, Any], summaries: dict[str, Any] = SAME, judged: tuple[str, ...] = ("bought",)) -> str:
    told: str = verdict(found, "old", summaries, judged, Rule())["kind"]
    return told


@pytest.mark.parametrize("sign", [1, -1])
def test_an_interval_without_0_decides(sign: int) -> None:
    better = "higher" if sign > 0 else "lower"
    fine = {"bought": {"auc": apart(0.001, 0.002)}}
    assert kind(compared(apart(sign * 0.003, 0.002), better, **fine)) == "better"
    assert kind(compared(apart(sign * 0.003, 0.004), better, **fine)) == "not shown"
    assert kind(compared(apart(sign * -0.003, 0.002), better, **fine)) == "worse"
    assert kind(compared(apart(0.0, 0.0, p=1.0), better, **fine)) == "not shown"
    assert kind(compared(apart(None), better, **fine)) == kind(compared(apart(0.1), better, **fine)) == "undecided"
    assert kind(compared(apart(sign * 0.003, 0.002, p=0.06), better, **fine)) == "not shown"  # corrected


def test_no_task_may_lose_more_than_the_margin() -> None:
    gain = apart(0.003, 0.002)
    assert kind(compared(gain, bought={"auc": apart(-0.001, 0.003)})) == "better"
    assert kind(compared(gain, bought={"auc": apart(-0.001, 0.005)})) == "held back"
    assert kind(compared(gain, bought={"auc": apart(0.001, None)})) == "held back"
    assert kind(compared(gain, bought={"auc": apart(None)})) == kind(compared(gain)) == "held back"
    both = compared(gain, bought={"auc": apart(0.001, 0.002)}, spent={"r2": apart(-0.02, 0.01)})
    assert kind(both) == "better", "there are too few labels to judge by"
    assert kind(both, judged=("bought", "spent")) == "held back"
    told = verdict(both, "old", SAME, ["bought", "spent"], Rule())
    assert told["sentence"] == (
        "'new' is held back, although mean auc of bought, liked is higher than that of 'old' by 0.0030 (0.0010 to "
        "0.0050): r2 of spent changes by -0.0200 (-0.0300 to -0.0100), which is a loss of more than 0.005 "
        "(evaluation.margin)"
    )
    assert [(guard["task"], guard["metric"], guard["passed"]) for guard in told["guards"]] == [
        ("bought", "auc", True),
        ("bought", "calibration", True),
        ("spent", "r2", False),
    ]
    assert verdict(both, "old", SAME, ["bought", "spent"], Rule(margin=0.03))["kind"] == "better"


def test_probabilities_may_not_be_far_off_where_they_were_not() -> None:
    found = compared(apart(0.003, 0.002), bought={"auc": apart(0.003, 0.002)})
    assert kind(found, {"new": summary(1.5), "old": summary(1.0)}) == "held back"
    assert kind(found, {"new": summary(0.6), "old": summary(1.2)}) == "held back"
    assert kind(found, {"new": summary(1.5), "old": summary(1.7)}) == "better"
    assert kind(found, {"new": summary(0.6), "old": summary(2.0)}) == "better"
    assert kind(found, {"new": summary(1.3), "old": summary(1.0)}) == "better"  # its interval reaches 1.2
    assert kind(found, {"new": summary(1.5, None), "old": summary(1.0)}) == "held back"  # by the value, without one
    assert kind(found, {"new": summary(1.2, None), "old": summary(1.0)}) == "better"
    (guard,) = (
        each
        for each in verdict(found, "old", {"new": summary(1.5), "old": summary()}, ["bought"], Rule())["guards"]
        if not each["passed"]
    )
    assert guard["sentence"] == (
        "the probabilities of bought are 1.50 times what was observed (1.40 to 1.60), which is beyond a factor of 1.25 "
        "(evaluation.calibration); those of 'old' are 1.00 times"
    )


def test_what_is_not_shown_says_what_would_have_been() -> None:
    told = verdict(compared(apart(0.0007, 0.0012)), "old", SAME, [], Rule())
    assert told["sentence"] == (
        "no difference is shown between 'new' and 'old': mean auc of bought, liked differs by +0.0007 (-0.0005 to "
        "+0.0019); nine of ten evaluations like this one would show a gain of 0.0020"
    )
    # 3.24 standard errors of the objective alone; with a guardrail, each has to fail in 5% of the cases only.
    alone = verdict(compared(apart(0.0007, 1.96e-3)), "old", SAME, [], Rule())
    assert alone["detectable"] == pytest.approx(3.2415e-3, rel=1e-4)
    both = compared(apart(0.0007, 1.96e-3), bought={"auc": apart(0.0, 1.96e-2)}, spent={"r2": apart(0.0, 0.9)})
    told = verdict(both, "old", SAME, ["bought", "spent"], Rule(margin=0.002))
    assert told["detectable"] == pytest.approx(1e-2 * (1.95996 + 1.64485) - 0.002, rel=1e-4)
    assert told["sentence"].endswith("would show a gain of 0.0340, if guardrails of r2 allow it")
    both["against"]["third"] = both["against"]["old"]
    corrected = verdict(both, "old", SAME, [], Rule())["detectable"]
    assert corrected == pytest.approx(1e-3 * (2.24140 + 1.28155), rel=1e-4)
    nothing = {**compared(apart(None)), "objective": None}
    assert verdict(nothing, "old", SAME, [], Rule())["sentence"] == (
        "'new' and 'old' can't be told apart: no task has labels enough (50 rows of either)"
    )


def test_a_gain_that_is_not_shown_once_corrected_says_so() -> None:
    """Its interval lies above 0, which would else contradict the verdict."""
    told = verdict(compared(apart(0.0013, 0.0012) | {"p_corrected": 0.07}), "old", SAME, [], Rule())
    assert told["kind"] == "not shown"
    assert "between 'new' and 'old', once corrected for the number of comparisons: mean auc" in told["sentence"]


def test_numbers_that_stand_together_have_as_many_decimals() -> None:
    assert numbers(0.0003, -0.000015, 0.00061) == ["+0.00030", "-0.00002", "+0.00061"]
    assert numbers(0.0083, 0.000024, 0.0155) == ["+0.00830", "+0.00002", "+0.01550"]
    assert numbers(0.0043, 0.0, 0.0052, sign=False) == ["0.0043", "0", "0.0052"]
    assert numbers(-1234.5, 0.25) == ["-1,234", "+0"]
    assert numbers(2e-8, 1.5e-9) == ["+2.0e-08", "+1.5e-09"]
    assert numbers(0.0, 0.0) == ["0", "0"]
    assert numbers() == []


def test_numbers_keep_two_digits_at_least() -> None:
    assert [number(each) for each in (0.0123456, -0.00034, 0.0, 1234.5, 2.5e-7)] == [
        "+0.0123",
        "-0.00034",
        "0",
        "+1,234",
        "+2.5e-07",
    ]
