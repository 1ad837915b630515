"""Tables of one process on a CPU in plain PyTorch, for machines that have no torchrec.

What is trained, and what a checkpoint holds by which name, is what torchrec's collection and its fused optimizer have;
so a training may go on with or without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmoe_rec.batches.batch import KeyedIds
from mmoe_rec.model.layout import ModelLayout
from mmoe_rec.model.tables import stored_width, used_tables
from mmoe_rec.training.rowwise import Place, RowWise, Storage

EPS = 1e-8  # as fbgemm has it where nothing else is said


@dataclass(frozen=True)
class Pooled:
    """Sums of the embeddings of each input, with the methods of torchrec's KeyedTensor that are read."""

    names: list[str]
    widths: list[int]
    sums: Tensor

    def keys(self) -> list[str]:
        """Names of the inputs."""
        return self.names

    def values(self) -> Tensor:
        """(B, sum of widths) float32."""
        return self.sums

    def length_per_key(self) -> list[int]:
        """Width of each input."""
        return self.widths


class OneProcessTables(nn.Module):
    """The tables of a layout, as wide as they are stored; zeros until they are filled.

    State: `embedding_bags.<table>.weight`, no parameters, as the backward pass itself updates the tables.
    """

    def __init__(self, layout: ModelLayout) -> None:
        super().__init__()
        # Equally wide tables stand side by side, so that they are rows of one matrix.
        tables = sorted(used_tables(layout), key=lambda table: stored_width(table.dim))
        weights = torch.zeros(sum(table.rows * stored_width(table.dim) for table in tables))
        momentum = torch.zeros(sum(table.rows for table in tables))
        self.storage = Storage(weights, momentum, torch.zeros(()), EPS)
        self.embedding_bags = nn.ModuleDict()
        self.momentum: dict[str, Tensor] = {}
        places = {}
        first = row = 0
        for table in tables:
            width = stored_width(table.dim)
            places[table.name] = Place(table.name, table.rows, width, first, row)
            weight = weights[first : first + table.rows * width].view(table.rows, width)
            bag = nn.Module()
            bag.register_buffer("weight", weight)
            self.embedding_bags[table.name] = bag
            self.momentum[table.name] = momentum[row : row + table.rows]
            first, row = first + weight.numel(), row + table.rows
        self._names = [each.name for each in layout.ids]
        self._tables = RowWise([places[each.table] for each in layout.ids])
        self._graph = torch.zeros(0, requires_grad=True)

    def forward(self, ids: KeyedIds) -> Pooled | dict[str, Tensor]:
        """Sums of each input's embeddings, to be read by `by_name`; tables are updated in the backward pass."""
        assert list(ids.keys) == self._names, "a batch has the inputs of its layout, in the same order"
        if not self._names:
            return {}
        sums = self.look_up(ids.values, ids.offsets)
        return Pooled(self._names, [place.width for place in self._tables.places], sums)

    def look_up(self, values: Tensor, offsets: Tensor) -> Tensor:
        """(B, sum of widths) float32, by the parts of a `KeyedIds`."""
        return self._tables.look_up(self.storage, values, offsets, self._graph)


class RowWiseAdagrad:
    """The part of an optimizer that is left to do: it holds the learning rate, and the state by name.

    param_groups: one, whose `lr` counts from the next `zero_grad()` or `step()` on, as in torchrec.
    """

    def __init__(self, tables: OneProcessTables, rate: float) -> None:
        self._tables = tables
        tables.storage.rate.fill_(rate)
        self.param_groups: list[dict[str, Any]] = [{"params": [], "lr": tables.storage.rate.item()}]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Takes the learning rate over; tables have no gradient."""
        self.step()

    def step(self) -> None:
        """Takes the learning rate over; tables have been updated in the backward pass."""
        self._tables.storage.rate.fill_(self.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """As torchrec's fused optimizer names it; the tensors are the storage itself."""
        momentum = self._tables.momentum.items()
        return {
            "state": {f"tables.embedding_bags.{name}.weight": {f"{name}.momentum1": each} for name, each in momentum}
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copies what `state_dict` gave."""
        for table, parts in self.state_dict()["state"].items():
            for name, part in parts.items():
                part.copy_(state["state"][table][name])


class OneProcess(nn.Module):
    """A model as it is, where several processes would have torchrec's DistributedModelParallel around it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """The model's."""
        return self.module(*arguments, **options)

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """The model's, under the same names."""
        return self.module.state_dict(*arguments, **options)

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The model's."""
        return self.module.load_state_dict(state, strict, assign)
