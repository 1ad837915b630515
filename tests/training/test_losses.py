"""The masked loss against the reference, a label at a time, and the definition of its normaliser."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mmoe_rec.model.layout import ModelTask
from mmoe_rec.training.losses import masked_loss
from tests.reference.model import loss as reference_loss

TASKS = (
    ModelTask("clicked", "binary", "engagement"),
    ModelTask("watched", "regression", "engagement", loss_weight=0.5, mean=2.0, deviation=1.5),
    ModelTask("liked", "binary", "satisfaction", loss_weight=2.0),
)


# Liked is only what was clicked.
GIVEN = (TASKS[0], TASKS[1], replace(TASKS[2], given="clicked"))


def random_labels(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 2, (rows, 3), generator=generator).double()
    labels[:, 1] *= 4.5
    observed = torch.rand(rows, 3, generator=generator) < 0.6
    return logits, labels * observed, observed


WEIGHTS = 1 + 9 * torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["rows count alike", "weighted"])
@pytest.mark.parametrize("tasks", [TASKS, GIVEN], ids=["apart", "given"])
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


def test_a_task_without_observed_rows_adds_exactly_zero() -> None:
    logits, labels, observed = random_labels(10)
    observed[:, 1] = False
    logits.requires_grad_()
    total, sums = masked_loss(logits, labels, observed, tasks=TASKS, global_counts=observed.sum(0))
    total.backward()
    assert sums[1] == 0
    assert total.isfinite()
    assert logits.grad is not None
    assert not logits.grad[:, 1].any()
    assert logits.grad[:, [0, 2]].any()
    nothing, _ = masked_loss(logits, labels, observed & False, tasks=TASKS, global_counts=torch.zeros(3))
    assert nothing == 0


def test_the_mean_over_ranks_is_the_global_loss() -> None:
    logits, labels, observed = random_labels(30)
    counts = observed.sum(0)
    options: dict[str, Any] = {"tasks": TASKS, "global_counts": counts}
    whole, _ = masked_loss(logits, labels, observed, **options)
    ranks = [slice(0, 5), slice(5, 30)]
    parts = [masked_loss(logits[r], labels[r], observed[r], **options, world_size=2)[0] for r in ranks]
    assert (sum(parts) / 2).item() == pytest.approx(whole.item())  # type: ignore[union-attr]


def test_both_together_are_finite_for_extreme_logits() -> None:
    ends = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4])
    one, other = (each.flatten() for each in torch.meshgrid(ends, ends, indexing="ij"))
    logits = torch.stack([one, torch.zeros_like(one), other], dim=1).requires_grad_()
    for label in (0.0, 1.0):
        labels, observed = torch.full_like(logits, label), torch.ones_like(logits, dtype=torch.bool)
        total, _ = masked_loss(logits, labels, observed, tasks=GIVEN, global_counts=observed.sum(0))
        assert total.isfinite()
        assert all(each.isfinite().all() for each in torch.autograd.grad(total, logits))
