"""First weights of a model: base rates, or those of another model, whose experts may be edited.

A model may start from another one whose features have since been extended by further days.

Dense weights and the table rows of ids that the other model knew are copied. An id that is new to the vocabulary starts
as a copy of the hashed bucket in which the other model looked it up. So the first outputs are, for all rows, those of
the other model. Optimizers start afresh, so the first steps are as large as in any training.
"""

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mmoe_rec.errors import UserError
from mmoe_rec.features.layout import TaskOutput
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.model.mmoe import Towers
from mmoe_rec.model.model_layout import EmbeddingTable, ModelLayout
from mmoe_rec.model.tables import has_int8_weights, used_tables
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.settings.load import describe_errors
from mmoe_rec.settings.model import Model
from mmoe_rec.settings.sections import diff_settings

# Settings without a weight of their own, by the last part of their name.
_FREE = frozenset({"dropout", "conditional_on"})
_FREE |= {"top_k", "random_top_k", "serving_top_k", "noise", "compute"}
_FREE |= {"balance", "balance_weight", "bias_rate", "z_loss", "ramp_steps"}


class WarmStart:
    """The weights of an artifact folder, as first weights of a model for features that grew from its own.

    structure: the `model` section that the artifact was made with; prepared, layout, settings: features, layout and
    `model` section of the model that is to start. Raises UserError where the model can't be read, or a difference
    besides new ids keeps its weights from fitting.
    """

    def __init__(
        self, folder: Path, structure: Model, prepared: FeatureFolder, layout: ModelLayout, settings: Model
    ) -> None:
        self.folder, self.layout = folder, layout
        with _weights(folder) as weights:
            if has_int8_weights(weights.keys()):
                raise UserError(
                    f"the model in '{folder}' is an export in int8, which is too coarse to be trained on: start from "
                    "the model that it was made from"
                )
        before = ModelLayout.read(folder)
        old = FeaturePipeline.load(folder / "features", stores=False)
        new = FeaturePipeline.load(prepared.serving, stores=False)
        described = _describe(old, before, structure), _describe(new, layout, settings)
        found = next(_misfits(*described, old, new), None)
        if found is not None:
            raise UserError(
                f"the model in '{folder}' can't be started from: {found}; start from a model of the features that "
                "these were extended from, or train without --from"
            )
        self._known = {table.name: table.rows for table in before.tables}
        # Table -> (rows that are new,) int64 row of the old table that each is a copy of.
        self._copied = {
            name: known.encode(new.vocabularies[name].ids[len(known.ids) :]) for name, known in old.vocabularies.items()
        }

    def rows(self, table: EmbeddingTable, first: int, last: int) -> Tensor:
        """First weights of rows first..last (exclusive) of a table: (last - first, dim) float32; reads no others."""
        known = self._known[table.name]
        copied = self._copied.get(table.name, np.empty(0, np.int64))[max(0, first - known) : max(0, last - known)]
        parts = []
        with _weights(self.folder) as weights:
            stored = weights.get_slice(f"tables.embedding_bags.{table.name}.weight")
            if first < known:
                parts.append(stored[first : min(last, known)])
            if len(copied):
                parts.append(stored[: int(copied.max()) + 1][torch.from_numpy(copied)])
        return torch.cat(parts) if parts else torch.empty(0, table.dim)

    @torch.no_grad()
    def fill_dense(self, model: nn.Module) -> None:
        """Gives all but the tables of a `RankingModel` their first weights."""
        mixture = model.get_submodule("mixture")
        with _weights(self.folder) as weights:
            mixture.load_state_dict({name: weights.get_tensor(f"mixture.{name}") for name in mixture.state_dict()})

    @torch.no_grad()
    def fill(self, model: nn.Module) -> None:
        """Gives a whole `RankingModel` over `PlainTables` its first weights."""
        self.fill_dense(model)
        for table in used_tables(self.layout):
            weight = model.get_parameter(f"tables.embedding_bags.{table.name}.weight")
            weight.copy_(self.rows(table, 0, table.rows))


@contextmanager
def _weights(folder: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / "weights.safetensors", framework="pt") as weights:
            yield weights
    except (OSError, SafetensorError) as error:
        raise UserError(f"the weights of the model in '{folder}' can't be read: {error}") from None


def _describe(pipeline: FeaturePipeline, layout: ModelLayout, model: Model) -> dict[str, Any]:
    """All that weights depend on, besides what features were fitted to."""
    tree = copy.deepcopy(pipeline.schema.identity())
    features: dict[str, dict[str, Any]] = tree["features"]
    for table in layout.tables:
        features[table.feature or table.name]["dim"] = table.dim
    for attention in layout.attention:
        features[attention.history]["pooling"] = "attention"
    inputs = [each.name for each in (*layout.ids, *layout.dense)]
    model_tree = model.model_dump(mode="json", exclude={"trees"})
    return {**tree, "model": model_tree, "inputs": inputs, "outputs": [task.name for task in layout.tasks]}


def _misfits(one: dict[str, Any], other: dict[str, Any], old: FeaturePipeline, new: FeaturePipeline) -> Iterator[str]:
    """Yield each difference that keeps weights from fitting, as a part of a sentence."""
    for where, was, now in diff_settings(one, other):
        if where.rpartition(".")[2] not in _FREE:
            yield f"its '{where}' is {was}, and {now} in the settings or features"
    for name, vocabulary in old.vocabularies.items():
        if not vocabulary.ids.equals(new.vocabularies[name].ids[: len(vocabulary.ids)]):
            yield f"the ids of its feature '{name}' have other rows than in the features"
    fitted, now_fitted = (
        {name: encoder.state().values for name, encoder in each.encoders.items()} | each.label_scales
        for each in (old, new)
    )
    for name, values in fitted.items():
        if values != now_fitted[name]:
            yield f"its feature or task '{name}' was fitted to other rows (means, deviations or edges differ)"


# Towers begin at the base rates: a new model predicts for every row what the training rows say on average. From a bias
# of 0 a short training never gets down to a label that one row in 200 has.


def base_rates(manifest: Mapping[str, Any], tasks: Sequence[TaskOutput], weighted: bool) -> list[float | None]:
    """How often each task's label is 1 among the training rows in which it is observed, as encoding counted them;
    None for a regression, and where no label was observed. Half a row of each class, of mean weight, is added, so no
    rate is 0 or 1.

    manifest: that of the features; weighted: rows count by their weight / the rate at which they were sampled, as in
    the loss, or else by their weight alone.
    """
    counts = manifest["splits"]["train"]
    rows, positives = ("weight", "weighted_sum") if weighted else ("row_weight", "row_weighted_sum")
    rates = []
    for task in tasks:
        observed, positive = counts[rows].get(task.name, 0), counts[positives].get(task.name, 0)
        known = observed > 0 and not task.kind.is_linear
        row = observed / counts["observed"][task.name] if known else 1.0
        rates.append((positive + 0.5 * row) / (observed + row) if known else None)
    return rates


@torch.no_grad()
def set_base_rates(towers: Towers, tasks: Sequence[TaskOutput], rates: Sequence[float | None]) -> None:
    """Sets the towers' last biases to the logits of the rates; 0 where there is none, a linear kind's mean label."""
    for bias, task, rate in zip(towers.output_bias[:, 0], tasks, rates, strict=True):
        bias.fill_(0.0 if rate is None else task.kind.logits(torch.tensor(rate, dtype=torch.float64)))


# Experts of a trained model are added, removed or taken out of use, on its weights and without training.
#
# Only experts that all tasks share can be added and removed; in a model of several levels, at all levels alike.
#
# Adding under soft gates that serve with all experts changes no output: a copy takes over half of an expert's weight,
# as ln 2 is subtracted from the gate's logits of both. As the two would get the same gradient for ever, a little noise
# is added to the weights of one and subtracted from those of the other. Where gates choose experts, half a probability
# may not be chosen, so an added expert begins out of use (its ramp is 1), and training lets it in.


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
    soft = model.gates.rule.selects_all and model.gates.serving_top_k is None
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
        raise UserError("; ".join(describe_errors(error, lambda _: f"with {count} shared experts"))) from None
