"""A small layout with all kinds of inputs, and random rows in it, for tests of batches, model and training."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mmoe_rec.features.layout import AttentionHistory, DenseInput, EncodedInputs, IdInput
from mmoe_rec.model.mmoe import RankingModel, build_model
from mmoe_rec.model.model_layout import EmbeddingTable, ModelLayout, ModelTask
from mmoe_rec.point_in_time.arrays import Ragged
from mmoe_rec.settings.model import Model
from tests.reference import model as reference

LAYOUT = ModelLayout(
    # Widths and sizes differ so that a sharding plan moves the tables out of layout order.
    tables=(
        EmbeddingTable("t0", 40, 4),
        EmbeddingTable("t1", 90, 8),
        EmbeddingTable("item", 60, 16),
        EmbeddingTable("city", 200, 8, oov_buckets=3),
        EmbeddingTable("ages", 9, 16),
        EmbeddingTable("t4", 30, 4),
    ),
    ids=(
        IdInput("user", "t0"),
        IdInput("tags", "t1", is_list=True),
        IdInput("item", "item"),
        IdInput("history", "item", is_list=True),
        IdInput("city", "city"),
        IdInput("history_city", "city", is_list=True, feature="history"),
        IdInput("history_ages", "ages", is_list=True, feature="history"),
        IdInput("slot", "t4", placement=True),
    ),
    dense=(
        DenseInput("age", edges=(-1.0, -0.2, 0.5, 2.0)),
        DenseInput("position", placement=True),
        DenseInput("price", edges=(-0.5, 1.0)),
    ),
    tasks=(
        ModelTask("click", "binary", "engagement", 1.0, 1.0),
        ModelTask("like", "binary", "satisfaction", 2.0, 0.5),
        ModelTask("rating", "regression", "satisfaction", 0.5, 2.0, mean=0.4, std=0.7),
    ),
    attention=(AttentionHistory("history", 4),),
)
KINDS = [task.kind for task in LAYOUT.tasks]


def random_rows(rows: int, seed: int = 0, layout: ModelLayout = LAYOUT) -> tuple[EncodedInputs, np.ndarray]:
    """Rows of a layout, and labels (rows, T) of which about a third are unobserved (NaN)."""
    random = np.random.default_rng(seed)
    ids: dict[str, np.ndarray | Ragged] = {}
    for item in layout.ids:
        size = layout.table(item.table).rows
        if item.is_list:
            events = ids.get(item.feature)  # what they hold besides comes later in a layout
            lengths = events.lengths if isinstance(events, Ragged) else random.integers(0, 5, rows).astype(np.int32)
            ids[item.name] = Ragged(random.integers(0, size, lengths.sum()), lengths)
        else:
            ids[item.name] = random.integers(0, size, rows)
    dense = random.normal(size=(rows, len(layout.dense))).astype(np.float32)
    labels = random.integers(0, 2, (rows, len(layout.tasks))).astype(np.float32)
    labels[random.random(labels.shape) < 1 / 3] = np.nan
    return EncodedInputs(ids, dense), labels


def is_weight(name: str) -> bool:
    """Whether an entry of a model's state is a weight, not what gates keep besides (which is all 0 at first)."""
    return not name.endswith(("masked", "ramp", "selection_bias"))


def small_model(tables: nn.Module, layout: ModelLayout = LAYOUT, **changes: object) -> RankingModel:
    """A model of a few units, with dense weights that are the same on every call.

    changes: settings of the model section, such as `experts={"count": 4}`.
    """
    model = build_model(layout, small_settings(**changes), tables, seed=5)
    generator = torch.Generator().manual_seed(6)
    for name, weight in model.mixture.named_parameters():
        if name.startswith("histories.") and not weight.any():  # which would hide all else of an attention
            weight.data.normal_(0.0, 0.5, generator=generator)
    return model


def small_settings(**changes: Any) -> Model:
    """A model section of a few units."""
    sizes: dict[str, Any] = {
        "bottom": {"units": (12,), "piecewise": False, "cross_layers": 0},
        "experts": {"count": 3, "units": (8, 6)},
        "towers": {"units": (5,)},
        "placement": {"units": (4,), "dropout": 0.0},
    }
    own = {name: sizes.get(name, {}) | changes.get(name, {}) for name in {**sizes, **changes}}
    return Model.model_validate(own)


def reference_weights(model: RankingModel) -> dict[str, Tensor]:
    """The model's weights in float64, for `reference_logits` and its gradients."""
    return {name: item.detach().double().requires_grad_() for name, item in model.named_parameters()}


def reference_logits(
    weights: dict[str, Tensor], encoded: EncodedInputs, layout: ModelLayout, settings: Model, placement: bool = True
) -> Tensor:
    """(B, T) float64 logits by the reference; a regression's is in its own unit."""

    def ids_of(name: str, row: int) -> np.ndarray:
        ids = encoded.ids[name]
        return ids.take(np.array([row])).values if isinstance(ids, Ragged) else ids[[row]]

    tables = {item.name: weights[f"tables.embedding_bags.{item.table}.weight"] for item in layout.ids}
    lengths = {item.history: item.length for item in layout.attention}

    def look(name: str, row: int) -> Tensor:
        own = [item.name for item in layout.ids if item.feature == name]
        counterparts = [name for name in own if (of := layout_table[name]) in encoded.ids and of != name]
        return reference.attend(
            {key.removeprefix(f"mixture.histories.{name}."): item for key, item in weights.items()},
            [
                torch.cat([tables[part][ids_of(part, row)[place]] for part in own])
                for place in range(len(ids_of(name, row)))
            ],
            torch.cat([tables[part][ids_of(layout_table[part], row)[0]] for part in counterparts]),
            [
                [ids_of(part, row)[place] == ids_of(layout_table[part], row)[0] != 0 for part in counterparts]
                for place in range(len(ids_of(name, row)))
            ],
            lengths[name],
        )

    layout_table = {item.name: item.table for item in layout.ids}

    def inputs(of_placement: bool) -> Tensor:
        parts = []
        for item in layout.ids:
            if item.placement == of_placement and (item.feature not in lengths or item.feature == item.name):
                rows = [reference.embed(tables[item.name], ids_of(item.name, row)) for row in range(len(encoded))]
                if item.name in lengths:
                    rows = [row + look(item.name, number) for number, row in enumerate(rows)]
                parts.append(torch.stack(rows))
        columns = [place for place, item in enumerate(layout.dense) if item.placement == of_placement]
        return torch.cat([*parts, torch.from_numpy(encoded.dense[:, columns]).double()], dim=1)

    placement = placement and layout.width(placement=True) > 0
    mixture = reference.Mixture(
        {name.removeprefix("mixture."): item for name, item in weights.items() if name.startswith("mixture.")},
        tasks=len(layout.tasks),
        shared=settings.experts.count,
        own=settings.experts.task_count,
        edges=[item.edges if settings.bottom.piecewise else () for item in layout.dense if not item.placement],
        rule=settings.gates.routing,
        k=settings.gates.top_k,
        activation=getattr(functional, settings.experts.activation),
        normalize=settings.experts.normalize,
        raw_inputs=settings.experts.raw_inputs,
    )
    logits = mixture.forward(inputs(False), inputs(True) if placement else None)
    scales, means = (torch.tensor([getattr(task, name) for task in layout.tasks]) for name in ("std", "mean"))
    return logits * scales + means
