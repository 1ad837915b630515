"""The histogram behind means, deviations and quantiles, against numpy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmoe_rec.features.numbers import NumberHistogram, Standardiser

PRECISION = 2.0**-12


def _histogram(*parts: np.ndarray) -> NumberHistogram:
    histogram = NumberHistogram()
    for part in parts:
        histogram.add(part)
    return histogram


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=4).map(sorted),
    seed=st.integers(0, 99),
)
def test_any_partition_and_order_gives_the_same_statistics(values, cuts, seed):
    whole = np.array(values, np.float64)
    shuffled = np.random.default_rng(seed).permutation(whole)
    one, other = _histogram(whole), _histogram(*np.split(shuffled, cuts))
    assert one.standardiser() == other.standardiser()
    assert one.quantiles(7).tolist() == other.quantiles(7).tolist()
    assert np.isfinite([one.standardiser().mean, one.standardiser().deviation]).all()


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.floats(-1e9, 1e9).map(lambda value: round(value, 6)), min_size=1, max_size=200))
def test_mean_deviation_and_quantiles_equal_numpys(values):
    exact = np.array(values)
    histogram = _histogram(exact)
    slack = np.abs(exact).max() * PRECISION + 1e-300
    found = histogram.standardiser()
    assert found.mean == pytest.approx(exact.mean(), abs=slack)
    if exact.std() > 8 * slack:
        assert found.deviation == pytest.approx(exact.std(), abs=slack)
    expected = np.quantile(exact, np.arange(1, 8) / 8, method="inverted_cdf")
    edges = histogram.quantiles(8)
    for quantile in expected:
        assert np.abs(edges - quantile).min() <= abs(quantile) * PRECISION + 1e-300


def test_rounding_is_relative_and_bounds_the_number_of_values():
    values = np.random.default_rng(0).uniform(1, 2, 200_000)
    histogram = _histogram(values, -values)
    assert len(histogram.values) <= 2 * (2**12 + 1)
    assert histogram.counts.sum() == 400_000
    exact = np.array([1.0, 0.5, 3.0, -7.0, 0.0, 1024.0])
    assert sorted(_histogram(exact).values) == sorted(exact)


def test_a_value_is_rounded_to_the_nearest():
    values = np.random.default_rng(0).lognormal(sigma=20, size=2000) * np.random.default_rng(1).choice([-1, 1], 2000)
    for value in values:
        assert abs(_histogram(np.array([value])).values[0] - value) <= abs(value) * 2.0**-13


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.floats(-1e9, 1e9).map(lambda value: round(value, 6)), min_size=2, max_size=200))
def test_edges_rise_from_the_least_to_the_largest_standardised_value(values):
    found = _histogram(np.array(values)).standardiser()
    edges = np.array(found.edges)
    assert (np.diff(edges) > 0).all()
    if len(set(values)) > 1 and len(edges):
        scaled = np.clip((np.array(values) - found.mean) / found.deviation, -10, 10)
        slack = np.abs(values).max() / found.deviation * PRECISION + 1e-5
        assert edges[[0, -1]] == pytest.approx([scaled.min(), scaled.max()], abs=slack)


def test_values_beyond_reach_do_not_break_the_statistics():
    found = _histogram(np.array([np.finfo(np.float64).max, 1.0, np.nan])).standardiser()
    assert np.isfinite([found.mean, found.deviation]).all()
    assert found.has_missing


def test_standardising_clips_and_puts_missing_values_at_the_mean():
    apply = Standardiser(2.0, 0.5, False).apply
    assert apply(np.array([2.0, 3.0, -100.0, 1e300, np.nan, np.inf])).tolist() == [0.0, 2.0, -10.0, 10.0, 0.0, 0.0]
