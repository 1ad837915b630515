"""Metrics of ranked lists and of the catalog against trec_eval (by ir-measures), scikit-learn, loops, and all orders
of tied rows."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise, permutations, product

import ir_measures
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from ir_measures import AP, RR, R, Success, nDCG
from simulated_log import Log, simulate
from sklearn.metrics import ndcg_score

from mmoe_rec.evaluation.metrics.ranking_metrics import (
    RankedRequests,
    average_precision,
    hit_rate,
    ndcg,
    random_ndcg,
    recall,
    reciprocal_rank,
)
from mmoe_rec.evaluation.summary import flatten, summarize
from mmoe_rec.evaluation.sums import MeasuredTask
from tests.evaluation.trees import measure

GROUPS = 40
MEASURES = {
    "ndcg_at_5": nDCG @ 5,
    "ndcg_at_10": nDCG @ 10,
    "mrr": RR,
    "map": AP,
    "recall_at_5": R @ 5,
    "recall_at_10": R @ 10,
    "hit_rate_at_5": Success @ 5,
    "hit_rate_at_10": Success @ 10,
}


def by_trec(request: np.ndarray, gain: np.ndarray, score: np.ndarray) -> dict[str, float]:
    """Means over the requests that rank something: whose rows differ in relevance."""
    qrels: dict[str, dict[str, int]] = {}
    run: dict[str, dict[str, float]] = {}
    for item in np.unique(request):
        rows = np.flatnonzero(request == item)
        if len(set(gain[rows])) > 1:
            place = np.argsort(np.argsort(score[rows]))  # trec_eval ranks by float32
            qrels[str(item)] = {str(row): int(gain[row]) for row in rows}
            run[str(item)] = {str(row): float(rank) for row, rank in zip(rows, place, strict=True)}
    actual = ir_measures.calc_aggregate(list(MEASURES.values()), qrels, run)
    return {name: actual[measure] for name, measure in MEASURES.items()}


@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_the_score_and_of_each_task_are_those_of_trec_eval(seed: int) -> None:
    log = simulate(seed, requests=300)
    graded = np.random.default_rng(seed).integers(-1, 4, len(log.score)).astype(float)
    graded[log.labels["bought"] == 0] = np.nan
    tasks = [MeasuredTask("bought", "binary", 2.0), MeasuredTask("stars", "regression", 1.0)]
    labels = {"bought": log.labels["bought"], "stars": graded}
    predictions = {"bought": log.predictions["bought"], "stars": log.predictions["liked"]}
    summary = summarize(measure(tasks, log.users, log.requests, predictions, labels, score=log.score), resamples=2)
    relevance = 2 * labels["bought"] + np.maximum(np.nan_to_num(graded), 0)
    given = {"score": (relevance, log.score)}
    given |= {name: (np.maximum(labels[name], 0), predictions[name]) for name in ("bought", "stars")}
    for name, (gain, score) in given.items():
        known = ~np.isnan(gain)
        expected = by_trec(log.requests[known], gain[known], score[known])
        actual = {item: summary.groups[name].get(item).value for item in MEASURES}
        assert actual == pytest.approx(expected, abs=1e-12)
        assert 0 < expected["map"] < 1


@pytest.mark.parametrize("cutoff", [1, 5, 10])
@pytest.mark.parametrize("levels", [1, 4, 1_000_000])
def test_ndcg_is_that_of_scikit_learn(levels: int, cutoff: int) -> None:
    """Few levels make many ties; a group has no relevant row, and the last one no row at all."""
    random = np.random.default_rng(levels)
    group, score = random.integers(GROUPS - 1, size=500), random.integers(levels, size=500) / levels
    gain = random.integers(2, size=500) * random.uniform(0.1, 3, size=500)
    gain[group == 5] = 0
    lists = RankedRequests.of(group, score, gain, GROUPS)
    actual, average = ndcg(lists, cutoff), random_ndcg(lists, cutoff)
    for index in range(GROUPS):
        rows = group == index
        if gain[rows].sum() == 0:
            assert np.isnan([actual[index], average[index]]).all()
        elif rows.sum() > 1:  # scikit-learn refuses lists of one
            scores = (score[rows], np.zeros(rows.sum()))
            expected = [ndcg_score([gain[rows]], [item], k=cutoff) for item in scores]
            assert [actual[index], average[index]] == pytest.approx(expected, abs=1e-12)


def precision_of_one(gain: np.ndarray) -> float:
    hits = np.flatnonzero(gain)
    return float(np.mean((np.arange(len(hits)) + 1) / (hits + 1)))


@pytest.mark.parametrize(
    ("of_lists", "of_one"),
    [
        (reciprocal_rank, lambda gain: 1 / (np.flatnonzero(gain)[0] + 1)),
        (average_precision, precision_of_one),
        (partial(recall, cutoff=2), lambda gain: gain[:2].sum() / gain.sum()),
        (partial(hit_rate, cutoff=2), lambda gain: float(gain[:2].any())),
    ],
)
@given(rows=st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6))
@example(rows=[(0, place == 4) for place in range(6)])
def test_ties_count_as_the_mean_over_their_orders(
    of_lists: Callable[[RankedRequests], np.ndarray],
    of_one: Callable[[np.ndarray], float],
    rows: list[tuple[int, bool]],
) -> None:
    score, gain = (np.array(item, dtype=float) for item in zip(*rows, strict=True))
    actual = of_lists(RankedRequests.of(np.zeros(len(rows), dtype=int), score, gain, 1))[0]
    if not gain.any():
        assert np.isnan(actual)
        return
    orders = [
        gain[list(order)]
        for order in permutations(range(len(rows)))
        if all(score[a] >= score[b] for a, b in pairwise(order))
    ]
    assert actual == pytest.approx(np.mean([of_one(order) for order in orders]), abs=1e-12)


# The catalog.


def naive_catalog(log: Log, candidates: np.ndarray, cutoff: int) -> dict[str, float]:
    """Of scores without ties."""
    requests, shown = np.unique(log.requests), dict.fromkeys(candidates.tolist(), 0)
    for request in requests:
        rows = np.flatnonzero(log.requests == request)
        for row in rows[np.argsort(-log.score[rows])][:cutoff]:
            shown[candidates[row]] += 1
    counts = np.array(list(shown.values()), float)
    share = np.array([min((candidates == item).sum() / len(requests), 1) for item in shown])
    separate = np.abs(counts[:, None] - counts).sum() / (2 * len(counts) ** 2 * counts.mean())
    return {"coverage": (counts > 0).mean(), "gini": separate, "novelty": -(counts @ np.log2(share)) / counts.sum()}


@pytest.mark.parametrize("text", [False, True])
def test_metrics_of_the_catalog_are_those_of_loops(log: Log, text: bool) -> None:
    candidates = np.random.default_rng(0).geometric(0.02, len(log.score)) * 10**15
    candidates[::2] = 0  # more rows than there are requests
    candidates = candidates.astype(str) if text else candidates
    summary = summarize(log.measure(candidates=candidates), 2)
    assert summary.catalog["candidates"] == len(set(candidates.tolist()))
    for cutoff in (5, 10):
        actual = {name: summary.catalog[f"{name}_at_{cutoff}"] for name in ("coverage", "gini", "novelty")}
        assert actual == pytest.approx(naive_catalog(log, candidates, cutoff), abs=1e-12)
    assert 0 < summary.catalog["coverage_at_5"] < summary.catalog["coverage_at_10"] <= 1
    assert flatten(summary)["catalog.gini_at_5"] == summary.catalog["gini_at_5"]


def test_ties_count_by_the_probability_to_be_among_the_first() -> None:
    """Two requests of seven rows, six of which are tied at the cutoff of 5, in all orders of each."""
    log = simulate(seed=1, users=2, requests=2)
    score = np.array([2.0, 1, 1, 1, 1, 1, 1] * 2)
    request = np.repeat([0, 1], 7)
    candidate = np.array([*range(7), *range(10, 15), 0, 1])
    rows = len(score)
    given = {name: np.full(rows, 0.5) for name in log.predictions}
    labels = {name: np.zeros(rows) for name in log.labels}
    log = replace(log, users=request, requests=request, predictions=given, labels=labels, score=score)
    actual = summarize(log.measure(candidates=candidate), 2).catalog
    shares = []
    for left_out in product(range(1, 7), range(8, 14)):  # of the tied rows five, less the first, are among the first
        for second in product(range(1, 7), range(8, 14)):
            if left_out[0] < second[0] and left_out[1] < second[1]:
                shown = set(candidate[[row for row in range(rows) if row not in {*left_out, *second}]].tolist())
                shares.append(len(shown) / len(set(candidate.tolist())))
    assert actual["coverage_at_5"] == pytest.approx(np.mean(shares), abs=1e-12)
    assert actual["coverage_at_10"] == 1
