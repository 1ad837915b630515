"""Effects of changes made several at a time, beside the normal equations written out, and on drawn truths."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t as student

from mmoe_rec.evaluation.effects import draw_design, estimate_effects
from mmoe_rec.evaluation.intervals import Resampled


def metric_of(value: float, influence: np.ndarray, counts: np.ndarray) -> Resampled:
    """A metric that is a mean over users, in resamples that draw them `counts` (U, R) times."""
    return Resampled(value, value + influence @ (counts - 1), influence)


def drawn_trainings(seed: int, trainings: int, changes: int) -> tuple[np.ndarray, list[Resampled], np.ndarray]:
    """A design, what its trainings measure, and the true effects. Users differ in level, and in what changes give."""
    random, users = np.random.default_rng(seed), 60
    design = draw_design([[n] for n in range(changes)], changes, trainings, seed)
    effects = random.normal(0, 0.003, changes)
    of_users, level = random.normal(0, 0.004, (changes, users)), random.normal(0, 0.1, users)
    counts = np.random.default_rng(1).multinomial(users, np.full(users, 1 / users), 400).T
    measured = []
    for made in design:
        each = level + made @ (effects[:, None] + of_users)
        measured.append(metric_of(float(each.mean() + random.normal(0, 0.001)), (each - each.mean()) / users, counts))
    return design, measured, effects + of_users.mean(1)


@pytest.mark.parametrize("seed", range(3))
def test_effects_are_those_of_the_normal_equations(seed: int) -> None:
    design, measured, _ = drawn_trainings(seed, 30, 4)
    found = estimate_effects(design, measured, 40.0)
    rows, width = len(design), design.shape[1] + 1
    x = [[1.0, *map(float, row)] for row in design]
    gram = np.array([[sum(x[n][i] * x[n][j] for n in range(rows)) for j in range(width)] for i in range(width)])
    inverse = np.linalg.inv(gram)

    def solve(y: list[float]) -> np.ndarray:
        return inverse @ np.array([sum(x[n][i] * y[n] for n in range(rows)) for i in range(width)])

    at_once = solve([each.value for each in measured])
    left = [each.value - sum(a * b for a, b in zip(x[n], at_once, strict=True)) for n, each in enumerate(measured)]
    noise = sum(each**2 for each in left) / (rows - width)
    redrawn = np.array([solve([float(each.redrawn[r]) for each in measured]) for r in range(400)])
    for change, each in enumerate(found, 1):
        assert each.value == pytest.approx(at_once[change])
        of_users = redrawn[:, change].var() * 40 / 39
        of_trainings = noise * inverse[change, change]
        assert each.error is not None
        assert each.error**2 >= of_trainings
        # The effective number of users is at most 40, by their influence it may be less.
        assert each.error**2 == pytest.approx(of_trainings + of_users, rel=0.15)
        assert each.low is not None
        assert each.high is not None
        assert each.effective_users is not None
        reach = student.ppf(0.975, each.effective_users - 1) * each.error
        assert (each.low, each.high) == pytest.approx((each.value - reach, each.value + reach))


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    held = []
    for seed in range(60):
        design, measured, truth = drawn_trainings(seed, 24, 5)
        found = estimate_effects(design, measured, 60.0)
        held += [each.low <= true <= each.high for each, true in zip(found, truth, strict=True)]  # type: ignore[operator]
    # Users are drawn once, so an interval that takes them for a sample is too wide for the truth of these.
    assert np.mean(held) > 0.93


def test_what_trainings_do_not_tell_apart_has_no_value() -> None:
    measured = [metric_of(float(n), np.ones(3) / 3, np.ones((3, 5))) for n in range(6)]
    together = np.array([[1, 1, 0], [1, 1, 1], [0, 0, 1], [0, 0, 0], [1, 1, 0], [0, 0, 1]])
    one, other, known = estimate_effects(together, measured, 3.0)
    assert one.value is None
    assert other.value is None
    assert known.value is not None
    never = estimate_effects(together * [1, 0, 0], measured, 3.0)
    assert [each.value is None for each in never] == [False, True, True]


def test_without_further_trainings_there_is_no_interval() -> None:
    measured = [metric_of(float(n), np.ones(3) / 3, np.ones((3, 5))) for n in range(3)]
    found = estimate_effects(np.array([[0, 0], [1, 0], [0, 1]]), measured, 3.0)
    assert [each.value for each in found] == pytest.approx([1, 2])
    assert [each.low for each in found] == [None, None]


def test_designs_make_each_change_as_often_and_none_that_exclude_each_other() -> None:
    groups = [[0], [1, 2], [3, 4, 5, 6], [8]]
    design = draw_design(groups, 9, 60, seed=3)
    assert design.sum(0).tolist() == [20, 15, 15, 12, 12, 12, 12, 0, 20]
    assert all(design[:, group].sum(1).max() <= 1 for group in groups)
    assert np.array_equal(design, draw_design(groups, 9, 60, seed=3))
    assert np.linalg.matrix_rank(design.astype(float)) == 8
