"""The simulator of clicks does what its formulas say, and the ratio of means has the interval that t-tests give."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tests.benchmarks.paired_ratio import ratio_of_means
from tests.benchmarks.placement import explained, kept
from tests.model.simulated_clicks import LIST, World, simulate, swapped


def bias_by_hand(rank: int) -> float:
    return -np.log(rank) + sum(np.log(each) for each in range(1, LIST + 1)) / LIST


@pytest.mark.parametrize("form", ["additive", "multiplicative"])
def test_click_rates_at_each_position_are_those_of_the_formula(form: str) -> None:
    world = World(form, strength=0.6, swaps=0.2, base=-0.5)
    log = simulate(world, 4000, seed=1)
    mean_examined = sum(1 / rank for rank in range(1, LIST + 1)) / LIST
    for rank in (1, 2, 5, LIST):
        at_rank = log.position == rank - 1
        relevance = log.relevance[at_rank]
        if form == "additive":
            expected = 1 / (1 + np.exp(-relevance - bias_by_hand(rank)))
            fair = 1 / (1 + np.exp(-relevance))
        else:
            expected = 1 / (1 + np.exp(-relevance)) / rank
            fair = mean_examined / (1 + np.exp(-relevance))
        for clicks, probability in ((log.clicks, expected), (log.fair_clicks, fair)):
            # Relevant and irrelevant rows apart, so that a formula that is right on average alone fails.
            for part in (relevance < world.base, relevance >= world.base):
                deviation = np.sqrt((probability * (1 - probability))[part].sum())
                assert abs((clicks[at_rank] - probability)[part].sum()) < 4 * deviation


@pytest.mark.parametrize("shelves", [False, True])
def test_each_request_has_all_positions_and_no_item_twice(shelves: bool) -> None:
    log = simulate(World(swaps=0.3, shelves=shelves), 300, seed=2)
    assert (np.sort(log.position, axis=1) == np.arange(LIST)).all()
    assert all(len(set(items)) == LIST for items in log.item)
    if shelves:
        assert (log.item // LIST == log.item[:, :1] // LIST).all()


def test_swaps_move_the_share_of_rows_that_was_asked_for_and_stay_within_requests() -> None:
    random = np.random.default_rng(3)
    before = np.argsort(random.random((5000, LIST)), axis=1)
    assert (swapped(before, 0.0, random) == before).all()
    after = swapped(before, 0.4, random)
    assert (np.sort(after, axis=1) == np.arange(LIST)).all()
    # A permutation of k rows leaves one of them in place on average; k is 0 with probability 0.6^LIST.
    moved = (after != before).sum(axis=1)
    assert abs(moved.mean() - (0.4 * LIST - 1 + 0.6**LIST)) < 4 * moved.std() / len(moved) ** 0.5
    # Where a chosen row goes does not depend on where it was.
    assert abs(np.corrcoef(before.ravel(), swapped(before, 1.0, random).ravel())[0, 1]) < 4 / before.size**0.5


def test_a_stronger_policy_sorts_more_by_relevance_and_the_strongest_wholly() -> None:
    correlations = []
    for strength in (0.0, 0.4, 0.8, 1.0):
        log = simulate(World(strength=strength, swaps=0.0), 400, seed=4)
        correlations.append(
            np.mean([stats.spearmanr(*each)[0] for each in zip(-log.position, log.relevance, strict=True)])
        )
    assert abs(correlations[0]) < 0.1
    assert np.diff(correlations).min() > 0.1
    assert correlations[-1] == 1.0


def test_an_item_on_a_shelf_keeps_its_position_without_swaps_and_not_with_them() -> None:
    def positions_an_item(swaps: float) -> float:
        log = simulate(World(swaps=swaps, shelves=True), 500, seed=5)
        pairs = np.unique(np.stack([log.item.ravel(), log.position.ravel()]), axis=1)
        return pairs.shape[1] / len(np.unique(log.item))

    assert positions_an_item(0.0) == 1.0
    assert positions_an_item(0.3) > 2.0


def test_draws_differ_in_users_and_not_in_the_world() -> None:
    first, again, other = (simulate(World(), 200, seed=6, draw=draw) for draw in (0, 0, 1))
    assert (first.clicks == again.clicks).all()
    assert not (first.item == other.item).all()
    numbers_of = [
        dict(zip(each.item.ravel().tolist(), each.numbers[..., 6:].reshape(-1, 6).tolist(), strict=True))
        for each in (first, other)
    ]
    shared = numbers_of[0].keys() & numbers_of[1].keys()
    assert len(shared) > 500
    assert all(numbers_of[0][item] == numbers_of[1][item] for item in shared)


def test_a_ratio_of_means_has_the_interval_of_t_tests() -> None:
    random = np.random.default_rng(7)
    whole = random.normal(2.0, 0.3, size=6)
    part = 0.8 * whole + random.normal(0, 0.1, size=6)
    found = ratio_of_means(part, whole)
    ratios = np.linspace(0, 2, 20_001)
    inside = ratios[stats.ttest_1samp(part - ratios[:, None] * whole, 0, axis=1).pvalue >= 0.05]
    assert found["value"] == pytest.approx(part.mean() / whole.mean())
    assert found["low"] == pytest.approx(inside.min(), abs=2e-4)
    assert found["high"] == pytest.approx(inside.max(), abs=2e-4)


def test_a_ratio_of_means_is_none_if_the_whole_may_be_zero() -> None:
    whole = np.array([0.1, -0.1, 0.2, -0.1, 0.1])
    assert stats.ttest_1samp(whole, 0).pvalue > 0.05
    assert ratio_of_means(whole, whole) == {"value": None, "low": None, "high": None}


@pytest.mark.parametrize(("share", "hidden"), [(0.9, 0.1), (0.5, 0.3), (0.3, 0.01), (0.8, 0.0)])
def test_what_hidden_rows_leave_in_the_main_model_is_the_least_squares_solution(share: float, hidden: float) -> None:
    expected, unexpected = np.linalg.qr(np.random.default_rng(8).normal(size=(50, 2)))[0].T
    bias = share**0.5 * expected + (1 - share) ** 0.5 * unexpected
    # Main model and tower are each one weight; the tower counts in shown rows only.
    shown, not_shown = (1 - hidden) ** 0.5, hidden**0.5
    inputs = np.concatenate([shown * np.stack([expected, bias], 1), not_shown * np.stack([expected, 0 * bias], 1)])
    main, _ = np.linalg.lstsq(inputs, np.concatenate([shown * bias, not_shown * bias]))[0]
    assert kept(share, hidden) == pytest.approx(main / share**0.5)


def test_what_explains_position_is_all_without_swaps_on_shelves_and_falls_with_swaps() -> None:
    def share(swaps: float) -> float:
        world = World(swaps=swaps, shelves=True)
        return explained(world, simulate(world, 5000, seed=9))

    assert share(0.0) == pytest.approx(1.0)
    # A row stays if it is not chosen, or if chosen with k - 1 others with probability 1 / k, whose mean makes it
    # (1 - 0.7^20) / 20 together. Otherwise it gets a position of the 19 others, whose mean is -1/19 of its own.
    stays = 0.7 + (1 - 0.7**LIST) / LIST
    assert share(0.3) == pytest.approx((stays - (1 - stays) / (LIST - 1)) ** 2, abs=0.02)
