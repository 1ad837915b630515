"""Intervals of the bootstrap, and how many equal users say as much, by their influence and by their sizes."""

import numpy as np
import pytest
from scipy.stats import beta, norm
from scipy.stats import t as student

from mmoe_rec.evaluation.intervals import (
    Difference,
    Interval,
    Resampled,
    add_errors,
    correct_all,
    correct_by_holm,
    draw_users,
    effective_sample_size,
    find_difference,
    is_small_sample,
    resample,
    rounding_of,
)

KEY = ("it", "mean")


def resampled_mean(values: np.ndarray, resamples: int, seed: int) -> Resampled:
    return resample(lambda counts: {KEY: values @ counts / len(values)}, len(values), resamples, seed)[KEY]


@pytest.mark.parametrize(
    ("effective", "users", "small"), [(29.0, 200, True), (30.0, 200, False), (10.0, 20, False), (9.0, 20, True)]
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
    rarely_undefined = np.where(np.arange(100) < 5, np.nan, 1.0)
    assert Resampled(1.0, rarely_undefined, np.zeros(5)).interval() == Interval(1.0, 1.0, 1.0)
    assert Resampled(1.0, np.where(np.arange(100) < 6, np.nan, 1.0), np.zeros(5)).interval() == Interval(1.0)


def test_holm_by_hand() -> None:
    assert correct_by_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert correct_by_holm([0.5, 0.9]) == [1.0, 1.0]
    assert correct_by_holm([]) == []
    # What has no p-value is no test.
    tested = correct_all([Difference(1.0, p=each) for each in (None, 0.04, None, 0.01)])
    assert [each.p_corrected for each in tested] == [None, 0.04, None, 0.02]


def number(value: float, spread: float, users: int) -> Resampled:
    """A number whose standard deviation over resamples is `spread`, and which no user influences more than others."""
    return Resampled(value, value + spread * np.tile([1.0, -1.0], 50), np.zeros(users))


@pytest.mark.parametrize(("users", "sizes", "freedom"), [(8, np.inf, 7), (8, 5.0, 4), (2, np.inf, 1), (400, 29.0, 28)])
def test_an_interval_of_few_users_is_that_of_student(users: int, sizes: float, freedom: int) -> None:
    error = 0.2 * np.sqrt((freedom + 1) / freedom)
    low, high = student.interval(0.95, freedom, 0.7, error)
    found = number(0.7, 0.2, users).interval(sizes)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
    # A difference has the same interval, with its p-value and what nine of ten evaluations would show.
    mine, other = number(0.7, 0.2, users), number(1.4, 0.4, users)
    found = find_difference(mine, other, sizes)
    assert (found.value, found.error, found.effective_users) == pytest.approx((-0.7, error, freedom + 1))
    assert (found.low, found.high) == pytest.approx(student.interval(0.95, freedom, -0.7, error), rel=1e-9)
    assert found.p == pytest.approx(2 * student.cdf(-0.7 / error, freedom), rel=1e-9)
    assert found.detectable == pytest.approx(
        error * (student.ppf(0.975, freedom) + student.ppf(0.9, freedom)), rel=1e-9
    )
    swapped = find_difference(other, mine, sizes)
    assert (swapped.value, swapped.p) == (-found.value, found.p)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_an_interval_of_a_share_is_that_of_jeffreys(share: float) -> None:
    """Of 40 users with a list each; by Korn and Graubard as many trials as have the variance, by Student's quantile."""
    spread = np.sqrt(share * (1 - share) / 40 * 39 / 40)
    trials = 40 * (norm.ppf(0.975) / student.ppf(0.975, 39)) ** 2 if spread else 40
    low, high = beta.interval(0.95, trials * share + 0.5, trials * (1 - share) + 0.5)
    found = number(share, spread, 40).interval(is_share=True)
    assert (found.low, found.high) == pytest.approx((low if share else 0.0, high if share < 1 else 1.0), rel=1e-9)


def test_trainings_add_to_the_error_by_welch_and_satterthwaite() -> None:
    """Users: a variance of 0.04 x 8 / 7 of 7 degrees of freedom; trainings: 0.09 of 4, and 0 of 2."""
    parts = [(0.04 * 8 / 7, 7), (0.09, 4)]
    error = np.sqrt(sum(variance for variance, _ in parts))
    freedom = error**4 / sum(variance**2 / free for variance, free in parts)
    found = find_difference(number(1.0, 0.4, 8), number(0.5, 0.2, 8), np.inf, besides=[(0.09, 4), (0.0, 2)])
    assert (found.value, found.error, found.effective_users) == pytest.approx((0.5, error, freedom + 1))
    assert found.p == pytest.approx(2 * student.sf(0.5 / error, freedom), rel=1e-9)
    assert add_errors([(0.0, 3), (0.0, 0)]) == (0.0, np.inf)
    assert add_errors([(0.09, 4), (0.0, 0)]) == pytest.approx((0.3, 4))


def test_what_does_not_vary_is_equal_or_not_told_apart() -> None:
    """Also where too few users have rows for a standard error: equal models are equal in any sample."""
    same, users = number(0.5, 0.1, 8), 8
    equal = Difference(0.0, 0.0, 0.0, 0.0, None, 1.0, None, 0.0)
    assert find_difference(same, same, np.inf) == equal
    assert find_difference(same, same, 1.2) == equal
    assert find_difference(same, number(0.4, 0.1, users), np.inf) == Difference(pytest.approx(0.1))
    assert find_difference(same, number(0.4, 0.3, users), 1.4) == Difference(pytest.approx(0.1))
    assert find_difference(same, number(0.4, 0.3, users), np.inf, units=1) == Difference(pytest.approx(0.1))
    assert find_difference(same, number(np.nan, 0.3, users), np.inf) == Difference(None)
    assert Resampled(0.5, np.full(9, 0.5), np.zeros(users)).effective_users == users
    assert effective_sample_size(np.zeros(users)) == 1
    assert rounding_of(1.0, -3.0) == pytest.approx(3e-9)


def test_an_interval_of_many_users_is_that_of_percentiles() -> None:
    found = Resampled(0.5, np.linspace(0, 1, 1001), np.zeros(400))
    assert found.interval(30.0) == Interval(0.5, pytest.approx(0.025), pytest.approx(0.975))
    assert found.interval(1.4) == Interval(0.5)


@pytest.mark.parametrize("users", [4, 5, 12, 300])
def test_the_number_of_equal_normal_users_follows_from_their_influences(users: int) -> None:
    """By the mean of sum d^4 / (sum d^2)^2 over draws of such users; so many resamples add hardly any noise."""
    influence = np.zeros(users + 100)
    influence[:users] = (3 * (users - 1) / (users * (users + 1)) / users) ** 0.25
    found = Resampled(0.0, np.tile([1.0, -1.0], 10**6), influence)
    assert found.effective_users == pytest.approx(users, rel=2e-3)
    assert found.error(users + 9)[1] == found.effective_users
    assert found.error(3.5)[1] == 3.5


def test_one_or_two_users_who_have_all_of_the_influence_count_as_so_many() -> None:
    for share, users in ((0.5, 2.0), (1.0, 1.0), (2.0, 1.0)):
        influence = np.r_[share**0.25, np.zeros(50)]
        assert Resampled(0.0, np.tile([1.0, -1.0], 10**6), influence).effective_users == pytest.approx(users, abs=1e-3)


def test_influences_are_those_of_each_number_and_of_defined_resamples() -> None:
    values = np.random.default_rng(0).normal(size=(2, 40))

    def at(counts: np.ndarray) -> dict[str, np.ndarray]:
        undefined = np.where(counts[0] > 3, np.nan, 0.0)  # where the first user is drawn four times or more
        return {"one": values[0] @ counts / 40, "two": values[1] @ counts / 40 + undefined}

    found = resample(at, 40, 4000)
    for name, each in zip(("one", "two"), values, strict=True):
        expected = (each - each.mean()) / 40
        assert np.corrcoef(found[name].influence[1:], expected[1:])[0, 1] > 0.9
        assert found[name].influence[1:].std() == pytest.approx(expected[1:].std(), rel=0.15)
    assert len(found["two"].defined) < 4000
