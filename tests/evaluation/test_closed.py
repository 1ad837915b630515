"""Sums of all rows of their users: in groups of users, in parts, in bins, and in files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from simulated_log import Log, simulate

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.metrics.auc import bin_edges
from mmoe_rec.evaluation.sums import ClosedSums, EvaluationSums, close_sums, group_of, join_sums
from mmoe_rec.log.hashing import hash_column
from tests.evaluation.trees import find_differences, summarise


def intervals(summary: dict) -> dict[tuple[str, str], dict[str, float]]:
    """Group and metric -> value, low and high."""
    groups = {**summary["tasks"], "score": summary["score"]}
    return {
        (name, metric): value
        for name, group in groups.items()
        for metric, value in group.items()
        if isinstance(value, dict) and "low" in value
    }


@pytest.mark.parametrize("text", [False, True])
def test_groups_of_users_have_the_values_of_users_and_intervals_as_wide(text: bool, monkeypatch) -> None:
    log = simulate(seed=5, users=4000, requests=6000)
    log = replace(log, users=log.users.astype(str)) if text else log
    sums = log.measure()
    alone = intervals(summarise(sums, 400))
    monkeypatch.setattr("mmoe_rec.evaluation.sums.MOST_UNITS", 512)
    grouped = close_sums(sums)
    assert 505 < len(grouped.tables["ranking"]) <= 512
    summary = summarise(grouped, 400)
    assert summary["users"] == grouped.users == len(np.unique(log.users)) > 2000
    together = intervals(summary)
    assert alone.keys() == together.keys()
    widths = []
    for key, value in together.items():
        assert value["value"] == pytest.approx(alone[key]["value"], rel=1e-9), key
        if alone[key]["high"] > alone[key]["low"]:
            widths.append((value["high"] - value["low"]) / (alone[key]["high"] - alone[key]["low"]))
    assert len(widths) > 40
    # Each width of 400 resamples, by 512 groups, scatters by some 6%.
    assert 0.97 < np.mean(widths) < 1.03
    assert 0.75 < min(widths) < max(widths) < 1.3


def test_parts_that_share_no_user_are_joined(monkeypatch) -> None:
    monkeypatch.setattr("mmoe_rec.evaluation.sums.MOST_UNITS", 64)
    monkeypatch.setattr("mmoe_rec.evaluation.metrics.auc.MOST_BINS", 100)
    log = simulate(seed=6, users=1000, requests=3000)
    whole = log.measure()
    edges = {}
    for task in ("bought", "liked"):
        _, label, prediction = log.observed(task)
        values, place = np.unique(prediction, return_inverse=True)
        counts = [np.bincount(place, each, len(values)) for each in (label, 1 - label)]
        edges[task] = bin_edges(values, *counts)
        assert 50 < len(edges[task]) < 100
    groups = group_of(hash_column(whole.tables["ranking"]["user"].combine_chunks()))
    group = dict(zip(whole.tables["ranking"]["user"].to_pylist(), groups, strict=True))
    part = np.array([group[user] // 16 for user in log.users.tolist()])
    parts = [close_sums(log.take(np.flatnonzero(part == each)).measure(), edges, grouped=True) for each in range(4)]
    found, expected = join_sums(parts), close_sums(whole, edges)
    apart = find_differences({"parts": found, "whole": expected}, "parts", resamples=20)["against"]["whole"]["groups"]
    assert apart["bought"]["auc"]["value"] == apart["bought"]["auc"]["detectable"] == 0.0
    assert apart["bought"]["auc"]["p"] == apart["liked"]["logloss"]["p"] == 1.0
    found, expected = intervals(summarise(found, 100)), intervals(summarise(expected, 100))
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-9), key


def test_bins_are_narrow_where_rare_positives_are() -> None:
    values, random = np.arange(100_000.0), np.random.default_rng(0)
    positives = np.zeros(len(values))
    positives[-1000:] = random.random(1000) < 0.3
    edges = bin_edges(values, positives, 1 - positives)
    assert 2_000 < len(edges) < 4_096
    assert (edges >= 99_000).sum() > 250
    np.testing.assert_array_equal(bin_edges(values[:50], positives[:50], 1 - positives[:50]), values[1:50])


def test_closed_sums_are_saved_and_loaded(log: Log, tmp_path: Path) -> None:
    sums = log.measure()
    close_sums(sums).save(tmp_path / "closed")
    sums.save(tmp_path / "open")
    assert summarise(ClosedSums.load(tmp_path / "closed"), 20) == summarise(sums, 20)
    assert summarise(ClosedSums.load(tmp_path / "open"), 20) == summarise(sums, 20)
    with pytest.raises(UserError, match="can't be merged"):
        EvaluationSums.load(tmp_path / "closed")
