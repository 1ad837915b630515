"""Counts to drift, against hand-made cases."""

import numpy as np
import pytest

from mmoe_rec.profiling.health_counts import psi


def test_psi_of_two_bins_by_hand():
    # Shares with half a row added: 75.5/101, 25.5/101 in training; 50.5/101 each in test.
    expected = (50.5 - 75.5) / 101 * np.log(50.5 / 75.5) + (50.5 - 25.5) / 101 * np.log(50.5 / 25.5)
    assert psi(np.array([75, 25]), np.array([50, 50]))[0] == pytest.approx(expected, rel=1e-12)
    assert psi(np.array([3, 4]), np.array([3, 4]))[0] == 0
    assert psi(np.array([1, 2]), np.array([0, 0])) == psi(np.array([0, 0]), np.array([1, 2])) == (None, None)
    assert np.isfinite(psi(np.array([10, 0]), np.array([0, 10]))[0])


def test_psi_noise_is_what_equal_distributions_have_on_average():
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(20, 5.0))
    pairs = [(rng.multinomial(4000, shares), rng.multinomial(1000, shares)) for _ in range(400)]
    assert np.mean([psi(*pair)[0] for pair in pairs]) == pytest.approx(psi(*pairs[0])[1], rel=0.1)
