"""Initial weights of a model, from base rates or another model, and edits of a model's experts.

A new model can start from an old model if its features extend the old model's features. Dense weights and table rows of
seen IDs are copied. An ID that is new to the vocabulary starts as a copy of the row where the old model looked it up (a
hash bucket). Before training, outputs thus equal the old model's outputs. The state of optimizers is not copied.
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

# Settings, by the last part of the name, that may differ between the models. They don't change what weights mean.
_FREE = {"dropout", "conditional_on", "top_k", "random_top_k", "serving_top_k", "noise", "compute"}
_FREE |= {"balance", "balance_weight", "bias_rate", "z_loss", "ramp_steps"}


class WarmStart:
    """Weights of an artifact folder as initial weights of a model whose features extend the artifact's features."""

    def __init__(
        self, folder: Path, old_settings: Model, prepared: FeatureFolder, layout: ModelLayout, settings: Model
    ) -> None:
        """Check that the weights match the model.

        Args:
            folder: Artifact folder.
            old_settings: Section `model` of the artifact.
            prepared: Features of the new model.
            layout: Layout of the new model.
            settings: Section `model` of the new model.

        Raises:
            UserError: The artifact can't be read, or it differs from the model by more than new IDs.
        """
        self.folder, self.layout = folder, layout
        with _weights(folder) as weights:
            if has_int8_weights(weights.keys()):
                raise UserError(
                    f"The model in '{folder}' is an int8 export, which is too coarse for training. Start from the "
                    "original model."
                )
        old_layout = ModelLayout.read(folder)
        old = FeaturePipeline.load(folder / "features", stores=False)
        new = FeaturePipeline.load(prepared.serving, stores=False)
        descriptions = _describe(old, old_layout, old_settings), _describe(new, layout, settings)
        mismatch = next(_mismatches(*descriptions, old, new), None)
        if mismatch is not None:
            raise UserError(
                f"Training can't start from the model in '{folder}': {mismatch}. Start from a model of the features "
                "before their extension, or train without --from."
            )
        self._old_rows = {table.name: table.rows for table in old_layout.tables}
        # Table -> (new rows,) int64, the old row that each new row copies.
        self._copied_rows = {
            name: vocabulary.encode(new.vocabularies[name].ids[len(vocabulary.ids) :])
            for name, vocabulary in old.vocabularies.items()
        }

    def rows(self, table: EmbeddingTable, first: int, last: int) -> Tensor:
        """Return initial weights (last - first, dim) float32 of a range of rows, without loading the whole table.

        Args:
            table: Table of the rows.
            first: First row.
            last: End of the rows, exclusive.
        """
        old_rows = self._old_rows[table.name]
        copied = self._copied_rows.get(table.name, np.empty(0, np.int64))
        copied = copied[max(0, first - old_rows) : max(0, last - old_rows)]
        parts = []
        with _weights(self.folder) as weights:
            stored = weights.get_slice(f"tables.embedding_bags.{table.name}.weight")
            if first < old_rows:
                parts.append(stored[first : min(last, old_rows)])
            if len(copied):
                parts.append(stored[: int(copied.max()) + 1][torch.from_numpy(copied)])
        return torch.cat(parts) if parts else torch.empty(0, table.dim)

    @torch.no_grad()
    def fill_dense(self, model: nn.Module) -> None:
        """Copy the initial weights of everything except the tables into a `RankingModel`."""
        mixture = model.get_submodule("mixture")
        with _weights(self.folder) as weights:
            mixture.load_state_dict({name: weights.get_tensor(f"mixture.{name}") for name in mixture.state_dict()})

    @torch.no_grad()
    def fill(self, model: nn.Module) -> None:
        """Copy all initial weights into a `RankingModel` with `PlainTables`."""
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
    """Return the settings and inputs that must be equal to copy weights (except `_FREE`), as a tree of JSON values."""
    tree = copy.deepcopy(pipeline.schema.identity())
    features: dict[str, dict[str, Any]] = tree["features"]
    for table in layout.tables:
        features[table.feature or table.name]["dim"] = table.dim
    for attention in layout.attention:
        features[attention.history]["pooling"] = "attention"
    inputs = [column.name for column in (*layout.ids, *layout.dense)]
    model_tree = model.model_dump(mode="json", exclude={"trees"})
    return {**tree, "model": model_tree, "inputs": inputs, "outputs": [task.name for task in layout.tasks]}


def _mismatches(
    old_description: dict[str, Any], new_description: dict[str, Any], old: FeaturePipeline, new: FeaturePipeline
) -> Iterator[str]:
    """Yield each difference that prevents a warm start, as a clause of a sentence."""
    for name, before, after in diff_settings(old_description, new_description):
        if name.rpartition(".")[2] not in _FREE:
            yield f"'{name}' is {before} in the model, and {after} in the settings or features"
    for name, vocabulary in old.vocabularies.items():
        if not vocabulary.ids.equals(new.vocabularies[name].ids[: len(vocabulary.ids)]):
            yield f"IDs of feature '{name}' have other rows in the model than in the features"
    fitted, now_fitted = (
        {name: encoder.state().values for name, encoder in pipeline.encoders.items()} | pipeline.label_scales
        for pipeline in (old, new)
    )
    for name, values in fitted.items():
        if values != now_fitted[name]:
            yield f"feature or task '{name}' was fitted to other rows (means, standard deviations or edges differ)"


# The last biases of the towers start at the base rates, so that a new model predicts the mean training label for every
# row. If the biases started at 0 (a rate of 50%), a short run would never reach the base rate of a rare label.


def base_rates(manifest: Mapping[str, Any], tasks: Sequence[TaskOutput], weighted: bool) -> list[float | None]:
    """Return the fraction of positive labels among the observed training rows of each task.

    The rate is None for a regression and for a task without observed labels. Half a positive and half a negative row of
    mean weight are added, so that no rate is 0 or 1.

    Args:
        manifest: Manifest of the features.
        tasks: Tasks.
        weighted: Whether to divide the rows' weights by their sampling rates, as the weighted loss does.
    """
    counts = manifest["splits"]["train"]
    rows, positives = ("weight", "weighted_sum") if weighted else ("row_weight", "row_weighted_sum")
    rates = []
    for task in tasks:
        observed, positive = counts[rows].get(task.name, 0), counts[positives].get(task.name, 0)
        has_rate = observed > 0 and not task.kind.is_linear
        row = observed / counts["observed"][task.name] if has_rate else 1.0
        rates.append((positive + 0.5 * row) / (observed + row) if has_rate else None)
    return rates


@torch.no_grad()
def set_base_rates(towers: Towers, tasks: Sequence[TaskOutput], rates: Sequence[float | None]) -> None:
    """Set the towers' last biases to the logits of the rates.

    Args:
        towers: Towers to change.
        tasks: Tasks of the towers.
        rates: Result of `base_rates`. None sets 0, which is the mean label of a regression.
    """
    for bias, task, rate in zip(towers.output_bias[:, 0], tasks, rates, strict=True):
        bias.fill_(0.0 if rate is None else task.kind.logits(torch.tensor(rate, dtype=torch.float64)))


# Experts of a trained model can be added, removed or masked without training.
#
# Only experts shared by all tasks can be added and removed, on all levels at once.
#
# An added expert is a copy of an existing expert. If soft gates serve with all experts, the copy changes outputs by
# almost nothing: original and copy each get half of the weight, since ln 2 is subtracted from both gate logits. Equal
# experts would always get equal gradients, so a little noise is added to the weights of one and subtracted from the
# weights of the other.
#
# If gates choose experts, half the probability may not suffice to be chosen, which would change outputs. The copy
# therefore starts unused (`Gates.ramp` is 1), and training phases it in.

State = dict[str, Tensor]
# Noise as a fraction of each weight. The noise of original and copy nearly cancels in soft gates: outputs change by
# about 2 * NOISE ^ 2.
NOISE = 1e-4
NOISE_OUT_OF_USE = 0.01

_EXPERT = re.compile(r"mixture\.levels\.\d+\.experts\.0\.layers\.\d+\.(weight|bias)")
_GATE = re.compile(r"mixture\.levels\.\d+\.gates\.(linear|route)\.(weight|bias)")
_PER_EXPERT = re.compile(r"mixture\.levels\.\d+\.gates\.(masked|ramp|selection_bias)")


def add_experts(state: State, model: Model, copied: Iterable[int], seed: int = 0) -> tuple[State, Model]:
    """Append a copy of each expert in `copied` to the shared experts, and return weights and section with the copies.

    Args:
        state: Weights of the model.
        model: Section `model` of the settings.
        copied: Indices of the experts to copy.
        seed: Seed of the noise by which copies and originals differ.

    Raises:
        UserError: An expert is masked or isn't shared by all tasks.
    """
    generator = torch.Generator().manual_seed(seed)
    soft = model.gates.rule.selects_all and model.gates.serving_top_k is None
    for expert in copied:
        _check_shared(model, expert, "copied")
        if any(state[name][expert] for name in state if name.endswith("gates.masked")):
            raise UserError(f"Expert {expert} is masked. Copy another expert.")
        count = model.experts.count
        state = _add_expert(state, expert, count, soft, generator)
        model = _with_count(model, count + 1)
    return state, model


def remove_expert(state: State, model: Model, expert: int) -> tuple[State, Model]:
    """Remove a shared expert, and return weights and section without the expert.

    Args:
        state: Weights of the model.
        model: Section `model` of the settings.
        expert: Index of the expert.

    Raises:
        UserError: The expert isn't shared by all tasks, or too few experts would remain in use.
    """
    _check_shared(model, expert, "removed")
    if model.experts.count + model.experts.task_count == 1:
        raise UserError(f"Expert {expert} is the only expert of a gate. Add an expert first.")
    if model.experts.count == 1 and model.experts.levels > 1:
        raise UserError(f"Expert {expert} is the only expert shared by all tasks. Add an expert first.")

    def drop(values: Tensor, dim: int) -> Tensor:
        kept = [index for index in range(values.shape[dim]) if index != expert]
        return values.index_select(dim, torch.tensor(kept))

    state, model = _change_experts(state, drop), _with_count(model, model.experts.count - 1)
    _check_in_use(state, model, expert, "removed")
    return state, model


def mask_expert(state: State, model: Model, expert: int) -> State:
    """Take an expert out of use on all levels, but keep the expert's weights. Return the changed state.

    Args:
        state: Weights of the model.
        model: Section `model` of the settings.
        expert: Index of the expert.

    Raises:
        UserError: The expert doesn't exist, or a gate would have no expert in use.
    """
    masks = [name for name in state if name.endswith("gates.masked")]
    total = len(state[masks[0]])
    if not 0 <= expert < total:
        raise UserError(f"Expert {expert} doesn't exist. Mask one of 0 to {total - 1}.")
    state = state | {name: state[name].index_fill(0, torch.tensor([expert]), 1) for name in masks}
    _check_in_use(state, model, expert, "masked")
    return state


def _add_expert(state: State, expert: int, count: int, soft: bool, generator: torch.Generator) -> State:

    def with_copy(values: Tensor, dim: int) -> Tensor:
        before, after = values.split([count, values.shape[dim] - count], dim)
        return torch.cat([before, values.narrow(dim, expert, 1), after], dim)

    changed = _change_experts(state, with_copy)
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


def _change_experts(state: State, change: Callable[[Tensor, int], Tensor]) -> State:
    """Apply a change to each tensor with a dimension for experts, along this dimension."""
    dims = {name: 0 for name in state if _EXPERT.fullmatch(name) or _PER_EXPERT.fullmatch(name)}
    dims |= {name: 1 for name in state if _GATE.fullmatch(name)}
    return state | {name: change(state[name], dim) for name, dim in dims.items()}


def _check_shared(model: Model, expert: int, action: str) -> None:
    count, own = model.experts.count, model.experts.task_count
    if count == 0:
        raise UserError(f"Expert {expert} can't be {action}: the model has no experts shared by all tasks.")
    if not 0 <= expert < count:
        hint = " (later numbers are experts of single tasks)" if own else ""
        raise UserError(
            f"Expert {expert} can't be {action}. The experts shared by all tasks are 0 to {count - 1}{hint}."
        )


def _check_in_use(state: State, model: Model, expert: int, action: str) -> None:
    """Raise UserError if a gate has no expert in use. Its task would predict the same for all candidates."""
    shared, own = model.experts.count, model.experts.task_count
    for name in (name for name in state if name.endswith("gates.masked")):
        in_use = (state[name] == 0) & (state[name.replace("masked", "ramp")] < 1)
        tasks_have_experts = in_use[shared:].view(-1, own).any(1).all() if own else False
        if not (in_use[:shared].any() or tasks_have_experts):
            raise UserError(f"Expert {expert} can't be {action}: it is the last expert in use of a gate.")


def _with_count(model: Model, count: int) -> Model:
    """Return the section with this number of shared experts, or raise UserError if the settings forbid it."""
    tree = model.model_dump()
    tree["experts"]["count"] = count
    try:
        return Model.model_validate(tree)
    except ValidationError as error:
        raise UserError("; ".join(describe_errors(error, lambda _: f"with {count} shared experts"))) from None
