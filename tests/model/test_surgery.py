"""Adding, removing and masking experts of a model, by what it then predicts."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mmoe_rec.errors import UserError
from mmoe_rec.model.mmoe import Mixture, build_mixture
from mmoe_rec.model.warm_start import add_experts, mask_expert, remove_expert
from mmoe_rec.settings.model import Model
from tests.model.examples import small_settings

TASKS, WIDTH = 2, 6
KINDS: dict[str, dict[str, Any]] = {
    "soft": {},
    "task experts": {"experts": {"count": 3, "task_count": 2}},
    "levels": {"experts": {"count": 3, "task_count": 1, "levels": 2}},
    "one gate": {"gates": {"per_task": False}},
    "top_k": {"gates": {"routing": "top_k", "top_k": 2}},
    "soft, served with fewer": {"gates": {"serving_top_k": 2}},
    "shared_route": {"gates": {"routing": "shared_route", "top_k": 2}},
}
SOFT = ("soft", "task experts", "levels", "one gate")


def built(model: Model, state: dict[str, Tensor] | None = None) -> Mixture:
    torch.manual_seed(0)
    made = build_mixture(WIDTH, [], 0, TASKS, model)
    if state is None:
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.mul_(2)
    else:
        made.load_state_dict({name.removeprefix("mixture."): item for name, item in state.items()})
    return made.eval()


def state_of(made: Mixture) -> dict[str, Tensor]:
    return {f"mixture.{name}": item.clone() for name, item in made.state_dict().items()}


def outputs(made: Mixture, x: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = made(x, torch.empty(len(x), 0)).logits
    return logits


def rows() -> Tensor:
    return torch.randn(300, WIDTH, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", KINDS)
def test_adding_changes_no_output(kind: str) -> None:
    model = small_settings(**KINDS[kind])
    made = built(model)
    state, changed = add_experts(state_of(made), model, [1, 1, 0])
    assert changed.experts.count == model.experts.count + 3
    first = next(item for name, item in state.items() if name.endswith("experts.0.layers.0.weight"))
    assert not torch.equal(first[model.experts.count], first[1]), "the same gradients would keep them alike"
    edited = built(changed, state)
    assert (outputs(edited, rows()) - outputs(made, rows())).abs().max() <= 1e-6
    weights = edited(rows(), torch.empty(300, 0)).routings[-1].weights
    # A gate that chooses does not use what was added; a soft one shares the original's weight with it.
    assert weights[:, :, model.experts.count :][:, :, :3].any().item() == (kind in SOFT)


@pytest.mark.parametrize("kind", KINDS)
def test_removing_equals_masking(kind: str) -> None:
    model = small_settings(**KINDS[kind])
    state = state_of(built(model))
    masked = built(model, mask_expert(state, model, 1))
    removed, smaller = remove_expert(state, model, 1)
    assert smaller.experts.count == model.experts.count - 1
    torch.testing.assert_close(outputs(built(smaller, removed), rows()), outputs(masked, rows()), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(outputs(masked, rows()), outputs(built(model, state), rows()), atol=1e-6)


def test_what_cannot_be_edited_is_named() -> None:
    model = small_settings(experts={"count": 2, "task_count": 1}, gates={"routing": "top_k", "top_k": 3})
    state = state_of(built(model))
    with pytest.raises(UserError, match=r"Expert 2 can't be removed\. .* are 0 to 1 \(later numbers are experts of"):
        remove_expert(state, model, 2)
    with pytest.raises(UserError, match=r"with 1 shared experts: gates\.top_k is 3, but a gate has only 2 experts"):
        remove_expert(state, model, 0)
    with pytest.raises(UserError, match=r"Expert 9 doesn't exist\. Mask one of 0 to 3"):
        mask_expert(state, model, 9)
    with pytest.raises(UserError, match=r"Expert 0 is masked\. Copy another expert"):
        add_experts(mask_expert(state, model, 0), model, [0])
    levels = small_settings(experts={"count": 1, "task_count": 1, "levels": 2})
    with pytest.raises(UserError, match="Expert 0 is the only expert shared by all tasks"):
        remove_expert(state_of(built(levels)), levels, 0)
    none = small_settings(experts={"count": 0, "task_count": 2})
    with pytest.raises(UserError, match="Expert 0 can't be copied: the model has no experts shared by all tasks"):
        add_experts(state_of(built(none)), none, [0])
    many = small_settings(experts={"count": 1024, "units": [1]})
    with pytest.raises(UserError, match=r"with 1025 shared experts: 'experts\.count' must be less than or equal"):
        add_experts(state_of(built(many)), many, [0])
    two = small_settings(experts={"count": 2, "task_count": 0})
    masked = mask_expert(state_of(built(two)), two, 0)
    with pytest.raises(UserError, match="Expert 1 can't be masked: it is the last expert in use of a gate"):
        mask_expert(masked, two, 1)
    with pytest.raises(UserError, match="Expert 1 can't be removed: it is the last expert in use of a gate"):
        remove_expert(masked, two, 1)
    own = small_settings(experts={"count": 1, "task_count": 1})
    masked = mask_expert(mask_expert(state_of(built(own)), own, 1), own, 2)
    with pytest.raises(UserError, match="Expert 0 can't be masked: it is the last expert in use of a gate"):
        mask_expert(masked, own, 0)
    alone = small_settings(experts={"count": 1})
    with pytest.raises(UserError, match="Expert 0 is the only expert of a gate"):
        remove_expert(state_of(built(alone)), alone, 0)
