"""Baselines: smoothed rates by hand; trees that learn what they should and fold rare categories."""

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.baselines import PopularityBaseline, gradient_boosting


def test_popularity_by_hand() -> None:
    labels = [1.0, 0.0, 1.0, 1.0, np.nan]
    baseline = PopularityBaseline(np.array([-7, -7, -7, 5, 9]), labels, smoothing=2)
    overall = 3 / 4
    expected = [(2 + 2 * overall) / 5, (1 + 2 * overall) / 3, overall, overall]
    np.testing.assert_allclose(baseline.predict(np.array([-7, 5, 9, 1234])), expected)


def test_popularity_takes_arrow_strings() -> None:
    baseline = PopularityBaseline(pa.array(["a", "b", "b"]).dictionary_encode(), [0.0, 1.0, 1.0], smoothing=0)
    np.testing.assert_allclose(baseline.predict(pa.chunked_array([["b"], ["a", "c", None]])), [1, 0, 2 / 3, 2 / 3])


def test_popularity_says_what_is_wrong() -> None:
    with pytest.raises(UserError, match="no training row has an observed label"):
        PopularityBaseline([1, 2], [np.nan, np.nan])


def tree_rows(seed: int, rows: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """A number with gaps, and an id from 600 values whose parity matters; large and negative ids."""
    generator = np.random.default_rng(seed)
    number = np.where(generator.random(rows) < 0.1, np.nan, generator.normal(size=rows))
    identity = generator.geometric(0.02, size=rows)
    logit = np.nan_to_num(number) + np.where(identity % 2 == 0, 1.5, -1.5)
    label = (generator.random(rows) < 1 / (1 + np.exp(-logit))).astype(float)
    return np.column_stack([number, identity * -1_000_000_007.0]), label


def test_trees_learn_from_numbers_and_categories() -> None:
    x, y = tree_rows(seed=0)
    x_test, y_test = tree_rows(seed=1)
    fitted = gradient_boosting(x, y, np.array([False, True]), iterations=15)
    assert roc_auc_score(y_test, fitted.predict(x_test)) > 0.8
    again = gradient_boosting(x, y, np.array([False, True]), iterations=15)
    np.testing.assert_array_equal(fitted.predict(x_test), again.predict(x_test))


def test_rare_and_unseen_categories_are_one() -> None:
    x = np.column_stack([np.repeat(np.arange(1000.0), 3), np.zeros(3000)])
    x[:600, 0] = 7  # the most frequent value; all others but 253 of equal frequency are folded
    y = (x[:, 0] == 7).astype(float)
    fitted = gradient_boosting(x, y, np.array([True, False]), iterations=5)
    assert len(fitted.categories[0]) == 254
    assert fitted.categories[0][0] == 7
    rare, unseen = fitted.predict(np.array([[999.0, 0], [-5.0, 0]]))
    assert rare == unseen
    assert fitted.predict(np.array([[7.0, 0]]))[0] > 0.5 > rare
    assert np.isfinite(fitted.predict(np.array([[np.nan, 0]]))).all()


def test_trees_use_observed_rows_only_and_stop_early() -> None:
    x, y = tree_rows(seed=2)
    unobserved = np.random.default_rng(0).random(len(y)) < 0.5
    masked = np.where(unobserved, np.nan, y)
    categorical = np.array([False, True])
    left = gradient_boosting(x, masked, categorical, iterations=8).predict(x)
    right = gradient_boosting(x[~unobserved], y[~unobserved], categorical, iterations=8).predict(x)
    np.testing.assert_array_equal(left, right)
    x_valid, y_valid = tree_rows(seed=3)
    y_valid[::3] = np.nan
    stopped = gradient_boosting(x, y, categorical, validation=(x_valid, y_valid), iterations=400, learning_rate=0.3)
    assert stopped.model.n_iter_ < 400


def test_trees_predict_values_of_a_regression() -> None:
    x, _ = tree_rows(seed=4)
    y = 3 + 2 * np.nan_to_num(x[:, 0])
    fitted = gradient_boosting(x, y, np.array([False, True]), kind="regression", iterations=30, learning_rate=0.3)
    assert np.abs(fitted.predict(x) - y).mean() < 0.2


def test_trees_say_what_is_wrong() -> None:
    x = np.zeros((3, 1))
    with pytest.raises(UserError, match="no training row"):
        gradient_boosting(x, np.full(3, np.nan), np.array([False]))
    with pytest.raises(UserError, match="expected both 0 and 1"):
        gradient_boosting(x, np.array([1, 1, np.nan]), np.array([False]))


def test_popularity_counts_rows_by_their_weights() -> None:
    """As if a row of weight 3 came three times."""
    random = np.random.default_rng(2)
    candidates, labels = random.integers(0, 5, 200), (random.random(200) < 0.3).astype(float)
    labels[random.random(200) < 0.1] = np.nan
    weights = random.integers(1, 4, 200)
    mine = PopularityBaseline(candidates, labels, weights=weights.astype(float)).predict(np.arange(6))
    often = PopularityBaseline(candidates.repeat(weights), labels.repeat(weights)).predict(np.arange(6))
    np.testing.assert_allclose(mine, often, rtol=1e-12)
