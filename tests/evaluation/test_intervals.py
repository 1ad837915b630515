"""Intervals of the bootstrap, and how many equal users say as much, by their influence and by their sizes."""

import numpy as np
import pytest

from mmoe_rec.evaluation.intervals import (
    Interval,
    Resampled,
    correct_by_holm,
    draw_users,
    effective_sample_size,
    is_small_sample,
    resample,
)

KEY = ("it", "mean")


def resampled_mean(values: np.ndarray, resamples: int, seed: int) -> Resampled:
    return resample(lambda counts: {KEY: values @ counts / len(values)}, len(values), resamples, seed)[KEY]


@pytest.mark.parametrize(
    ("effective", "users", "small"), [(29.0, 200, True), (31.0, 200, False), (12.0, 20, False), (9.0, 20, True)]
)
def test_few_users_are_warned_of_where_most_say_little(effective: float, users: int, small: bool) -> None:
    assert is_small_sample(effective, users) == small


@pytest.mark.parametrize(
    ("scale", "least", "most"),
    [
        (np.ones(12), 7, 12),
        (np.ones(300), 200, 300),
        (np.r_[np.full(1, 100.0), np.ones(200)], 1.0, 1.5),
        (np.r_[np.full(2, 100.0), np.ones(200)], 1.2, 3.0),
        (np.r_[np.full(6, 100.0), np.ones(200)], 3.0, 10.0),
    ],
)
def test_users_that_move_a_mean_most_count_alone(scale: np.ndarray, least: float, most: float) -> None:
    """The median over draws of users who deviate by these scales. Influence on a mean is deviation / users."""
    found = []
    for seed in range(9):
        values = scale * np.random.default_rng(seed).normal(size=len(scale))
        resampled = resampled_mean(values, 1000, seed)
        expected = (values - values.mean()) / len(scale)
        np.testing.assert_allclose(resampled.influence, expected, atol=5 * expected.std() * np.sqrt(len(scale) / 1000))
        found.append(resampled.effective_users)
    assert least <= np.median(found) <= most


@pytest.mark.parametrize("users", [3, 5, 12])
def test_intervals_of_few_users_hold_the_truth_as_often_as_they_say(users: int) -> None:
    """Of 400, each of users of normal values, whose mean is 0."""
    held = 0
    for seed in range(400):
        values = np.random.default_rng(seed).normal(size=users)
        redrawn = np.concatenate([values @ counts / users for counts in draw_users(users, 200, seed)])
        interval = Resampled(float(values.mean()), redrawn, np.zeros(users)).interval()
        assert interval.low is not None
        held += interval.low <= 0 <= interval.high
    # 95% are 380; fewer than 366 come by chance less than once in a hundred times.
    assert held >= 366


@pytest.mark.parametrize(("users", "rate"), [(5, 0.97), (5, 0.5), (12, 0.05), (60, 0.98), (150, 0.98), (150, 0.3)])
def test_intervals_of_shares_hold_the_truth_also_where_nearly_all_users_agree(users: int, rate: float) -> None:
    """Of 300, each of lists of uneven numbers, of which some users' hit more often."""
    held, random = 0, np.random.default_rng(users)
    for seed in range(300):
        lists = random.integers(1, 5, users)
        hits = random.binomial(lists, random.beta(15 * rate, 15 * (1 - rate), users))
        counts = np.concatenate(list(draw_users(users, 200, seed)), axis=1)
        found = Resampled(hits.sum() / lists.sum(), hits @ counts / (lists @ counts), np.zeros(users))
        interval = found.interval(effective_sample_size(lists.astype(float)), is_share=True)
        held += interval.low <= rate <= interval.high
    # 95% are 285; fewer than 273 come by chance less than once in a hundred times.
    assert held >= 273


def test_every_draw_is_of_as_many_users_as_there_are() -> None:
    counts = np.concatenate(list(draw_users(50, 300, seed=1)), axis=1)
    assert counts.shape == (50, 300)
    np.testing.assert_array_equal(counts.sum(axis=0), 50)
    assert counts.mean(axis=1) == pytest.approx(np.ones(50), abs=0.3)
    assert counts.var() == pytest.approx(1 - 1 / 50, rel=0.05)


def test_no_interval_when_a_metric_is_often_undefined() -> None:
    mostly_undefined = np.where(np.arange(100) < 10, np.nan, 1.0)
    assert Resampled(1.0, mostly_undefined, np.zeros(5)).interval() == Interval(1.0)
    rarely_undefined = np.where(np.arange(100) < 4, np.nan, 1.0)
    assert Resampled(1.0, rarely_undefined, np.zeros(5)).interval() == Interval(1.0, 1.0, 1.0)


def test_holm_by_hand() -> None:
    assert correct_by_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert correct_by_holm([0.5, 0.9]) == [1.0, 1.0]
    assert correct_by_holm([]) == []
