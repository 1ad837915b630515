"""The benchmark of correlated tasks: its data against the formula, its batched trainings against plain ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.benchmarks.correlated_tasks import CorrelatedTasks
from tests.benchmarks.many_trainings import ManyTrainings
from tests.benchmarks.task_correlation import (
    Cell,
    MixtureOnInputs,
    arms,
    choose,
    compare,
    interval,
)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 1.0])
def test_labels_follow_the_formula(correlation):
    tasks = CorrelatedTasks([3, 4], inputs=6, scale=0.7, sines=3)
    rows = tasks.draw(5)
    labels = tasks.labels(rows, correlation)
    for seed in range(2):
        u1, u2 = tasks.directions[seed].double().T
        torch.testing.assert_close(torch.stack([u1 @ u1, u1 @ u2, u2 @ u2]), torch.tensor([1.0, 0.0, 1.0]).double())
        weights = [0.7 * u1, 0.7 * (correlation * u1 + math.sqrt(1 - correlation**2) * u2)]
        for row, task in np.ndindex(5, 2):
            projection = float(weights[task] @ rows.inputs[seed, row].double())
            expected = projection + float(rows.noise[seed, row, task])
            for a, b in zip(tasks.amplitudes[seed].flatten(), tasks.phases[seed].flatten(), strict=True):
                expected += math.sin(float(a) * projection + float(b))
            assert float(labels[seed, row, task]) == pytest.approx(expected, abs=1e-5)


def test_a_seed_has_its_own_stream_whatever_is_beside_it():
    alone, together = CorrelatedTasks([7], 6, 0.3, 5), CorrelatedTasks([2, 7], 6, 0.3, 5)
    for _ in range(2):
        one, two = alone.draw(4), together.draw(4)
        torch.testing.assert_close(one.inputs[0], two.inputs[1])
        torch.testing.assert_close(alone.labels(one, 0.5)[0], together.labels(two, 0.5)[1])
        assert not torch.equal(two.inputs[0], two.inputs[1])
    assert not torch.equal(one.inputs, alone.draw(4).inputs)


@pytest.mark.thorough
@pytest.mark.parametrize("arm", list(arms()))
def test_batched_trainings_equal_plain_ones(arm):
    model, seeds, steps = arms()[arm], [5, 6, 7], 20
    tasks = CorrelatedTasks(seeds, 100, 0.3, 5)
    batches = [(rows.inputs, tasks.labels(rows, 0.5)) for rows in (tasks.draw(32) for _ in range(steps))]
    unseen = tasks.draw(100)
    labels = tasks.labels(unseen, 0.5)
    many = ManyTrainings(lambda: MixtureOnInputs(model), seeds, 1e-2)
    untrained = many.losses(unseen.inputs, labels)
    many.train(batches)

    for index, seed in enumerate(seeds):
        torch.manual_seed(seed)
        plain = MixtureOnInputs(model)
        optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2)
        for inputs, targets in batches:
            optimizer.zero_grad()
            functional.mse_loss(plain(inputs[index]), targets[index]).backward()
            optimizer.step()
        loss = functional.mse_loss(plain(unseen.inputs[index]), labels[index])
        torch.testing.assert_close(many.losses(unseen.inputs, labels)[index], loss.detach(), rtol=1e-3, atol=1e-5)
        assert loss < 0.9 * untrained[index]


def test_the_lowest_mean_loss_chooses_the_learning_rate():
    names = list(arms())
    losses = {
        Cell(arm, p, rate): np.array([[9.0, 9.0], [value, value + 1]])
        for arm in names
        for p in (0.0, 0.5, 0.9, 1.0)
        for rate, value in ((1e-4, 3.0), (1e-3, float("nan")), (1e-2, 2.0))
    }
    losses[Cell(names[0], 0.5, 1e-4)][-1] = [0.0, 1.0]
    chosen = {(cell.arm, cell.correlation): cell.learning_rate for cell in choose(losses)}
    assert chosen == {(arm, p): 1e-2 for arm in names for p in (0.0, 0.5, 0.9, 1.0)} | {(names[0], 0.5): 1e-4}


def test_comparisons_are_paired_by_seed():
    """Differences that are alike for all seeds are sure, however much the seeds themselves differ."""
    generator = np.random.default_rng(0)
    losses = generator.normal(0, 100, 40)
    small = generator.normal(0, 0.1, 40)
    last = {(arm, p): losses - (p + small if arm == "mmoe" else 0) for arm in arms() for p in (0.0, 0.5, 0.9, 1.0)}
    found = compare(last)
    for each in found["differences"]:
        if each["arms"] == "mmoe - shared_bottom":
            assert each["mean"] == pytest.approx(-each["p"], abs=0.05)
            assert each["low"] < each["mean"] < each["high"]
            assert each["high"] - each["low"] == pytest.approx(2 * 1.96 * small.std() / math.sqrt(40), rel=0.1)
    assert found["difference_at_0_minus_at_1"][0]["mean"] == pytest.approx(1, abs=1e-3)
    assert interval(np.full(10, 2.5)) == {"mean": 2.5, "low": 2.5, "high": 2.5}
