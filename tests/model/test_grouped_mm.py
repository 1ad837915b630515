"""One product for all experts, as a GPU computes it, against the loop over experts; and on fake tensors of a GPU.

torch computes `grouped_mm` on a CPU too, by the same contract, in fp32 as well.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from mmoe_rec.model import levels, products
from mmoe_rec.model.levels import Experts
from mmoe_rec.model.mmoe import build_mixture
from mmoe_rec.model.products import BLOCK, Sent, gradients, in_one_product
from mmoe_rec.settings import model as section
from tests.model.examples import small_settings

ROWS, EXPERTS = 50, 6


def drawn(k: int, gates: int, seed: int, empty: bool) -> Tensor:
    """(ROWS, EXPERTS) bool: up to k experts a gate. empty: an expert has no rows, and a row has no experts."""
    probabilities = torch.rand(ROWS, gates, EXPERTS, generator=torch.Generator().manual_seed(seed))
    if empty:
        probabilities[:, :, 3] = -1
    used = torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, probabilities.topk(k).indices, True).any(1)
    if empty:
        used[7] = False
    return used


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize(("k", "gates"), [(1, 1), (2, 1), (2, 2), (4, 3), (1, 3)])
def test_every_row_finds_its_experts_where_they_are(k: int, gates: int, empty: bool) -> None:
    used = drawn(k, gates, 10 * k + gates, empty)
    sent = Sent.of(used, k * gates)
    owners, ends = sent.owners.tolist(), sent.ends.tolist()
    assert sent.ends.dtype == torch.int32
    assert ends[-1] == len(owners) == len(sent.rows)
    assert all(end % BLOCK == 0 for end in ends)
    assert [owners.count(expert) for expert in range(EXPERTS)] == [
        b - a for a, b in zip([0, *ends], ends, strict=False)
    ]
    assert min(owners.count(expert) for expert in range(EXPERTS)) > 0, "a product over no rows"
    found = torch.zeros_like(used)
    read = set()
    for row, (places, experts, filled) in enumerate(zip(sent.places, sent.experts, sent.filled, strict=True)):
        for slot, (place, expert) in enumerate(zip(places[filled].tolist(), experts[filled].tolist(), strict=True)):
            assert (owners[place], int(sent.rows[place])) == (expert, row)
            assert int(sent.slots[place]) == row * sent.places.shape[1] + slot
            assert sent.asked[place]
            found[row, expert] = True
            read.add(place)
    assert torch.equal(found, used)
    assert int(sent.asked.sum()) == int(used.sum()) == len(read)


@pytest.mark.parametrize("normalise", [False, True])
def test_a_mix_is_the_same_in_either_way(monkeypatch: pytest.MonkeyPatch, normalise: bool) -> None:
    torch.manual_seed(0)
    used = drawn(2, 3, 5, empty=True)
    weights = torch.rand(ROWS, 3, EXPERTS) * used.unsqueeze(1)
    hidden = torch.randn(ROWS, 8)
    experts = Experts(EXPERTS, 8, section.Experts(units=(16, 8), normalise=normalise, compute="grouped"))
    found = []
    for on_gpu in (False, True):
        monkeypatch.setattr(levels, "in_one_product", lambda x, widths, on_gpu=on_gpu: on_gpu)
        x, w = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
        experts.zero_grad()
        mixed = experts.mix(x, w, used, most=6)
        mixed.square().sum().backward()
        assert w.grad is not None
        found.append([mixed, x.grad, w.grad * used.unsqueeze(1), *(each.grad for each in experts.parameters())])
    for loop, product in zip(*found, strict=True):
        torch.testing.assert_close(product, loop, atol=1e-5, rtol=1e-5)


def test_a_result_that_is_not_finite_reaches_its_own_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "in_one_product", lambda x, widths: True)
    used = drawn(2, 1, 3, empty=False)
    experts = Experts(EXPERTS, 8, section.Experts(units=(8,), compute="grouped"))
    with torch.no_grad():
        experts.layers[0].weight[2] = float("nan")  # type: ignore[index, union-attr]
    mixed = experts.mix(torch.randn(ROWS, 8), torch.rand(ROWS, 2, EXPERTS) * used.unsqueeze(1), used, most=2)
    assert torch.equal(mixed.isnan().any(2).any(1), used[:, 2])


def test_it_is_for_bf16_and_whole_blocks_on_gpus_that_have_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        rows = {kind: torch.empty(4, 8, dtype=torch.bfloat16, device=kind) for kind in ("cpu", "cuda")}
        for capability, has_it in (((9, 0), True), ((10, 0), True), ((8, 0), False), ((12, 0), False)):
            monkeypatch.setattr(products, "_capability", lambda device, found=capability: found)
            assert in_one_product(rows["cuda"], (8, 16, 64)) == has_it
            assert not in_one_product(rows["cuda"], (8, 12))
            assert not in_one_product(rows["cuda"].float(), (8, 16))
            assert not in_one_product(rows["cpu"], (8, 16))


def test_a_gpu_accepts_the_operands() -> None:
    """Torch checks types, strides and alignment before it looks at any number."""
    with FakeTensorMode():
        used = torch.empty(ROWS, EXPERTS, dtype=torch.bool, device="cuda")
        x = torch.empty(ROWS, 16, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        weight, bias = torch.empty(EXPERTS, 24, 16, device="cuda"), torch.empty(EXPERTS, 24, device="cuda")
        sent = Sent.of(used, 2)
        places = sent.to_places(x)
        out = sent.product(places, weight, bias)
        assert (out.shape, out.dtype, out.device.type) == ((len(places), 24), torch.bfloat16, "cuda")
        mixed = sent.combine(out, torch.empty(ROWS, 3, EXPERTS, device="cuda"))
        assert (mixed.shape, mixed.dtype) == ((ROWS, 3, 24), torch.bfloat16)
        of_places, of_weight, of_bias = gradients(torch.empty_like(out), places, weight.bfloat16(), sent.ends)
        assert of_places is not None
        assert [each.shape for each in (of_places, of_weight, of_bias)] == [places.shape, weight.shape, bias.shape]
        assert {each.device.type for each in (of_places, of_weight, of_bias)} == {"cuda"}


SETTINGS: dict[str, dict[str, Any]] = {
    "a gate a task": {"experts": {"count": 8}},
    "one gate": {"experts": {"count": 8}, "gates": {"per_task": False}},
    "one router": {"experts": {"count": 8}, "gates": {"routing": "shared_route"}},
    "experts of tasks, two levels": {"experts": {"count": 3, "task_count": 5, "levels": 2}},
    "no shared experts": {"experts": {"count": 0, "task_count": 5, "levels": 3}},
    "k is drawn": {"experts": {"count": 8}, "gates": {"random_top_k": True}},
    "fewer in serving": {"experts": {"count": 8}, "gates": {"serving_top_k": 1}},
    "experts choose in training": {"experts": {"count": 8}, "gates": {"routing": "expert_choice", "serving_top_k": 2}},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_no_expert_of_a_row_is_left_out(monkeypatch: pytest.MonkeyPatch, name: str, training: bool) -> None:
    """What a model makes room for is enough for what its rule chooses, in every arrangement of experts and gates."""
    sections = SETTINGS[name]
    x = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(2))
    logits, asked = {}, []

    def on_gpu(x: Tensor, widths: tuple[int, ...]) -> bool:
        asked.append(widths)
        return True

    for compute in ("dense", "grouped"):
        monkeypatch.setattr(levels, "in_one_product", on_gpu)
        settings = small_settings(
            experts={"units": (16, 8), "compute": compute} | sections["experts"],
            gates={"routing": "top_k", "top_k": 2} | sections.get("gates", {}),
        )
        torch.manual_seed(1)
        mixture = build_mixture(6, [[-1.0, 1.0]], 0, 3, settings).train(training)
        logits[compute] = mixture(x, torch.empty(ROWS, 0)).logits
    assert bool(asked) == (name != "experts choose in training" or not training)
    torch.testing.assert_close(logits["grouped"], logits["dense"], atol=1e-6, rtol=1e-5)
