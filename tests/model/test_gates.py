"""Routing by every rule, one row, gate and expert at a time, and what none may do."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmoe_rec.model.levels import RAMP_LOGIT_OFFSET, Gates, restrict_unless_empty
from mmoe_rec.model.routing import RULES, GateOutput, Routing, RoutingRule, balance_loss, expert_loads, get_rule, z_loss
from mmoe_rec.settings import model as section
from mmoe_rec.settings.load import describe_settings
from tests.reference import model as reference

GATES, EXPERTS, ROWS = 2, 5, 40


def gates(routing: str = "soft", visible: Tensor | None = None, **changes: Any) -> Gates:
    torch.manual_seed(0)
    settings = section.Gates(routing=routing, **changes)
    made = Gates(6, torch.ones(GATES, EXPERTS, dtype=torch.bool) if visible is None else visible, settings)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4)  # far from even
    return made


def hidden(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(1))


def predictions_to_logits(layer: torch.nn.Module, x: Tensor) -> np.ndarray:
    weight, bias = (parameter.detach().double().numpy() for parameter in layer.parameters())
    return np.einsum("geh,bh->bge", weight, x.double().numpy()) + bias


def softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits - logits.max())
    return exponents / exponents.sum()


@pytest.mark.parametrize("kind", ["top_k", "shared_route"])
def test_gates_choose_in_bf16_as_in_fp32(kind: Any) -> None:
    made, x = gates(kind, top_k=2), hidden(2000).bfloat16()
    exact = made(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = made(x)
    assert exact.selected is not None
    assert torch.equal(actual.selected, exact.selected)
    torch.testing.assert_close(actual.weights, exact.weights)


def test_expert_choice_is_the_references() -> None:
    made, x = gates("expert_choice", top_k=2, serving_top_k=2), hidden()
    routing = made(x)
    expected = reference.expert_choice(torch.from_numpy(predictions_to_logits(made.linear, x)), k=2)
    torch.testing.assert_close(routing.weights.double(), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(routing.selected, expected > 0)


def test_expert_choice_gives_each_gate_its_k_of_the_experts_in_use() -> None:
    """A gate that sees fewer experts, or lost some, gets more rows of each."""
    visible = torch.tensor([[True, True, True, True, False], [True, True, False, False, True]])
    made = gates("expert_choice", top_k=2, serving_top_k=2, visible=visible)
    made.masked[0] = True
    routing = made(hidden())
    assert routing.selected is not None
    each = [0, 27, 27, 27, 0], [0, 40, 0, 0, 40]  # ceil(40 * 2 / 3), 40 * 2 / 2
    assert routing.selected.sum(0).tolist() == list(each)
    assert routing.weights.isfinite().all()


def test_expert_choice_scores_each_row_on_its_own() -> None:
    made, x = gates("expert_choice", top_k=2, serving_top_k=2).eval(), hidden()
    torch.testing.assert_close(made(x[:3]).weights, made(x).weights[:3])
    assert (made(x).weights > 0).sum(-1).eq(2).all()
    made.settings = made.settings.model_copy(update={"serving_top_k": None})
    with pytest.raises(ValueError, match="scoring needs a k"):
        made(x)


def test_soft_gates_sum_to_one_and_serve_fewer() -> None:
    made, x = gates().eval(), hidden()
    routing = made(x)
    assert routing.selected is None
    expected = np.apply_along_axis(softmax, 2, predictions_to_logits(made.linear, x))
    np.testing.assert_allclose(routing.weights.detach().numpy(), expected, atol=1e-6)
    first = made(x, top_k=1).weights
    # Trained with weights that sum to 1, so served with such.
    assert torch.equal(first.amax(-1), torch.ones(ROWS, GATES))
    assert torch.equal(first.argmax(-1), routing.weights.argmax(-1))
    torch.testing.assert_close(made(x, top_k=EXPERTS).weights, routing.weights)


@pytest.mark.parametrize("kind", ["top_k", "shared_route", "expert_choice"])
def test_the_gate_learns_at_k_of_one(kind: Any) -> None:
    made = gates(kind, top_k=1, serving_top_k=1)
    x = hidden()
    made(x).weights.square().sum().backward()
    learning = made.linear if made.route is None else made.route
    gradient = learning.weight.grad
    assert gradient.abs().max() > 1e-3
    # However many serve it: what was never divided in training is not divided there.
    routing = made.eval()(x, top_k=3)
    assert routing.selected is not None
    kept = (routing.probabilities * routing.selected).sum(-1)
    torch.testing.assert_close(routing.weights.sum(-1), kept.expand(-1, GATES))


def test_random_k_draws_all_and_serves_as_it_trains() -> None:
    torch.manual_seed(0)
    made, x = gates("top_k", top_k=3, random_top_k=True), hidden()
    counts = {int((made(x).weights > 0).sum(-1).max()) for _ in range(40)}
    assert counts == {1, 2, 3}
    made.eval()
    first = made(x, top_k=1)
    torch.testing.assert_close(first.weights.amax(-1), first.probabilities.amax(-1))
    assert (made(x).weights > 0).sum(-1).eq(3).all()


def test_gate_dropout_renormalises_the_kept_experts() -> None:
    made, x = gates(dropout=0.3), hidden(5000)
    dropped, full = made(x).weights, made.eval()(x).weights
    torch.testing.assert_close(dropped.sum(-1), torch.ones(5000, GATES))
    kept = dropped > 0
    torch.testing.assert_close(dropped, full * kept / (full * kept).sum(-1, keepdim=True))
    # All five are dropped with probability 0.3^5 and then all kept.
    assert kept.float().mean().item() == pytest.approx(0.7 + 0.3**5, abs=0.01)


def test_a_gate_never_loses_all_its_experts() -> None:
    keep = torch.tensor([[False, False, False], [False, True, True]])
    assert restrict_unless_empty(keep, torch.tensor([True, False, True])).tolist() == [
        [True, False, True],
        [False, False, True],
    ]
    made = gates(dropout=0.99)
    x = hidden(500).requires_grad_()
    weights = made(x).weights
    assert weights.isfinite().all()
    weights.square().sum().backward()
    assert x.grad.isfinite().all()


def test_noise_is_for_training_only() -> None:
    made, x = gates("top_k", top_k=2, noise=3.0), hidden()
    assert not torch.equal(made(x).weights, made(x).weights)
    made.eval()
    assert torch.equal(made(x).weights, made(x).weights)


@pytest.mark.parametrize("routing", ["soft", "top_k", "shared_route"])
def test_masked_experts_get_nothing_and_the_others_are_renormalised(routing: str) -> None:
    made, x = gates(routing, top_k=2).eval(), hidden()
    made.masked[1] = True
    usable = torch.tensor([True, True, True, False, True])
    weights = made(x, usable=usable).weights
    assert not weights[:, :, [1, 3]].any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(ROWS, GATES))
    everything_lost = made(x, usable=torch.zeros(EXPERTS, dtype=torch.bool)).weights
    assert torch.equal(everything_lost, torch.zeros(ROWS, GATES, EXPERTS))


def test_an_added_expert_is_let_in_step_by_step() -> None:
    made, x = gates("top_k", top_k=2), hidden()
    before = made(x).weights
    made.ramp[4] = 1.0
    assert not made(x).weights[:, :, 4].any()
    made.advance_ramp(steps=4)
    assert made.ramp.tolist() == [0, 0, 0, 0, 0.75]
    expected = predictions_to_logits(made.linear, x)
    expected[:, :, 4] -= 0.75 * RAMP_LOGIT_OFFSET
    np.testing.assert_allclose(
        made(x).probabilities.detach().numpy(), np.apply_along_axis(softmax, 2, expected), atol=1e-6
    )
    for _ in range(5):
        made.advance_ramp(steps=4)
    torch.testing.assert_close(made(x).weights, before)


def test_a_selection_bias_changes_what_is_chosen_but_no_weight() -> None:
    made, x = gates("top_k", top_k=2).eval(), hidden()
    loads = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1])
    made.update_selection_bias(loads, rate=0.25)
    assert made.selection_bias.tolist() == [-0.25, 0.0, 0.25, 0.25, 0.25]
    made.selection_bias[3] = 100.0  # more than any difference of logits
    routing = made(x)
    assert routing.selected[:, :, 3].all()
    kept = routing.probabilities * routing.selected
    torch.testing.assert_close(routing.weights, kept / kept.sum(-1, keepdim=True))


def test_the_weights_of_a_shared_route_rise_with_the_ramp() -> None:
    made, x = gates("shared_route", top_k=EXPERTS), hidden()
    made.ramp[4] = 0.5
    weights = made(x).weights[:, :, 4]
    made.ramp[4] = 0.0
    full = made(x).weights[:, :, 4]
    assert (weights > 0).all()
    torch.testing.assert_close(weights.logit(), full.logit() - 0.5 * RAMP_LOGIT_OFFSET, atol=1e-4, rtol=1e-4)


def test_experts_that_are_out_have_no_part_in_the_bias() -> None:
    made = gates("top_k", top_k=2)
    made.masked[0], made.ramp[1] = True, 0.5
    made.update_selection_bias(torch.tensor([0.0, 0.05, 0.2, 0.3, 0.45]), rate=0.25)
    assert made.selection_bias.tolist() == [0.0, 0.0, 0.25, 0.25, -0.25]
    made.masked[:] = True
    made.update_selection_bias(torch.zeros(EXPERTS), rate=0.25)
    assert made.selection_bias.tolist() == [0.0, 0.0, 0.25, 0.25, -0.25]


def test_balance_by_hand() -> None:
    """Two rows, one gate, two experts: both rows go to the first, with probabilities .9 and .7."""
    probabilities = torch.tensor([[[0.9, 0.1]], [[0.7, 0.3]]], requires_grad=True)
    selected = torch.tensor([[[True, False]], [[True, False]]])
    routing = Routing(probabilities * selected, probabilities, selected, torch.tensor([[[1.0]], [[3.0]]]))
    loads, shares = expert_loads(routing, torch.ones(2)), torch.full((2,), 0.5)
    assert loads.tolist() == [1.0, 0.0]
    loss = balance_loss(routing, loads, shares)
    assert loss.item() == pytest.approx(2 * (1.0 * 0.8 + 0.0 * 0.2))
    loss.backward()
    assert probabilities.grad.tolist() == [[[1.0, 0.0]], [[1.0, 0.0]]]
    assert z_loss(routing, shares).item() == pytest.approx((1 + 9) / 2)
    # Over tasks together: two tasks that each use one expert are as even as can be.
    separate = torch.eye(2).expand(6, 2, 2)
    routing = Routing(separate, separate, separate > 0, torch.zeros(6, 2, 2))
    loads = expert_loads(routing, torch.ones(6))
    assert loads.tolist() == [0.5, 0.5]
    assert balance_loss(routing, loads, torch.full((6,), 1 / 6)).item() == pytest.approx(1.0)


@pytest.mark.parametrize("chooses", [True, False])
def test_loads_are_those_of_the_rows_that_count(chooses: bool) -> None:
    selected = torch.tensor([[[True, False]], [[False, True]]])
    weights = selected.float()
    routing = Routing(weights, weights, selected if chooses else None, torch.zeros(2, 1, 2))
    assert expert_loads(routing, torch.tensor([1.0, 0.0])).tolist() == [1.0, 0.0]


def test_names_are_unique_and_in_the_help() -> None:
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names)
    text = describe_settings()
    for rule in RULES:
        assert get_rule(rule.name) is rule
        assert f"{rule.summary} ({rule.name})" in text


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_gives_no_weight_to_what_may_not_be_used(rule: RoutingRule) -> None:
    """Whatever rule is in the list: weights are finite, and 0 for experts that are not allowed or not selected."""
    logits = torch.randn(30, 1 if rule.shared_router else 2, 5, generator=torch.Generator().manual_seed(3))
    gates = logits if not rule.shared_router else torch.randn(30, 2, 5, generator=torch.Generator().manual_seed(4))
    allowed = torch.ones(logits.shape[1], 5, dtype=torch.bool)
    allowed[:, 2] = False
    probabilities = logits.masked_fill(~allowed, float("-inf")).softmax(-1)
    gated = GateOutput(gates, logits, probabilities, allowed, torch.zeros(5), 2 if rule.takes_k else None)
    selected = rule.select(gated)
    weights = rule.weigh(gated, selected, renormalize=True)
    assert weights.shape == (30, 2, 5)
    assert weights.isfinite().all()
    assert not weights[:, :, 2].any()
    assert (selected is None) == rule.selects_all
    if selected is not None:
        assert not weights[~selected.expand_as(weights)].any()
        torch.testing.assert_close(weights.sum(-1), selected.any(-1).float().expand(-1, 2))
