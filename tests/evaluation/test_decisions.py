"""The verdict on two models: what makes it, what holds a model back, and what it says."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from scipy.stats import norm

from mmoe_rec.evaluation.comparison import Comparison, Verdict, Versus, decide
from mmoe_rec.evaluation.intervals import LEVEL, Difference, Interval, level_after
from mmoe_rec.evaluation.slices import SliceRecord
from mmoe_rec.evaluation.summary import GroupSummary, Objective, Summary
from mmoe_rec.report.formatting import signed
from mmoe_rec.report.sentences import describe_guard, describe_verdict
from mmoe_rec.report.tables import differences_table
from mmoe_rec.settings.sections import Evaluation


def apart(value: float | None, reach: float | None = None, p: float | None = None) -> Difference:
    if value is None or reach is None:
        return Difference(value, p=p, p_corrected=p)
    p = p if p is not None else 0.01 if abs(value) > reach else 0.5
    return Difference(value, value - reach, value + reach, reach / 1.96, 1e9, p, p, reach)


def compared(
    objective: Difference, better: str = "higher", judged: tuple[str, ...] = ("bought",), **groups: Any
) -> Comparison:
    decides = Objective("auc", ("bought", "liked"), better)
    against = {"old": Versus(objective, groups)}
    return Comparison("new", 1000, {}, decides, against, judged=judged)


def summary(calibration: float = 1.0, reach: float | None = 0.1) -> Summary:
    ends = (None, None) if reach is None else (calibration - reach, calibration + reach)
    tasks = {
        "bought": GroupSummary("binary", {}, {"calibration": Interval(calibration, *ends)}, {}),
        "spent": GroupSummary("regression", {}, {}, {}),
    }
    return Summary(1, 1, 1, 1, tasks, GroupSummary("score", {}, {}, {}))


SAME = {"new": summary(), "old": summary()}


def verdict(found: Comparison, summaries: dict[str, Summary] = SAME) -> Verdict:
    return decide(found, "old", summaries)


def sentence(found: Comparison) -> str:
    return describe_verdict(replace(found, verdicts={"old": verdict(found)}), "old", SAME["new"])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("value", "reach", "p", "kind"),
    [
        (0.003, 0.002, None, "better"),
        (0.003, 0.004, None, "not shown"),
        (-0.003, 0.002, None, "worse"),
        (0.0, 0.0, 1.0, "not shown"),
        (None, None, None, "undecided"),
        (0.1, None, None, "undecided"),
        (0.003, 0.002, 0.06, "not shown"),  # once corrected
    ],
)
def test_an_interval_without_0_decides(sign: int, value: float | None, reach: float, p: float, kind: str) -> None:
    objective = apart(None if value is None else sign * value, reach, p)
    found = compared(objective, "higher" if sign > 0 else "lower", bought={"auc": apart(0.001, 0.002)})
    assert verdict(found).kind == kind


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (apart(-0.001, 0.003), "better"),
        (apart(-0.001, 0.005), "held back"),
        (apart(0.001, None), "held back"),
        (apart(None), "held back"),
        (None, "held back"),
    ],
)
def test_no_task_may_lose_more_than_the_margin(loss: Difference | None, kind: str) -> None:
    groups = {} if loss is None else {"bought": {"auc": loss}}
    assert verdict(compared(apart(0.003, 0.002), **groups)).kind == kind


def test_a_model_that_is_held_back_says_why() -> None:
    both = compared(apart(0.003, 0.002), bought={"auc": apart(0.001, 0.002)}, spent={"r2": apart(-0.02, 0.01)})
    assert verdict(both).kind == "better", "there are too few labels of 'spent' to judge by"
    both = replace(both, judged=("bought", "spent"))
    assert sentence(both) == (
        "'new' is not called better, although mean auc of bought, liked is higher than that of 'old' by 0.0030 (0.0010 "
        "to 0.0050): the r2 of spent changes by -0.0200 (-0.0300 to -0.0100), which is a loss of more than 0.005 "
        "(evaluation.margin)"
    )
    assert [(guard.task, guard.metric, guard.passed) for guard in verdict(both).guards] == [
        ("bought", "auc", True),
        ("bought", "calibration", True),
        ("spent", "r2", False),
    ]
    assert verdict(replace(both, rules=Evaluation(margin=0.03))).kind == "better"


@pytest.mark.parametrize("low", [-0.0080001, -0.0081, -0.0071])
def test_a_margin_that_rows_can_not_rule_out_says_which_they_could(low: float) -> None:
    found = compared(apart(0.003, 0.002), bought={"auc": apart(0.001, 0.001 - low)})
    told = re.search(r"a loss of more than 0.005 .* can't be ruled out; the least margin .* is (.*)$", sentence(found))
    assert told
    assert -low <= float(told[1]) < -low + 1e-4
    assert verdict(replace(found, rules=Evaluation(margin=float(told[1])))).kind == "better"


@pytest.mark.parametrize(
    ("number", "changes", "kind"),
    [
        (10, {}, "held back"),
        (30, {}, "better"),  # of so many, one is as far off by chance
        (10, {"apart": -0.03}, "better"),  # is not shown to be beyond the margin
        (10, {"group": "liked"}, "better"),  # is not judged
        (10, {"beside": "all rows"}, "better"),
        (10, {"metric": "ndcg_at_10"}, "better"),
        (10, {"error": None}, "better"),
    ],
)
def test_a_slice_that_is_shown_to_lose_more_than_the_margin_holds_back(number: int, changes: Any, kind: str) -> None:
    """Three standard errors beyond the margin: by chance 27 of 10,000."""
    ends = {"low": -0.079, "high": -0.021, "error": 0.015, "effective_users": 1e9, "p": 0.001}
    same = SliceRecord("country", "A", "bought", "auc", 99, 60, None, 0.7, "old", 0.0, 0.0, 0.0, 0.0, 1e9, 1.0)
    lost = replace(same, **({"slice": "E", "apart": -0.05, "value": 0.48} | ends | changes))
    found = compared(apart(0.003, 0.002), bought={"auc": apart(0.001, 0.002)})
    found = replace(found, slices=[lost, *(replace(same, slice=f"{each}") for each in range(number - 1))])
    assert verdict(found).kind == kind
    (guard,) = (each for each in verdict(found).guards if each.metric == "slices")
    told = describe_guard(guard, "old", Evaluation())
    if kind == "held back":
        assert sentence(found).endswith(told)
        assert told == (
            "in slice country: E (99 rows): auc of bought is 0.480, where that of 'old' is 0.530, which is a loss of "
            "more than 0.005 (evaluation.margin), corrected for the 10 slices by country"
        )
    else:
        assert re.fullmatch(r"of \d+ slices by country none is shown to have a loss .*\(evaluation.margin\)", told)


@pytest.mark.parametrize(
    ("mine", "its", "kind"),
    [
        (summary(1.5), summary(1.0), "held back"),
        (summary(0.6), summary(1.2), "held back"),
        (summary(1.5), summary(1.7), "better"),
        (summary(0.6), summary(2.0), "better"),
        (summary(1.3), summary(1.0), "better"),  # its interval reaches 1.2
        (summary(1.5, None), summary(1.0), "held back"),  # by the value, without an interval
        (summary(1.2, None), summary(1.0), "better"),
    ],
)
def test_probabilities_may_not_be_far_off_where_they_were_not(mine: Summary, its: Summary, kind: str) -> None:
    found = compared(apart(0.003, 0.002), bought={"auc": apart(0.003, 0.002)})
    of_both = verdict(found, {"new": mine, "old": its})
    assert of_both.kind == kind
    (guard,) = (each for each in of_both.guards if each.metric == "calibration")
    told = describe_guard(guard, "old", Evaluation())
    assert ("observed (" in told) == (mine.tasks["bought"].get("calibration").low is not None), "none has no width"


def test_a_guardrail_of_probabilities_says_what_it_found() -> None:
    found = compared(apart(0.003, 0.002), bought={"auc": apart(0.003, 0.002)})
    (guard,) = (each for each in verdict(found, {"new": summary(1.5), "old": summary()}).guards if not each.passed)
    assert describe_guard(guard, "old", Evaluation()) == (
        "the probabilities of bought are 1.50 times what was observed (1.40 to 1.60), which is beyond a factor of 1.25 "
        "(evaluation.calibration); those of 'old' are 1.00 times"
    )


def test_what_is_not_shown_says_what_would_have_been() -> None:
    assert sentence(compared(apart(0.0007, 0.0012), judged=())) == (
        "no difference is shown between 'new' and 'old': mean auc of bought, liked differs by +0.0007 (-0.0005 to "
        "+0.0019); nine of ten evaluations like this one would show a gain of 0.0020"
    )
    # An interval that lies above 0 would else contradict the verdict.
    corrected = compared(replace(apart(0.0013, 0.0012), p_corrected=0.07))
    assert "between 'new' and 'old', once corrected for the number of comparisons: mean auc" in sentence(corrected)
    # 3.24 standard errors of the objective alone; with a guardrail, each has to fail in 5% of the cases only.
    alone = verdict(compared(apart(0.0007, 1.96e-3), judged=()))
    assert alone.detectable == pytest.approx(3.2415e-3, rel=1e-4)
    groups = {"bought": {"auc": apart(0.0, 1.96e-2)}, "spent": {"r2": apart(0.0, 0.9)}}
    both = compared(apart(0.0007, 1.96e-3), judged=("bought", "spent"), **groups)
    both = replace(both, rules=Evaluation(margin=0.002))
    assert verdict(both).detectable == pytest.approx(1e-2 * (1.95996 + 1.64485) - 0.002, rel=1e-4)
    assert sentence(both).endswith("would show a gain of 0.0340, if guardrails of r2 allow it")
    three = replace(both, judged=(), against=both.against | {"third": both.against["old"]})
    assert verdict(three).detectable == pytest.approx(1e-3 * (2.24140 + 1.28155), rel=1e-4)
    assert sentence(replace(compared(apart(None)), objective=None)) == (
        "'new' and 'old' can't be told apart: no task has labels enough (50 rows of either)"
    )


def test_decisions_on_the_same_rows_share_one_level() -> None:
    """Each half of which errs in favour of the new model."""
    assert level_after(0) == LEVEL
    assert sum(level_after(tried) for tried in range(100_000)) / 2 == pytest.approx(LEVEL, rel=1e-4)
    again = replace(compared(replace(apart(0.0007, 1.96e-3), p_corrected=0.5), judged=()), tried=2)
    assert verdict(again).detectable == pytest.approx(1e-3 * (norm.isf(0.05 / 12) + norm.isf(0.1)), rel=1e-4)
    told = " (2 decisions on these rows promoted no model before, so the level of this one is 0.83%, not 5%)"
    for found in (apart(0.003, 0.002), apart(0.003, 0.004), apart(-0.003, 0.002)):
        for groups in ({"bought": {"auc": apart(0.001, 0.002)}}, {}):  # the latter holds back
            assert sentence(replace(compared(found, **groups), tried=2)).endswith(told)


@pytest.mark.parametrize(("mine", "its", "told"), [(1.2, 1.1, "further"), (0.9, 0.8, "closer"), (0.5, 1.6, "further")])
def test_a_difference_of_calibration_says_which_way(mine: float, its: float, told: str) -> None:
    """By factors: 0.5 is further from 1 than 1.6."""
    found = compared(apart(0.0, 0.1), bought={"calibration": apart(mine - its, 0.05)})
    (_, cell) = differences_table(found, summary(mine)).columns[1].cells
    assert str(cell).endswith(f" {told}")


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ((0.0003, -0.000015, 0.00061), ["+0.00030", "-0.00002", "+0.00061"]),
        ((0.0083, 0.000024, 0.0155), ["+0.00830", "+0.00002", "+0.01550"]),
        ((-1234.5, 0.25), ["-1,234", "+0"]),
        ((2e-8, 1.5e-9), ["+2.0e-08", "+1.5e-09"]),
        ((0.0, 0.0), ["0", "0"]),
        ((), []),
        ((0.0123456,), ["+0.0123"]),
        ((-0.00034,), ["-0.00034"]),
        ((2.5e-7,), ["+2.5e-07"]),
    ],
)
def test_numbers_that_stand_together_have_as_many_decimals(values: tuple[float, ...], shown: list[str]) -> None:
    assert signed(*values) == shown
    assert signed(*values, sign=False) == [each.removeprefix("+") for each in shown]
