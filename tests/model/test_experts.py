"""Experts, grouped and dense, and levels of them, against plain loops over expert modules."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mmoe_rec.model import levels as levels_module
from mmoe_rec.model.levels import Experts, visible_experts
from mmoe_rec.model.mmoe import Mixture, build_mixture
from mmoe_rec.model.multiply import Products
from mmoe_rec.model.products import Dispatch, combine, grouped_linear
from mmoe_rec.settings import model as section
from tests.model.examples import small_settings

ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU}


def made_of(count: int, inputs: int, units: tuple[int, ...], **changes: Any) -> Experts:
    return Experts(count, inputs, section.Experts(units=units, **changes))


def alone(experts: Experts, index: int, activation: str = "silu") -> nn.Sequential:
    """One expert as a network of its own."""
    layers: list[nn.Module] = []
    for layer in experts.layers:
        weight, bias = layer.weight[index].detach(), layer.bias[index].detach()  # type: ignore[index, union-attr]
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.load_state_dict({"weight": weight, "bias": bias})
        layers += [linear, ACTIVATIONS[activation]()]
    if experts.normalise:
        layers.append(nn.LayerNorm(layers[-2].out_features, elementwise_affine=False))
    return nn.Sequential(*layers)


def routed(rows: int, gates: int, count: int, k: int) -> tuple[Tensor, Tensor]:
    """Weights (rows, gates, count) of k experts a gate, and which experts a row uses."""
    probabilities = torch.rand(rows, gates, count)
    chosen = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(k).indices, 1.0)
    return probabilities * chosen, chosen.bool().any(1)


@pytest.mark.parametrize("compute", ["dense", "grouped"])
@pytest.mark.parametrize("activation", get_args(section.Experts.model_fields["activation"].annotation))
@pytest.mark.parametrize("normalise", [False, True])
def test_mixing_equals_a_loop_over_expert_modules(compute: Any, activation: Any, normalise: bool) -> None:
    torch.manual_seed(0)
    experts = made_of(6, 7, (9, 5), activation=activation, normalise=normalise, compute=compute)
    hidden = torch.randn(30, 7)
    weights, used = routed(30, 3, 6, 2)
    expected = torch.zeros(30, 3, 5)
    for index in range(6):
        expected += weights[:, :, index, None] * alone(experts, index, activation)(hidden)[:, None]
    torch.testing.assert_close(experts.mix(hidden, weights, used), expected, atol=1e-5, rtol=1e-5)


def test_grouped_gradients_equal_dense_ones() -> None:
    torch.manual_seed(0)
    found = []
    for compute in ("dense", "grouped"):
        torch.manual_seed(1)
        experts = made_of(6, 7, (9, 5), compute=compute)
        hidden = torch.randn(30, 7, requires_grad=True)
        weights, used = routed(30, 2, 6, 2)
        used[:, 3] = False  # an expert without rows
        weights[:, :, 3] = 0
        weights.requires_grad_()
        experts.mix(hidden, weights, used).square().sum().backward()
        assert weights.grad is not None
        found.append([hidden.grad, weights.grad * used[:, None], *(each.grad for each in experts.parameters())])
    for dense, grouped in zip(*found, strict=True):
        assert dense is not None
        assert grouped is not None
        torch.testing.assert_close(grouped, dense, atol=1e-5, rtol=1e-5)


def test_grouped_layers_pass_finite_differences() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *each: grouped_linear(*each, [2, 0, 3, 1]), (x, weight, bias))


def test_only_the_used_pairs_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []

    def counting(x: Tensor, weight: Tensor, bias: Tensor, counts: list[int], products: Products) -> Tensor:
        computed.append(len(x))
        assert sum(counts) == len(x)
        return grouped_linear(x, weight, bias, counts, products)

    monkeypatch.setattr(levels_module, "grouped_linear", counting)
    weights, used = routed(200, 2, 16, 2)
    experts = made_of(16, 7, (9, 5))
    experts.mix(torch.randn(200, 7), weights, used)
    assert computed == [int(used.sum())] * 2
    assert int(used.sum()) < 200 * 4


def test_dense_is_taken_where_most_experts_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels_module, "grouped_linear", None)
    weights, used = routed(50, 2, 4, 3)
    made_of(4, 7, (9, 5)).mix(torch.randn(50, 7), weights, used)


@pytest.mark.parametrize(
    ("units", "k", "grouped"), [((9, 5), 3, False), ((9, 5), 1, True), ((300, 200), 3, True), ((300, 200), 1, True)]
)
def test_small_experts_that_most_rows_use_run_on_all_rows(units: tuple[int, ...], k: int, grouped: bool) -> None:
    _, used = routed(50, 2, 4, k)
    assert made_of(4, 150, units).takes_grouped(used) == grouped
    assert made_of(4, 150, units, compute="grouped").takes_grouped(used)
    assert not made_of(4, 150, units, compute="dense").takes_grouped(used)


def test_nothing_used_gives_zeros() -> None:
    experts = made_of(3, 7, (9, 5))
    mixed = experts.mix(torch.randn(8, 7), torch.zeros(8, 2, 3), torch.zeros(8, 3, dtype=torch.bool), alone=True)
    assert torch.equal(mixed, torch.zeros(8, 2, 5))


@pytest.mark.parametrize("block", [1, 4])
def test_each_pair_has_its_place(block: int) -> None:
    torch.manual_seed(0)
    _, used = routed(12, 2, 5, 2)
    used[:, 2] = False  # an expert without rows
    dispatch = Dispatch.of(used, block)
    assert dispatch.counts == [-(-count // block) * block for count in used.sum(0).tolist()]
    assert sum(dispatch.counts) == len(dispatch.rows)
    expert_of_place = torch.arange(5).repeat_interleave(torch.tensor(dispatch.counts))
    places = dispatch.places[dispatch.filled]
    assert torch.equal(dispatch.filled.sum(1), used.sum(1))
    assert len(places.unique()) == int(used.sum()), "no two pairs share a place"
    assert torch.equal(dispatch.rows[places], dispatch.filled.nonzero()[:, 0])
    assert torch.equal(expert_of_place[places], dispatch.experts[dispatch.filled])
    assert used[dispatch.rows[places], dispatch.experts[dispatch.filled]].all()


@pytest.mark.parametrize("block", [1, 4])
def test_combine_adds_up_what_was_sent(block: int) -> None:
    torch.manual_seed(0)
    weights, used = routed(12, 2, 5, 2)
    dispatch = Dispatch.of(used, block)
    values = torch.randn(len(dispatch.rows), 3)
    expected = torch.zeros(12, 2, 3)
    starts = [sum(dispatch.counts[:expert]) for expert in range(5)]
    for expert, start in enumerate(starts):
        for nth, row in enumerate(used[:, expert].nonzero()[:, 0]):
            expected[row] += weights[row, :, expert, None] * values[start + nth]
    torch.testing.assert_close(combine(values, weights, dispatch), expected)


def test_a_result_reaches_only_the_rows_that_asked_for_it() -> None:
    weights, used = torch.ones(3, 1, 2), torch.tensor([[True, True], [False, True], [True, False]])
    dispatch = Dispatch.of(used, 4)
    first, second = torch.ones(len(dispatch.rows), 1).split(dispatch.counts)
    mixed = combine(torch.cat([first.fill_(torch.nan), second]), weights, dispatch)
    assert mixed.flatten().isnan().tolist() == [True, False, True]


def test_bf16_grouped_gradients_stay_near_fp32() -> None:
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        experts = made_of(6, 32, (24, 8), compute="grouped")
        hidden = torch.randn(64, 32, requires_grad=True)
        weights, used = routed(64, 2, 6, 2)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            mixed = experts.mix(hidden, weights.requires_grad_(), used)
        mixed.float().square().sum().backward()
        assert weights.grad is not None
        found.append([hidden.grad, weights.grad * used[:, None], *(each.grad for each in experts.parameters())])
    for exact, rounded in zip(*found, strict=True):
        assert exact is not None
        assert rounded is not None
        torch.testing.assert_close(rounded, exact, atol=0.05 * float(exact.abs().max()), rtol=0.05)


def test_bf16_grouped_stays_near_fp32() -> None:
    torch.manual_seed(0)
    experts = made_of(6, 32, (24, 8), compute="grouped")
    hidden = torch.randn(64, 32)
    weights, used = routed(64, 2, 6, 2)
    exact = experts.mix(hidden, weights, used)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = experts.mix(hidden, weights, used)
    torch.testing.assert_close(rounded.float(), exact, atol=0.02, rtol=0.05)
    rounded.float().sum().backward()
    assert all(each.grad is not None and each.grad.dtype == torch.float32 for each in experts.parameters())


def test_which_experts_gates_see() -> None:
    assert visible_experts(2, 1, 2, shared_gate=True).int().tolist() == [
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 1],
        [1, 1, 1, 1, 1],
    ]


def mixture(inputs: int = 6, tasks: int = 2, **changes: Any) -> Mixture:
    torch.manual_seed(0)
    return build_mixture(inputs, [], 0, tasks, small_settings(**changes)).eval()


def reference_level(mixture: Mixture, level: int, gate_inputs: list[Tensor], experts: list[Tensor]) -> list[Tensor]:
    """Each gate's mix of experts' outputs, by a loop; gate_inputs: one a gate."""
    gates = mixture.gates[level]
    mixes = []
    for gate, hidden in enumerate(gate_inputs):
        seen = gates.visible[gate].nonzero().flatten().tolist()
        logits = functional.linear(hidden, gates.linear.weight[gate], gates.linear.bias[gate])[:, seen]
        weights = logits.softmax(-1)
        mixes.append(sum((weights[:, [i]] * experts[expert] for i, expert in enumerate(seen)), torch.zeros(())))
    return mixes


def test_two_levels_with_experts_of_tasks_equal_a_loop() -> None:
    """PLE: a gate of each task sees shared experts and its own; the shared gate of the first level sees all."""
    made = mixture(experts={"count": 2, "task_count": 1, "levels": 2, "units": (8, 6)})
    x = torch.randn(20, 6)
    hidden = made.bottom(x)
    first, second = (level.experts for level in made.levels)  # type: ignore[union-attr]
    outputs = [alone(first[0], index)(hidden) for index in range(4)]  # type: ignore[index, arg-type]
    mixes = reference_level(made, 0, [hidden] * 3, outputs)
    sources = [(second[0], 0, 2), (second[0], 1, 2), (second[1], 0, 0), (second[2], 0, 1)]  # type: ignore[index]
    outputs = [alone(experts, index)(mixes[source]) for experts, index, source in sources]  # type: ignore[arg-type]
    mixes = reference_level(made, 1, mixes[:2], outputs)
    expected = made.towers(torch.stack(mixes, dim=1))
    found = made(x, torch.empty(20, 0))
    torch.testing.assert_close(found.logits, expected, atol=1e-6, rtol=1e-5)
    assert [routing.weights.shape for routing in found.routings] == [(20, 3, 4), (20, 2, 4)]


@pytest.mark.parametrize("routing", ["top_k", "expert_choice"])
def test_grouped_levels_equal_dense_ones(routing: str) -> None:
    settings = {"count": 2, "task_count": 2, "levels": 2, "units": (8, 6)}
    rule = {"routing": routing, "top_k": 1, "serving_top_k": 1}
    x = torch.randn(20, 6)
    dense, grouped = (
        mixture(experts=settings | {"compute": compute}, gates=rule).train()(x, torch.empty(20, 0)).logits
        for compute in ("dense", "grouped")
    )
    torch.testing.assert_close(grouped, dense, atol=1e-6, rtol=1e-5)


def test_one_gate_for_all_tasks_gives_one_mix() -> None:
    made = mixture(gates={"per_task": False})
    routing = made(torch.randn(9, 6), torch.empty(9, 0)).routings[0]
    assert routing.weights.shape == (9, 2, 3)
    assert torch.equal(routing.weights[:, 0], routing.weights[:, 1])
    assert routing.probabilities.shape == (9, 1, 3)


def test_one_expert_is_a_shared_bottom() -> None:
    made = mixture(experts={"count": 1, "units": (8, 6)})
    x = torch.randn(9, 6)
    shared = alone(made.levels[0].experts[0], 0)(made.bottom(x))  # type: ignore[union-attr, index, arg-type]
    expected = made.towers(shared[:, None].expand(-1, 2, -1))
    torch.testing.assert_close(made(x, torch.empty(9, 0)).logits, expected)


def test_experts_may_read_the_raw_inputs() -> None:
    made = mixture(experts={"raw_inputs": True, "count": 2, "units": (8, 6)})
    assert made.levels[0].experts[0].layers[0].weight.shape == (2, 8, 12 + 6)  # type: ignore[union-attr, index]
    assert made.gates[0].linear.weight.shape == (2, 2, 12)
    assert made(torch.randn(9, 6), torch.empty(9, 0)).logits.shape == (9, 2)
