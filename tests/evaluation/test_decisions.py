"""The verdict on two models: what makes it, what holds a model back, and what it says."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm
from scipy.stats import t as student
from simulated_log import simulate

from mmoe_rec.evaluation.comparison import Comparison, Guard, Results, Verdict, Versus, decide, guard_slices
from mmoe_rec.evaluation.intervals import LEVEL, Difference, Interval, level_after
from mmoe_rec.evaluation.promotion import _find_objections, _read_verdict
from mmoe_rec.evaluation.results_report import differences_table
from mmoe_rec.evaluation.sentences import describe_guard, describe_verdict
from mmoe_rec.evaluation.slices import SliceRecord
from mmoe_rec.evaluation.summary import GroupSummary, MeasuredModel, Objective, Summary, summarise
from mmoe_rec.report.formatting import signed
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
ENDS = ("low", "high")


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
    ("changes", "tried", "kind"),
    [
        ({"low": -0.0001}, 0, "not shown"),  # few users' changes limit the interval, and not the p-value
        ({"low": 0.0}, 0, "not shown"),
        ({"p_corrected": 0.049}, 0, "better"),
        ({"p_corrected": 0.05}, 0, "not shown"),
        ({"p_corrected": 0.02}, 0, "better"),
        ({"p_corrected": 0.02}, 1, "not shown"),  # 5% x 2 / (2 x 3) are 1.67%
        ({"p_corrected": LEVEL * 2 / (2 * 3)}, 1, "not shown"),
        ({"p": 0.001, "p_corrected": 0.03}, 1, "not shown"),
        ({"p": None}, 0, "undecided"),
        ({"value": -0.003, "low": -0.005, "high": -0.001, "p_corrected": 0.03}, 1, "worse"),
        ({"value": -0.003, "low": -0.005, "high": -0.001, "p": 0.001, "p_corrected": 0.05}, 0, "not shown"),
    ],
)
def test_both_interval_and_level_decide(changes: dict[str, Any], tried: int, kind: str) -> None:
    found = compared(replace(apart(0.003, 0.002), **changes), bought={"auc": apart(0.001, 0.002)})
    assert verdict(replace(found, tried=tried)).kind == kind


@pytest.mark.parametrize(
    ("low", "high", "passed", "is_outside"),
    [
        (-0.005, 0.01, True, False),
        (-0.0051, 0.01, False, False),
        (-0.02, -0.005, False, False),
        (-0.02, -0.0051, False, True),
        (None, None, False, False),
    ],
)
def test_a_loss_is_shown_or_can_not_be_ruled_out(low: Any, high: Any, passed: bool, is_outside: bool) -> None:
    loss = Difference(None if low is None else (low + high) / 2, low, high)
    (guard, _) = verdict(compared(apart(0.003, 0.002), bought={"auc": loss})).guards
    assert (guard.passed, guard.is_outside, guard.difference) == (passed, is_outside, loss)


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
    # Slices that can't be judged are none of those that the correction counts.
    unknown = [replace(same, slice=f"{each} unknown", effective_users=None) for each in range(50)]
    found = replace(found, slices=[lost, *(replace(same, slice=f"{each}") for each in range(number - 1)), *unknown])
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


def test_slices_that_lose_come_worst_first_and_slices_of_several_tasks_count_once() -> None:
    same = SliceRecord("country", "A", "bought", "auc", 99, 60, None, 0.7, "old", 0.0, 0.0, 0.0, 0.01, 40.0, 1.0)
    lost, worse = replace(same, slice="B", apart=-0.06), replace(same, slice="C", apart=-0.09)
    records = [same, replace(same, group="liked"), lost, replace(worse, group="liked")]
    found = replace(compared(apart(0.003, 0.002), judged=("bought", "liked")), slices=records)
    guard = guard_slices(found, "old")
    assert guard == Guard(None, "slices", False, True, looked_at={"country": 3}, losing=(records[3], lost))
    lenient = guard_slices(replace(found, rules=Evaluation(margin=0.2)), "old")
    assert lenient == Guard(None, "slices", True, False, looked_at={"country": 3})
    assert guard_slices(replace(found, judged=()), "old") is None
    assert guard_slices(found, "another") is None


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
        (summary(1.25, None), summary(1.0), "better"),  # as far off as is allowed
        (summary(0.79, None), summary(1.0), "held back"),  # 1 / 1.25 is 0.8
        (summary(0.85), summary(1.0), "better"),  # its interval reaches 0.75 and 0.95
        (summary(1.5), summary(1.5), "better"),  # as far as the other
    ],
)
def test_probabilities_may_not_be_far_off_where_they_were_not(mine: Summary, its: Summary, kind: str) -> None:
    found = compared(apart(0.003, 0.002), bought={"auc": apart(0.003, 0.002)})
    of_both = verdict(found, {"new": mine, "old": its})
    assert of_both.kind == kind
    (guard,) = (each for each in of_both.guards if each.metric == "calibration")
    low, high = (getattr(mine.tasks["bought"].get("calibration"), end) or guard.calibrations[0].value for end in ENDS)
    assert guard.is_outside == (low > 1.25 or high < 0.8)
    told = describe_guard(guard, "old", Evaluation())
    assert ("observed (" in told) == (mine.tasks["bought"].get("calibration").low is not None), "none has no width"


@pytest.mark.parametrize("undefined", ["new", "old"])
def test_probabilities_that_either_model_lacks_are_not_guarded(undefined: str) -> None:
    lacking = replace(summary(), tasks={"bought": GroupSummary("binary", {}, {}, {})})
    found = compared(apart(0.003, 0.002), bought={"auc": apart(0.003, 0.002)})
    guards = verdict(found, {"new": summary(1.5), "old": summary()} | {undefined: lacking}).guards
    assert [guard.metric for guard in guards] == ["auc"]


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


@pytest.mark.parametrize(("users", "of_guard"), [(5.0, 9.0), (9.0, 4.0)])
def test_the_detectable_gain_is_by_student_and_by_the_hardest_part(users: float, of_guard: float) -> None:
    """Each of three parts may fail in a third of one case in ten. A guardrail allows for the margin."""
    own, task = (replace(apart(0.001, 0.002), error=0.01, effective_users=of) for of in (users, of_guard))
    groups = {"bought": {"auc": task}, "liked": {"auc": replace(task, error=0.004)}}
    found = replace(compared(own, judged=("bought", "liked"), **groups), tried=1)
    tasks = SAME["new"].tasks | {"liked": SAME["new"].tasks["bought"]}
    both = dict.fromkeys(SAME, replace(SAME["new"], tasks=tasks))
    gains = [
        0.01 * (student.ppf(1 - 0.05 / 3 / 2, users - 1) + student.ppf(1 - 0.1 / 3, users - 1)),
        0.01 * (student.ppf(0.975, of_guard - 1) + student.ppf(1 - 0.1 / 3, of_guard - 1)) - 0.005,
    ]
    assert verdict(found, both).detectable == pytest.approx(max(gains), rel=1e-9)
    assert (gains[0] > gains[1]) == (users < of_guard)
    # Where few users' changes limit all intervals, no error says how large a gain has to be.
    unknown = replace(own, error=None)
    assert verdict(compared(unknown, judged=("bought",), bought={"auc": replace(task, error=1e-4)})).detectable == 0
    assert verdict(compared(unknown, judged=("bought",), bought={"auc": unknown})).detectable == 0


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
    (_, (_, cell)) = differences_table(found, summary(mine)).rows
    assert cell.text.endswith(f" {told}")


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


LOW, RANKS = (
    "the probabilities of 'bought' are too low: 0.47 times ",
    "the score ranks the rows of requests worse than chance ",
)
BOTH, SEEN = ("bought", "liked"), "old has seen these rows"


@pytest.mark.parametrize(
    ("scale", "tasks", "changes", "against"),
    [
        (1.0, BOTH, {}, []),  # although both models rank likes by chance
        (1.0, ("liked",), {}, ["'new' and 'old' do not differ "]),
        (0.45, BOTH, {"calibration": 1.25}, ["'new' is not called better, although ", LOW]),
        (0.45, BOTH, {}, [LOW]),
        (0.45, ("liked",), {}, ["'new' and 'old' do not differ "]),  # where purchases are not judged
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
    its = log.with_predictions(bought=np.where(log.users % 2 == 0, chance, chance.mean()))
    models = {
        name: MeasuredModel(sums, summarise(sums, 100))
        for name, sums in (("new", mine.measure()), ("old", its.measure()))
    }
    if "seen" in changes:
        models["old"] = replace(models["old"], seen=["has seen these rows"])
    rules = Evaluation(resamples=100, margin=0.05, calibration=changes.get("calibration", 9))
    results = Results(models, tasks, rules, "", {})
    found = _find_objections(results, "new", "old")
    assert len(found) == len(against)
    assert all(told.startswith(expected) for told, expected in zip(found, against, strict=True))
    better, told = _read_verdict(results)
    assert better == (told.startswith("'new' is better than 'old': "))
    assert better == (not any(each.startswith("'new' ") for each in against))
