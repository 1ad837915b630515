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

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmoe_rec.batches.batch import Batch
from mmoe_rec.errors import UserError
from mmoe_rec.model.bottom import Bottom, mlp
from mmoe_rec.model.layout import ModelLayout
from mmoe_rec.model.levels import Gates, Level
from mmoe_rec.model.products import Linear, StackedLinear, for_products
from mmoe_rec.model.routing import Routing
from mmoe_rec.model.tables import by_name

if TYPE_CHECKING:
    from mmoe_rec.settings import model as section

# torchrec's pipeline traces the model down to its parts, and this is one.
torch.fx.wrap("by_name")


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
    is the same. State: `tables.embedding_bags.<table>.weight` and `mixture.*`.
    """

    def __init__(self, tables: nn.Module, layout: ModelLayout, mixture: Mixture) -> None:
        super().__init__()
        self.tables = tables
        self.dense_columns: Tensor
        self.placement_columns: Tensor
        self.dims = {each.name: layout.table(each.table).dim for each in layout.ids}
        self.id_names = {placement: layout.id_names(placement) for placement in (False, True)}
        for name, placement in (("dense_columns", False), ("placement_columns", True)):
            columns = [index for index, each in enumerate(layout.dense) if each.placement == placement]
            self.register_buffer(name, torch.tensor(columns, dtype=torch.int64), persistent=False)
        self.scale: Tensor
        self.mean: Tensor
        units = torch.float64 if any(task.kind == "regression" for task in layout.tasks) else torch.float32
        self.register_buffer("scale", torch.tensor([task.deviation for task in layout.tasks], dtype=units), False)
        self.register_buffer("mean", torch.tensor([task.mean for task in layout.tasks], dtype=units), False)
        self.mixture = mixture
        self.tasks = len(layout.tasks)

    @property
    def visible_experts(self) -> Tensor:
        """(T, E) bool: the experts of the last level that each task sees."""
        visible = self.mixture.gates[-1].visible
        return visible.expand(self.tasks, -1) if len(visible) == 1 else visible

    @property
    def experts_in_use(self) -> Tensor:
        """(T, E) bool: those of them that may get a weight."""
        return self.visible_experts & self.mixture.gates[-1].in_use

    def forward(
        self,
        batch: Batch,
        use_placement: bool | None = None,
        top_k: int | None = None,
        usable: Tensor | None = None,
    ) -> Outputs:
        """Logits and routings of a batch; the options are those of `Mixture`. Over sharded tables a collective call."""
        inputs, placement = self.side_by_side(batch)
        return self.of_inputs(inputs, placement, use_placement, top_k, usable)

    def side_by_side(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A batch's inputs, (B, W) float32: embeddings, then numbers, in layout order; and its placement, (B, P)."""
        pooled = self.tables(batch.ids)
        embeddings = by_name(pooled, self.dims, batch.ragged, batch.shares)  # of each id input (B, its dim)
        inputs = _side_by_side(embeddings, self.id_names[False], batch.dense, self.dense_columns)
        return inputs, _side_by_side(embeddings, self.id_names[True], batch.dense, self.placement_columns)

    def of_inputs(
        self,
        inputs: Tensor,
        placement: Tensor | None,
        use_placement: bool | None = None,
        top_k: int | None = None,
        usable: Tensor | None = None,
    ) -> Outputs:
        """Logits and routings of inputs as `side_by_side` gives them; without placement, its tower adds nothing."""
        if placement is None:
            use_placement = False
        outputs = self.mixture(inputs, placement, use_placement, top_k, usable)
        # A regression's output is in the label's own unit; a binary task has mean 0 and deviation 1.
        return Outputs(torch.addcmul(self.mean, outputs.logits.to(self.mean.dtype), self.scale), outputs.routings)


def _side_by_side(embeddings: dict[str, Tensor], names: list[str], dense: Tensor, columns: Tensor) -> Tensor:
    return torch.cat([*(embeddings[name] for name in names), dense.index_select(1, columns)], dim=1)


class Mixture(nn.Module):
    """The dense part: from concatenated inputs to logits.

    raw_inputs: experts of the first level read the inputs of the bottom besides its output.
    """

    def __init__(
        self,
        bottom: Bottom,
        levels: Sequence[Level],
        towers: Towers,
        placement: PlacementTower | None,
        raw_inputs: bool = False,
    ) -> None:
        super().__init__()
        self.bottom = bottom
        self.levels = nn.ModuleList(levels)
        self.towers = towers
        self.placement = placement
        self.raw_inputs = raw_inputs

    def each_level(self) -> list[Level]:
        """The levels, first to last."""
        return [module for module in self.levels if isinstance(module, Level)]

    @property
    def gates(self) -> list[Gates]:
        """The gates of each level, the last level's last."""
        return [level.gates for level in self.each_level()]

    def forward(
        self,
        inputs: Tensor,
        placement: Tensor | None,
        use_placement: bool | None = None,
        top_k: int | None = None,
        usable: Tensor | None = None,
    ) -> Outputs:
        """inputs (B, sum of widths), placement (B, P) where it is used -> logits and routings.

        use_placement: add the placement tower's logits; None does so in training only. top_k: experts per row and gate,
        outside training, instead of the model's own number; usable: (E,) bool, the only experts that may be run.
        """
        hidden = self.bottom(inputs)  # (B, H)
        gate_inputs = [hidden]
        rounded = for_products(hidden)
        expert_inputs = [torch.cat([rounded, inputs.to(rounded.dtype)], dim=1) if self.raw_inputs else rounded]
        routings = []
        for level in self.levels:
            mixed, routing = level(gate_inputs, expert_inputs, top_k, usable)  # (B, G, U)
            routings.append(routing)
            gate_inputs = expert_inputs = list(mixed.unbind(1))  # G of (B, U)
        logits = self.towers(torch.stack(gate_inputs, dim=1) if len(self.levels) > 1 else mixed).float()  # (B, T)
        if use_placement is None:
            use_placement = self.training
        if use_placement and self.placement is not None:
            logits = logits + self.placement(placement).float()
        return Outputs(logits, tuple(routings))


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
        logits: Tensor = self.layers[-1](hidden)
        return logits.squeeze(-1)


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
            shown = torch.rand(len(logits), 1, device=logits.device) >= self.dropout
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
        return RankingModel(tables, layout, build_mixture(widths[0], edges, widths[1], len(layout.tasks), model))


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
