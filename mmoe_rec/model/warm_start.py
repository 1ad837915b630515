"""Starts a model from the weights of another one whose features have since been extended by further days.

Dense weights and the table rows of ids that the other model knew are copied. An id that is new to the vocabulary starts
as a copy of the hashed bucket in which the other model looked it up. So the first outputs are, for all rows, those of
the other model. Optimizers start afresh, so the first steps are as large as in any training.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmoe_rec.errors import UserError
from mmoe_rec.features.layout import TaskOutput
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.model.mmoe import Towers
from mmoe_rec.model.model_layout import EmbeddingTable, ModelLayout
from mmoe_rec.model.tables import some_in_int8, used_tables
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.settings.model import Model
from mmoe_rec.settings.sections import differences

# Settings without a weight of their own, by the last part of their name.
_FREE = frozenset({"dropout", "given"})
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
            if some_in_int8(weights.keys()):
                raise UserError(
                    f"the model in '{folder}' is an export in int8, which is too coarse to be trained on: start from "
                    "the model that it was made from"
                )
        before = ModelLayout.read(folder)
        old = FeaturePipeline.load(folder / "features", memories=False)
        new = FeaturePipeline.load(prepared.serving, memories=False)
        one, other = ({"model": each.model_dump(mode="json", exclude={"trees"})} for each in (structure, settings))
        misfits = _compare(one, other, "settings"), _misfits(old, new), _widths(before, layout)
        found = next(itertools.chain(*misfits), None)
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


def _compare(one: dict[str, Any], other: dict[str, Any], place: str) -> Iterator[str]:
    """The settings on which weights depend and that differ, each as a part of a sentence."""
    for where, old, new in differences(one, other):
        if where.rpartition(".")[2] not in _FREE:
            yield f"its setting '{where}' is {old}, and {new} in the {place}"


def _misfits(old: FeaturePipeline, new: FeaturePipeline) -> Iterator[str]:
    """What besides new ids distinguishes the features, each as a part of a sentence."""
    yield from _compare(old.schema.identity(), new.schema.identity(), "features")
    for name, vocabulary in old.vocabularies.items():
        known, now = vocabulary.ids, new.vocabularies[name].ids
        if len(known) > len(now):
            yield f"its feature '{name}' knows {len(known):,} ids, the features only {len(now):,}"
        if len(known) and not known.equals(now[: len(known)]):
            yield f"the ids of its feature '{name}' have other rows than in the features"
    for name, encoder in old.encoders.items():
        if encoder.state().values != new.encoders[name].state().values:
            yield f"its feature '{name}' was fitted to other rows (means, deviations or edges differ)"
    for name, scale in old.label_scales.items():
        if scale != new.label_scales[name]:
            yield f"the labels of its task '{name}' have another mean or deviation"


def _widths(old: ModelLayout, new: ModelLayout) -> Iterator[str]:
    """What distinguishes the shapes of models on features that fit otherwise."""
    dims = {table.name: table.dim for table in new.tables}
    for table in old.tables:
        if dims.get(table.name, table.dim) != table.dim:
            where = f"features.{table.feature or table.name}.dim"
            yield f"its setting '{where}' is {table.dim}, and {dims[table.name]} in the settings"
    pools = [{each.history for each in layout.attention} for layout in (old, new)]
    for name in sorted(pools[0] ^ pools[1]):
        before, now = ("attention" if name in each else "mean" for each in pools)
        yield f"its setting 'features.{name}.pooling' is {before}, and {now} in the settings"
    if _shape(old) != _shape(new):
        yield "its inputs or tasks come in another order"


def _shape(layout: ModelLayout) -> tuple[Any, ...]:
    """All that must be equal: not the sizes of tables, nor the weights of tasks."""
    tables = tuple(replace(table, rows=0) for table in layout.tables)
    tasks = tuple((task.name, task.kind, task.mean, task.deviation) for task in layout.tasks)
    return tables, layout.ids, layout.dense, tasks


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
    rows, positives = ("weight", "weighted_sum") if weighted else ("given_weight", "given_sum")
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
