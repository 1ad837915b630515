"""Experts on the rows sent to them, on a CPU and as a GPU is told to, against all experts on all rows."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from mmoe_rec.model import levels, matmul
from mmoe_rec.model.levels import Experts
from mmoe_rec.model.matmul import GROUPED_MM_ALIGNMENT, Dispatch
from mmoe_rec.model.mmoe import build_mixture
from mmoe_rec.settings import model as section
from tests.model.examples import small_settings

ROWS, EXPERTS = 50, 6


def made_of(count: int, inputs: int, units: tuple[int, ...], **changes: Any) -> Experts:
    torch.manual_seed(0)
    return Experts(count, inputs, section.Experts(units=units, **changes))


def drawn(k: int, gates: int, empty: bool = False) -> tuple[Tensor, Tensor]:
    """Weights (ROWS, gates, EXPERTS) of k experts a gate, and which experts a row uses. empty: an expert has no rows,
    and a row has no experts.
    """
    probabilities = torch.rand(ROWS, gates, EXPERTS, generator=torch.Generator().manual_seed(10 * k + gates))
    probabilities[:, :, 3] *= not empty
    chosen = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(k).indices, 1.0) * (probabilities > 0)
    chosen[7] *= not empty
    return probabilities * chosen, chosen.bool().any(1)


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("block", [1, GROUPED_MM_ALIGNMENT])
@pytest.mark.parametrize(("k", "gates"), [(1, 1), (2, 2), (4, 3), (1, 3)])
def test_every_row_has_its_places(k: int, gates: int, block: int, bounded: bool, empty: bool) -> None:
    _, used = drawn(k, gates, empty)
    dispatch = Dispatch.of(used, block, k * gates if bounded else None)
    assert int(dispatch.sizes.sum()) == len(dispatch.rows)
    assert not (dispatch.sizes[:-1] % block).any()
    if bounded:
        assert len(dispatch.rows) <= ROWS * k * gates + (EXPERTS + 1) * block
        assert dispatch.sizes.min() > 0, "a product over no rows"
    else:
        assert dispatch.sizes.tolist() == [-(-count // block) * block for count in used.sum(0).tolist()]
    owners = torch.arange(EXPERTS).repeat_interleave(dispatch.sizes)
    slots = dispatch.slots[dispatch.filled]
    assert len(slots.unique()) == int(used.sum()), "no two results share a place"
    assert torch.equal(dispatch.filled.sum(1), used.sum(1))
    assert torch.equal(dispatch.rows[slots], dispatch.filled.nonzero()[:, 0])
    assert torch.equal(owners[slots], dispatch.experts[dispatch.filled])
    assert used[dispatch.rows[slots], owners[slots]].all()


def mixed(experts: Experts, hidden: Tensor, weights: Tensor, used: Tensor | None) -> list[Tensor]:
    """The mix, and the gradients of all that it depends on."""
    x, w = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    out = experts.mix(x, w, used)
    gradients = torch.autograd.grad(out.float().square().sum(), [x, w, *experts.parameters()])
    return [out.detach(), gradients[0], gradients[1] * (weights > 0), *gradients[2:]]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("units", [(16, 8), (9, 5)])
def test_a_mix_is_that_of_all_experts_on_all_rows(
    monkeypatch: pytest.MonkeyPatch, units: tuple[int, ...], normalize: bool, precision: torch.dtype
) -> None:
    weights, used = drawn(2, 3, empty=True)
    hidden, experts = torch.randn(ROWS, 7), made_of(EXPERTS, 7, units, normalize=normalize, compute="grouped")
    dense = mixed(experts, hidden, weights, None)
    of = Dispatch.of
    for most in (None, 6):
        monkeypatch.setattr(Dispatch, "of", lambda used, block, _, most=most: of(used, block, most))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            sparse = mixed(experts, hidden, weights, used)
        for first, second in zip(sparse, dense, strict=True):
            near = 1e-5 if precision == torch.float32 else 0.05 * float(second.abs().max())
            torch.testing.assert_close(first.float(), second, atol=near, rtol=max(near, 1e-5))


def test_a_result_that_is_not_finite_reaches_its_own_rows_alone() -> None:
    weights, used = drawn(2, 1)
    experts = made_of(EXPERTS, 8, (8,), compute="grouped")
    with torch.no_grad():
        experts.layers[0].weight[2] = float("nan")  # type: ignore[index, union-attr]
    out = experts.mix(torch.randn(ROWS, 8), weights, used)
    assert torch.equal(out.isnan().any(2).any(1), used[:, 2])


def test_nothing_used_gives_zeros() -> None:
    out = made_of(3, 7, (9, 5)).mix(torch.randn(8, 7), torch.zeros(8, 2, 3), torch.zeros(8, 3, dtype=torch.bool), True)
    assert torch.equal(out, torch.zeros(8, 2, 5))


@pytest.mark.parametrize(
    ("units", "k", "sparse"), [((9, 5), 3, False), ((9, 5), 1, True), ((300, 200), 3, True), ((300, 200), 1, True)]
)
def test_small_experts_that_most_rows_use_run_on_all_rows(units: tuple[int, ...], k: int, sparse: bool) -> None:
    used, hidden = drawn(k, 2)[1][:, :4], torch.zeros(ROWS, 150)
    used[:, :k] = True
    assert made_of(4, 150, units).uses_grouped(hidden, used, None) == sparse
    assert made_of(4, 150, units, compute="grouped").uses_grouped(hidden, used, None)
    assert not made_of(4, 150, units, compute="dense").uses_grouped(hidden, used, None)


def test_a_gpu_runs_them_sparse_where_it_has_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        used = torch.empty(ROWS, EXPERTS, dtype=torch.bool, device="cuda")
        hidden = torch.empty(ROWS, 8, dtype=torch.bfloat16, device="cuda")
        for capability, has_it in (((9, 0), True), ((10, 0), True), ((8, 0), False), ((12, 0), False)):
            monkeypatch.setattr(matmul, "_capability", lambda device, actual=capability: actual)
            for compute, most, sparse in (("auto", 2, True), ("auto", 4, False), ("grouped", 4, True)):
                experts = made_of(EXPERTS, 8, (8,), compute=compute)
                assert experts.uses_grouped(hidden, used, most) == (has_it and sparse)
                assert not experts.uses_grouped(hidden.float(), used, most)
                assert not experts.uses_grouped(hidden, used, None)


def test_a_gpu_accepts_the_operands() -> None:
    """Torch checks types, strides and alignment before it looks at any number."""
    with FakeTensorMode():
        used = torch.empty(ROWS, EXPERTS, dtype=torch.bool, device="cuda")
        hidden = torch.empty(ROWS, 14, dtype=torch.bfloat16, device="cuda")
        dispatch = Dispatch.of(used, GROUPED_MM_ALIGNMENT, 2)
        places = hidden[dispatch.rows]
        out = dispatch.multiply(places, torch.empty(EXPERTS, 20, 14, device="cuda"), torch.empty(EXPERTS, 20).cuda())
        assert (out.shape, out.dtype, out.device.type) == ((len(places), 20), torch.bfloat16, "cuda")
        of_rows = dispatch.combine(out, torch.empty(ROWS, 3, EXPERTS, device="cuda"))
        assert (of_rows.shape, of_rows.dtype) == ((ROWS, 3, 20), torch.bfloat16)


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
def test_a_model_makes_room_for_all_that_its_rule_chooses(
    monkeypatch: pytest.MonkeyPatch, name: str, training: bool
) -> None:
    message: list[int | None] = []

    def uses_grouped(experts: Experts, hidden: Tensor, used: Tensor, most: int | None) -> bool:
        message.append(most)
        assert most is None or int(used.sum(1).max()) <= most
        return False

    monkeypatch.setattr(levels.Experts, "uses_grouped", uses_grouped)
    settings = small_settings(
        experts={"units": (16, 8)} | SETTINGS[name]["experts"],
        gates={"routing": "top_k", "top_k": 2} | SETTINGS[name].get("gates", {}),
    )
    mixture = build_mixture(6, [[-1.0, 1.0]], 0, 3, settings).train(training)
    mixture(torch.randn(ROWS, 6), torch.empty(ROWS, 0))
    assert all((most is None) == (name == "experts choose in training" and training) for most in message)
    assert message
