"""Intervals of the bootstrap and of differences."""

import numpy as np
import pytest
from scipy.stats import beta, norm
from scipy.stats import t as student

from mmoe_rec.evaluation.intervals import (
    Difference,
    Estimate,
    Interval,
    combine_variances,
    compute_difference,
    draw_user_counts,
    effective_sample_size,
    holm_correct,
    rounding_tolerance,
)


def test_every_draw_is_of_as_many_users_as_there_are() -> None:
    counts = np.concatenate(list(draw_user_counts(50, 300, seed=1)), axis=1)
    assert counts.shape == (50, 300)
    np.testing.assert_array_equal(counts.sum(axis=0), 50)
    assert counts.mean(axis=1) == pytest.approx(np.ones(50), abs=0.3)
    assert counts.var() == pytest.approx(1 - 1 / 50, rel=0.05)


def test_no_interval_when_a_metric_is_often_undefined() -> None:
    mostly_undefined = np.where(np.arange(100) < 10, np.nan, 1.0)
    assert Estimate(1.0, mostly_undefined, 5).interval() == Interval(1.0)
    rarely_undefined = np.where(np.arange(100) < 5, np.nan, 1.0)
    assert Estimate(1.0, rarely_undefined, 5).interval() == Interval(1.0, 1.0, 1.0)
    assert Estimate(1.0, np.where(np.arange(100) < 6, np.nan, 1.0), 5).interval() == Interval(1.0)


def test_holm_by_hand() -> None:
    """What has no p-value is no test."""
    for given, expected in (
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.5, 0.9], [1.0, 1.0]),
        ([], []),
        ([None, 0.04, None, 0.01], [None, 0.04, None, 0.02]),
    ):
        assert [
            item.corrected_p_value for item in holm_correct([Difference(1.0, p_value=p_value) for p_value in given])
        ] == expected


def number(value: float, spread: float, users: float) -> Estimate:
    """A number whose standard deviation over resamples is `spread`."""
    return Estimate(value, value + spread * np.tile([1.0, -1.0], 50), users)


@pytest.mark.parametrize("users", [8, 5.0, 2, 29.0])
def test_an_interval_of_few_users_is_that_of_student(users: float) -> None:
    degrees_of_freedom = users - 1
    standard_error = 0.2 * np.sqrt((degrees_of_freedom + 1) / degrees_of_freedom)
    low, high = student.interval(0.95, degrees_of_freedom, 0.7, standard_error)
    actual = number(0.7, 0.2, users).interval()
    assert (actual.low, actual.high) == pytest.approx((low, high), rel=1e-9)
    # A difference has the same interval, by the fewer users of both.
    mine, second = number(0.7, 0.2, users), number(1.4, 0.4, users + 3)
    actual = compute_difference(mine, second)
    assert (actual.value, actual.standard_error, actual.degrees_of_freedom) == pytest.approx(
        (-0.7, standard_error, degrees_of_freedom)
    )
    assert (actual.low, actual.high) == pytest.approx(
        student.interval(0.95, degrees_of_freedom, -0.7, standard_error), rel=1e-9
    )
    assert actual.p_value == pytest.approx(2 * student.cdf(-0.7 / standard_error, degrees_of_freedom), rel=1e-9)
    swapped = compute_difference(second, mine)
    assert (swapped.value, swapped.p_value) == (-actual.value, actual.p_value)
    assert (swapped.low, swapped.high) == pytest.approx((actual.negated.low, actual.negated.high))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_an_interval_of_a_share_is_that_of_jeffreys(share: float) -> None:
    """Of 40 users with a list each; by Korn and Graubard as many trials as have the variance, by Student's quantile."""
    spread = np.sqrt(share * (1 - share) / 40 * 39 / 40)
    trials = 40 * (norm.ppf(0.975) / student.ppf(0.975, 39)) ** 2 if spread else 40
    low, high = beta.interval(0.95, trials * share + 0.5, trials * (1 - share) + 0.5)
    actual = number(share, spread, 40).interval(is_fraction=True)
    assert (actual.low, actual.high) == pytest.approx((low if share else 0.0, high if share < 1 else 1.0), rel=1e-9)


def test_trainings_add_to_the_error_by_welch_and_satterthwaite() -> None:
    """Users: a variance of 0.04 x 8 / 7 of 7 degrees of freedom; trainings: 0.09 of 4, and 0 of 2."""
    parts = [(0.04 * 8 / 7, 7), (0.09, 4)]
    standard_error = np.sqrt(sum(variance for variance, _ in parts))
    degrees_of_freedom = standard_error**4 / sum(variance**2 / free for variance, free in parts)
    actual = compute_difference(number(1.0, 0.4, 8), number(0.5, 0.2, 8), [(0.09, 4), (0.0, 2)])
    assert (actual.value, actual.standard_error, actual.degrees_of_freedom) == pytest.approx(
        (0.5, standard_error, degrees_of_freedom)
    )
    assert actual.p_value == pytest.approx(2 * student.sf(0.5 / standard_error, degrees_of_freedom), rel=1e-9)
    assert combine_variances([(0.0, 3), (0.0, 0)]) == (0.0, np.inf)
    assert combine_variances([(0.09, 4), (0.0, 0)]) == pytest.approx((0.3, 4))


def test_what_does_not_vary_is_equal_or_not_distinguished() -> None:
    """Also where too few users have rows for a standard error: equal models are equal in any sample."""
    same, users = number(0.5, 0.1, 8), 8
    equal = Difference(0.0, 0.0, 0.0, 0.0, None, 1.0)
    for effective in (8, 1.2, 1):
        assert compute_difference(same, number(0.5, 0.1, effective)) == equal
    assert compute_difference(same, number(0.4, 0.1, users)) == Difference(pytest.approx(0.1))
    assert compute_difference(same, number(0.4, 0.3, 1.4)) == Difference(pytest.approx(0.1))
    assert compute_difference(same, number(0.4, 0.3, 1)) == Difference(pytest.approx(0.1))
    assert compute_difference(same, number(np.nan, 0.3, users)) == Difference(None)
    assert effective_sample_size(np.zeros(users)) == 1
    assert rounding_tolerance(1.0, -3.0) == pytest.approx(3e-9)


def test_an_interval_of_many_users_is_that_of_percentiles() -> None:
    redrawn = np.linspace(0, 1, 1001)
    assert Estimate(0.5, redrawn, 30.0).interval() == Interval(0.5, pytest.approx(0.025), pytest.approx(0.975))
    assert Estimate(0.5, redrawn, 1.4).interval() == Interval(0.5)
