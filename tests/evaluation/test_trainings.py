"""Means over trainings: their interval against a closed form, and how often it holds the truth."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp, ttest_ind
from simulated_log import Log, simulate

from mmoe_rec.evaluation.comparison import average_trainings, find_differences
from mmoe_rec.evaluation.summary import OBJECTIVE, Objective
from mmoe_rec.evaluation.sums import EvaluationSums, MeasuredTask
from tests.evaluation.trees import measure

SPENT = MeasuredTask("spent", "regression")


def trained(labels: np.ndarray, shift: float) -> EvaluationSums:
    """A model that errs by a label less than zero: its mean absolute error is |label - shift|."""
    ids = np.arange(len(labels))
    predicted = np.full(len(labels), shift)
    return measure([SPENT], ids, ids, {"spent": predicted}, {"spent": labels}, score=predicted)


def test_the_same_training_again_has_the_interval_of_users() -> None:
    labels = np.random.default_rng(0).normal(5, 1, size=800)
    found = average_trainings([trained(labels, 0.0)] * 3, 1000)["spent"]["mae"]
    assert found.mean == pytest.approx(labels.mean())
    assert found.between_trainings == pytest.approx(0, abs=1e-12)
    assert found.between_users == pytest.approx(labels.std(ddof=1) / np.sqrt(800), rel=0.05)
    low, high = ttest_1samp(labels, 0).confidence_interval()
    assert found.low == pytest.approx(low, abs=0.06 * (high - low))
    assert found.high == pytest.approx(high, abs=0.06 * (high - low))


def test_trainings_that_differ_for_all_users_have_the_interval_of_seeds() -> None:
    labels = np.full(50, 5.0) + np.arange(50) * 1e-9
    shifts = np.random.default_rng(1).normal(0, 0.3, size=6)
    found = average_trainings([trained(labels, each) for each in shifts], 100)["spent"]["mae"]
    low, high = ttest_1samp(5 - shifts, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6)
    assert found.between_trainings == pytest.approx(shifts.std(ddof=1), rel=1e-6)
    assert found.values == pytest.approx(5 - shifts, rel=1e-6)


def test_settings_that_differ_for_all_users_are_told_apart_as_by_welch() -> None:
    labels = np.full(50, 5.0) + np.arange(50) * 1e-9
    random = np.random.default_rng(2)
    mine, its = random.normal(0.5, 0.3, size=6), random.normal(0, 0.1, size=4)
    sums = [[trained(labels, each) for each in shifts] for shifts in (mine, its)]
    found = find_differences(sums[0], [("it", sums[1])], resamples=100)["it", "spent", "mae"]
    welch = ttest_ind(5 - mine, 5 - its, equal_var=False)
    low, high = welch.confidence_interval()
    assert found.value == pytest.approx(its.mean() - mine.mean(), rel=1e-6)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6)
    assert found.p == pytest.approx(welch.pvalue, rel=1e-6)


def test_users_who_decide_nearly_alone_give_no_interval() -> None:
    """One user with 5,000 rows beside 30 with one: the effective number is 1.01."""
    labels, users = np.random.default_rng(0).normal(5, 1, size=5_030), np.r_[np.zeros(5_000, int), np.arange(1, 31)]

    def model(shift: float) -> EvaluationSums:
        predicted = labels * shift
        rows = np.arange(len(labels))
        return measure([SPENT], users, rows, {"spent": predicted}, {"spent": labels}, score=predicted)

    sides = [[model(shift + each) for each in (0.0, 0.1)] for shift in (0.2, 0.5)]
    found = find_differences(sides[0], [("it", sides[1])], resamples=50)["it", "spent", "mae"]
    assert found.value == pytest.approx(0.3 * np.abs(labels).mean(), rel=1e-6)
    assert found.low is found.p is None


def test_the_objective_has_a_mean_and_a_difference_of_rounding_is_none() -> None:
    labels = np.random.default_rng(0).normal(5, 1, size=60)
    sides = [[trained(labels, shift + each) for each in (-0.01, 0.0, 0.01)] for shift in (0.0, 0.1, 1e-12)]
    objective = Objective("mae", ("spent",), "lower")
    found = find_differences(sides[0], [("far", sides[1]), ("same", sides[2])], objective, resamples=50)
    assert found["far", *OBJECTIVE].value == pytest.approx(0.1, rel=1e-6)
    assert found["same", *OBJECTIVE].value == 0
    means = average_trainings(sides[0], 50, objective)
    assert means[OBJECTIVE[0]][OBJECTIVE[1]].mean == pytest.approx(means["spent"]["mae"].mean)


def test_what_is_undefined_is_none() -> None:
    log: Log = simulate(seed=0)
    log.labels["liked"][:] = np.nan
    found = average_trainings([log.measure()] * 2, 20)
    assert found["liked"]["auc"].mean is found["liked"]["auc"].low is None
    assert found["liked"]["auc"].values == (None, None)
    assert found["bought"]["auc"].low < found["bought"]["auc"].mean


def test_a_task_that_one_side_lacks_and_the_score_are_left_out() -> None:
    """Without a task a row is worth something else; of single trainings, users alone make the interval."""
    random, ids = np.random.default_rng(0), np.arange(90) // 3
    labels = {name: random.normal(5, 1, size=90) for name in ("spent", "liked")}

    def model(*names: str) -> EvaluationSums:
        predicted = {name: labels[name] + random.normal(size=90) for name in names}
        tasks = [MeasuredTask(name, "regression") for name in names]
        return measure(tasks, ids, ids, predicted, labels, score=predicted[names[0]])

    both, one, single = ([model(*names) for _ in range(3)] for names in (("spent", "liked"), ("spent",), ("liked",)))
    found = find_differences(both, [("one", one), ("single", single[:1])], resamples=50)
    assert {key[:2] for key in found} == {("one", "spent"), ("single", "liked")}
    few = find_differences(both, [("one", one), ("single", single[:1])], resamples=50, metrics=["mae"])
    assert few.keys() == {key for key in found if key[2] == "mae"}
    for key, each in few.items():
        ends = (each.value, each.low, each.high)
        assert ends == pytest.approx((found[key].value, found[key].low, found[key].high), rel=1e-9)
    alone = find_differences(both[:1], [("single", single[:1])], resamples=50)["single", "liked", "mae"]
    assert alone.freedom <= 29
    with_score = find_differences(both, [("same", both[::-1])], resamples=50)
    assert ("same", "score", "ndcg_at_10") in with_score
