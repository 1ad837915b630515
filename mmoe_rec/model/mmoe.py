"""The ranking model: tables, shared bottom, experts, one gate and tower per task, and the placement tower.

Multi-gate mixture-of-experts (Ma et al., KDD 2018) in the arrangement of YouTube's ranking system (Zhao et al., RecSys
2019): experts and gates sit on a shared hidden layer, not on the wide input. A shared bottom is one expert, OMoE one
gate for all tasks, CGC has experts of single tasks, PLE several levels. The forward pass reads from top to bottom here,
in `levels` and in `routing`.

Shapes: B rows, W width of all inputs, D dense inputs, H hidden width, G gates, U expert width, P placement width, T
tasks.

The concatenated inputs are not normalised: dense inputs arrive standardised and embeddings start small, so that an
unseen id adds next to nothing; a LayerNorm across them would let one outlying number rescale all others.
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

# torchrec's pipeline traces the model down to its parts, and these are some.
torch.fx.wrap("mean_embeddings")
torch.fx.wrap("pool_histories")


class Outputs(NamedTuple):
    """Logits (B, T) float32 of B rows, and the routing of each level of experts, the last level's last.

    Those of a `RankingModel` with a regression are float64: a float32 in the label's own unit may have steps wider
    than the labels' deviation.
    """

    logits: Tensor
    routings: tuple[Routing, ...]


class RankingModel(nn.Module):
    """Logits of all tasks for a batch of rows; for a regression task the logit is the prediction.

    tables: `PlainTables` (ids as `KeyedIds`) or torchrec's collection (ids as KeyedJaggedTensor); the rest of the model
    is the same. State: `tables.embedding_bags.<table>.weight` and `mixture.*`. trees: beside the mixture, once it is
    trained.
    """

    trees: Trees | None = None

    def __init__(self, tables: nn.Module, layout: ModelLayout, mixture: "Mixture") -> None:
        super().__init__()
        self.tables = tables
        self.dims = {each.name: layout.table(each.table).dim for each in [*layout.ids, *layout.lookup_inputs()]}
        self.histories = [(each.length, [name for name, _ in layout.history_inputs(each)]) for each in layout.attention]
        self.id_names = {placement: layout.id_names(placement) for placement in (False, True)}
        is_placement = torch.tensor([each.placement for each in layout.dense], dtype=torch.bool)
        self.dense_columns = nn.Buffer((~is_placement).nonzero()[:, 0], persistent=False)
        self.placement_columns = nn.Buffer(is_placement.nonzero()[:, 0], persistent=False)
        units = torch.float64 if any(task.kind.is_linear for task in layout.tasks) else torch.float32
        deviations, means = zip(*((task.std, task.mean) for task in layout.tasks), strict=True)
        self.scale = nn.Buffer(torch.tensor(deviations, dtype=units), persistent=False)
        self.mean = nn.Buffer(torch.tensor(means, dtype=units), persistent=False)
        self.mixture = mixture
        self.names = [task.name for task in layout.tasks]
        self.width = layout.width(placement=False)
        self.tree_id_names = layout.single_ids()

    @property
    def visible_experts(self) -> Tensor:
        """(T, E) bool: the experts of the last level that each task sees."""
        visible = self.mixture.gates[-1].visible
        return visible.expand(len(self.names), -1) if len(visible) == 1 else visible

    @property
    def experts_in_use(self) -> Tensor:
        """(T, E) bool: those of them that may get a weight."""
        return self.visible_experts & self.mixture.gates[-1].in_use

    def forward(self, batch: Batch, top_k: int | None = None, usable: Tensor | None = None) -> Outputs:
        """Logits and routings of a batch; the options are those of `Mixture`. Over sharded tables a collective call."""
        inputs, placement, events = self._look_up(batch)
        return self.forward_inputs(inputs, placement, top_k, usable, events)

    def concat_inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A batch's inputs, (B, W) float32: embeddings, then numbers, in layout order, with trees also single ids; and
        its placement, (B, P)."""
        inputs, placement, events = self._look_up(batch)
        if events is not None:
            assert self.mixture.histories is not None
            inputs = self.mixture.histories(inputs, events, events.vectors)
        return inputs, placement

    def _look_up(self, batch: Batch) -> tuple[Tensor, Tensor, AttentionEvents | None]:
        """What `concat_inputs` gives, with means for what attention pools, and the events of these."""
        pooled = self.tables(batch.ids)
        embeddings = mean_embeddings(
            pooled, self.dims, batch.ragged_inputs, batch.pooling_weights
        )  # of each id input (B, its dim)
        events = None
        if self.histories:
            assert batch.events is not None
            embeddings, events = pool_histories(embeddings, batch.events, self.histories, batch.dense)
        inputs = _side_by_side(embeddings, self.id_names[False], batch.dense, self.dense_columns)
        if self.trees is not None:
            ids = [batch.ids.column(name)[0][:, None] for name in self.tree_id_names]
            inputs = torch.cat([inputs, *(each.to(inputs) for each in ids)], dim=1)
        return inputs, _side_by_side(embeddings, self.id_names[True], batch.dense, self.placement_columns), events

    def forward_inputs(
        self,
        inputs: Tensor,
        placement: Tensor | None,
        top_k: int | None = None,
        usable: Tensor | None = None,
        events: AttentionEvents | None = None,
    ) -> Outputs:
        """Logits and routings of inputs as `concat_inputs` gives them; placement is read in training only. events: of
        histories that attention has not pooled yet."""
        of_network = inputs if self.trees is None else inputs[:, : self.width]
        # Vectors are arguments of their own: where these enter the mixture, training cuts the graph in front of tables.
        vectors = [] if events is None else [events.vectors[each] for each in range(len(self.histories))]
        outputs = self.mixture(of_network, placement, top_k, usable, *((events, *vectors) if vectors else ()))
        return self.postprocess(inputs, outputs)

    def postprocess(self, inputs: Tensor, outputs: Outputs) -> Outputs:
        """The model's outputs from its inputs, see `concat_inputs`, and those of its mixture."""
        logits = self.to_label_units(outputs.logits)
        if self.trees is None:
            return outputs._replace(logits=logits)
        grown = self.trees.logits(inputs[:, self.width - len(self.dense_columns) :], self.names)
        grown = self.to_label_units(grown.to(logits))
        return outputs._replace(logits=self.trees.blend(logits, grown, self.names))

    def to_label_units(self, logits: Tensor) -> Tensor:
        """(B, T) with those of a regression in the label's own unit, in float64; of binary tasks alone as they are."""
        if self.mean.dtype == torch.float32:
            return logits
        return torch.addcmul(self.mean, logits.to(self.mean.dtype), self.scale)


def _side_by_side(embeddings: dict[str, Tensor], names: list[str], dense: Tensor, columns: Tensor) -> Tensor:
    return torch.cat([*(embeddings[name] for name in names), dense.index_select(1, columns)], dim=1)


class Mixture(nn.Module):
    """The dense part: from concatenated inputs to logits.

    raw_inputs: experts of the first level read the inputs of the bottom besides its output.
    """

    def __init__(
        self,
        bottom: "Bottom",
        levels: Sequence[Level],
        towers: "Towers",
        placement: "PlacementTower | None",
        raw_inputs: bool = False,
    ) -> None:
        super().__init__()
        self.histories: HistoryAttention | None = None
        self.bottom = bottom
        self.levels = nn.ModuleList(levels)
        self.towers = towers
        self.placement = placement
        self.raw_inputs = raw_inputs

    def place(self, placement: Tensor) -> Tensor | None:
        """(B, P) -> (B, T) what the placement tower adds in training; None without such inputs."""
        return None if self.placement is None else self.placement(placement)

    def expert_levels(self) -> list[Level]:
        return [module for module in self.levels if isinstance(module, Level)]

    @property
    def gates(self) -> list[Gates]:
        """The gates of each level, the last level's last."""
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
        """inputs (B, sum of widths), placement (B, P), which counts in training only -> logits and routings.

        top_k: experts per row and gate, outside training, instead of the model's own number; usable: (E,) bool, the
        only experts that may be run; events, vectors: see `HistoryAttention`, where inputs hold no more than means of
        these.
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
            gate_inputs = expert_inputs = list(mixed.unbind(1))  # G of (B, U)
        logits = self.towers(torch.stack(gate_inputs, dim=1) if len(self.levels) > 1 else mixed).float()  # (B, T)
        if self.training and self.placement is not None:
            logits = logits + self.placement(placement).float()
        return Outputs(logits, tuple(routings))


class Bottom(nn.Module):
    """The shared bottom, which experts and gates sit on: crosses and bends on the wide input, then hidden layers.

    edges: for each of the last D inputs, the dense ones, the edges of its piecewise-linear encoding (at least two, or
    none to leave it as it is).
    """

    def __init__(self, inputs: int, edges: Sequence[Sequence[float]], settings: section.Bottom) -> None:
        super().__init__()
        self.dense = len(edges)
        self.crosses = (
            CrossNetwork(inputs, settings.cross_layers, settings.cross_rank) if settings.cross_layers else None
        )
        piecewise_linear = settings.piecewise and any(len(each) > 1 for each in edges)
        self.piecewise_linear = PiecewiseLinear(edges) if piecewise_linear else None
        width = inputs + (len(self.piecewise_linear.column) if self.piecewise_linear else 0)
        self.layers = mlp(width, settings.units, settings.dropout)
        self.outputs = settings.units[-1] if settings.units else width

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) float32 -> (B, H)."""
        crossed = x if self.crosses is None else self.crosses(x)  # (B, W)
        if self.piecewise_linear is None:
            return self.layers(crossed)
        piecewise_linear = self.piecewise_linear(x[:, -self.dense :])
        if not self.layers:
            return torch.cat([crossed, piecewise_linear.to(crossed.dtype)], dim=1)
        first, *others = self.layers
        hidden: Tensor = first(crossed, piecewise_linear)
        for layer in others:
            hidden = layer(hidden)
        return hidden


class CrossNetwork(nn.Module):
    """Feature crosses: DCN-v2 with low-rank weights (Wang et al., WWW 2021, eq. 2), (B, W) -> (B, W).

    x_{l+1} = x_0 * (U_l V_l x_l + b_l) + x_l, for `layers` layers of the given rank.
    """

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
    """Piecewise-linear encoding of numbers (Gorishniy et al., NeurIPS 2022, eq. 1): how far each reaches into each of
    the intervals between its edges, 0 to 1. The layer above then fits any function with bends at the edges.
    """

    def __init__(self, edges: Sequence[Sequence[float]]) -> None:
        super().__init__()
        intervals = [(index, *ends) for index, each in enumerate(edges) for ends in pairwise(each)]
        column, low, high = zip(*intervals, strict=True) if intervals else ((), (), ())
        self.column = nn.Buffer(torch.tensor(column, dtype=torch.int64), persistent=False)
        self.slope = nn.Buffer(1.0 / (torch.tensor(high) - torch.tensor(low)), persistent=False)
        self.low = nn.Buffer(torch.tensor(low), persistent=False)

    def forward(self, numbers: Tensor) -> Tensor:
        """(B, D) float32 -> (B, number of all intervals) float32. Numbers are data: no gradient flows back to them."""
        # The difference first: it is exact where the edges lie so near that their distance is small beside themselves.
        parts = numbers.detach().index_select(1, self.column).sub_(self.low)
        return parts.mul_(self.slope).clamp_(0.0, 1.0)


def mlp(inputs: int, units: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """Linear layers of the given widths, each followed by SiLU and, if asked for, dropout."""
    layers: list[nn.Module] = []
    for width in units:
        layers += [Linear(inputs, width), nn.SiLU()]
        if dropout > 0:
            layers.append(RowDropout(dropout))
        inputs = width
    return nn.Sequential(*layers)


class RowDropout(nn.Dropout):
    """Dropout of (B, W) that draws for rows, see `mmoe_rec.batches.batch.seeded_draws`."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input
        return input * ((draw_uniform(input.shape, input.device) >= self.p) / (1 - self.p)).to(input.dtype)


class Towers(nn.Module):
    """T independent networks, one per task: SiLU hidden layers, then one logit."""

    def __init__(self, tasks: int, inputs: int, units: Sequence[int]) -> None:
        super().__init__()
        widths = [inputs, *units, 1]
        self.layers = nn.ModuleList(StackedLinear(tasks, width, below) for width, below in pairwise(widths))

    @property
    def output_bias(self) -> nn.Parameter:
        """(T, 1) what is added to each task's logit last."""
        last = self.layers[-1]
        assert isinstance(last, StackedLinear)
        return last.bias

    def forward(self, gated: Tensor) -> Tensor:
        """(B, T, U) -> logits (B, T)."""
        hidden = gated
        for layer in self.layers[:-1]:
            hidden = functional.silu(layer(hidden))
        return self.layers[-1](hidden).squeeze(-1)


class PlacementTower(nn.Module):
    """A shallow network from placement inputs to a logit per task, which absorbs bias (Zhao et al., RecSys 2019): added
    to the main logits in training, where it is hidden (0) for a row with probability `dropout`, so that the model does
    not lean on it.
    """

    def __init__(self, inputs: int, tasks: int, settings: section.Placement) -> None:
        super().__init__()
        self.dropout = settings.dropout
        self.layers = mlp(inputs, settings.units)
        self.logits = Linear(settings.units[-1] if settings.units else inputs, tasks)

    def forward(self, placement: Tensor) -> Tensor:
        """(B, P) -> logits (B, T)."""
        logits: Tensor = self.logits(self.layers(placement))
        if self.training and self.dropout > 0:
            shown = draw_uniform((len(logits), 1), logits.device) >= self.dropout
            logits = logits * shown
        return logits


def build_model(layout: ModelLayout, model: section.Model, tables: nn.Module, seed: int = 0) -> RankingModel:
    """The model that the `model` section of the settings describes; the dense part's weights follow from the seed.

    Raises UserError for a layout without inputs besides placement.
    """
    if layout.width(placement=False) == 0:
        raise UserError("no feature describes user, candidate or context: a model needs at least one such input")
    edges = [each.edges for each in layout.dense if not each.placement]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = layout.width(placement=False), layout.width(placement=True)
        mixture = build_mixture(widths[0], edges, widths[1], len(layout.tasks), model)
        mixture.histories = HistoryAttention(layout) if layout.attention else None
    return RankingModel(tables, layout, mixture)


def build_mixture(
    inputs: int, edges: Sequence[Sequence[float]], placement_inputs: int, tasks: int, model: section.Model
) -> Mixture:
    """The dense part on `inputs` inputs, with weights from torch's global generator.

    edges: of each of the last inputs, the dense ones, see `Bottom`; placement_inputs: 0 leaves that tower out.
    """
    bottom = Bottom(inputs, edges, model.bottom)
    hidden, mixed = bottom.outputs, model.experts.units[-1]
    levels = [Level(hidden, hidden + inputs * model.experts.raw_inputs, tasks, 0, model)]
    levels += [Level(mixed, mixed, tasks, index, model) for index in range(1, model.experts.levels)]
    towers = Towers(tasks, mixed, model.towers.units)
    placement = PlacementTower(placement_inputs, tasks, model.placement) if placement_inputs else None
    return Mixture(bottom, levels, towers, placement, model.experts.raw_inputs)
