"""Experts, gates, towers and the score, each on its own."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from torch.nn import functional

from mmoe_rec.model.bottom import PiecewiseLinear
from mmoe_rec.model.levels import Experts
from mmoe_rec.model.mmoe import PlacementTower
from mmoe_rec.model.products import StackedLinear
from mmoe_rec.model.score import SMALLEST_VALUE, fuse, logit_of_both, predictions
from mmoe_rec.settings import model as section


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_stacked_layers_equal_separate_ones(precision: torch.dtype) -> None:
    """Outputs and all gradients, rows in either precision, which need not lie next to each other."""
    torch.manual_seed(0)
    layer = StackedLinear(4, 6, 5)
    x = torch.randn(4, 9, 6).transpose(0, 1).requires_grad_()
    gradient = torch.randn(9, 5, 4).transpose(1, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        outputs = layer(x)
    assert outputs.dtype == precision
    outputs.backward(gradient.to(precision))
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if precision == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    for group in range(4):
        own, weight, bias = (
            each.detach().clone().requires_grad_() for each in (x[:, group], layer.weight[group], layer.bias[group])
        )
        expected = functional.linear(own, weight, bias)
        expected.backward(gradient[:, group])
        torch.testing.assert_close(outputs[:, group].float(), expected, **tolerance)
        assert x.grad is not None
        found = (x.grad[:, group], layer.weight.grad[group], layer.bias.grad[group])  # type: ignore[index]
        for one, other in zip(found, (own.grad, weight.grad, bias.grad), strict=True):
            torch.testing.assert_close(one, other, **tolerance)


def test_each_expert_starts_on_its_own_like_a_linear_layer() -> None:
    torch.manual_seed(0)
    experts = Experts(4, 200, section.Experts(units=(150, 100)))
    for layer, inputs in zip(experts.layers, (200, 150), strict=True):
        weight = layer.weight.detach().flatten(1).numpy()  # type: ignore[operator]
        assert np.abs(np.corrcoef(weight) - np.eye(4)).max() < 0.05
        # nn.Linear draws from U(-1 / sqrt(inputs), 1 / sqrt(inputs)); a stacked fan-in would be smaller.
        assert np.abs(weight).max() == pytest.approx(1 / math.sqrt(inputs), rel=0.01)
        np.testing.assert_allclose(weight.std(1), 1 / math.sqrt(3 * inputs), rtol=0.05)


def test_placement_dropout_hides_whole_rows() -> None:
    torch.manual_seed(0)
    tower = PlacementTower(3, 2, section.Placement(units=(4,), dropout=0.25))
    placement = torch.randn(4000, 3)
    logits = tower(placement)
    hidden = logits == 0
    assert torch.equal(hidden[:, 0], hidden[:, 1])
    assert hidden[:, 0].float().mean().item() == pytest.approx(0.25, abs=0.03)
    full = tower.eval()(placement)
    torch.testing.assert_close(logits, torch.where(hidden, 0.0, full))


def test_log_score_is_finite_for_extreme_logits() -> None:
    logits = torch.tensor([[-500.0, -3.0], [500.0, 0.0]])
    log_score = fuse(logits, ["binary", "regression"], [1.0, 1.0])
    tiny = math.log(SMALLEST_VALUE)
    np.testing.assert_allclose(log_score.numpy(), [-500.0 + tiny, tiny], rtol=1e-6)


def test_the_logit_of_both_is_exact_for_any_logits() -> None:
    """Against 400 digits, where p q, 1 - p q and their logarithms can be written as they are.

    A logit of 300 itself is held to 2e-5, which is what the logarithm of 1 - e^-300 can be held to, relatively.
    """
    ends = [-300.0, -90.0, -20.0, -3.0, 0.0, 0.5, 8.0, 40.0, 90.0, 300.0]
    getcontext().prec = 400

    def probability(logit: float) -> Decimal:
        return 1 / (1 + (-Decimal(logit)).exp())

    for one, other in itertools.product(ends, ends):
        found = logit_of_both(torch.tensor(one), torch.tensor(other))
        both = probability(one) * probability(other)
        assert found.item() == pytest.approx(float((both / (1 - both)).ln()), rel=1e-6, abs=2e-6)
        assert functional.logsigmoid(found).item() == pytest.approx(float(both.ln()), rel=2e-5, abs=1e-37)
        if abs(found) < 80:
            assert functional.logsigmoid(-found).item() == pytest.approx(float((1 - both).ln()), rel=2e-5, abs=1e-37)


def test_the_gradient_of_the_logit_of_both_is_finite_and_right() -> None:
    ends = torch.tensor([-300.0, -20.0, 0.0, 8.0, 300.0], dtype=torch.float64)
    one, other = (each.flatten().requires_grad_() for each in torch.meshgrid(ends, ends, indexing="ij"))
    assert torch.autograd.gradcheck(logit_of_both, (one, other))


def test_a_wrong_number_of_tasks_is_refused() -> None:
    with pytest.raises(ValueError, match="each of 2 tasks, found 3"):
        predictions(torch.zeros(4, 3), ["binary", "binary"])


def test_edges_may_lie_near_to_each_other_far_from_zero() -> None:
    edges = np.float32([3.0, 3.000002, 3.000006, 9.9999, 10.0])
    x = np.float32([[2.9], [3.000001], [3.000004], [3.000006], [9.99995], [10.0]])
    parts = PiecewiseLinear([edges.tolist()])(torch.from_numpy(x)).numpy()
    low, high, exact = edges[:-1].astype(float), edges[1:].astype(float), x.astype(float)
    np.testing.assert_allclose(parts, np.clip((exact - low) / (high - low), 0, 1), atol=1e-6)
