"""Boosted trees as arrays of bits: LightGBM's own sums, for any rows beside a row, and texts that are refused."""

import re
from typing import Any

import lightgbm
import numpy as np
import pytest

from mmoe_rec.model.trees import Ensemble, Forest, read_ensemble


def grow(seed: int, number: int = 12, **settings: Any) -> str:
    """Trees of three numbers, one of which is whole, and of two features of 40 and 5 ids."""
    random = np.random.default_rng(seed)
    numbers = np.column_stack([random.normal(size=(3000, 2)), random.integers(-4, 5, 3000)])
    x = np.column_stack([numbers, random.integers(0, 40, 3000), random.integers(0, 5, 3000)]).astype(np.float32)
    labels = x[:, 0] * (x[:, 3] % 3) + np.sin(9 * x[:, 1]) + (x[:, 2] == x[:, 4]) + random.normal(size=3000)
    binary = settings.get("objective") == "binary"
    rows = lightgbm.Dataset(x, labels > 0 if binary else labels, categorical_feature=[3, 4])
    settings = {"num_leaves": 31, "min_data_in_leaf": 5, "seed": seed, "verbosity": -1, "num_threads": 1} | settings
    return lightgbm.train(settings, rows, number).model_to_string()


def rows_at_edges(texts: list[str], seed: int) -> np.ndarray:
    """(700, 5) float32: numbers at, just below and just above a threshold of the trees, and ids, some of them new."""
    random = np.random.default_rng(seed)
    lines = " ".join(re.findall(r"(?m)^threshold=(.*)$", "\n".join(texts)))
    numbers = random.choice(np.array(lines.split(), float), (700, 3)).astype(np.float32)
    towards = np.choose(random.integers(0, 3, (700, 3)), [np.float32(-np.inf), numbers, np.float32(np.inf)])
    numbers = np.nextafter(numbers, towards)
    assert (numbers == np.float32(-1e-35)).any(), "which LightGBM reads as 0"
    return np.column_stack([numbers, random.integers(0, 60, 700), random.integers(0, 5, 700)]).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_sums_are_those_of_lightgbm(seed: int) -> None:
    """Of tasks together: trees whose leaves take one byte or two, stumps, and trees without a split."""
    texts = [
        grow(seed, objective="binary"),
        grow(seed + 10, 3, num_leaves=400, min_data_in_leaf=1),
        grow(seed + 20, 5, num_leaves=2),
        grow(seed + 30, 2, min_data_in_leaf=3000),
    ]
    forest, rows = Forest([read_ensemble(text) for text in texts]), rows_at_edges(texts, seed)
    boosters = [lightgbm.Booster(model_str=text) for text in texts]
    expected = [booster.predict(rows.astype(np.float64), raw_score=True, num_threads=1) for booster in boosters]
    actual = forest.sums(rows)
    np.testing.assert_allclose(actual, np.transpose(expected), rtol=1e-12, atol=1e-12)
    assert [len(np.unique(column)) > 1 for column in actual.T] == [True, True, True, False]
    assert max(len(tree.values) for tree in read_ensemble(texts[1]).trees) > 256


def test_a_row_gets_the_same_sum_whatever_stands_beside_it() -> None:
    text = grow(5)
    forest, rows = Forest([read_ensemble(text), read_ensemble(grow(6))]), rows_at_edges([text], 5)
    whole = forest.sums(rows)
    for count in (1, 63, 64, 65, 128, 129):
        start = 700 - 5 * count
        np.testing.assert_array_equal(forest.sums(rows[start : start + count]), whole[start : start + count])
    order = np.repeat([7, 8, 7], [330, 1, 20])  # ids are those of one user, and then of two
    np.testing.assert_array_equal(forest.sums(rows[order]), whole[order])
    np.testing.assert_array_equal(forest.sums(np.concatenate([rows] * 3), threads=3), np.concatenate([whole] * 3))
    assert forest.sums(rows[:0]).shape == (0, 2)


@pytest.mark.parametrize(
    ("wrong", "by", "message"),
    [
        (r"(?s)\nTree=.*?\nend of trees", "\nend of trees", "there is no tree"),
        (r"(?m)^max_feature_idx=4", "max_feature_idx=1", "an input that doesn't exist"),
        (r"(?m)^decision_type=.*? ", "decision_type=8 ", "a rule for missing numbers"),
        (r"(?m)^left_child=.*? ", "left_child=", "are inconsistent"),
        (r"(?m)^leaf_value=.*? ", "leaf_value=", "are inconsistent"),
        (r"(?m)^leaf_value=", "leaf_value=x", "could not convert"),
        (r"(?m)^cat_boundaries=.*", "cat_boundaries=0", "not enough values"),
    ],
)
def test_what_is_damaged_or_of_another_kind_is_refused(wrong: str, by: str, message: str) -> None:
    text = re.sub(wrong, by, before := grow(0, 3), count=1)
    assert text != before
    with pytest.raises((ValueError, LookupError), match=message):
        Forest([read_ensemble(text)])
    assert isinstance(read_ensemble(before), Ensemble)
