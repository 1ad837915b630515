"""What is shown of the catalogue, against loops over requests, and over the orders of tied rows."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from simulated_log import Log, simulate

from mmoe_rec.evaluation.summary import flatten, summarise


def naive(log: Log, candidates: np.ndarray, cutoff: int) -> dict[str, float]:
    """Of scores without ties."""
    requests, shown = np.unique(log.requests), dict.fromkeys(candidates.tolist(), 0)
    for request in requests:
        rows = np.flatnonzero(log.requests == request)
        for row in rows[np.argsort(-log.score[rows])][:cutoff]:
            shown[candidates[row]] += 1
    counts = np.array(list(shown.values()), float)
    share = np.array([min((candidates == each).sum() / len(requests), 1) for each in shown])
    apart = np.abs(counts[:, None] - counts).sum() / (2 * len(counts) ** 2 * counts.mean())
    return {"coverage": (counts > 0).mean(), "gini": apart, "novelty": -(counts @ np.log2(share)) / counts.sum()}


@pytest.mark.parametrize("text", [False, True])
def test_metrics_are_those_of_loops(log: Log, text: bool) -> None:
    candidates = np.random.default_rng(0).geometric(0.02, len(log.score)) * 10**15
    candidates = candidates.astype(str) if text else candidates
    summary = summarise(log.measure(candidates=candidates), 2)
    assert summary.catalogue["candidates"] == len(set(candidates.tolist()))
    for cutoff in (5, 10):
        found = {name: summary.catalogue[f"{name}_at_{cutoff}"] for name in ("coverage", "gini", "novelty")}
        assert found == pytest.approx(naive(log, candidates, cutoff), abs=1e-12)
    assert 0 < summary.catalogue["coverage_at_5"] < summary.catalogue["coverage_at_10"] <= 1
    assert flatten(summary)["catalogue.gini_at_5"] == summary.catalogue["gini_at_5"]


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
    found = summarise(log.measure(candidates=candidate), 2).catalogue
    shares = []
    for left_out in product(range(1, 7), range(8, 14)):  # of the tied rows five, less the first, are among the first
        for other in product(range(1, 7), range(8, 14)):
            if left_out[0] < other[0] and left_out[1] < other[1]:
                shown = set(candidate[[row for row in range(rows) if row not in {*left_out, *other}]].tolist())
                shares.append(len(shown) / len(set(candidate.tolist())))
    assert found["coverage_at_5"] == pytest.approx(np.mean(shares), abs=1e-12)
    assert found["coverage_at_10"] == 1


def test_one_candidate_in_all_requests_is_no_news() -> None:
    log = simulate(seed=2, requests=50)
    found = summarise(log.measure(candidates=np.zeros(len(log.score), int)), 2).catalogue
    assert found["novelty_at_5"] == found["gini_at_5"] == 0
    assert found["coverage_at_5"] == found["candidates"] == 1
