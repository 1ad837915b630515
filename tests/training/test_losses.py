"""The masked loss and learnt task weights against the reference, a label at a time; trainings with learnt weights."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from mmoe_rec.model.layout import ModelTask
from mmoe_rec.preprocessing.prepare import Prepared
from mmoe_rec.training.loop import Trainer
from mmoe_rec.training.losses import masked_loss
from tests.model.examples import LAYOUT
from tests.reference.model import loss as reference_loss
from tests.training.learnable import GIVEN, MODEL, trained, write_prepared

TASKS = (
    ModelTask("clicked", "binary", "engagement"),
    ModelTask("watched", "regression", "engagement", loss_weight=0.5, mean=2.0, deviation=1.5),
    ModelTask("liked", "binary", "satisfaction", loss_weight=2.0),
)


# Liked is only what was clicked.
BOTH = (TASKS[0], TASKS[1], replace(TASKS[2], given="clicked"))


def random_labels(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 2, (rows, 3), generator=generator).double()
    labels[:, 1] *= 4.5
    observed = torch.rand(rows, 3, generator=generator) < 0.6
    return logits, labels * observed, observed


WEIGHTS = 1 + 9 * torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["rows count alike", "weighted"])
@pytest.mark.parametrize("tasks", [TASKS, BOTH], ids=["apart", "given"])
def test_loss_and_gradients_are_the_references(tasks: tuple[ModelTask, ...], weights: torch.Tensor | None) -> None:
    logits, labels, observed = random_labels(40)
    counts = observed.sum(0) if weights is None else (observed * weights[:, None]).sum(0)
    logits.requires_grad_()
    total, sums = masked_loss(logits, labels, observed, tasks=tasks, global_counts=counts, weights=weights)
    expected, expected_sums = reference_loss(logits, labels, observed, tasks, weights)
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert sums.tolist() == pytest.approx([each.item() for each in expected_sums], rel=1e-12)
    one, other = (torch.autograd.grad(each, logits)[0] for each in (total, expected))
    torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)
    assert not one[:, 1][~observed[:, 1]].any()


def test_both_together_are_finite_for_extreme_logits() -> None:
    ends = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4])
    one, other = (each.flatten() for each in torch.meshgrid(ends, ends, indexing="ij"))
    logits = torch.stack([one, torch.zeros_like(one), other], dim=1).requires_grad_()
    for label in (0.0, 1.0):
        labels, observed = torch.full_like(logits, label), torch.ones_like(logits, dtype=torch.bool)
        total, _ = masked_loss(logits, labels, observed, tasks=BOTH, global_counts=observed.sum(0))
        assert total.isfinite()
        assert all(each.isfinite().all() for each in torch.autograd.grad(total, logits))


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


def test_an_unobserved_task_adds_exactly_zero() -> None:
    logits, labels, observed = random_labels(10)
    observed[:, 1] = False
    logs = torch.tensor([0.0, 5.0, 0.0], dtype=torch.float64, requires_grad=True)
    total, _ = masked_loss(logits, labels, observed, tasks=TASKS, global_counts=observed.sum(0), log_variances=logs)
    fixed, sums = masked_loss(logits.requires_grad_(), labels, observed, tasks=TASKS, global_counts=observed.sum(0))
    assert total.item() == pytest.approx(fixed.item(), rel=1e-14)
    assert sums[1] == 0
    for loss, values in ((total, logs), (fixed, logits)):
        (gradient,) = torch.autograd.grad(loss, values)
        assert not gradient[..., 1].any()
        assert gradient[..., [0, 2]].any()
    nothing, _ = masked_loss(logits, labels, observed & False, tasks=TASKS, global_counts=torch.zeros(3))
    assert nothing == 0


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
