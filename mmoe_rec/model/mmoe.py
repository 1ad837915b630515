"""The ranking model: tables, shared bottom, experts, one gate and tower per task, and the placement tower.

Multi-gate mixture-of-experts (Ma et al., KDD 2018) in the arrangement of YouTube's ranking system (Zhao et al., RecSys
2019): experts and gates sit on a shared hidden layer, never on the wide input. Shapes: B rows, H hidden width, E
experts, U expert width, P placement width, T tasks.

The concatenated inputs are not normalised: dense inputs arrive standardised and embeddings start small, so that an
unseen id adds next to nothing; a LayerNorm across them would let one outlying number rescale all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmoe_rec.batches.batch import Batch
from mmoe_rec.errors import UserError
from mmoe_rec.features.layout import Layout
from mmoe_rec.model.bottom import Bottom
from mmoe_rec.model.experts import Experts
from mmoe_rec.model.gates import SoftGates
from mmoe_rec.model.precision import for_products
from mmoe_rec.model.tables import by_name
from mmoe_rec.model.towers import PlacementTower, Towers

if TYPE_CHECKING:
    from mmoe_rec.settings import Model

# torchrec's pipeline traces the model down to its parts, and this is one.
torch.fx.wrap("by_name")


class Mixture(nn.Module):
    """The dense part: from concatenated inputs to logits."""

    def __init__(
        self,
        inputs: int,
        edges: Sequence[Sequence[float]],
        placement_inputs: int,
        tasks: int,
        *,
        bottom_units: Sequence[int],
        bottom_dropout: float,
        cross_layers: int,
        cross_rank: int,
        expert_count: int,
        expert_units: Sequence[int],
        gate_dropout: float,
        tower_units: Sequence[int],
        placement_units: Sequence[int],
        placement_dropout: float,
    ) -> None:
        super().__init__()
        self.bottom = Bottom(inputs, edges, bottom_units, bottom_dropout, cross_layers, cross_rank)
        self.experts = Experts(expert_count, self.bottom.outputs, expert_units)
        self.gates = SoftGates(self.bottom.outputs, tasks, expert_count, gate_dropout)
        self.towers = Towers(tasks, expert_units[-1], tower_units)
        self.placement = (
            PlacementTower(placement_inputs, tasks, placement_units, placement_dropout) if placement_inputs else None
        )

    def forward(self, inputs: Tensor, placement: Tensor, use_placement: bool | None = None) -> tuple[Tensor, Tensor]:
        """inputs (B, sum of widths), placement (B, P) -> logits (B, T) float32 and gate weights (B, T, E) float32.

        use_placement: add the placement tower's logits; None does so in training only.
        """
        hidden = for_products(self.bottom(inputs))
        experts = self.experts(hidden)
        gates = self.gates(hidden)
        gated = torch.bmm(gates.to(experts.dtype), experts)
        logits = self.towers(gated).float()
        if use_placement is None:
            use_placement = self.training
        if use_placement and self.placement is not None:
            logits = logits + self.placement(placement).float()
        return logits, gates


class RankingModel(nn.Module):
    """Logits of all tasks for a batch of rows; for a regression task the logit is the prediction.

    tables: `PlainTables` (ids as `KeyedIds`) or torchrec's collection (ids as KeyedJaggedTensor); the rest of the model
    is the same. State: `tables.embedding_bags.<table>.weight` and `mixture.*`. Raises UserError for a layout without
    inputs besides placement.
    """

    def __init__(
        self,
        tables: nn.Module,
        layout: Layout,
        *,
        bottom_units: Sequence[int] = (256,),
        bottom_dropout: float = 0.0,
        piecewise: bool = False,
        cross_layers: int = 0,
        cross_rank: int = 32,
        expert_count: int = 8,
        expert_units: Sequence[int] = (128, 64),
        gate_dropout: float = 0.0,
        tower_units: Sequence[int] = (32,),
        placement_units: Sequence[int] = (16,),
        placement_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if layout.width(placement=False) == 0:
            raise UserError("no feature describes user, candidate or context: a model needs at least one such input")
        self.tables = tables
        self.dense_columns: Tensor
        self.placement_columns: Tensor
        self.id_names = {placement: layout.id_names(placement) for placement in (False, True)}
        for name, placement in (("dense_columns", False), ("placement_columns", True)):
            columns = [index for index, each in enumerate(layout.dense) if each.placement == placement]
            self.register_buffer(name, torch.tensor(columns, dtype=torch.int64), persistent=False)
        self.scale: Tensor
        self.mean: Tensor
        self.register_buffer("scale", torch.tensor([task.deviation for task in layout.tasks]), persistent=False)
        self.register_buffer("mean", torch.tensor([task.mean for task in layout.tasks]), persistent=False)
        dense = [each for each in layout.dense if not each.placement]
        self.mixture = Mixture(
            layout.width(placement=False),
            [each.edges if piecewise else () for each in dense],
            layout.width(placement=True),
            len(layout.tasks),
            bottom_units=bottom_units,
            bottom_dropout=bottom_dropout,
            cross_layers=cross_layers,
            cross_rank=cross_rank,
            expert_count=expert_count,
            expert_units=expert_units,
            gate_dropout=gate_dropout,
            tower_units=tower_units,
            placement_units=placement_units,
            placement_dropout=placement_dropout,
        )

    def forward(self, batch: Batch, use_placement: bool | None = None) -> Tensor:
        """Logits (B, T) float32. use_placement: add the placement tower's logits; None does so in training only."""
        return self.forward_with_gates(batch, use_placement)[0]

    def forward_with_gates(self, batch: Batch, use_placement: bool | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, T) float32 and the gates' weights (B, T, E) float32.

        Over sharded tables this is a collective call: every rank makes it.
        """
        embeddings = by_name(self.tables(batch.ids))
        inputs = _side_by_side(embeddings, self.id_names[False], batch.dense, self.dense_columns)
        placement = _side_by_side(embeddings, self.id_names[True], batch.dense, self.placement_columns)
        logits, gates = self.mixture(inputs, placement, use_placement)
        # A regression's output is in the label's own unit; a binary task has mean 0 and deviation 1.
        return torch.addcmul(self.mean, logits, self.scale), gates

    def gate_weights(self, batch: Batch) -> Tensor:
        """Weights (B, T, E) float32 of each task's gate; their mean over rows is what is worth logging."""
        return self.forward_with_gates(batch)[1]


def _side_by_side(embeddings: dict[str, Tensor], names: list[str], dense: Tensor, columns: Tensor) -> Tensor:
    """The named inputs' embeddings, then the given dense columns, always in layout order: (B, width) float32."""
    return torch.cat([*(embeddings[name] for name in names), dense.index_select(1, columns)], dim=1)


def build_model(layout: Layout, model: Model, tables: nn.Module, seed: int = 0) -> RankingModel:
    """The model that the `model` section of the settings describes; the dense part's weights follow from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RankingModel(
            tables,
            layout,
            bottom_units=model.bottom.units,
            bottom_dropout=model.bottom.dropout,
            piecewise=model.bottom.piecewise,
            cross_layers=model.bottom.cross_layers,
            cross_rank=model.bottom.cross_rank,
            expert_count=model.experts.count,
            expert_units=model.experts.units,
            gate_dropout=model.gates.dropout,
            tower_units=model.towers.units,
            placement_units=model.placement.units,
            placement_dropout=model.placement.dropout,
        )
