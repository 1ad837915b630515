"""Experts, grouped and dense, and levels of them, against plain loops over expert modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmoe_rec.model import levels as levels_module
from mmoe_rec.model.levels import Experts
from mmoe_rec.model.products import Dispatch, Products, combine, grouped_linear
from mmoe_rec.settings import model as section


def made_of(count: int, inputs: int, units: tuple[int, ...], **changes: Any) -> Experts:
    return Experts(count, inputs, section.Experts(units=units, **changes))


def routed(rows: int, gates: int, count: int, k: int) -> tuple[Tensor, Tensor]:
    """Weights (rows, gates, count) of k experts a gate, and which experts a row uses."""
    probabilities = torch.rand(rows, gates, count)
    chosen = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(k).indices, 1.0)
    return probabilities * chosen, chosen.bool().any(1)


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
