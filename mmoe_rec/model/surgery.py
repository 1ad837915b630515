"""Adds experts to a trained model, removes them or takes them out of use, on its weights and without training.

Only experts that all tasks share can be added and removed; in a model of several levels, at all levels alike.

Adding under soft gates that serve with all experts changes no output: a copy takes over half of an expert's weight, as
ln 2 is subtracted from the gate's logits of both. As the two would get the same gradient for ever, a little noise is
added to the weights of one and subtracted from those of the other. Where gates choose experts, half a probability may
not be chosen, so an added expert begins out of use (its ramp is 1), and training lets it in.
"""

import math
import re
from collections.abc import Callable, Iterable

import torch
from pydantic import ValidationError
from torch import Tensor

from mmoe_rec.errors import UserError
from mmoe_rec.settings.load import explain
from mmoe_rec.settings.model import Model

State = dict[str, Tensor]
# As a share of each weight: soft gates' outputs change by twice its square.
NOISE = 1e-4
NOISE_OUT_OF_USE = 0.01

_EXPERT = re.compile(r"mixture\.levels\.\d+\.experts\.0\.layers\.\d+\.(weight|bias)")
_GATE = re.compile(r"mixture\.levels\.\d+\.gates\.(linear|route)\.(weight|bias)")
_PER_EXPERT = re.compile(r"mixture\.levels\.\d+\.gates\.(masked|ramp|selection_bias)")


def add_experts(state: State, model: Model, copied: Iterable[int], seed: int = 0) -> tuple[State, Model]:
    """A copy of each given expert, numbered after the shared ones, and the `model` section that fits.

    Raises UserError for an expert that is not shared or is out of use.
    """
    generator = torch.Generator().manual_seed(seed)
    soft = model.gates.rule.mixes_all and model.gates.serving_top_k is None
    for expert in copied:
        _check_shared(model, expert, "copied")
        if any(state[name][expert] for name in state if name.endswith("gates.masked")):
            raise UserError(f"expert {expert} is out of use: copy another one")
        count = model.experts.count
        state = _added(state, expert, count, soft, generator)
        model = _with_count(model, count + 1)
    return state, model


def remove_expert(state: State, model: Model, expert: int) -> tuple[State, Model]:
    """The model without a shared expert; gates give its weight to the others, in proportion.

    Raises UserError where too few would be left, or none of a gate in use.
    """
    _check_shared(model, expert, "removed")
    if model.experts.count + model.experts.task_count == 1:
        raise UserError(f"expert {expert} is the only one of a gate: add one before it is removed")
    if model.experts.count == 1 and model.experts.levels > 1:
        raise UserError(f"expert {expert} is the only one that all tasks share in each level: add one first")

    def without(values: Tensor, dim: int) -> Tensor:
        kept = [index for index in range(values.shape[dim]) if index != expert]
        return values.index_select(dim, torch.tensor(kept))

    state, model = _changed(state, without), _with_count(model, model.experts.count - 1)
    _check_in_use(state, model, expert, "removed")
    return state, model


def mask_expert(state: State, model: Model, expert: int) -> State:
    """The model with an expert out of use, its weights kept.

    Raises UserError for one that it does not have, and where a gate would have none in use.
    """
    masks = [name for name in state if name.endswith("gates.masked")]
    total = len(state[masks[0]])
    if not 0 <= expert < total:
        raise UserError(f"there is no expert {expert} to mask: the model has 0 to {total - 1}")
    state = state | {name: state[name].index_fill(0, torch.tensor([expert]), 1) for name in masks}
    _check_in_use(state, model, expert, "put out of use")
    return state


def _added(state: State, expert: int, count: int, soft: bool, generator: torch.Generator) -> State:

    def with_copy(values: Tensor, dim: int) -> Tensor:
        before, after = values.split([count, values.shape[dim] - count], dim)
        return torch.cat([before, values.narrow(dim, expert, 1), after], dim)

    changed = _changed(state, with_copy)
    for name, values in changed.items():
        if _EXPERT.fullmatch(name):
            size = NOISE if soft else NOISE_OUT_OF_USE
            noise = size * values[expert] * torch.randn(values[expert].shape, generator=generator)
            values[count] += noise
            if soft:
                values[expert] -= noise
        elif soft and _GATE.fullmatch(name) and name.endswith("linear.bias"):
            values[:, [expert, count]] -= math.log(2)
        elif not soft and name.endswith("gates.ramp"):
            values[count] = 1.0
    return changed


def _changed(state: State, change: Callable[[Tensor, int], Tensor]) -> State:
    """The state with every tensor that has a dimension for experts changed along it."""
    first = {
        name: change(each, 0) for name, each in state.items() if _EXPERT.fullmatch(name) or _PER_EXPERT.fullmatch(name)
    }
    return state | first | {name: change(each, 1) for name, each in state.items() if _GATE.fullmatch(name)}


def _check_shared(model: Model, expert: int, what: str) -> None:
    count, own = model.experts.count, model.experts.task_count
    if count == 0:
        raise UserError(f"expert {expert} can't be {what}: the model has no experts that all tasks share")
    if not 0 <= expert < count:
        hint = " (later numbers are experts of single tasks)" if own else ""
        raise UserError(f"expert {expert} can't be {what}: the experts that all tasks share are 0 to {count - 1}{hint}")


def _check_in_use(state: State, model: Model, expert: int, what: str) -> None:
    """A gate without experts in use would predict the same for every candidate."""
    shared, own = model.experts.count, model.experts.task_count
    for name in (name for name in state if name.endswith("gates.masked")):
        in_use = (state[name] == 0) & (state[name.replace("masked", "ramp")] < 1)
        of_tasks = in_use[shared:].view(-1, own).any(1).all() if own else False
        if not (in_use[:shared].any() or of_tasks):
            raise UserError(f"expert {expert} can't be {what}: it is the last one of a gate in use")


def _with_count(model: Model, count: int) -> Model:
    """Raises UserError where the settings do not allow this number."""
    tree = model.model_dump()
    tree["experts"]["count"] = count
    try:
        return Model.model_validate(tree)
    except ValidationError as error:
        raise UserError("; ".join(explain(error, lambda _: f"with {count} shared experts"))) from None
