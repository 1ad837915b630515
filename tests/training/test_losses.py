"""The masked loss against a loop over single labels, finite differences and the definition of its normaliser."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from mmoe_rec.model.layout import ModelTask
from mmoe_rec.training.losses import masked_loss

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


def naive_sums(logits: torch.Tensor, labels: torch.Tensor, observed: torch.Tensor) -> list[float]:
    sums = [0.0, 0.0, 0.0]
    for row in range(len(logits)):
        for task in range(3):
            if observed[row, task]:
                logit, label = logits[row, task].item(), labels[row, task].item()
                if TASKS[task].kind == "regression":
                    sums[task] += ((logit - label) / TASKS[task].deviation) ** 2
                else:
                    probability = 1 / (1 + math.exp(-logit))
                    sums[task] -= label * math.log(probability) + (1 - label) * math.log(1 - probability)
    return sums


def test_equals_a_loop_over_the_observed_labels() -> None:
    logits, labels, observed = random_labels(40)
    counts = observed.sum(0) + torch.tensor([3, 0, 7])
    total, sums = masked_loss(logits, labels, observed, tasks=TASKS, global_counts=counts, world_size=4)
    expected = naive_sums(logits, labels, observed)
    assert sums.tolist() == pytest.approx(expected)
    weighted = zip([task.loss_weight for task in TASKS], expected, counts.tolist(), strict=True)
    assert total.item() == pytest.approx(4 * sum(weight * value / count for weight, value, count in weighted))


def test_gradient_equals_finite_differences() -> None:
    logits, labels, observed = random_labels(6)
    counts = observed.sum(0)

    def total(x: torch.Tensor) -> torch.Tensor:
        return masked_loss(x, labels, observed, tasks=TASKS, global_counts=counts)[0]

    logits.requires_grad_()
    assert torch.autograd.gradcheck(total, (logits,))
    total(logits).backward()
    assert logits.grad is not None
    assert not logits.grad[~observed].any()


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


# A task that is given another one


def test_both_together_equal_a_loop_over_probabilities() -> None:
    logits, labels, observed = random_labels(40)
    total, sums = masked_loss(logits, labels, observed, tasks=GIVEN, global_counts=observed.sum(0))
    expected = naive_sums(logits, labels, observed)
    expected[2] = 0.0
    for row in range(40):
        if observed[row, 2]:
            clicked, liked = (1 / (1 + math.exp(-logits[row, task].item())) for task in (0, 2))
            expected[2] -= math.log(clicked * liked) if labels[row, 2] == 1 else math.log(1 - clicked * liked)
    assert sums.tolist() == pytest.approx(expected)
    weighted = zip([task.loss_weight for task in GIVEN], expected, observed.sum(0).tolist(), strict=True)
    assert total.item() == pytest.approx(sum(weight * value / count for weight, value, count in weighted))


def test_both_together_have_the_gradients_of_finite_differences() -> None:
    logits, labels, observed = random_labels(6)

    def total(x: torch.Tensor) -> torch.Tensor:
        return masked_loss(x, labels, observed, tasks=GIVEN, global_counts=observed.sum(0))[0]

    assert torch.autograd.gradcheck(total, (logits.requires_grad_(),))


def test_a_like_teaches_the_click_as_well() -> None:
    logits, labels, observed = random_labels(20)
    observed[:, :2] = False
    total, _ = masked_loss(logits.requires_grad_(), labels, observed, tasks=GIVEN, global_counts=observed.sum(0))
    total.backward()
    assert logits.grad is not None
    assert logits.grad[observed[:, 2]][:, [0, 2]].all()
    # More clicks make what was liked more likely, and what was not liked less.
    assert torch.equal(logits.grad[observed[:, 2], 0] < 0, labels[observed[:, 2], 2] == 1)


def test_both_together_are_finite_for_extreme_logits() -> None:
    ends = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4])
    one, other = (each.flatten() for each in torch.meshgrid(ends, ends, indexing="ij"))
    logits = torch.stack([one, torch.zeros_like(one), other], dim=1).requires_grad_()
    for label in (0.0, 1.0):
        labels, observed = torch.full_like(logits, label), torch.ones_like(logits, dtype=torch.bool)
        total, _ = masked_loss(logits, labels, observed, tasks=GIVEN, global_counts=observed.sum(0))
        assert total.isfinite()
        assert all(each.isfinite().all() for each in torch.autograd.grad(total, logits))


# Weights of rows


def test_weighted_rows_equal_a_loop() -> None:
    logits, labels, observed = random_labels(40)
    weights = 1 + 9 * torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight_sums = (observed * weights[:, None]).sum(0)
    total, sums = masked_loss(logits, labels, observed, tasks=TASKS, global_counts=weight_sums, weights=weights)
    expected = [0.0, 0.0, 0.0]
    for row in range(40):
        one = slice(row, row + 1)
        for task, value in enumerate(naive_sums(logits[one], labels[one], observed[one])):
            expected[task] += weights[row].item() * value
    assert sums.tolist() == pytest.approx(expected)
    mean = zip([task.loss_weight for task in TASKS], expected, weight_sums.tolist(), strict=True)
    assert total.item() == pytest.approx(sum(weight * value / count for weight, value, count in mean))

    def of(x: torch.Tensor) -> torch.Tensor:
        return masked_loss(x, labels, observed, tasks=TASKS, global_counts=weight_sums, weights=weights)[0]

    assert torch.autograd.gradcheck(of, (logits[:6].repeat(7, 1)[:40].requires_grad_(),))


def test_a_row_of_weight_two_is_the_row_twice() -> None:
    logits, labels, observed = random_labels(12)
    twice = torch.arange(12).repeat_interleave(torch.tensor([1, 2] * 6))
    one, _ = masked_loss(
        logits[twice], labels[twice], observed[twice], tasks=GIVEN, global_counts=observed[twice].sum(0)
    )
    weights = torch.tensor([1.0, 2.0] * 6, dtype=torch.float64)
    other, _ = masked_loss(logits, labels, observed, tasks=GIVEN, global_counts=observed[twice].sum(0), weights=weights)
    assert other.item() == pytest.approx(one.item())
