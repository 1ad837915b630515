"""Estimates of another policy on logs of two, side by side, whose truth is known; and refusals where there is none."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from mmoe_rec.evaluation.intervals import UNDEFINED, Interval
from mmoe_rec.evaluation.off_policy import CAPS, LoggedChoices, PolicyEstimate, find_refusal
from mmoe_rec.report.sentences import describe_warnings
from tests.evaluation.trees import estimate

ACTIONS = 6


class Bandit:
    """Visitors of three kinds, to whom one of six items is shown: at random, or as a policy has learnt."""

    def __init__(self, sharpness: float = 1.0) -> None:
        random = np.random.default_rng(5)
        self.chance = 1 / (1 + np.exp(-random.normal(-1.5, 1.2, size=(3, ACTIONS))))
        taste = sharpness * (np.log(self.chance) + random.normal(0, 0.3, size=self.chance.shape))
        self.learnt = np.exp(taste) / np.exp(taste).sum(1, keepdims=True)
        self.uniform = np.full_like(self.chance, 1 / ACTIONS)

    def log(
        self, shows: np.ndarray, target: np.ndarray, rows: int, seed: int, model: np.ndarray | None = None
    ) -> LoggedChoices:
        """Rows of a policy, and how likely the target is to choose the same. model: what it expects of (kind, item)."""
        random = np.random.default_rng(seed)
        user = random.integers(rows // 4, size=rows)
        kind = user % 3
        item = (shows[kind].cumsum(1) < random.random((rows, 1))).sum(1)
        label = (random.random(rows) < self.chance[kind, item]).astype(float)
        expected = (None, None) if model is None else (model[kind, item], (target[kind] * model[kind]).sum(1))
        return LoggedChoices(pa.array(user), shows[kind, item], target[kind, item], label, *expected)

    def truth(self, policy: np.ndarray) -> float:
        return float((policy * self.chance).sum(1).mean())


@pytest.mark.thorough
def test_the_estimate_from_one_log_is_the_truth_of_the_other() -> None:
    """Both ways, by both estimates, as often as their intervals say; the plain mean of the log is far from it."""
    bandit = Bandit()
    wrong_model = np.full_like(bandit.chance, 0.3)
    for shows, target in ((bandit.uniform, bandit.learnt), (bandit.learnt, bandit.uniform)):
        covered = {"snips": 0, "doubly_robust": 0}
        for seed in range(40):
            found = estimate(bandit.log(shows, target, 4000, seed, wrong_model), 200)
            assert found["refused"] is None
            for name in covered:
                each = found["estimates"][0][name]
                covered[name] += each["low"] <= bandit.truth(target) <= each["high"]
            assert not found["logged"]["low"] <= bandit.truth(target) <= found["logged"]["high"]
        assert all(33 <= number <= 40 for number in covered.values()), covered


def test_a_right_model_makes_the_doubly_robust_estimate_sharper() -> None:
    bandit = Bandit()
    bandit.chance = np.where(bandit.chance > 0.2, 0.97, 0.03)  # what is left to chance no model knows
    found = estimate(bandit.log(bandit.uniform, bandit.learnt, 6000, 3, bandit.chance), 200)
    snips, robust = (found["estimates"][0][name] for name in ("snips", "doubly_robust"))
    assert robust["high"] - robust["low"] < 0.8 * (snips["high"] - snips["low"])
    for each in (snips, robust):
        assert each["low"] <= bandit.truth(bandit.learnt) <= each["high"]


def test_numbers_are_those_of_the_formulas() -> None:
    bandit = Bandit()
    shown = bandit.log(bandit.learnt, bandit.uniform, 3000, 4, bandit.chance * 0.5)
    found = estimate(shown, 20)
    weight = shown.target / shown.propensity
    assert found["mean_weight"]["value"] == pytest.approx(weight.mean())
    assert found["effective_rows"] == pytest.approx(weight.sum() ** 2 / (weight**2).sum())
    assert [each["cap"] for each in found["estimates"]] == list(CAPS)
    for each in found["estimates"]:
        clipped = weight if each["cap"] is None else np.minimum(weight, each["cap"])
        assert each["snips"]["value"] == pytest.approx((clipped * shown.label).sum() / clipped.sum())
        robust = shown.expected.mean() + (clipped * (shown.label - shown.predicted)).sum() / clipped.sum()
        assert each["doubly_robust"]["value"] == pytest.approx(robust)
        assert each["clipped"] == pytest.approx(1 - clipped.sum() / weight.sum())
    assert found["estimates"][-1]["cap"] == 1.0


def test_without_support_there_is_no_estimate() -> None:
    bandit = Bandit()
    never = bandit.learnt.copy()
    never[:, 0] = 0
    never /= never.sum(1, keepdims=True)
    target = np.zeros_like(never)
    target[:, 0] = 0.5
    target[:, 1] = 0.5
    found = estimate(bandit.log(never, target, 8000, 1), 100)
    assert "and has to be 1: the log never shows some of what the target chooses" in found["refused"]
    assert "estimates" not in found
    only = np.zeros_like(never)
    only[:, 0] = 1
    refused = estimate(bandit.log(never, only, 500, 1), 20)["refused"]
    assert refused.startswith("the effective number of rows is 0 of 500, and 100 are needed: ")
    short = estimate(bandit.log(bandit.uniform, bandit.learnt, 60, 0), 20)
    assert short["refused"] == "60 rows have a label, and 100 are needed"
    rare = np.full_like(never, 0.001)
    rare[:, 1] = 0.995
    few = estimate(bandit.log(rare, bandit.uniform, 3000, 1), 20)
    assert "the effective number of rows is " in few["refused"]
    wrong = bandit.log(bandit.uniform, bandit.learnt, 8000, 2)
    wrong = LoggedChoices(wrong.users, wrong.propensity * 0.8, wrong.target, wrong.label)
    assert "or these are not the probabilities of its choices" in estimate(wrong, 100)["refused"]


def test_rows_without_a_label_are_left_out() -> None:
    bandit = Bandit()
    shown = bandit.log(bandit.uniform, bandit.learnt, 4000, 6)
    gone = np.arange(4000) % 3 == 0
    partly = LoggedChoices(shown.users, shown.propensity, shown.target, np.where(gone, np.nan, shown.label))
    assert estimate(partly, 20)["rows"] == (~gone).sum()
    found = estimate(partly, 20)
    assert found == estimate(shown.take(np.flatnonzero(~gone)), 20) | {"without_label": int(gone.sum())}
    none = LoggedChoices(shown.users, shown.propensity, shown.target, np.full(4000, np.nan))
    assert estimate(none, 20) == {
        "rows": 0,
        "without_label": 4000,
        "refused": "0 rows have a label, and 100 are needed",
    }


@pytest.mark.parametrize(
    ("mean", "apart", "told"),
    [
        (Interval(0.9, 0.82, 0.97), UNDEFINED, ", below 1: up to 18% of what the target chooses"),
        (Interval(1.1, 1.02, 1.2), UNDEFINED, ", above 1: these may not be the probabilities"),
        (Interval(0.98, 0.9, 1.05), Interval(0.1, 0.06, 0.14), "is 0.1000 above SNIPS, by more than chance explains"),
        (Interval(0.98, 0.9, 1.05), Interval(0.1, 0.04, 0.16), None),
    ],
)
def test_what_is_suspicious_is_told(mean: Interval, apart: Interval, told: str | None) -> None:
    found = list(describe_warnings(PolicyEstimate(1000, 0, None, mean_weight=mean, apart=apart)))
    assert [told in each for each in found] == [True] * (told is not None)
    assert find_refusal(1000, 1000.0, Interval(0.5, 0.3, 0.7)) == "no support"
    assert find_refusal(1000, 1000.0, mean) is None


def test_few_users_with_most_rows_have_wide_intervals() -> None:
    bandit = Bandit()
    shown = bandit.log(bandit.uniform, bandit.uniform, 4000, 0)
    one = replace(shown, users=pa.array(np.where(np.arange(4000) < 3900, np.arange(4000) % 3, np.arange(4000))))
    wide, narrow = (estimate(each, 200)["estimates"][0]["snips"] for each in (one, shown))
    assert wide["high"] - wide["low"] > 1.5 * (narrow["high"] - narrow["low"])


def test_a_user_with_most_weight_has_the_interval_of_few_users() -> None:
    """All have as many rows, so their number alone would say that there are a hundred; few users tell."""
    random, user = np.random.default_rng(0), np.arange(4000) % 100
    target, label = np.where(user == 0, 1.0, 0.01), (random.random(4000) < random.random(100)[user]).astype(float)
    found = estimate(LoggedChoices(pa.array(user), np.full(4000, 0.02), target, label), 200)["estimates"][0]["snips"]
    assert found["high"] - found["low"] > 0.28  # by the number of users it would be 0.2
    none = estimate(LoggedChoices(pa.array(user), np.full(4000, 0.02), np.full(4000, 0.02), label * 0), 20)
    for zero in (none["logged"], none["estimates"][0]["snips"]):
        assert (zero["value"], zero["low"]) == (0.0, 0.0)
        assert 0.02 < zero["high"] < 0.03  # of a hundred users who agree
