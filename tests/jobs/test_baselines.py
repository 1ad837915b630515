"""Baselines: smoothed rates by hand; trees that learn what they should and fold rare categories."""

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from mmoe_rec.errors import UserError
from mmoe_rec.jobs.baselines import SMOOTHING, boost_trees, rate_candidates


@pytest.mark.parametrize("of", [lambda number: number, lambda number: f"item {number}"])
def test_popularity_by_hand(of) -> None:
    candidates, others = ([of(each) for each in ids] for ids in ((-7, -7, -7, 5, 9), (-7, 5, 9, 1234)))
    found = rate_candidates(pa.array(candidates), np.array([1.0, 0.0, 1.0, 1.0, np.nan]), None, pa.array(others))
    overall = 3 / 4
    sums = [(2, 3), (1, 1), (0, 0), (0, 0)]
    np.testing.assert_allclose(found, [(a + SMOOTHING * overall) / (b + SMOOTHING) for a, b in sums])


def test_popularity_counts_rows_by_their_weights() -> None:
    """As if a row of weight 3 came three times."""
    random = np.random.default_rng(2)
    candidates, labels = random.integers(0, 5, 200), (random.random(200) < 0.3).astype(float)
    labels[random.random(200) < 0.1] = np.nan
    weights = random.integers(1, 4, 200)
    mine = rate_candidates(pa.array(candidates), labels, weights.astype(float), pa.array(range(6)))
    often = rate_candidates(pa.array(candidates.repeat(weights)), labels.repeat(weights), None, pa.array(range(6)))
    np.testing.assert_allclose(mine, often, rtol=1e-12)


NUMBER_AND_ID = np.array([False, True])


def tree_rows(seed: int, rows: int = 4000) -> tuple[np.ndarray, np.ndarray, None]:
    """A number with gaps, and an id from 600 values whose parity matters; large and negative ids."""
    generator = np.random.default_rng(seed)
    number = np.where(generator.random(rows) < 0.1, np.nan, generator.normal(size=rows))
    identity = generator.geometric(0.02, size=rows)
    logit = np.nan_to_num(number) + np.where(identity % 2 == 0, 1.5, -1.5)
    label = (generator.random(rows) < 1 / (1 + np.exp(-logit))).astype(float)
    return np.column_stack([number, identity * -1_000_000_007.0]), label, None


def test_trees_learn_from_numbers_and_categories() -> None:
    train, (x, y, _) = tree_rows(seed=0), tree_rows(seed=1)
    found, again = (boost_trees("binary", NUMBER_AND_ID, train, None, x, 15) for _ in range(2))
    assert roc_auc_score(y, found) > 0.8
    np.testing.assert_array_equal(found, again)


def test_rare_and_unseen_categories_are_one() -> None:
    x = np.column_stack([np.repeat(np.arange(1000.0), 3), np.zeros(3000)])
    x[:600, 0] = 7  # the most frequent value; all others but 253 of equal frequency are folded
    train = (x, (x[:, 0] == 7).astype(float), None)
    others = np.column_stack([[999.0, -5.0, 7.0, np.nan], np.zeros(4)])
    rare, unseen, frequent, missing = boost_trees("binary", np.array([True, False]), train, None, others, 5)
    assert rare == unseen < 0.5 < frequent
    assert np.isfinite(missing)


def test_trees_use_observed_rows_only_and_validation_rows_stop_them() -> None:
    x, y, _ = tree_rows(seed=2)
    unobserved = np.random.default_rng(0).random(len(y)) < 0.5
    masked = (x, np.where(unobserved, np.nan, y), None)
    left, right = (
        boost_trees("binary", NUMBER_AND_ID, each, None, x, 8)
        for each in (masked, (x[~unobserved], y[~unobserved], None))
    )
    np.testing.assert_array_equal(left, right)
    noise = np.random.default_rng(1).integers(0, 2, len(y)).astype(float)
    noise[::3] = np.nan
    stopped, full = (
        boost_trees("binary", NUMBER_AND_ID, (x, y, None), each, x, 80) for each in ((x, noise, None), None)
    )
    assert np.ptp(stopped) < np.ptp(full)


def test_trees_predict_values_of_a_regression() -> None:
    x, _, _ = tree_rows(seed=4)
    y = 3 + 2 * np.nan_to_num(x[:, 0])
    assert np.abs(boost_trees("regression", NUMBER_AND_ID, (x, y, None), None, x, 90) - y).mean() < 0.2


def test_what_can_not_be_learnt_is_told() -> None:
    x, unobserved = np.zeros((3, 1)), np.full(3, np.nan)
    for labels, sentence in ((unobserved, "no training row"), (np.array([1, 1, np.nan]), "expected both 0 and 1")):
        with pytest.raises(UserError, match=sentence):
            boost_trees("binary", np.array([False]), (x, labels, None), None, x)
    with pytest.raises(UserError, match="no training row has an observed label"):
        rate_candidates(pa.array([1, 2, 3]), unobserved, None, pa.array([1]))
