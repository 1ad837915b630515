"""Counted task weights: the loss against a loop and finite differences; trainings that stop, go on and are shared."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from mmoe_rec.preprocessing.prepare import Prepared
from mmoe_rec.training.loop import Trainer
from mmoe_rec.training.losses import masked_loss
from tests.model.examples import LAYOUT
from tests.reference.model import loss as reference_loss
from tests.training.learnable import GIVEN, MODEL, trained, write_prepared
from tests.training.resuming import DROPS, STEPS, CrashError, crash, train, weights
from tests.training.test_losses import TASKS, random_labels

LEARNT = {"task_weighting": "uncertainty"}
# With a task that is given another one, everything that a loss can be made of.
ALL = LEARNT | {"sampling_correction": "weights"}
LOG_VARIANCES = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return write_prepared(tmp_path_factory.mktemp("prepared"), LAYOUT)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return write_prepared(tmp_path_factory.mktemp("given"), GIVEN)


def saved_log_variances(folder: Path) -> torch.Tensor:
    """Those of a checkpoint."""
    state = {"model": {"log_variances": torch.zeros(len(LAYOUT.tasks))}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state["model"]["log_variances"]


# The loss


def test_equals_a_loop_over_tasks() -> None:
    logits, labels, observed = random_labels(40)
    counts = observed.sum(0)
    total, sums = masked_loss(logits, labels, observed, tasks=TASKS, global_counts=counts, log_variances=LOG_VARIANCES)
    expected, naive = 0.0, [each.item() for each in reference_loss(logits, labels, observed, TASKS)[1]]
    for task, s, value, count in zip(TASKS, LOG_VARIANCES.tolist(), naive, counts.tolist(), strict=True):
        likelihood = math.exp(-s) * value / count
        if task.kind == "regression":
            likelihood /= 2
        expected += task.loss_weight * (likelihood + s / 2)
    assert total.item() == pytest.approx(expected)
    assert sums.tolist() == pytest.approx(naive)


def test_a_regression_has_the_likelihood_of_a_gaussian() -> None:
    logits, labels, observed = random_labels(40)
    rows, task = observed[:, 1], TASKS[1]
    total, _ = masked_loss(
        logits[:, 1:2], labels[:, 1:2], observed[:, 1:2], tasks=TASKS[1:2], global_counts=rows.sum()[None],
        log_variances=LOG_VARIANCES[1:2],
    )  # fmt: skip
    errors = (logits[rows, 1] - labels[rows, 1]) / task.deviation
    gaussian = torch.distributions.Normal(0.0, math.exp(LOG_VARIANCES[1].item() / 2))
    likelihood = -gaussian.log_prob(errors).mean() - math.log(2 * math.pi) / 2
    assert total.item() == pytest.approx(task.loss_weight * likelihood.item())


def test_an_unobserved_task_adds_exactly_zero() -> None:
    logits, labels, observed = random_labels(10)
    observed[:, 1] = False
    logs = torch.tensor([0.0, 5.0, 0.0], dtype=torch.float64, requires_grad=True)
    total, _ = masked_loss(logits, labels, observed, tasks=TASKS, global_counts=observed.sum(0), log_variances=logs)
    fixed, _ = masked_loss(logits, labels, observed, tasks=TASKS, global_counts=observed.sum(0))
    assert total.item() == pytest.approx(fixed.item(), rel=1e-14)
    total.backward()
    assert logs.grad is not None
    assert logs.grad[1] == 0
    assert logs.grad[[0, 2]].all()


def test_at_the_best_log_variances_a_loss_counts_by_its_inverse() -> None:
    """The gradients are then those of the sum of loss weight / 2 x log mean loss."""
    logits, labels, observed = random_labels(40)
    counts = observed.sum(0)
    logits.requires_grad_()
    means = masked_loss(logits, labels, observed, tasks=TASKS, global_counts=counts)[1] / counts
    best = torch.tensor([2.0, 1.0, 2.0]) * means
    logs = best.log().requires_grad_()
    total, _ = masked_loss(logits, labels, observed, tasks=TASKS, global_counts=counts, log_variances=logs)
    by_logs, by_logits = torch.autograd.grad(total, (logs, logits))
    torch.testing.assert_close(by_logs, torch.zeros_like(logs))
    inverse = tuple(
        replace(task, loss_weight=task.loss_weight / 2 / mean) for task, mean in zip(TASKS, means.tolist(), strict=True)
    )
    fixed, _ = masked_loss(logits, labels, observed, tasks=inverse, global_counts=counts)
    torch.testing.assert_close(by_logits, torch.autograd.grad(fixed, logits)[0])


# Training


def test_the_weights_are_learnt_logged_and_left_out_of_the_model(prepared: Prepared, tmp_path: Path) -> None:
    found = trained(prepared, tmp_path, epochs=2, weight_decay=0.5, **LEARNT)
    logs = saved_log_variances(found.checkpoint)
    assert (logs.abs() > 0.1).all()
    assert "log_variances" not in found.model().state_dict()
    steps = [metrics for _, metrics in found.logged if "train/learning_rate" in metrics]
    for index, task in enumerate(LAYOUT.tasks):
        half = 0.5 if task.kind == "regression" else 1.0
        last = task.loss_weight * half * math.exp(-logs[index].item())
        assert steps[-1][f"train/{task.name}.weight"] == pytest.approx(last, rel=1e-5)
    # The smaller its loss, the more a task counts.
    losses = found.result.history[-1][1].loss
    assert losses["rating"] < losses["click"]
    assert steps[-1]["train/rating.weight"] / 0.5 > steps[-1]["train/click.weight"]


def test_weight_decay_leaves_them_alone(prepared: Prepared, tmp_path: Path) -> None:
    from mmoe_rec.training.ranks import process_group
    from tests.training.learnable import CPU, TRAINING

    with process_group(CPU):
        settings = TRAINING.model_copy(update=LEARNT | {"weight_decay": 0.25})
        trainer = Trainer(prepared, LAYOUT, MODEL, settings, CPU, tmp_path, lambda *_: None)
        decays = {}
        for group in trainer.optimizer.dense.param_groups:
            decays |= dict.fromkeys(map(id, group["params"]), group["weight_decay"])
        for name, parameter in trainer.sharded.dense_parameters().items():
            assert decays.pop(id(parameter)) == (0.0 if name == "log_variances" else 0.25)
        assert not decays


def test_a_crash_changes_no_bit(given: Prepared, tmp_path: Path) -> None:
    whole = train(given, tmp_path / "whole", **ALL)
    with pytest.raises(CrashError):
        train(given, tmp_path / "resumed", crash(100), **ALL)
    resumed = train(given, tmp_path / "resumed", **ALL)
    assert [step for step, _ in resumed.history] == [step for step, _ in whole.history]
    assert [found.loss for _, found in resumed.history] == [found.loss for _, found in whole.history]
    last = [saved_log_variances(tmp_path / name / f"step-{STEPS:08d}") for name in ("whole", "resumed")]
    assert last[0].all()
    assert torch.equal(*last)
    one, other = (weights(given, tmp_path / name, DROPS) for name in ("whole", "resumed"))
    assert all(torch.equal(weight, one[name]) for name, weight in other.items())
