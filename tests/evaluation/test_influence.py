"""How many users alike tell as much, by their influence and by their sizes."""

from __future__ import annotations

import numpy as np
import pytest

from mmoe_rec.evaluation.intervals import Resampling, user_counts, with_interval
from mmoe_rec.evaluation.metrics.metric import alike

KEY = ("it", "mean")


def effective(scale: np.ndarray, resamples: int = 1000) -> float:
    """The median over draws, of the mean of users who deviate by these scales."""
    found = []
    for seed in range(9):
        values = scale * np.random.default_rng(seed).normal(size=len(scale))
        resampling = Resampling({KEY: np.array([values.mean()])}, len(scale))
        for counts in user_counts(len(scale), resamples, seed):
            resampling.add(counts, {KEY: values @ counts / len(scale)})
        resampled = resampling.found()[KEY]
        # The influence of a user on a mean is its deviation / their number.
        expected = (values - values.mean()) / len(scale)
        noise = 5 * expected.std() * np.sqrt(len(scale) / resamples)
        np.testing.assert_allclose(resampled.influence, expected, atol=noise)
        found.append(resampled.effective_users)
    return float(np.median(found))


def test_users_alike_tell_as_much_as_there_are() -> None:
    assert effective(np.ones(12)) > 7
    assert effective(np.ones(300)) > 200


@pytest.mark.parametrize(("few", "least", "most"), [(1, 1.0, 1.5), (2, 1.2, 3.0), (6, 3.0, 10.0)])
def test_few_that_move_it_most_tell_nearly_alone(few: int, least: float, most: float) -> None:
    assert least <= effective(np.r_[np.full(few, 100.0), np.ones(200)]) <= most


def test_what_never_varies_rests_on_all() -> None:
    resampling = Resampling({KEY: np.array([2.0])}, 10)
    for counts in user_counts(10, 50, 0):
        resampling.add(counts, {KEY: np.full(counts.shape[1], 2.0)})
    assert resampling.found()[KEY].effective_users == 10


def test_users_of_equal_size() -> None:
    assert alike(np.ones(7)) == 7
    assert alike(np.r_[np.full(2, 1e6), np.ones(50)]) == pytest.approx(2, rel=1e-3)
    assert alike(np.zeros(3)) == 1


@pytest.mark.parametrize("users", [3, 5, 12])
def test_intervals_of_few_users_hold_the_truth_as_often_as_they_say(users: int) -> None:
    """Of 400, each of users of normal values, whose mean is 0."""
    held = 0
    for seed in range(400):
        values = np.random.default_rng(seed).normal(size=users)
        redrawn = np.concatenate([values @ counts / users for counts in user_counts(users, 200, seed)])
        interval = with_interval(float(values.mean()), redrawn, users)
        assert interval["low"] is not None
        assert interval["high"] is not None
        held += interval["low"] <= 0 <= interval["high"]
    # 95% are 380; fewer than 366 come by chance less than once in a hundred times.
    assert held >= 366
