"""Ranking metrics against scikit-learn one request at a time, and against averages over all orders of tied rows."""

from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from mmoe_rec.evaluation.metrics.ranking import RankedLists, least_and_random_ndcg, ndcg, reciprocal_rank

GROUPS = 40


def random_rows(seed: int, levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(group, value, label) of 500 rows; few levels make many ties, and the last group has no row."""
    generator = np.random.default_rng(seed)
    group = generator.integers(GROUPS - 1, size=500)
    return group, generator.integers(levels, size=500) / levels, generator.integers(2, size=500).astype(float)


@pytest.mark.parametrize("cutoff", [1, 5, 10])
@pytest.mark.parametrize("levels", [1, 4, 1_000_000])
def test_ndcg_is_that_of_scikit_learn(levels: int, cutoff: int) -> None:
    group, score, label = random_rows(seed=levels, levels=levels)
    gain = label * np.random.default_rng(9).uniform(0.1, 3, size=len(label))
    gain[group == 5] = 0
    lists = RankedLists.of(group, score, gain, GROUPS)
    found, (least, random) = ndcg(lists, cutoff), least_and_random_ndcg(lists, cutoff)
    for index in range(GROUPS):
        rows = group == index
        if gain[rows].sum() == 0:
            assert np.isnan(found[index])
            assert np.isnan(least[index])
            assert np.isnan(random[index])
        elif rows.sum() > 1:  # scikit-learn refuses lists of one
            worst = np.argsort(np.argsort(-gain[rows]))
            assert least[index] == pytest.approx(ndcg_score([gain[rows]], [worst], k=cutoff), abs=1e-12)
            assert found[index] == pytest.approx(ndcg_score([gain[rows]], [score[rows]], k=cutoff), abs=1e-12)
            tied = ndcg_score([gain[rows]], [np.zeros(rows.sum())], k=cutoff)
            assert random[index] == pytest.approx(tied, abs=1e-12)


def test_reciprocal_rank_by_hand() -> None:
    group = np.array([0, 0, 0, 1, 1, 2, 3, 3])
    score = np.array([0.9, 0.5, 0.7, 0.1, 0.2, 5.0, -np.inf, 0.0])
    gain = np.array([0, 1, 1, 0, 2.0, 0, 1, 0])
    # request 0: 0.9 irrelevant, 0.7 relevant; request 1: 0.2 relevant; request 2: nothing; request 3: -inf is second.
    found = reciprocal_rank(RankedLists.of(group, score, gain, 5))
    np.testing.assert_allclose(found, [1 / 2, 1, np.nan, 1 / 2, np.nan])


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6))
@settings(deadline=None)
def test_ties_count_as_the_mean_over_their_orders(rows: list[tuple[int, bool]]) -> None:
    score = np.array([row[0] for row in rows], dtype=float)
    gain = np.array([row[1] for row in rows], dtype=float)
    lists = RankedLists.of(np.zeros(len(rows), dtype=int), score, gain, 1)
    if not gain.any():
        assert np.isnan(reciprocal_rank(lists)[0])
        assert np.isnan(ndcg(lists, 3)[0])
        return
    reciprocal_ranks, dcgs = [], []
    for order in permutations(range(len(rows))):
        if all(score[a] >= score[b] for a, b in pairwise(order)):
            ranked = gain[list(order)]
            reciprocal_ranks.append(1 / (np.flatnonzero(ranked)[0] + 1))
            dcgs.append(sum(g / np.log2(i + 2) for i, g in enumerate(ranked[:3])))
    ideal = sum(g / np.log2(i + 2) for i, g in enumerate(sorted(gain, reverse=True)[:3]))
    assert reciprocal_rank(lists)[0] == pytest.approx(np.mean(reciprocal_ranks), abs=1e-12)
    assert ndcg(lists, 3)[0] == pytest.approx(np.mean(dcgs) / ideal, abs=1e-12)


def test_a_constant_score_gains_nothing_from_the_order_of_the_rows() -> None:
    """One relevant row among ten, all tied: the mean of 1 / rank, wherever the relevant row stands in the input."""
    for relevant in (0, 4, 9):
        gain = np.eye(10)[relevant]
        found = reciprocal_rank(RankedLists.of(np.zeros(10, dtype=int), np.zeros(10), gain, 1))
        assert found[0] == pytest.approx(np.mean(1 / np.arange(1, 11)))
