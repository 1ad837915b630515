"""Sums and summaries against scikit-learn and naive loops; users are measured in groups; bad tasks are named."""

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import entropy as entropy_of
from simulated_log import SPENT, Log, simulate
from sklearn.metrics import (
    average_precision_score,
    log_loss,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
    root_mean_squared_error,
)

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation import summary as typed
from mmoe_rec.evaluation.intervals import draw_user_counts
from mmoe_rec.evaluation.messages import describe_notes
from mmoe_rec.evaluation.metrics.metric import Resamples
from mmoe_rec.evaluation.metrics.task_metrics import NormalizedEntropy, bin_edges
from mmoe_rec.evaluation.summary import UNINFORMATIVE_REQUESTS, BootstrapMetrics, flatten
from mmoe_rec.evaluation.sums import MeasuredTask
from tests.evaluation.trees import intervals, measure, summarize


def notes(log: Log) -> list[str]:
    return list(describe_notes(typed.summarize(log.measure(), 20)))


def values(log: Log) -> Callable[[str, str], float]:
    """The value of a task's metric."""
    tasks = summarize(log.measure(), resamples=1)["tasks"]
    return lambda task, metric: tasks[task][metric]["value"]


def naive_gauc(log: Log, task: str, groups: np.ndarray) -> float:
    rows, label, prediction = log.observed(task)
    of_rows = np.ones(len(rows)) if log.weight is None else log.weight[rows]
    total, weight = 0.0, 0.0
    for group in np.unique(groups):
        mine = groups[rows] == group
        if len(np.unique(label[mine])) == 2:
            counts = of_rows[mine].sum()
            total += counts * roc_auc_score(label[mine], prediction[mine], sample_weight=of_rows[mine])
            weight += counts
    return total / weight


@pytest.mark.parametrize(("spread", "rate"), [(1.0, 1.0), (1e-9, 1.0), (1.0, 0.05)])
def test_areas_are_exact_and_their_intervals_good_where_bins_hold_many_values(spread, rate, monkeypatch) -> None:
    """Bins of some 6 values each; also where predictions lie close together, and where positives are rare."""
    log = simulate(seed=3)
    kept = log.labels["bought"] * (np.random.default_rng(0).random(len(log.score)) < rate)
    log = log.with_predictions(bought=0.3 + spread * 0.5 * log.predictions["bought"])
    log = log.with_labels(bought=kept)
    _, label, prediction = log.observed("bought")
    exact = summarize(log.measure(), resamples=200)["tasks"]["bought"]
    monkeypatch.setattr("mmoe_rec.evaluation.metrics.task_metrics.MAX_BINS", 400)
    actual = summarize(log.measure(), resamples=200)["tasks"]["bought"]
    for metric, area in (("auc", roc_auc_score), ("average_precision", average_precision_score)):
        assert actual[metric]["value"] == pytest.approx(area(label, prediction), abs=1e-12)
        width = exact[metric]["high"] - exact[metric]["low"]
        for end in ("low", "high"):
            assert actual[metric][end] == pytest.approx(exact[metric][end], abs=0.03 * width)
    if rate == 1.0:
        assert actual["average_precision"]["low"] != exact["average_precision"]["low"]


@pytest.mark.parametrize("largest", [30, 1e9])
@pytest.mark.parametrize("decimals", [None, 1])
def test_rows_count_by_their_weights_in_metrics_of_tasks_and_requests_alike(decimals, largest: float) -> None:
    log = simulate(seed=4, decimals=decimals)
    weight = np.exp(np.random.default_rng(5).uniform(np.log(0.5), np.log(largest), size=len(log.score)))
    weighted = replace(log, weight=weight)
    heavy = values(weighted)
    plainly = values(log)
    rows, label, prediction = log.observed("liked")
    w = weight[rows]
    loss, rate = log_loss(label, prediction, sample_weight=w), w @ label / w.sum()
    assert heavy("liked", "logloss") == pytest.approx(loss, rel=1e-9)
    assert heavy("liked", "normalized_entropy") == pytest.approx(loss / entropy_of([rate, 1 - rate]), rel=1e-9)
    assert heavy("liked", "calibration") == pytest.approx((w @ prediction) / (w @ label), rel=1e-9)
    for metric, area in (("auc", roc_auc_score), ("average_precision", average_precision_score)):
        expected = area(label, prediction, sample_weight=w)
        assert heavy("liked", metric) == pytest.approx(expected, abs=1e-12)
        assert heavy("liked", metric) != pytest.approx(plainly("liked", metric), abs=1e-4)
    for metric, groups in (("gauc_user", log.users), ("gauc_request", log.requests)):
        assert heavy("liked", metric) == pytest.approx(naive_gauc(weighted, "liked", groups), abs=1e-12)
    rows, label, prediction = log.observed("spent")
    w = weight[rows]
    for metric, expected in (
        ("r2", r2_score(label, prediction, sample_weight=w)),
        ("mae", mean_absolute_error(label, prediction, sample_weight=w)),
        ("rmse", root_mean_squared_error(label, prediction, sample_weight=w)),
    ):
        assert heavy("spent", metric) == pytest.approx(expected, rel=1e-9)
    score, plain = (summarize(item.measure(), resamples=1) for item in (weighted, log))
    assert score["score"] == plain["score"]
    assert score["tasks"]["liked"]["mrr"] == plain["tasks"]["liked"]["mrr"]


def test_groups_left_out_are_counted(log: Log) -> None:
    rows, label, _ = log.observed("liked")
    actual = summarize(log.measure(), resamples=1)["tasks"]["liked"]
    for name, groups in (("single_class_users", log.users[rows]), ("single_class_requests", log.requests[rows])):
        single = [group for group in np.unique(groups) if len(np.unique(label[groups == group])) == 1]
        share = np.isin(groups, single).mean()
        assert actual[name] == {"count": len(single), "fraction_of_rows": pytest.approx(share)}


def test_requests_that_rank_nothing_are_left_out_and_counted(log: Log) -> None:
    relevant = sum(task.weight * np.nan_to_num(log.labels[task.name]) for task in log.tasks)
    relevant[log.requests < 20 * 1_000_003] = 1.0  # whole requests of equal relevance
    labels = {"bought": relevant, "liked": np.zeros(len(relevant)), "spent": np.zeros(len(relevant))}
    log = replace(log, tasks=(replace(SPENT, name="bought", weight=1.0), *log.tasks[1:]), labels=labels)
    naive, left_out = [], dict.fromkeys(UNINFORMATIVE_REQUESTS, 0)
    for request in np.unique(log.requests):
        rows = np.flatnonzero(log.requests == request)
        ranked = relevant[rows[np.argsort(-log.score[rows])]]
        if len(rows) == 1:
            left_out["requests_of_one_row"] += 1
        elif (ranked == 0).all():
            left_out["requests_without_relevant_row"] += 1
        elif len(set(ranked)) == 1:
            left_out["requests_of_equal_relevance"] += 1
        else:
            naive.append(1 / (np.argmax(ranked > 0) + 1))
    summary = summarize(log.measure(), resamples=1)
    assert summary["score"]["mrr"]["value"] == pytest.approx(np.mean(naive))
    assert {name: summary["score"][name] for name in left_out} == left_out
    assert min(left_out.values()) > 0
    total = sum(left_out.values())
    assert any(
        note.startswith(f"score: {total} of {summary['requests']} requests have no ranking") for note in notes(log)
    )


def test_ndcg_of_labels_that_differ_by_little_beside_their_size_is_reported(log: Log) -> None:
    """Times in seconds: the worst order of all has an NDCG of 1 but for rounding."""
    times = 1.7e9 + 100 * np.random.default_rng(3).standard_normal(len(log.score))
    log = log.with_labels(spent=times)
    summary = summarize(log.measure(), resamples=20)
    assert summary["score"]["ndcg_at_10"]["value"] > 0.999
    (note,) = [item for item in notes(log) if "nearly 1 in any order" in item]
    assert note.startswith("score: NDCG")
    assert "score_weight" in note
    log = log.with_labels(spent=times - 1.7e9)
    assert not any("in any order" in item for item in notes(log))


def with_mean(log: Log, mean: float, std: float) -> Log:
    """Labels and predictions of `spent` moved to another mean and deviation."""
    label = log.labels["spent"]
    moved = mean + std * (label - np.nanmean(label)) / np.nanstd(label)
    error = std * np.random.default_rng(3).normal(size=len(label))
    predicted = np.nan_to_num(moved + 0.3 * error, nan=mean)
    return log.with_labels(spent=moved).with_predictions(spent=predicted)


@pytest.mark.parametrize(("mean", "std"), [(1.7e9, 100.0), (-1.7e9, 100.0), (1e12, 1.0), (0.0, 1e-9)])
def test_r2_where_the_mean_is_large_beside_the_deviation(log: Log, mean: float, std: float) -> None:
    """The tolerance is that of sums of 1e12, between which float64 has steps of .0001 deviations."""
    log = with_mean(log, mean, std)
    _, label, prediction = log.observed("spent")
    actual = summarize(log.measure(), resamples=100)["tasks"]["spent"]
    assert actual["r2"]["value"] == pytest.approx(r2_score(label - mean, prediction - mean), rel=1e-5)
    assert actual["rmse"]["value"] == pytest.approx(root_mean_squared_error(label, prediction), rel=1e-6)
    assert actual["r2"]["low"] < actual["r2"]["value"] < actual["r2"]["high"]
    assert ("mrr, map, " in actual.get("note", "")) == (mean < 0), "without a positive label no request ranks anything"


def test_r2_is_undefined_in_resamples_that_draw_equal_labels_alone() -> None:
    """Users whose labels differ, though not within a user: what rounding leaves of a variance is none."""
    random, users = np.random.default_rng(0), np.repeat(np.arange(30), 5)
    labels, weight = np.repeat(random.normal(size=30), 5), random.uniform(0.1, 9, 150)
    sums = measure((SPENT,), users, users, {"spent": labels + 1}, {"spent": labels}, score=labels, weight=weight)
    drawn = np.concatenate([30 * np.eye(30), np.ones((30, 1))], axis=1)  # each user alone, then all
    actual = BootstrapMetrics(sums).groups["spent"].compute(drawn)["r2"]
    assert np.isnan(actual).tolist() == [True] * 30 + [False]


def test_calibration_bins_have_equal_mass_and_add_up(log: Log) -> None:
    _, label, prediction = log.observed("bought")
    actual = summarize(log.measure(), resamples=50)["tasks"]["bought"]
    bins = actual["calibration_bins"]
    assert len(bins) == 10
    assert sum(row["rows"] for row in bins) == len(label)
    assert max(row["rows"] for row in bins) - min(row["rows"] for row in bins) < 0.02 * len(label)
    order = np.argsort(prediction)
    start = 0
    for row in bins:
        mine = order[start : start + row["rows"]]
        start += row["rows"]
        assert row["mean_predicted"] == pytest.approx(prediction[mine].mean(), abs=1e-12)
        assert row["observed_rate"] == pytest.approx(label[mine].mean(), abs=1e-12)
        assert row["low"] <= row["observed_rate"] <= row["high"]
    error = sum(row["rows"] * abs(row["mean_predicted"] - row["observed_rate"]) for row in bins) / len(label)
    assert actual["ece"] == pytest.approx(error)


def test_flat_names_suit_mlflow(log: Log) -> None:
    summary, flat = summarize(log.measure(), resamples=20), flatten(typed.summarize(log.measure(), resamples=20))
    assert flat["score.ndcg_at_10"] == summary["score"]["ndcg_at_10"]["value"]
    assert flat["bought.ece"] == summary["tasks"]["bought"]["ece"]
    assert {"rows", "users", "requests", "spent.rmse.high", "liked.single_class_users.fraction_of_rows"} <= flat.keys()
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.") for name in flat)
    assert all(type(number) is float for number in flat.values())


@pytest.mark.parametrize("weighted", [False, True])
def test_a_resampled_metric_is_that_of_the_redrawn_rows(log: Log, weighted: bool) -> None:
    """A user drawn twice counts as two users: the metric of the rows taken as often as their user was drawn."""
    weight = np.random.default_rng(6).uniform(0.1, 9, len(log.score)) if weighted else np.ones(len(log.score))
    log = with_mean(replace(log, weight=weight), 1.7e9, 100.0)
    sums = log.measure()
    counts = next(draw_user_counts(len(sums.tables["ranking"]), 3, seed=4))
    drawn = dict(zip(sums.tables["ranking"]["user"].to_pylist(), counts, strict=True))
    groups = BootstrapMetrics(sums).groups
    for task in ("bought", "liked", "spent"):
        rows, label, prediction = log.observed(task)
        areas = {"auc": roc_auc_score, "average_precision": average_precision_score, "logloss": log_loss}
        if task == "spent":
            label, prediction, areas = label - 1.7e9, prediction - 1.7e9, {"r2": r2_score}
        actual = groups[task].compute(counts)
        for draw in range(3):
            times = np.array([drawn[user][draw] for user in log.users[rows]]) * weight[rows]
            for metric, area in areas.items():
                expected = area(label, prediction, sample_weight=times)
                assert actual[metric][draw] == pytest.approx(expected, rel=1e-6 if metric == "r2" else 1e-9)


def same_label(log: Log, task: str, label: float) -> Log:
    """Where the label is observed."""
    given = np.where(np.isnan(log.labels[task]), np.nan, label)
    return log.with_labels(**{task: given})


UNDEFINED = {
    "lists of one row": (
        lambda log: replace(log, requests=np.arange(len(log.score))),
        {"score": ("ndcg_at_5", "mrr"), "bought": ("gauc_request",)},
        {
            "score": "No request has rows that differ in relevance",
            "bought": "are undefined: labels are the same in all rows, or within each user or request.",
        },
    ),
    "rows of equal relevance": (
        lambda log: same_label(same_label(same_label(log, "bought", 1.0), "liked", 0.0), "spent", 0.0),
        {"score": ("mrr",)},
        {"score": "No request has rows that differ in relevance"},
    ),
    "no positive label": (
        lambda log: same_label(log, "bought", 0.0),
        {"bought": ("auc", "gauc_user", "gauc_request", "normalized_entropy", "calibration")},
        {"bought": "auc, average_precision, gauc_user, gauc_request, "},
    ),
    "no negative label, by weights": (
        lambda log: replace(same_label(log, "liked", 1.0), weight=np.random.default_rng(7).uniform(0.1, 9, 2_435)),
        {"liked": ("auc", "gauc_user", "normalized_entropy")},
        {"liked": "gauc_user, gauc_request, "},
    ),
    "no label": (
        lambda log: replace(log, labels=dict.fromkeys(log.labels, np.full(len(log.score), np.nan))),
        {"bought": ("auc",), "liked": ("logloss",), "spent": ("rmse",), "score": ("mrr",)},
        {"spent": "No row has an observed label", "score": "No request has rows that differ in relevance"},
    ),
    "equal labels of a regression": (
        lambda log: log.with_labels(spent=np.full(len(log.score), 1e6 / 3)),
        {"spent": ("r2",)},
        {"spent": "r2"},
    ),
}
"""What is done to a log, which metrics of which group are undefined then, and the notes of groups."""


@pytest.mark.parametrize("what", UNDEFINED)
def test_what_is_undefined_has_a_note(log: Log, what: str) -> None:
    change, undefined, said = UNDEFINED[what]
    summary = summarize(change(log).measure(), resamples=20)
    json.dumps(summary, allow_nan=False)
    groups = {**summary["tasks"], "score": summary["score"]}
    for group, metrics in undefined.items():
        for metric in metrics:
            assert groups[group][metric] == {"value": None, "low": None, "high": None}
    for group, note in said.items():
        assert note in groups[group]["note"]
    if "label, by" in what or what == "no positive label":
        (group,) = said
        assert f"undefined: all {groups[group]['rows']:,} labels are {int(group == 'liked')}." in groups[group]["note"]
    if what == "no positive label":
        assert groups["liked"]["auc"]["value"] is not None


@pytest.mark.parametrize(("positives", "label"), [(0, 1e-17), (1, 0.25), (3, 0.75), (4, 1 - 1e-16)])
def test_counts_decide_whether_normalised_entropy_is_defined(positives: int, label: float) -> None:
    """Of a single class, the sums of labels and weights differ by rounding because processors add in other orders."""
    sums = simulate(seed=1, users=1, requests=3).measure()
    totals = {"logloss": 0.6, "label": label, "weight": 1.0, "positives": float(positives), "rows": 4.0}
    drawn = Resamples(
        typed.BootstrapMetrics(sums).groups["bought"],
        np.ones((1, 1)),
        {name: np.array([total]) for name, total in totals.items()},
    )
    expected = np.nan if positives in (0, 4) else 0.6 / entropy_of([label, 1 - label])
    np.testing.assert_allclose(NormalizedEntropy().summarize(drawn), [expected], rtol=1e-12)


def test_what_has_no_interval_is_said_and_why() -> None:
    """Two users, one of which has a single class: half of the resamples have no AUC. Of one user nothing has."""
    task, label, score = MeasuredTask("bought", "binary"), np.array([0.0, 1, 0, 0]), np.array([0.2, 0.7, 0.3, 0.4])
    summary = summarize(measure((task,), [1, 1, 2, 2], [1, 1, 2, 2], {"bought": score}, {"bought": label}, score=score))
    actual = summary["tasks"]["bought"]
    assert actual["auc"] == {"value": 1, "low": None, "high": None}
    assert "auc, average_precision, gauc_user, " in actual["note"]
    assert "no interval" in summary["score"]["note"]
    alone = typed.summarize(simulate(seed=2, users=1, requests=30).measure(), resamples=20)
    assert "one user" in next(describe_notes(alone))
    numbers = [metric for group in alone.groups.values() for metric in group.metrics.values()]
    assert all(number.value is not None and number.low is None and number.high is None for number in numbers)


def test_users_who_all_agree_leave_no_interval_of_no_width() -> None:
    """Five of them, ranked without an error, with equal sums of predictions and labels, and equal losses."""
    users, label = np.repeat(np.arange(5), 4), np.tile([0.0, 0.0, 1.0, 1.0], 5)
    chance = 0.25 + label / 2
    task = MeasuredTask("bought", "binary")
    actual = summarize(measure((task,), users, users, {"bought": chance}, {"bought": label}, score=chance))
    for auc in (actual["tasks"]["bought"]["auc"], actual["score"]["hit_rate_at_5"]):
        assert (auc["value"], auc["high"]) == (1.0, 1.0)
        assert 0.5 < auc["low"] < 0.7
    for name in ("logloss", "calibration", "normalized_entropy"):
        assert actual["tasks"]["bought"][name]["low"] is None
    assert "have no interval: values are the same for all users, undefined" in actual["tasks"]["bought"]["note"]


# The sums.


def test_tables_hold_what_naive_loops_count(log: Log) -> None:
    sums = log.measure()
    by_user = {row["user"]: row for row in sums.tables["liked.users"].to_pylist()}
    ranking = {row["user"]: row for row in sums.tables["ranking"].to_pylist()}
    for user in np.unique(log.users):
        mine = log.users == user
        known = mine & ~np.isnan(log.labels["liked"])
        assert ranking[user]["rows"] == mine.sum()
        assert ranking[user]["requests"] == len(np.unique(log.requests[mine]))
        assert by_user[user]["rows"] == known.sum()
        assert by_user[user]["positives"] == log.labels["liked"][known].sum()
        assert by_user[user]["requests"] == len(np.unique(log.requests[known]))
        single = [len(set(log.labels["liked"][known & (log.requests == r)])) < 2 for r in set(log.requests[known])]
        assert by_user[user]["single_class_requests"] == sum(single)
    assert list(by_user) == sorted(by_user)
    single = replace(log, weight=np.ones(len(log.score), np.float32)).measure()  # which warns of nothing
    assert single.tables["ranking"].equals(sums.tables["ranking"])


def test_what_rounding_leaves_makes_no_row_relevant_and_no_two_rows_differ() -> None:
    """0.1 + 0.2 - 0.3 is 5.6e-17 in floats, and 0.1 + 0.2 is no 0.3."""
    for weights, labels, why in (
        ((0.1, 0.2, -0.3), ([1, 0], [1, 0], [1, 0]), "requests_without_relevant_row"),
        ((0.1, 0.2, 0.3), ([1, 0], [1, 0], [0, 1]), "requests_of_equal_relevance"),
        ((1e9, 2e-9, 0.0), ([1, 1], [1, 0], [0, 0]), "requests_of_equal_relevance"),
    ):
        tasks = [MeasuredTask(name, "binary", weight) for name, weight in zip("abc", weights, strict=True)]
        given = dict(zip("abc", labels, strict=True))
        sums = measure(tasks, [1, 1], [1, 1], dict.fromkeys("abc", np.full(2, 0.5)), given, score=[1.0, 2.0])
        assert sums.tables["ranking"][why].to_pylist() == [1], weights


def test_no_rows_are_refused(log: Log) -> None:
    with pytest.raises(UserError, match="no row to evaluate"):
        log.take(np.array([], dtype=int)).measure()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a@b", "binary"), "cannot be used in metric names"),
        (("score", "binary"), "cannot be used"),
        (("bought", "ordinal"), "'ordinal' is not a task kind"),
        (("bought", "binary", float("nan")), "weight nan"),
    ],
)
def test_bad_tasks_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeasuredTask(*arguments)


@pytest.mark.parametrize("text", [False, True])
def test_groups_of_users_have_the_values_of_users_and_intervals_as_wide(text: bool, monkeypatch) -> None:
    log = simulate(seed=5, users=4000, requests=6000)
    log = replace(log, users=log.users.astype(str)) if text else log
    alone = intervals(summarize(log.measure(grouped=False), 400))
    monkeypatch.setattr("mmoe_rec.evaluation.sums.MAX_BOOTSTRAP_UNITS", 512)
    grouped = log.measure()
    assert 505 < len(grouped.tables["ranking"]) <= 512
    summary = summarize(grouped, 400)
    assert summary["users"] == grouped.users == len(np.unique(log.users)) > 2000
    together = intervals(summary)
    assert alone.keys() == together.keys()
    widths = []
    for key, value in together.items():
        assert value["value"] == pytest.approx(alone[key]["value"], rel=1e-9), key
        if value["value"] != 1.0:  # where all agree, as many as they are say as much
            widths.append((value["high"] - value["low"]) / (alone[key]["high"] - alone[key]["low"]))
    assert len(widths) > 40
    # Each width of 400 resamples, by 512 groups, scatters by some 6%.
    assert 0.97 < np.mean(widths) < 1.03
    assert 0.75 < min(widths) < max(widths) < 1.3


def test_bins_are_narrow_where_rare_positives_are() -> None:
    values, random = np.arange(100_000.0), np.random.default_rng(0)
    positives = np.zeros(len(values))
    positives[-1000:] = random.random(1000) < 0.3
    edges = bin_edges(values, positives, 1 - positives)
    assert 2_000 < len(edges) < 4_096
    assert (edges >= 99_000).sum() > 250
    np.testing.assert_array_equal(bin_edges(values[:50], positives[:50], 1 - positives[:50]), values[1:50])
