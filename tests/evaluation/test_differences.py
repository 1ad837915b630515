"""Paired differences and means over trainings against scipy and loops; what is no difference; rows that differ."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import ttest_1samp, ttest_ind, ttest_rel
from simulated_log import BOUGHT, SPENT, Log, simulate

from mmoe_rec.auc import MIN_RARER_ROWS
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation import summary as typed
from mmoe_rec.evaluation.comparison import Results, average_runs, compare, find_differences
from mmoe_rec.evaluation.intervals import Difference, holm_correct
from mmoe_rec.evaluation.summary import OBJECTIVE, Objective
from mmoe_rec.evaluation.sums import EvaluationSums, MeasuredTask
from mmoe_rec.settings.sections import Evaluation
from tests.evaluation.trees import compare as compare_sums
from tests.evaluation.trees import measure, summarize


def measure_differences(a: Log, b: Log, resamples: int = 400, tasks: tuple[str, ...] = ()) -> dict:
    return compare_sums({"a": a.measure(), "b": b.measure()}, "a", tasks, resamples)["against"]["b"]


def perturbed(log: Log, seed: int = 1) -> Log:
    noise = np.exp(0.3 * np.random.default_rng(seed).normal(size=len(log.score)))
    noisy = np.clip(log.predictions["bought"] * noise, 0.01, 0.99).astype(np.float32).astype(float)
    return log.with_predictions(bought=noisy)


def test_a_difference_of_means_is_that_of_a_paired_t_test() -> None:
    """One row a user: the logloss of either model is a mean over users."""
    log = simulate(seed=4, users=800, requests=1500)
    log = log.take(np.unique(log.users, return_index=True)[1])
    a, b = log, perturbed(log)
    losses = [
        -np.where(item.labels["bought"] == 1, np.log(item.predictions["bought"]), np.log1p(-item.predictions["bought"]))
        for item in (a, b)
    ]
    expected = ttest_rel(*losses)
    difference = measure_differences(a, b, 1500)["groups"]["bought"]["logloss"]
    assert difference["value"] == pytest.approx((losses[0] - losses[1]).mean(), rel=1e-9)
    low, high = expected.confidence_interval()
    assert difference["low"] == pytest.approx(low, abs=0.05 * (high - low))
    assert difference["high"] == pytest.approx(high, abs=0.05 * (high - low))
    weak = measure_differences(
        a, replace(a, predictions=a.predictions | {"bought": a.predictions["bought"] ** 1.01}), 50
    )
    assert 0 <= weak["groups"]["bought"]["logloss"]["p_value"] <= 1


@pytest.mark.parametrize("scale", [1.0, 1 + 1e-15])
def test_equal_models_do_not_differ_and_rounding_is_no_difference(log: Log, scale: float) -> None:
    same = replace(log, predictions={name: item * scale for name, item in log.predictions.items()})
    result = measure_differences(same, log, 50, ("bought", "liked"))
    assert result["objective"]["value"] == 0
    assert result["objective"]["p_value"] == 1
    for group in result["groups"].values():
        for name, item in group.items():
            assert (item["value"], item["p_value"]) == (0, 1), name


def by_holm(differences: list[dict]) -> list[float | None]:
    return [
        item.corrected_p_value
        for item in holm_correct([Difference(0.0, p_value=difference["p_value"]) for difference in differences])
    ]


def test_headline_metrics_of_all_models_are_one_family(log: Log) -> None:
    models = {"a": perturbed(log).measure(), "b": log.measure(), "c": perturbed(log, 2).measure()}
    both = compare_sums(models, "b", ["bought"], 100)["against"]
    shown = [
        value
        for model in both.values()
        for group in model["groups"].values()
        for value in group.values()
        if value["corrected_p_value"] is not None
    ]
    assert [item["corrected_p_value"] for item in shown] == by_holm(shown)
    assert both["a"]["groups"]["bought"]["ndcg_at_5"]["corrected_p_value"] is None
    assert both["a"]["groups"]["score"]["ndcg_at_5"]["corrected_p_value"] is not None
    objectives = [both[name]["objective"] for name in "ac"]
    assert [objective["corrected_p_value"] for objective in objectives] == by_holm(objectives)


def test_the_objective_is_the_mean_over_tasks(log: Log) -> None:
    sums = log.measure()
    objective = Objective.from_setting("auc", sums, ["bought", "liked", "spent"])
    assert objective == Objective("auc", ("bought", "liked"), "higher")
    assert objective.name == "mean auc of bought, liked"
    result = measure_differences(perturbed(log), log, 100, objective.groups)
    areas = [result["groups"][task]["auc"]["value"] for task in ("bought", "liked")]
    assert result["objective"]["value"] == pytest.approx(np.mean(areas))
    both = typed.BootstrapMetrics(sums, objective)
    bought, liked = (both.effective_users((task, "auc")) for task in ("bought", "liked"))
    assert both.effective_users(OBJECTIVE) == min(bought, liked)
    assert bought != liked
    assert (
        OBJECTIVE not in typed.BootstrapMetrics(replace(log, tasks=(BOUGHT, SPENT)).measure(), objective).point_values
    )
    assert Objective.from_setting("auc", sums, ["spent"]) == Objective("r2", ("spent",), "higher")
    assert Objective.from_setting("score.mrr", sums, []) == Objective("mrr", ("score",), "higher")
    assert Objective.from_setting("logloss", sums, ["bought"]) == Objective("logloss", ("bought",), "lower")
    few = log.take(np.arange(80))
    assert Objective.from_setting("auc", few.measure(), ["bought", "liked"]) is None
    for wrong in ("acu", "calibration", "score.auc", "bought.auc", "ece"):
        with pytest.raises(UserError, match=f"evaluation.primary_metric is '{wrong}'; expected a metric of tasks"):
            Objective.from_setting(wrong, sums, ["bought"])


@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("rarer", [MIN_RARER_ROWS - 1, MIN_RARER_ROWS])
def test_tasks_with_fifty_rows_of_the_rarer_label_are_judged(log: Log, rarer: int, label: float) -> None:
    given = np.where(np.arange(len(log.score)) < rarer, label, 1 - label)
    sums = [item.with_labels(liked=given).measure() for item in (perturbed(log), log)]
    models = dict(zip("ab", (typed.MeasuredModel(item, typed.summarize(item, 1)) for item in sums), strict=True))
    rules = Evaluation(max_metric_drop=0.5, resamples=20)
    actual = Results(models, ("liked", "bought"), rules, "", {}).comparison
    eligible_tasks = ("bought",) if rarer < MIN_RARER_ROWS else ("liked", "bought")
    assert actual.eligible_tasks == actual.objective.groups == eligible_tasks
    assert actual.excluded_tasks == ({"liked": rarer} if rarer < MIN_RARER_ROWS else {})
    alone = Objective.from_setting("auc", sums[0], ["liked"])
    assert alone == (None if rarer < MIN_RARER_ROWS else Objective("auc", ("liked",), "higher"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda log: log.take(np.flatnonzero(log.users > 0)), r"[\d,]+ rows of \d+ users, and [\d,]+ of 60"),
        (lambda log: replace(log, requests=log.requests + 1), "their requests or candidates differ"),
        (lambda log: replace(log, users=log.users + 1), "the users of rows differ"),
        (lambda log: log.with_labels(bought=np.roll(log.labels["bought"], 1)), "labels of 'bought' differ"),
        (
            lambda log: log.with_labels(liked=np.where(log.users > 0, np.nan, log.labels["liked"])),
            r"\d+ rows with a label of 'liked' of 60 users, and [\d,]+ of 60",
        ),
        (lambda log: replace(log, weight=np.full(len(log.score), 2.0)), "their requests or candidates differ"),
    ],
)
def test_rows_that_are_not_the_same_are_reported(log: Log, changed, message: str) -> None:
    with pytest.raises(UserError, match=rf"'a' and 'b' were not measured on the same rows \({message}"):
        measure_differences(changed(log), log, 20)


def test_other_weights_of_tasks_have_another_truth_of_the_score(log: Log) -> None:
    heavier = replace(log, tasks=(replace(BOUGHT, weight=9.0), *log.tasks[1:]))
    assert set(measure_differences(heavier, log, 20)["groups"]) == {"bought", "liked", "spent"}
    unlike = replace(log, tasks=log.tasks[:2])
    assert set(measure_differences(unlike, log, 20)["groups"]) == {"bought", "liked"}
    models = {
        name: typed.MeasuredModel(item, typed.summarize(item, 1))
        for name, item in (("a", heavier.measure()), ("b", log.measure()))
    }
    assert (
        compare(models, "a", [], Evaluation(primary_metric="score.mrr", resamples=20)).verdicts["b"].kind == "undecided"
    )
    assert compare(models, "a", ["bought"], Evaluation(resamples=20)).verdicts["b"].kind == "not significant"
    # A task of no weight is worth nothing in a row, so a model without it has the same truth.
    weightless = replace(log, tasks=(*log.tasks[:2], replace(SPENT, weight=0.0)))
    assert set(measure_differences(weightless, unlike, 20)["groups"]) == {"bought", "liked", "score"}


def test_one_user_and_one_resample_have_differences_without_an_interval(log: Log) -> None:
    alone = replace(log, users=np.zeros(len(log.users), int))
    for item, resamples in ((alone, 20), (log, 1)):
        difference = measure_differences(perturbed(item), item, resamples)["groups"]["bought"]["auc"]
        assert difference["value"] != 0
        assert difference["low"] is difference["p_value"] is None


@pytest.mark.parametrize("few", ["weight", "positive labels"])
def test_users_that_hold_nearly_all_of_what_counts_tell_little(few: str) -> None:
    """Three of 300 users."""
    log = simulate(seed=0, users=300, requests=1500)
    of_few = log.users < np.unique(log.users)[3]
    if few == "weight":
        log = replace(log, weight=np.where(of_few, 400.0, 1.0))
    else:
        log = log.with_labels(bought=np.where(of_few, log.labels["bought"], 0.0))
    assert 1.5 < measure_differences(perturbed(log), log, 20)["groups"]["bought"]["auc"]["degrees_of_freedom"] + 1 < 4
    assert "Few users have most" in summarize(log.measure(), 10)["tasks"]["bought"]["note"]


@pytest.mark.parametrize(
    "change",
    [
        lambda log: log.take(np.random.default_rng(0).permutation(len(log.score))),
        lambda log: replace(log, labels={name: item.astype(np.float32) for name, item in log.labels.items()}),
    ],
)
def test_rows_in_another_order_and_labels_of_other_precision_are_the_same(log: Log, change) -> None:
    assert measure_differences(change(log), log, 20)["groups"]["bought"]["auc"]["value"] == 0


def test_large_labels_that_single_precision_has_the_same_are_others(log: Log) -> None:
    """Such as moments in seconds."""
    moments = 1.7e9 + np.random.default_rng(0).integers(60, size=(2, len(log.score)))
    assert (moments[0].astype(np.float32) == moments[1].astype(np.float32)).mean() > 0.9
    first, two = (log.with_labels(spent=moment) for moment in moments)
    with pytest.raises(UserError, match="labels of 'spent' differ"):
        measure_differences(first, two, 20)


# Means and differences of several trainings: the interval of each.


AMOUNT = MeasuredTask("spent", "regression")


def trained(labels: np.ndarray, shift: float) -> EvaluationSums:
    """A model that errs by a label less than zero: its mean absolute error is |label - shift|."""
    ids = np.arange(len(labels))
    predicted = np.full(len(labels), shift)
    return measure([AMOUNT], ids, ids, {"spent": predicted}, {"spent": labels}, score=predicted)


def test_the_same_training_again_has_the_interval_of_users() -> None:
    labels = np.random.default_rng(0).normal(5, 1, size=800)
    actual = average_runs([trained(labels, 0.0)] * 3, 1000)["spent"]["mae"]
    assert actual.mean == pytest.approx(labels.mean())
    assert actual.std_between_runs == pytest.approx(0, abs=1e-12)
    assert actual.standard_error_over_users == pytest.approx(labels.std(ddof=1) / np.sqrt(800), rel=0.05)
    low, high = ttest_1samp(labels, 0).confidence_interval()
    assert actual.low == pytest.approx(low, abs=0.06 * (high - low))
    assert actual.high == pytest.approx(high, abs=0.06 * (high - low))


def test_trainings_that_differ_for_all_users_have_the_interval_of_seeds() -> None:
    labels = np.full(50, 5.0) + np.arange(50) * 1e-9
    shifts = np.random.default_rng(1).normal(0, 0.3, size=6)
    actual = average_runs([trained(labels, shift) for shift in shifts], 100)["spent"]["mae"]
    low, high = ttest_1samp(5 - shifts, 0).confidence_interval()
    assert (actual.low, actual.high) == pytest.approx((low, high), rel=1e-6)
    assert actual.std_between_runs == pytest.approx(shifts.std(ddof=1), rel=1e-6)
    assert actual.values == pytest.approx(5 - shifts, rel=1e-6)


def test_settings_that_differ_for_all_users_are_distinguished_as_by_welch() -> None:
    labels = np.full(50, 5.0) + np.arange(50) * 1e-9
    random = np.random.default_rng(2)
    mine, theirs = random.normal(0.5, 0.3, size=6), random.normal(0, 0.1, size=4)
    sums = [[trained(labels, shift) for shift in shifts] for shifts in (mine, theirs)]
    actual = find_differences(sums[0], [("it", sums[1])], resamples=100)["it", "spent", "mae"]
    welch = ttest_ind(5 - mine, 5 - theirs, equal_var=False)
    low, high = welch.confidence_interval()
    assert actual.value == pytest.approx(theirs.mean() - mine.mean(), rel=1e-6)
    assert (actual.low, actual.high) == pytest.approx((low, high), rel=1e-6)
    assert actual.p_value == pytest.approx(welch.pvalue, rel=1e-6)


def test_users_who_decide_nearly_alone_give_no_interval() -> None:
    """One user with 5,000 rows beside 30 with one: the effective number is 1.01."""
    labels, users = np.random.default_rng(0).normal(5, 1, size=5_030), np.r_[np.zeros(5_000, int), np.arange(1, 31)]

    def model(shift: float) -> EvaluationSums:
        predicted = labels * shift
        rows = np.arange(len(labels))
        return measure([AMOUNT], users, rows, {"spent": predicted}, {"spent": labels}, score=predicted)

    sides = [[model(shift + number) for number in (0.0, 0.1)] for shift in (0.2, 0.5)]
    actual = find_differences(sides[0], [("it", sides[1])], resamples=50)["it", "spent", "mae"]
    assert actual.value == pytest.approx(0.3 * np.abs(labels).mean(), rel=1e-6)
    assert actual.low is actual.p_value is None


def test_the_objective_has_a_mean_and_a_difference_of_rounding_is_none() -> None:
    labels = np.random.default_rng(0).normal(5, 1, size=60)
    sides = [[trained(labels, shift + item) for item in (-0.01, 0.0, 0.01)] for shift in (0.0, 0.1, 1e-12)]
    objective = Objective("mae", ("spent",), "lower")
    actual = find_differences(sides[0], [("far", sides[1]), ("same", sides[2])], objective, resamples=50)
    assert actual["far", *OBJECTIVE].value == pytest.approx(0.1, rel=1e-6)
    assert actual["same", *OBJECTIVE].value == 0
    means = average_runs(sides[0], 50, objective)
    assert means[OBJECTIVE[0]][OBJECTIVE[1]].mean == pytest.approx(means["spent"]["mae"].mean)


def test_what_is_undefined_is_none() -> None:
    log = simulate(seed=0)
    log.labels["liked"][:] = np.nan
    actual = average_runs([log.measure()] * 2, 20)
    assert actual["liked"]["auc"].mean is actual["liked"]["auc"].low is None
    assert actual["liked"]["auc"].values == (None, None)
    assert actual["bought"]["auc"].low < actual["bought"]["auc"].mean


def test_a_task_that_one_side_lacks_and_the_score_are_left_out() -> None:
    """Without a task a row is worth something else; of single trainings, users alone make the interval."""
    random, ids = np.random.default_rng(0), np.arange(90) // 3
    labels = {name: random.normal(5, 1, size=90) for name in ("spent", "liked")}

    def model(*names: str) -> EvaluationSums:
        predicted = {name: labels[name] + random.normal(size=90) for name in names}
        tasks = [MeasuredTask(name, "regression") for name in names]
        return measure(tasks, ids, ids, predicted, labels, score=predicted[names[0]])

    both, first, single = ([model(*names) for _ in range(3)] for names in (("spent", "liked"), ("spent",), ("liked",)))
    actual = find_differences(both, [("one", first), ("single", single[:1])], resamples=50)
    assert {key[:2] for key in actual} == {("one", "spent"), ("single", "liked")}
    few = find_differences(both, [("one", first), ("single", single[:1])], resamples=50, metrics=["mae"])
    assert few.keys() == {key for key in actual if key[2] == "mae"}
    for key, item in few.items():
        ends = (item.value, item.low, item.high)
        assert ends == pytest.approx((actual[key].value, actual[key].low, actual[key].high), rel=1e-9)
    alone = find_differences(both[:1], [("single", single[:1])], resamples=50)["single", "liked", "mae"]
    assert alone.degrees_of_freedom <= 29
    with_score = find_differences(both, [("same", both[::-1])], resamples=50)
    assert ("same", "score", "ndcg_at_10") in with_score
