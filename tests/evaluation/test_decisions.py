"""The verdict on two models: what makes it, what holds a model back, and what it says."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from simulated_log import simulate

from mmoe_rec.evaluation.comparison import (
    Comparison,
    Guardrail,
    ModelDifferences,
    Results,
    Verdict,
    check_guardrails,
    check_slice_guardrail,
    decide,
)
from mmoe_rec.evaluation.intervals import Difference, Interval
from mmoe_rec.evaluation.promotion import _find_objections, _read_verdict
from mmoe_rec.evaluation.results_report import differences_table
from mmoe_rec.evaluation.slices import SliceRecord
from mmoe_rec.evaluation.summary import GroupSummary, MeasuredModel, Objective, Summary, summarize
from mmoe_rec.report.formatting import format_signed
from mmoe_rec.settings.sections import Evaluation


def build_difference(value: float | None, reach: float | None = None, p_value: float | None = None) -> Difference:
    if value is None or reach is None:
        return Difference(value, p_value=p_value, corrected_p_value=p_value)
    p_value = p_value if p_value is not None else 0.01 if abs(value) > reach else 0.5
    return Difference(value, value - reach, value + reach, reach / 1.96, 1e9, p_value, p_value)


def summary(calibration: float = 1.0, reach: float | None = 0.1) -> Summary:
    ends = (None, None) if reach is None else (calibration - reach, calibration + reach)
    tasks = {
        "bought": GroupSummary("binary", {}, {"calibration": Interval(calibration, *ends)}, {}),
        "spent": GroupSummary("regression", {}, {}, {}),
    }
    return Summary(1, 1, 1, 1, tasks, GroupSummary("score", {}, {}, {}))


SAME = {"new": summary(), "old": summary()}
DECIDES = Objective("auc", ("bought", "liked"), "higher")


def verdict(
    objective: Difference,
    better: str = "higher",
    judged: tuple[str, ...] = ("bought",),
    margin: float = 0.005,
    summaries: dict[str, Summary] = SAME,
    slices: Any = (),
    **groups: Any,
) -> Verdict:
    differences, rules = ModelDifferences(objective, groups), Evaluation(max_metric_drop=margin)
    guardrails = [
        *check_guardrails(differences, summaries, judged, rules),
        check_slice_guardrail(slices, "old", judged, margin),
    ]
    known = [guard for guard in guardrails if guard is not None]
    return decide("new", "old", replace(DECIDES, better=better), differences, known)


WELL = {"bought": {"auc": build_difference(0.001, 0.002)}}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("value", "reach", "p", "kind"),
    [
        (0.003, 0.002, None, "better"),
        (0.003, 0.004, None, "not significant"),
        (-0.003, 0.002, None, "worse"),
        (0.0, 0.0, 1.0, "not significant"),
        (None, None, None, "undecided"),
        (0.1, None, None, "undecided"),
        (0.003, 0.002, 0.049, "better"),
        (0.003, 0.002, 0.05, "not significant"),  # once corrected
        (-0.003, 0.002, 0.05, "not significant"),
    ],
)
def test_an_interval_without_0_decides(sign: int, value: float | None, reach: float, p: float, kind: str) -> None:
    objective = build_difference(None if value is None else sign * value, reach, p)
    assert verdict(objective, "higher" if sign > 0 else "lower", **WELL).kind == kind


LIMIT = "a loss of more than 0.005 (evaluation.max_metric_drop)"


@pytest.mark.parametrize(
    ("low", "high", "kind", "message"),
    [
        (-0.005, 0.01, "better", f"changes by +0.0025 (-0.0050 to +0.0100), so {LIMIT} is ruled out"),
        (-0.0051, 0.01, "blocked", f"so {LIMIT} can't be ruled out"),
        (-0.02, -0.005, "blocked", f"so {LIMIT} can't be ruled out"),
        (-0.02, -0.0051, "blocked", f", which is {LIMIT}"),
        (None, 0.0, "blocked", f"the difference in auc of bought has no interval, so {LIMIT} can't be ruled out"),
        (None, None, "blocked", f"the difference in auc of bought is undefined, so {LIMIT} can't be ruled out"),
    ],
)
def test_no_task_may_lose_more_than_the_margin(low: Any, high: Any, kind: str, message: str) -> None:
    loss = Difference(high, None, None) if low is None else Difference((low + high) / 2, low, high)
    actual = verdict(build_difference(0.003, 0.002), bought={"auc": loss})
    assert actual.kind == kind
    assert actual.guardrails[0].message.endswith(message)
    assert (message in actual.message) == (kind == "blocked")
    assert verdict(build_difference(0.003, 0.002)).kind == "blocked", "a difference that there is not"


def test_a_model_that_is_held_back_says_why() -> None:
    groups = WELL | {"spent": {"r2": build_difference(-0.02, 0.01)}}
    assert verdict(build_difference(0.003, 0.002), **groups).kind == "better", (
        "there are too few labels of 'spent' to judge by"
    )
    actual = verdict(build_difference(0.003, 0.002), judged=("bought", "spent"), **groups)
    assert actual.message == (
        "'new' is not accepted as better, although mean auc of bought, liked is higher than that of 'old' by 0.0030 "
        "(0.0010 to 0.0050): the r2 of spent changes by -0.0200 (-0.0300 to -0.0100), which is a loss of more "
        "than 0.005 (evaluation.max_metric_drop)"
    )
    assert [(guard.task, guard.metric, guard.passed) for guard in actual.guardrails] == [
        ("bought", "auc", True),
        ("bought", "calibration", True),
        ("spent", "r2", False),
    ]
    assert verdict(build_difference(0.003, 0.002), judged=("bought", "spent"), margin=0.03, **groups).kind == "better"


@pytest.mark.parametrize(
    ("number", "changes", "kind"),
    [
        (10, {}, "blocked"),
        (30, {}, "better"),  # of so many, one is as far off by chance
        (10, {"difference": -0.03}, "better"),  # is not significantly beyond the margin
        (10, {"group": "liked"}, "better"),  # is not judged
        (10, {"compared_to": "all rows"}, "better"),
        (10, {"metric": "ndcg_at_10"}, "better"),
        (10, {"standard_error": None}, "better"),
    ],
)
def test_a_slice_that_is_shown_to_lose_more_than_the_margin_holds_back(number: int, changes: Any, kind: str) -> None:
    """Three standard errors beyond the margin: by chance 27 of 10,000."""
    ends = {"low": -0.079, "high": -0.021, "standard_error": 0.015, "degrees_of_freedom": 1e9, "p_value": 0.001}
    same = SliceRecord("country", "A", "bought", "auc", 99, 60, None, 0.7, "old", 0.0, 0.0, 0.0, 0.0, 1e9, 1.0)
    lost = replace(same, **({"slice": "E", "difference": -0.05, "value": 0.48} | ends | changes))
    # Slices that can't be judged are none of those that the correction counts.
    unknown = [replace(same, slice=f"{index} unknown", degrees_of_freedom=None) for index in range(50)]
    slices = [lost, *(replace(same, slice=f"{index}") for index in range(number - 1)), *unknown]
    actual = verdict(build_difference(0.003, 0.002), slices=slices, **WELL)
    assert actual.kind == kind
    (message,) = (guardrail.message for guardrail in actual.guardrails if guardrail.metric == "slices")
    if kind == "blocked":
        assert actual.message.endswith(message)
        assert message == (
            "in slice country: E (99 rows): auc of bought is 0.480, where that of 'old' is 0.530, which is a loss of "
            "more than 0.005 (evaluation.max_metric_drop), corrected for the 10 slices by country"
        )
    else:
        assert (
            " slices by country has, significantly, a loss of more than 0.005 (evaluation.max_metric_drop)" in message
        )


def test_slices_that_lose_come_worst_first_and_slices_of_several_tasks_count_once() -> None:
    same = SliceRecord("country", "A", "bought", "auc", 99, 60, None, 0.7, "old", 0.0, 0.0, 0.0, 0.01, 40.0, 1.0)
    records = [same, replace(same, group="liked"), replace(same, slice="B", difference=-0.06)]
    records += [replace(same, slice="C", difference=-0.09, group="liked")]
    guard, tasks = check_slice_guardrail(records, "old", ["bought", "liked"], 0.005), ["bought", "liked"]
    assert guard.message == (
        "in slice country: C (99 rows): auc of liked is 0.700, where that of 'old' is 0.790; in slice country: B (99 "
        "rows): auc of bought is 0.700, where that of 'old' is 0.760, which is a loss of more than 0.005 "
        "(evaluation.max_metric_drop), corrected for the 3 slices by country"
    )
    message = "none of 3 slices by country has, significantly, a loss of more than 0.2 (evaluation.max_metric_drop)"
    assert check_slice_guardrail(records, "old", tasks, 0.2) == Guardrail(None, "slices", True, message)
    assert (
        check_slice_guardrail(records, "old", [], 0.005)
        is check_slice_guardrail(records, "another", tasks, 0.005)
        is None
    )


@pytest.mark.parametrize(
    ("mine", "theirs", "kind"),
    [
        (summary(1.5), summary(1.0), "blocked"),
        (summary(0.6), summary(1.2), "blocked"),
        (summary(1.5), summary(1.7), "better"),
        (summary(0.6), summary(2.0), "better"),
        (summary(1.3), summary(1.0), "better"),  # its interval reaches 1.2
        (summary(1.5, None), summary(1.0), "blocked"),  # by the value, without an interval
        (summary(1.2, None), summary(1.0), "better"),
        (summary(1.25, None), summary(1.0), "better"),  # as far off as is allowed
        (summary(0.79, None), summary(1.0), "blocked"),  # 1 / 1.25 is 0.8
        (summary(0.85), summary(1.0), "better"),  # its interval reaches 0.75 and 0.95
        (summary(1.5), summary(1.5), "better"),  # as far as the other
    ],
)
def test_probabilities_may_not_be_far_off_where_they_were_not(mine: Summary, theirs: Summary, kind: str) -> None:
    actual = verdict(build_difference(0.003, 0.002), summaries={"new": mine, "old": theirs}, **WELL)
    assert actual.kind == kind
    (message,) = (guardrail.message for guardrail in actual.guardrails if guardrail.metric == "calibration")
    ratio, second = (item.tasks["bought"].get("calibration") for item in (mine, theirs))
    is_outside = (ratio.low or ratio.value) > 1.25 or (ratio.high or ratio.value) < 0.8
    assert message == (
        f"the probabilities of bought are {ratio.format(2)} times the mean label, which is "
        f"{'beyond' if is_outside else 'not significantly beyond'} a factor of 1.25 "
        "(evaluation.max_calibration_ratio). "
        f"For 'old', the factor is {second.value:.2f}"
    )


@pytest.mark.parametrize("undefined", ["new", "old"])
def test_probabilities_that_either_model_lacks_are_not_guarded(undefined: str) -> None:
    lacking = replace(summary(), tasks={"bought": GroupSummary("binary", {}, {}, {})})
    summaries = {"new": summary(1.5), "old": summary()} | {undefined: lacking}
    assert [
        guard.metric for guard in verdict(build_difference(0.003, 0.002), summaries=summaries, **WELL).guardrails
    ] == ["auc"]


def test_a_verdict_that_shows_nothing_says_so() -> None:
    assert verdict(build_difference(0.0007, 0.0012)).message == (
        "there is no significant difference between 'new' and 'old': mean auc of bought, liked "
        "differs by +0.0007 (-0.0005 to +0.0019)"
    )
    # An interval that lies above 0 would else contradict the verdict.
    corrected = verdict(build_difference(0.0013, 0.0012, 0.07)).message
    assert "between 'new' and 'old', once corrected for the number of comparisons: mean auc" in corrected
    assert (
        verdict(build_difference(0.0, 0.0, 1.0)).message
        == "'new' and 'old' do not differ: mean auc of bought, liked is the same"
    )
    assert decide("new", "old", None, ModelDifferences(build_difference(None), {})).message == (
        "'new' and 'old' can't be compared: every task has fewer than 50 rows of one label"
    )
    assert verdict(build_difference(None)).message.endswith("mean auc of bought, liked is undefined")
    assert "has no interval, as one user decides nearly alone" in verdict(build_difference(0.1)).message


@pytest.mark.parametrize(
    ("mine", "theirs", "message"), [(1.2, 1.1, "further"), (0.9, 0.8, "closer"), (0.5, 1.6, "further")]
)
def test_a_difference_of_calibration_says_which_way(mine: float, theirs: float, message: str) -> None:
    """By factors: 0.5 is further from 1 than 1.6."""
    differences = ModelDifferences(
        build_difference(0.0, 0.1), {"bought": {"calibration": build_difference(mine - theirs, 0.05)}}
    )
    (_, (_, cell)) = differences_table(Comparison("new", None, {"old": differences}, (), {}, {}), summary(mine)).rows
    assert cell.text.endswith(f" {message}")


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
    assert format_signed(*values) == shown
    assert format_signed(*values, sign=False) == [item.removeprefix("+") for item in shown]


LOW, RANKS = (
    "the probabilities of 'bought' are too low: 0.47 times ",
    "the score ranks the rows of requests worse than chance ",
)
BOTH, SEEN = ("bought", "liked"), "old has seen these rows"


@pytest.mark.parametrize(
    ("scale", "tasks", "changes", "against"),
    [
        (1.0, BOTH, {}, []),  # although both models rank likes by chance
        (1.0, ("liked",), {}, ["'new' and 'old' do not differ: "]),
        (0.45, BOTH, {"calibration": 1.25}, ["'new' is not accepted as better, although ", LOW]),
        (0.45, BOTH, {}, [LOW]),
        (0.45, ("liked",), {}, ["'new' and 'old' do not differ: "]),  # where purchases are not judged
        (0.85, BOTH, {}, []),  # is for the guardrail of calibration
        (1.0, BOTH, {"reversed": True}, [RANKS]),
        (1.0, BOTH, {"seen": True}, [SEEN]),
    ],
)
def test_what_speaks_against_a_version(
    scale: float, tasks: tuple[str, ...], changes: dict[str, Any], against: list[str]
) -> None:
    """Beside a model that knows nothing of half of the users; of both, nothing is known of likes."""
    log = simulate(seed=7, users=400, requests=1500)
    chance = log.predictions["bought"]
    mine = replace(
        log.with_predictions(bought=scale * chance), score=-log.score if "reversed" in changes else log.score
    )
    theirs = log.with_predictions(bought=np.where(log.users % 2 == 0, chance, chance.mean()))
    models = {
        name: MeasuredModel(sums, summarize(sums, 100))
        for name, sums in (("new", mine.measure()), ("old", theirs.measure()))
    }
    if "seen" in changes:
        models["old"] = replace(models["old"], training_overlap=["has seen these rows"])
    rules = Evaluation(resamples=100, max_metric_drop=0.05, max_calibration_ratio=changes.get("calibration", 9))
    results = Results(models, tasks, rules, "", {})
    actual = _find_objections(results, "new", "old")
    assert len(actual) == len(against)
    assert all(message.startswith(expected) for message, expected in zip(actual, against, strict=True))
    better, message = _read_verdict(results)
    assert better == (message.startswith("'new' is better than 'old': "))
    assert better == (not any(item.startswith("'new' ") for item in against))
