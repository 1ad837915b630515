"""The statistics of numbers, against numpy and `fractions`."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmoe_rec.features.numeric_statistics import EDGE_COUNT, NumberHistogram, Standardizer


def _histogram(*parts: np.ndarray) -> NumberHistogram:
    histogram = NumberHistogram()
    for part in parts:
        histogram.add(part)
    return histogram


@given(
    values=st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=4).map(sorted),
    seed=st.integers(0, 99),
)
@example(values=[float(np.finfo(np.float64).max), 1.0, math.nan], cuts=[], seed=0)
def test_any_partition_and_order_gives_the_same_statistics(values, cuts, seed):
    whole = np.array(values, np.float64)
    shuffled = np.random.default_rng(seed).permutation(whole)
    first, second = _histogram(whole), _histogram(*np.split(shuffled, cuts))
    assert first.standardizer() == second.standardizer()
    assert first.bucket_edges(7).tolist() == second.bucket_edges(7).tolist()
    assert np.isfinite([first.standardizer().mean, first.standardizer().std]).all()
    assert first.standardizer().has_missing == (not np.isfinite(whole).all())


@pytest.mark.parametrize("offset", [0.0, 1.7e9, -1.7e9, 1.7e15, 1.7e18])
def test_a_small_spread_around_a_large_offset_is_kept(offset):
    values = offset + np.random.default_rng(0).integers(-500, 500, 3000) * max(1.0, np.spacing(offset))
    actual = _histogram(values).standardizer()
    distance = values - offset
    assert actual.mean - offset == pytest.approx(distance.mean(), abs=distance.std() * 0.01)
    assert actual.std == pytest.approx(distance.std(), rel=1e-5)
    expected = (distance - distance.mean()) / distance.std()
    np.testing.assert_allclose(actual.apply(values), expected, atol=0.01)
    assert len(actual.edges) == EDGE_COUNT


def test_the_spread_of_more_values_than_are_kept_is_theirs():
    values = 1.7e9 + np.random.default_rng(0).uniform(0, 86_400, 200_000)
    histogram = _histogram(*np.split(values, 5))
    assert len(histogram.bins[0]) <= 2**16
    assert histogram.bins[2].sum() == 200_000
    actual = histogram.standardizer()
    assert actual.mean == pytest.approx(values.mean(), abs=1.0)
    assert actual.std == pytest.approx(values.std(), rel=1e-4)


def test_rounding_noise_is_no_spread():
    assert _histogram(np.array([0.1 + 0.2, 0.3])).standardizer().std == 1.0


# More values than are kept, drawn once: signs, magnitudes, whole numbers and many repeats.
_MANY = np.concatenate(
    [
        np.random.default_rng(0).normal(size=40_000),
        np.random.default_rng(1).lognormal(sigma=20, size=40_000) * -1,
        np.arange(40_000.0),
        np.full(40_000, 7.25),
        [0.0, -0.0, np.nan, np.inf, 1e300, -1e300, 5e-324],
    ]
)


@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(0, len(_MANY)), max_size=6).map(sorted), seed=st.integers(0, 99), joined=st.booleans())
def test_bounding_the_values_does_not_depend_on_the_order(cuts, seed, joined):
    parts = np.split(np.random.default_rng(seed).permutation(_MANY), cuts)
    if joined:
        second = NumberHistogram()
        for part in reversed(parts):
            second.merge(NumberHistogram.from_table(_histogram(part).to_table()))
    else:
        second = _histogram(*parts)
    whole = _histogram(_MANY)
    assert len(whole.bins[0]) <= 2**16
    assert second.to_table().equals(whole.to_table(), check_metadata=True)


def test_a_value_of_many_is_rounded_by_little():
    values = np.random.default_rng(0).lognormal(sigma=20, size=70_000) * np.random.default_rng(1).choice(
        [-1, 1], 70_000
    )
    least, largest, _ = _histogram(values).bins
    actual = (least + largest) / 2
    nearest = np.clip(np.searchsorted(actual, values), 1, len(actual) - 1)
    distance = np.minimum(np.abs(actual[nearest] - values), np.abs(actual[nearest - 1] - values))
    assert (distance <= np.abs(values) * 2.0**-9).all()


def test_a_spike_in_a_continuous_number_is_found_and_nothing_else():
    random = np.random.default_rng(3)
    values = random.permutation(np.concatenate([random.normal(size=90_000), np.full(300, 0.7), np.full(80, -0.2)]))
    actual = _histogram(*np.split(values, 5)).frequent_values()
    ids = actual.find(values)
    near = np.abs(values - 0.7) <= 0.7 * 2.0**-9  # values that are counted together
    assert len(actual.keys) == 1
    assert (ids[values == 0.7] == 1).all()
    assert not ids[~near].any()


_DISTINCT = {
    "near": [20001.0, 30003.0],
    "prices": [1.99, 2.99, 3.99, 4.99, 5.99, 6.99, 7.99, 9.99],
    "float32": np.float32([1.99, 2.99, 9.99]).astype(np.float64).tolist(),
    "negative": [-9.99, -9.98, -1.0, 0.0, 1e-300, 1.0, 1.0 + 2**-52],
    "seconds": [1.7e9 + index for index in range(8)],
    "nanoseconds": [1.7e18 + 256 * index for index in range(8)],
    "huge": [-1.7e308, -1e200, 5e-324, 1e-310, 1e200, 1.7e308],
}


@pytest.mark.parametrize("values", _DISTINCT.values(), ids=_DISTINCT)
def test_different_values_have_buckets_of_their_own(values):
    exact = np.array(values)
    counts = 10 ** np.random.default_rng(0).integers(0, 5, len(values))  # of which one may have most rows
    edges = _histogram(np.repeat(exact, counts)).bucket_edges(len(values))
    assert np.searchsorted(edges, np.sort(exact)).tolist() == list(range(len(values)))


def test_a_value_and_what_float32_makes_of_it_are_in_one_bucket():
    prices = np.arange(100, 10_000, 7) / 100
    for stored in (prices, prices.astype(np.float32)):
        edges = _histogram(stored).bucket_edges(4096)
        assert np.searchsorted(edges, prices).tolist() == np.searchsorted(edges, prices.astype(np.float32)).tolist()


@given(
    values=st.lists(st.sampled_from([*map(float, range(-6, 7)), -0.0, 0.1, 0.2, 0.3]), min_size=1, max_size=200),
    buckets=st.integers(2, 12),
)
def test_there_are_as_many_buckets_as_asked_for_and_none_is_empty(values, buckets):
    exact = np.array(values)
    actual = np.searchsorted(_histogram(exact).bucket_edges(buckets), exact)
    assert np.unique(actual).tolist() == list(range(min(buckets, len(set(values)))))


def test_standardising_clips_and_puts_missing_values_at_the_mean():
    apply = Standardizer(2.0, 0.5, False).apply
    assert apply(np.array([2.0, 3.0, -100.0, 1e300, np.nan, np.inf])).tolist() == [0.0, 2.0, -10.0, 10.0, 0.0, 0.0]
