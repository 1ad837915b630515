"""Metrics of ranked lists against trec_eval, by ir-measures, which has no ties, and against all orders of tied rows."""

from collections.abc import Callable
from itertools import pairwise, permutations

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import AP, RR, R, Success, nDCG
from simulated_log import simulate

from mmoe_rec.evaluation.metrics.ranking import RankedLists, average_precision, hit_rate, recall
from mmoe_rec.evaluation.sums import MeasuredTask, measure
from tests.evaluation.trees import summarise

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
    for each in np.unique(request):
        rows = np.flatnonzero(request == each)
        if len(set(gain[rows])) > 1:
            place = np.argsort(np.argsort(score[rows]))  # trec_eval ranks by float32
            qrels[str(each)] = {str(row): int(gain[row]) for row in rows}
            run[str(each)] = {str(row): float(rank) for row, rank in zip(rows, place, strict=True)}
    found = ir_measures.calc_aggregate(list(MEASURES.values()), qrels, run)
    return {name: found[measure] for name, measure in MEASURES.items()}


@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_the_score_and_of_each_task_are_those_of_trec_eval(seed: int) -> None:
    log = simulate(seed, requests=300)
    graded = np.random.default_rng(seed).integers(-1, 4, len(log.score)).astype(float)
    graded[log.labels["bought"] == 0] = np.nan
    tasks = [MeasuredTask("bought", "binary", 2.0), MeasuredTask("stars", "regression", 1.0)]
    labels = {"bought": log.labels["bought"], "stars": graded}
    predictions = {"bought": log.predictions["bought"], "stars": log.predictions["liked"]}
    sums = measure(tasks, log.users, log.requests, predictions, labels, score=log.score)
    summary = summarise(sums, resamples=2)
    relevance = 2 * labels["bought"] + np.maximum(np.nan_to_num(graded), 0)
    given = {"score": (summary["score"], relevance, log.score)}
    for name in ("bought", "stars"):
        given[name] = summary["tasks"][name], np.maximum(labels[name], 0), predictions[name]
    for found, gain, score in given.values():
        known = ~np.isnan(gain)
        expected = by_trec(log.requests[known], gain[known], score[known])
        assert {name: found[name]["value"] for name in MEASURES} == pytest.approx(expected, abs=1e-12)
        assert 0 < found["map"]["value"] < 1


def naive_precision(gain: np.ndarray) -> float:
    hits = np.flatnonzero(gain)
    return float(np.mean((np.arange(len(hits)) + 1) / (hits + 1)))


@pytest.mark.parametrize(
    ("of_lists", "of_one"),
    [
        (average_precision, naive_precision),
        (lambda lists: recall(lists, 2), lambda gain: gain[:2].sum() / gain.sum()),
        (lambda lists: hit_rate(lists, 2), lambda gain: float(gain[:2].any())),
    ],
)
@given(rows=st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6))
@settings(deadline=None, max_examples=60)
def test_ties_count_as_the_mean_over_their_orders(
    of_lists: Callable[[RankedLists], np.ndarray],
    of_one: Callable[[np.ndarray], float],
    rows: list[tuple[int, bool]],
) -> None:
    score, gain = (np.array(each, dtype=float) for each in zip(*rows, strict=True))
    found = of_lists(RankedLists.of(np.zeros(len(rows), dtype=int), score, gain, 1))[0]
    if not gain.any():
        assert np.isnan(found)
        return
    orders = [
        gain[list(order)]
        for order in permutations(range(len(rows)))
        if all(score[a] >= score[b] for a, b in pairwise(order))
    ]
    assert found == pytest.approx(np.mean([of_one(order) for order in orders]), abs=1e-12)
