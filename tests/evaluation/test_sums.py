"""Sums are those of loops; users are measured in groups; bad tasks are named."""

from dataclasses import replace

import numpy as np
import pytest
from simulated_log import BOUGHT, SPENT, Log, simulate

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.metrics.tasks import bin_edges
from mmoe_rec.evaluation.sums import MeasuredTask
from tests.evaluation.trees import intervals, measure, summarise


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


def test_relevance_is_the_weighted_sum_of_labels() -> None:
    """Task weights 1 and 0.1: a row bought beats a row with 5 spent; a negative or unobserved label counts as 0."""
    sums = measure(
        (BOUGHT, SPENT),
        users=[1, 1, 1, 1],
        requests=[1, 1, 1, 1],
        predictions={"bought": np.full(4, 0.5), "spent": np.zeros(4)},
        labels={"bought": [1, 0, np.nan, 0], "spent": [0, 5, -7, np.nan]},
        score=[1, 2, 4, 3],
    )
    dcg = 1 / np.log2(5) + 0.5 / np.log2(4)
    row = sums.tables["ranking"].to_pylist()[0]
    assert row["ndcg_at_5"] == pytest.approx(dcg / (1 + 0.5 / np.log2(3)))
    assert row["mrr"] == pytest.approx(1 / 3)


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
        (("bought", "ordinal"), "kind 'ordinal'"),
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
    alone = intervals(summarise(log.measure(grouped=False), 400))
    monkeypatch.setattr("mmoe_rec.evaluation.sums.MOST_UNITS", 512)
    grouped = log.measure()
    assert 505 < len(grouped.tables["ranking"]) <= 512
    summary = summarise(grouped, 400)
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
