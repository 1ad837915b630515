"""AUC from counts and within groups, against scikit-learn on the rows behind them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from mmoe_rec.auc import auc_of_counts, grouped_auc

BINS, GROUPS = 8, 40


@given(st.lists(st.tuples(st.integers(0, BINS - 1), st.booleans()), min_size=1, max_size=60))
def test_auc_of_counts_is_that_of_the_rows_behind_them(rows: list[tuple[int, bool]]) -> None:
    counts = np.zeros((2, BINS), np.int64)
    for place, label in rows:
        counts[int(label), place] += 1
    negatives, positives = counts
    labels = [label for _, label in rows]
    actual = auc_of_counts(positives, negatives)
    if len(set(labels)) == 1:
        assert np.isnan(actual)
    else:
        assert actual == pytest.approx(roc_auc_score(labels, [place for place, _ in rows]), abs=1e-12)
        assert grouped_auc(np.zeros(BINS, int), np.arange(BINS), positives, negatives, 1)[0] == actual


def test_columns_of_counts_are_histograms_of_their_own() -> None:
    positives, negatives = np.random.default_rng(0).integers(0, 9, (2, BINS, 5)).astype(float)
    positives[:, 2] = 0
    actual = auc_of_counts(positives, negatives)
    assert actual.shape == (5,)
    np.testing.assert_array_equal(actual, [auc_of_counts(positives[:, r], negatives[:, r]) for r in range(5)])
    assert np.flatnonzero(np.isnan(actual)) == [2]


def test_counts_of_many_rows_do_not_overflow() -> None:
    many = np.array([2**40, 2**40])
    assert auc_of_counts(many, many) == 0.5


@pytest.mark.parametrize("levels", [1, 3, 1_000_000])
def test_grouped_auc_is_that_of_each_group(levels: int) -> None:
    generator = np.random.default_rng(levels)
    group = generator.integers(GROUPS - 1, size=500)  # the last group has no row
    value, label = generator.integers(levels, size=500) / levels, generator.integers(2, size=500).astype(float)
    label[group == 3] = 1
    actual = grouped_auc(group, value, label, 1 - label, GROUPS)
    for index in range(GROUPS):
        rows = group == index
        if len(np.unique(label[rows])) < 2:
            assert np.isnan(actual[index])
        else:
            assert actual[index] == pytest.approx(roc_auc_score(label[rows], value[rows]), abs=1e-12)
