"""Ranking model with embedding tables, a shared bottom, experts, gates, towers and a placement tower.

The model is a multi-gate mixture-of-experts (Ma et al., KDD 2018) arranged like YouTube's ranking system (Zhao et al.,
RecSys 2019). Each task has a gate, which weights the experts, and a tower, which computes the task's logit. Experts and
gates read a shared hidden layer instead of the wide input. After this file, read `levels` and `routing`.

The settings also allow related architectures: shared bottom (one expert), OMoE (one gate for all tasks), CGC
(additional experts for single tasks) and PLE (several levels of experts).

The concatenated inputs are not normalized, since a LayerNorm would let one outlier rescale all other inputs.

Shapes: B rows, W width of all inputs, D dense inputs, H hidden width, G gates, E experts, U expert width, P placement
width, T tasks.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmoe_rec.batches.batch import AttentionEvents, Batch, draw_uniform
from mmoe_rec.errors import UserError
from mmoe_rec.model.attention import HistoryAttention
from mmoe_rec.model.levels import Gates, Level
from mmoe_rec.model.matmul import Linear, StackedLinear, cast_for_matmul
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.model.routing import Routing
from mmoe_rec.model.tables import mean_embeddings, pool_histories
from mmoe_rec.model.trees import Trees
from mmoe_rec.settings import model as section

# torchrec's pipeline traces the model. Keep these functions as single nodes of the graph.
torch.fx.wrap("mean_embeddings")
torch.fx.wrap("pool_histories")


class Outputs(NamedTuple):
    """Outputs of the model for B rows.

    Attributes:
        logits: (B, T) float32. A `RankingModel` with a regression returns float64, because float32 may be too coarse
            for large labels.
        routings: Routing of each level of experts, from first to last.
    """

    logits: Tensor
    routings: tuple[Routing, ...]


class RankingModel(nn.Module):
    """Model that returns the logits of all tasks for a batch. A regression's logit is its prediction.

    Attributes:
        trees: Boosted trees whose logits are blended with the logits of the mixture. None until they are trained.
    """

    trees: Trees | None = None

    def __init__(self, tables: nn.Module, layout: ModelLayout, mixture: "Mixture") -> None:
        """Create the model.

        Args:
            tables: `PlainTables` (IDs as `KeyedIds`) or torchrec's collection (IDs as KeyedJaggedTensor).
            layout: Inputs and outputs.
            mixture: Dense part.
        """
        super().__init__()
        self.tables = tables
        self.dims = {part.name: layout.table(part.table).dim for part in [*layout.ids, *layout.lookup_inputs()]}
        self.histories = [(part.length, [name for name, _ in layout.history_inputs(part)]) for part in layout.attention]
        self.id_names = {placement: layout.id_names(placement) for placement in (False, True)}
        is_placement = torch.tensor([part.placement for part in layout.dense], dtype=torch.bool)
        self.dense_columns = nn.Buffer((~is_placement).nonzero()[:, 0], persistent=False)
        self.placement_columns = nn.Buffer(is_placement.nonzero()[:, 0], persistent=False)
        dtype = torch.float64 if any(task.kind.is_linear for task in layout.tasks) else torch.float32
        stds, means = zip(*((task.std, task.mean) for task in layout.tasks), strict=True)
        self.scale = nn.Buffer(torch.tensor(stds, dtype=dtype), persistent=False)
        self.mean = nn.Buffer(torch.tensor(means, dtype=dtype), persistent=False)
        self.mixture = mixture
        self.names = [task.name for task in layout.tasks]
        self.width = layout.width(placement=False)
        self.tree_id_names = layout.single_ids()

    @property
    def visible_experts(self) -> Tensor:
        """Experts of the last level that each task sees, (T, E) bool."""
        visible = self.mixture.gates[-1].visible
        return visible.expand(len(self.names), -1) if len(visible) == 1 else visible

    @property
    def experts_in_use(self) -> Tensor:
        """Experts of the last level that each task sees and that are in use (see `Gates.in_use`), (T, E) bool."""
        return self.visible_experts & self.mixture.gates[-1].in_use

    def forward(self, batch: Batch, top_k: int | None = None, usable: Tensor | None = None) -> Outputs:
        """Return the logits and routings of a batch. Over sharded tables, all ranks must call it together.

        Args:
            batch: B rows.
            top_k: As in `Mixture.forward`.
            usable: As in `Mixture.forward`.
        """
        inputs, placement, events = self._look_up(batch)
        return self.forward_inputs(inputs, placement, top_k, usable, events)

    def concat_inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the inputs (B, W) float32 and the placement inputs (B, P) of a batch.

        Embeddings come first, then dense inputs, in layout order. If the model has trees, the IDs that trees may read
        follow as numbers, which adds columns to W.
        """
        inputs, placement, events = self._look_up(batch)
        if events is not None:
            assert self.mixture.histories is not None
            inputs = self.mixture.histories(inputs, events, events.vectors)
        return inputs, placement

    def _look_up(self, batch: Batch) -> tuple[Tensor, Tensor, AttentionEvents | None]:
        """Return inputs with the mean of each history, placement inputs, and the events (None without histories)."""
        pooled = self.tables(batch.ids)
        embeddings = mean_embeddings(pooled, self.dims, batch.ragged_inputs, batch.pooling_weights)  # Name -> (B, dim).
        events = None
        if self.histories:
            assert batch.events is not None
            embeddings, events = pool_histories(embeddings, batch.events, self.histories, batch.dense)
        inputs = _side_by_side(embeddings, self.id_names[False], batch.dense, self.dense_columns)
        if self.trees is not None:
            ids = [batch.ids.column(name)[0][:, None] for name in self.tree_id_names]
            inputs = torch.cat([inputs, *(column.to(inputs) for column in ids)], dim=1)
        return inputs, _side_by_side(embeddings, self.id_names[True], batch.dense, self.placement_columns), events

    def forward_inputs(
        self,
        inputs: Tensor,
        placement: Tensor | None,
        top_k: int | None = None,
        usable: Tensor | None = None,
        events: AttentionEvents | None = None,
    ) -> Outputs:
        """Return the logits and routings of concatenated inputs.

        Args:
            inputs: (B, W) as in `concat_inputs`.
            placement: (B, P), which only training reads.
            top_k: As in `Mixture.forward`.
            usable: As in `Mixture.forward`.
            events: Events of the histories, None if attention has already been added to `inputs`.
        """
        network_inputs = inputs if self.trees is None else inputs[:, : self.width]
        # Index the vectors, because the tracing by torchrec's pipeline can't iterate over them.
        vectors = [] if events is None else [events.vectors[index] for index in range(len(self.histories))]
        outputs = self.mixture(network_inputs, placement, top_k, usable, *((events, *vectors) if vectors else ()))
        return self.postprocess(inputs, outputs)

    def postprocess(self, inputs: Tensor, outputs: Outputs) -> Outputs:
        """Convert the mixture's logits to label units and blend them with the trees.

        Args:
            inputs: (B, W) as in `concat_inputs`.
            outputs: Outputs of the mixture.
        """
        logits = self.to_label_units(outputs.logits)
        if self.trees is None:
            return outputs._replace(logits=logits)
        tree_logits = self.trees.logits(inputs[:, self.width - len(self.dense_columns) :], self.names)
        tree_logits = self.to_label_units(tree_logits.to(logits))
        return outputs._replace(logits=self.trees.blend(logits, tree_logits, self.names))

    def to_label_units(self, logits: Tensor) -> Tensor:
        """Convert logits (B, T) of regressions from standardized labels to the label's unit, and keep other logits."""
        if self.mean.dtype == torch.float32:
            return logits
        return torch.addcmul(self.mean, logits.to(self.mean.dtype), self.scale)


def _side_by_side(embeddings: dict[str, Tensor], names: list[str], dense: Tensor, columns: Tensor) -> Tensor:
    return torch.cat([*(embeddings[name] for name in names), dense.index_select(1, columns)], dim=1)


class Mixture(nn.Module):
    """Dense part of the model, from concatenated inputs to logits."""

    def __init__(
        self,
        bottom: "Bottom",
        levels: Sequence[Level],
        towers: "Towers",
        placement: "PlacementTower | None",
        raw_inputs: bool = False,
    ) -> None:
        """Create the dense part.

        Args:
            bottom: Shared bottom.
            levels: Levels of experts.
            towers: Towers of the tasks.
            placement: Placement tower, None without placement inputs.
            raw_inputs: Whether experts of the first level read the bottom's inputs besides the bottom's output.
        """
        super().__init__()
        self.histories: HistoryAttention | None = None
        self.bottom, self.levels, self.towers = bottom, nn.ModuleList(levels), towers
        self.placement, self.raw_inputs = placement, raw_inputs

    def expert_levels(self) -> list[Level]:
        return [module for module in self.levels if isinstance(module, Level)]

    @property
    def gates(self) -> list[Gates]:
        """Gates of each level from first to last."""
        return [level.gates for level in self.expert_levels()]

    def forward(
        self,
        inputs: Tensor,
        placement: Tensor | None,
        top_k: int | None = None,
        usable: Tensor | None = None,
        events: AttentionEvents | None = None,
        *vectors: Tensor,
    ) -> Outputs:
        """Return the logits and routings of concatenated inputs.

        Args:
            inputs: (B, W) float32.
            placement: (B, P), which only training reads.
            top_k: Experts per row and gate outside training, None for the number in the settings.
            usable: (E,) bool, the experts that may run, None for all.
            events: Events of the histories, None if attention has already been added to `inputs`.
            vectors: Embeddings of the events, as in `HistoryAttention.forward`.
        """
        if events is not None:
            assert self.histories is not None
            inputs = self.histories(inputs, events, vectors)
        hidden = self.bottom(inputs)  # (B, H)
        gate_inputs = [hidden]
        rounded = cast_for_matmul(hidden)
        expert_inputs = [torch.cat([rounded, inputs.to(rounded.dtype)], dim=1) if self.raw_inputs else rounded]
        routings = []
        for level in self.levels:
            mixed, routing = level(gate_inputs, expert_inputs, top_k, usable)  # (B, G, U)
            routings.append(routing)
            gate_inputs = expert_inputs = list(mixed.unbind(1))  # A list of G tensors (B, U).
        logits = self.towers(torch.stack(gate_inputs, dim=1) if len(self.levels) > 1 else mixed).float()  # (B, T)
        if self.training and self.placement is not None:
            logits = logits + self.placement(placement).float()
        return Outputs(logits, tuple(routings))


class Bottom(nn.Module):
    """Shared bottom below experts and gates: feature crosses, piecewise-linear encodings and hidden layers.

    Attributes:
        dense: Number of dense inputs, which are the last inputs.
        outputs: Width H of the output.
    """

    def __init__(self, inputs: int, edges: Sequence[Sequence[float]], settings: section.Bottom) -> None:
        """Create the layers.

        Args:
            inputs: Number of inputs.
            edges: For each dense input, the ascending ends of the intervals of the piecewise-linear encoding. Inputs
                with fewer than two edges aren't encoded.
            settings: Section `model.bottom`.
        """
        super().__init__()
        self.dense = len(edges)
        layers, rank = settings.cross_layers, settings.cross_rank
        self.crosses = _CrossNetwork(inputs, layers, rank) if layers else None
        piecewise_linear = settings.piecewise and any(len(boundaries) > 1 for boundaries in edges)
        self.piecewise_linear = PiecewiseLinear(edges) if piecewise_linear else None
        width = inputs + (len(self.piecewise_linear.column) if self.piecewise_linear else 0)
        self.layers = _mlp(width, settings.units, settings.dropout)
        self.outputs = settings.units[-1] if settings.units else width

    def forward(self, x: Tensor) -> Tensor:
        """Return the hidden layer (B, H) of the inputs (B, W) float32."""
        crossed = x if self.crosses is None else self.crosses(x)  # (B, W)
        if self.piecewise_linear is None:
            return self.layers(crossed)
        piecewise_linear = self.piecewise_linear(x[:, -self.dense :])
        if not self.layers:
            return torch.cat([crossed, piecewise_linear.to(crossed.dtype)], dim=1)
        first, *rest = self.layers
        hidden: Tensor = first(crossed, piecewise_linear)
        for layer in rest:
            hidden = layer(hidden)
        return hidden


class _CrossNetwork(nn.Module):
    """Feature crosses of DCN-v2 with low-rank weights (Wang et al., WWW 2021, eq. 2), (B, W) -> (B, W)."""

    def __init__(self, inputs: int, layers: int, rank: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(Linear(inputs, rank, bias=False) for _ in range(layers))
        self.up = nn.ModuleList(Linear(rank, inputs) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        crossed = x
        for down, up in zip(self.down, self.up, strict=True):
            crossed = x * up(down(crossed)) + crossed
        return crossed


class PiecewiseLinear(nn.Module):
    """Piecewise-linear encoding of numbers (Gorishniy et al., NeurIPS 2022, eq. 1).

    Each output belongs to one interval between edges. The output is 0 for numbers below the interval, 1 above, and
    linear in between. The next layer can then fit any piecewise-linear function with bends at the edges.
    """

    def __init__(self, edges: Sequence[Sequence[float]]) -> None:
        super().__init__()
        intervals = [(index, *ends) for index, boundaries in enumerate(edges) for ends in pairwise(boundaries)]
        column, low, high = zip(*intervals, strict=True) if intervals else ((), (), ())
        self.column = nn.Buffer(torch.tensor(column, dtype=torch.int64), persistent=False)
        self.slope = nn.Buffer(1.0 / (torch.tensor(high) - torch.tensor(low)), persistent=False)
        self.low = nn.Buffer(torch.tensor(low), persistent=False)

    def forward(self, numbers: Tensor) -> Tensor:
        """Encode (B, D) float32 as (B, number of all intervals) float32, without a gradient to the numbers."""
        # Subtract before scaling. The difference is exact even if the edges are close together and far from 0.
        parts = numbers.detach().index_select(1, self.column).sub_(self.low)
        return parts.mul_(self.slope).clamp_(0.0, 1.0)


def _mlp(inputs: int, units: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """Return linear layers of these widths, each followed by SiLU and optional dropout."""
    layers: list[nn.Module] = []
    for width, below in pairwise([inputs, *units]):
        layers += [Linear(width, below), nn.SiLU(), *([_RowDropout(dropout)] if dropout > 0 else [])]
    return nn.Sequential(*layers)


class _RowDropout(nn.Dropout):
    """Dropout with `draw_uniform`, so that a repeated step drops the same elements (see `batch.seeded_draws`)."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input
        return input * ((draw_uniform(input.shape, input.device) >= self.p) / (1 - self.p)).to(input.dtype)


class Towers(nn.Module):
    """T independent networks, one per task, with SiLU hidden layers and one logit."""

    def __init__(self, tasks: int, inputs: int, units: Sequence[int]) -> None:
        """Create the layers.

        Args:
            tasks: Number of tasks.
            inputs: Width U of an input.
            units: Widths of the hidden layers.
        """
        super().__init__()
        widths = [inputs, *units, 1]
        self.layers = nn.ModuleList(StackedLinear(tasks, width, below) for width, below in pairwise(widths))

    @property
    def output_bias(self) -> nn.Parameter:
        """Bias (T, 1) of each task's logit."""
        last = self.layers[-1]
        assert isinstance(last, StackedLinear)
        return last.bias

    def forward(self, gated: Tensor) -> Tensor:
        """Return the logits (B, T) from each task's mix of experts (B, T, U)."""
        hidden = gated
        for layer in self.layers[:-1]:
            hidden = functional.silu(layer(hidden))
        return self.layers[-1](hidden).squeeze(-1)


class PlacementTower(nn.Module):
    """Shallow network from placement inputs, such as the position, to a logit per task (Zhao et al., RecSys 2019).

    Only training adds these logits to the logits of the towers. The network thus absorbs the effect of position on
    labels. With probability `dropout`, training leaves out a row's placement logits, as serving always does.
    """

    def __init__(self, inputs: int, tasks: int, settings: section.Placement) -> None:
        """Create the layers.

        Args:
            inputs: Number of placement inputs P.
            tasks: Number of tasks.
            settings: Section `model.placement`.
        """
        super().__init__()
        self.dropout = settings.dropout
        self.layers = _mlp(inputs, settings.units)
        self.logits = Linear(settings.units[-1] if settings.units else inputs, tasks)

    def forward(self, placement: Tensor) -> Tensor:
        """Return the logits (B, T) of the placement (B, P)."""
        logits: Tensor = self.logits(self.layers(placement))
        if self.training and self.dropout > 0:
            logits = logits * (draw_uniform((len(logits), 1), logits.device) >= self.dropout)
        return logits


def build_model(layout: ModelLayout, model: section.Model, tables: nn.Module, seed: int = 0) -> RankingModel:
    """Build an untrained model.

    Args:
        layout: Inputs and outputs.
        model: Section `model` of the settings.
        tables: Embedding tables.
        seed: Seed of the dense part's weights.

    Raises:
        UserError: The layout has no inputs besides placement.
    """
    if layout.width(placement=False) == 0:
        raise UserError("no feature describes user, candidate or context. Add a feature with one of these roles.")
    edges = [column.edges for column in layout.dense if not column.placement]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = layout.width(placement=False), layout.width(placement=True)
        mixture = build_mixture(widths[0], edges, widths[1], len(layout.tasks), model)
        mixture.histories = HistoryAttention(layout) if layout.attention else None
    return RankingModel(tables, layout, mixture)


def build_mixture(
    inputs: int, edges: Sequence[Sequence[float]], placement_inputs: int, tasks: int, model: section.Model
) -> Mixture:
    """Build the dense part. Its weights are drawn from torch's global random generator.

    Args:
        inputs: Number of inputs.
        edges: Edges of each dense input, as in `Bottom`.
        placement_inputs: Number of placement inputs, 0 for no placement tower.
        tasks: Number of tasks.
        model: Section `model` of the settings.
    """
    bottom = Bottom(inputs, edges, model.bottom)
    hidden, mixed = bottom.outputs, model.experts.units[-1]
    levels = [Level(hidden, hidden + inputs * model.experts.raw_inputs, tasks, 0, model)]
    levels += [Level(mixed, mixed, tasks, index, model) for index in range(1, model.experts.levels)]
    towers = Towers(tasks, mixed, model.towers.units)
    placement = PlacementTower(placement_inputs, tasks, model.placement) if placement_inputs else None
    return Mixture(bottom, levels, towers, placement, model.experts.raw_inputs)
