"""The ranking model: tables, shared bottom, experts, one gate and tower per task, and the placement tower.

Multi-gate mixture-of-experts (Ma et al., KDD 2018) in the arrangement of YouTube's ranking system (Zhao et al., RecSys
2019): experts and gates sit on a shared hidden layer, not on the wide input. Its relatives are the same code by other
settings: a shared bottom is one expert, OMoE one gate for all tasks, CGC has experts of single tasks, PLE several
levels. Shapes: B rows, H hidden width, E experts, U expert width, P placement width, T tasks.

The concatenated inputs are not normalised: dense inputs arrive standardised and embeddings start small, so that an
unseen id adds next to nothing; a LayerNorm across them would let one outlying number rescale all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from mmoe_rec.batches.batch import Batch
from mmoe_rec.errors import UserError
from mmoe_rec.model.bottom import Bottom
from mmoe_rec.model.gates import Gates, Routing, RoutingRule
from mmoe_rec.model.layout import ModelLayout
from mmoe_rec.model.levels import Level
from mmoe_rec.model.stacked import for_products
from mmoe_rec.model.tables import by_name
from mmoe_rec.model.towers import PlacementTower, Towers

if TYPE_CHECKING:
    from mmoe_rec.settings import Model

# torchrec's pipeline traces the model down to its parts, and this is one.
torch.fx.wrap("by_name")


class Outputs(NamedTuple):
    """Of B rows: logits (B, T), and where each level of experts sent them, the last level's routing last.

    Logits are float32; of a `RankingModel` with a regression float64, as a float32 in the label's own unit may have
    steps wider than the labels' deviation.
    """

    logits: Tensor
    routings: tuple[Routing, ...]


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
        """The levels, the last one last."""
        return [module for module in self.levels if isinstance(module, Level)]

    @property
    def gates(self) -> list[Gates]:
        """The gates of each level, the last level's last."""
        return [level.gates for level in self.each_level()]

    def forward(
        self,
        inputs: Tensor,
        placement: Tensor,
        use_placement: bool | None = None,
        top_k: int | None = None,
        usable: Tensor | None = None,
    ) -> Outputs:
        """inputs (B, sum of widths), placement (B, P) -> logits and routings.

        use_placement: add the placement tower's logits; None does so in training only. top_k: experts a row and gate,
        outside training, instead of the model's own number; usable: (E,) bool, the only experts that may be run.
        """
        hidden = for_products(self.bottom(inputs))
        gate_inputs = [hidden]
        expert_inputs = [torch.cat([hidden, inputs.to(hidden.dtype)], dim=1)] if self.raw_inputs else gate_inputs
        routings = []
        for level in self.levels:
            mixed, routing = level(gate_inputs, expert_inputs, top_k, usable)
            routings.append(routing)
            gate_inputs = expert_inputs = list(mixed.unbind(1))
        logits = self.towers(torch.stack(gate_inputs, dim=1) if len(self.levels) > 1 else mixed).float()
        if use_placement is None:
            use_placement = self.training
        if use_placement and self.placement is not None:
            logits = logits + self.placement(placement).float()
        return Outputs(logits, tuple(routings))


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
        """Logits and routings of a batch; the options are those of `Mixture`.

        Over sharded tables this is a collective call: every rank makes it.
        """
        embeddings = by_name(self.tables(batch.ids), self.dims)
        inputs = _side_by_side(embeddings, self.id_names[False], batch.dense, self.dense_columns)
        placement = _side_by_side(embeddings, self.id_names[True], batch.dense, self.placement_columns)
        outputs = self.mixture(inputs, placement, use_placement, top_k, usable)
        # A regression's output is in the label's own unit; a binary task has mean 0 and deviation 1.
        return Outputs(torch.addcmul(self.mean, outputs.logits.to(self.mean.dtype), self.scale), outputs.routings)


def _side_by_side(embeddings: dict[str, Tensor], names: list[str], dense: Tensor, columns: Tensor) -> Tensor:
    """The named inputs' embeddings, then the given dense columns, always in layout order: (B, width) float32."""
    return torch.cat([*(embeddings[name] for name in names), dense.index_select(1, columns)], dim=1)


def build_model(layout: ModelLayout, model: Model, tables: nn.Module, seed: int = 0) -> RankingModel:
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
    inputs: int, edges: Sequence[Sequence[float]], placement_inputs: int, tasks: int, model: Model
) -> Mixture:
    """The dense part on so many inputs, with weights from torch's global generator.

    edges: of each of the last inputs, the dense ones, see `Bottom`; placement_inputs: 0 leaves that tower out.
    """
    section = model.bottom
    bottom = Bottom(
        inputs,
        edges if section.piecewise else [() for _ in edges],
        section.units,
        section.dropout,
        section.cross_layers,
        section.cross_rank,
    )
    return Mixture(
        bottom,
        _levels(bottom.outputs, inputs, tasks, model),
        Towers(tasks, model.experts.units[-1], model.towers.units),
        PlacementTower(placement_inputs, tasks, model.placement.units, model.placement.dropout)
        if placement_inputs
        else None,
        model.experts.raw_inputs,
    )


def _levels(hidden: int, raw: int, tasks: int, model: Model) -> list[Level]:
    experts, gates = model.experts, model.gates
    rule = RoutingRule(gates.routing, gates.top_k, gates.random_top_k, gates.serving_top_k, gates.dropout, gates.noise)
    return [
        Level(
            hidden if index == 0 else experts.units[-1],
            hidden + raw * experts.raw_inputs if index == 0 else experts.units[-1],
            tasks,
            experts.count,
            experts.task_count,
            experts.units,
            rule,
            first=index == 0,
            last=index == experts.levels - 1,
            per_task=gates.per_task,
            activation=experts.activation,
            normalise=experts.normalise,
            compute=experts.compute,
        )
        for index in range(experts.levels)
    ]
