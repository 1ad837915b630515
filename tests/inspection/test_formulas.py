"""Counts to drift and AUC, against hand-made cases, scikit-learn and naive sets."""

import numpy as np
import pytest

from mmoe_rec.inspection.sums import DistinctCount, psi, psi_noise
from mmoe_rec.log.columns import mix


def test_psi_of_two_bins_by_hand():
    # Shares with half a row added: 75.5/101, 25.5/101 in training; 50.5/101 each in test.
    expected = (50.5 - 75.5) / 101 * np.log(50.5 / 75.5) + (50.5 - 25.5) / 101 * np.log(50.5 / 25.5)
    assert psi(np.array([75, 25]), np.array([50, 50])) == pytest.approx(expected, rel=1e-12)
    assert psi(np.array([3, 4]), np.array([3, 4])) == 0
    assert psi(np.array([1, 2]), np.array([0, 0])) is psi_noise(np.array([0, 0]), np.array([1, 2])) is None
    assert np.isfinite(psi(np.array([10, 0]), np.array([0, 10])))


def test_psi_noise_is_what_equal_distributions_have_on_average():
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(20, 5.0))
    pairs = [(rng.multinomial(4000, shares), rng.multinomial(1000, shares)) for _ in range(400)]
    assert np.mean([psi(*pair) for pair in pairs]) == pytest.approx(psi_noise(*pairs[0]), rel=0.1)


def test_distinct_values_are_exact_then_estimated():
    hashes = mix(np.arange(30_000).astype(np.uint64))
    small, large = DistinctCount(4096), DistinctCount(4096)
    for _ in range(2):
        small.add(np.repeat(hashes[:4000], 3))
    assert small.exact
    assert small.count() == 4000
    large.add(hashes[:20_000])
    large.add(hashes[10_000:])
    assert not large.exact
    assert large.count() == pytest.approx(30_000, rel=4 / np.sqrt(4096))
    at_once = DistinctCount(4096)
    at_once.add(hashes)
    np.testing.assert_array_equal(large.smallest, at_once.smallest)


@pytest.mark.parametrize("keep", [100_000, 2_000])
def test_the_share_of_values_that_another_count_has_seen(keep):
    """Exact, or estimated: 10,000 values, of which 3,000 are among 50,000 others."""
    hashes = np.random.default_rng(4).integers(0, 2**64, 57_000, np.uint64)
    one, other, empty = (DistinctCount(keep) for _ in range(3))
    for part in np.array_split(hashes[:10_000], 7):
        one.add(part)
    other.add(hashes[7_000:])
    assert one.share_in(other) == pytest.approx(0.3, abs=1e-12 if keep > 60_000 else 0.08)
    assert one.share_in(one) == 1
    assert one.share_in(empty) == 0
    assert empty.share_in(one) is None
