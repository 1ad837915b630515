"""What the bottom reads of requests: what describes user and context is looked up once, and spread over candidates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mmoe_rec.features.encoder import Inputs
from mmoe_rec.model.int8 import Int8Bag
from mmoe_rec.model.layout import ModelLayout
from mmoe_rec.model.tables import PlainTables
from mmoe_rec.point_in_time.arrays import Ragged


@dataclass(frozen=True)
class _Column:
    """An id input's place in the matrix, from `start` to `end`, and its table."""

    name: str
    table: str
    start: int
    end: int


class RequestInputs:
    """Puts a model's inputs (all but placement) side by side, as `RankingModel.side_by_side` does of a batch."""

    def __init__(self, layout: ModelLayout, tables: PlainTables) -> None:
        self._tables = tables
        self._columns: list[_Column] = []
        width = 0
        for name in layout.id_names(False):
            table = next(each.table for each in layout.ids if each.name == name)
            dim = layout.table(table).dim
            self._columns.append(_Column(name, table, width, width + dim))
            width += dim
        self._first_number = width
        self._numbers = [each.name for each in layout.dense if not each.placement]
        self.width = width + len(self._numbers)

    def matrix(self, shared: Inputs, own: Inputs, of: np.ndarray) -> Tensor:
        """(N, width) float32 of N candidates. shared: inputs of R requests; own: of the candidates; of: (N,) int64 the
        request of each."""
        requests = int(of[-1]) + 1 if len(of) else 0
        spread = np.empty((requests, self.width), np.float32)
        self._write(spread, shared)
        matrix = spread.take(of, axis=0)
        self._write(matrix, own)
        return torch.from_numpy(matrix)

    def _write(self, matrix: np.ndarray, inputs: Inputs) -> None:
        for column in self._columns:
            if (ids := inputs.ids.get(column.name)) is not None:
                matrix[:, column.start : column.end] = self._embedded(column.table, ids)
        for place, name in enumerate(self._numbers, self._first_number):
            if (numbers := inputs.dense.get(name)) is not None:
                matrix[:, place] = numbers

    def _embedded(self, table: str, ids: np.ndarray | Ragged) -> np.ndarray:
        bag = self._tables.embedding_bags[table]
        if isinstance(bag, Int8Bag):
            if isinstance(ids, Ragged):
                return bag(torch.from_numpy(ids.values), torch.from_numpy(ids.offsets)).numpy()
            return bag.rows(torch.from_numpy(ids)).numpy()
        assert isinstance(bag, nn.EmbeddingBag)
        weight = bag.weight.detach()
        if not isinstance(ids, Ragged):
            return weight.numpy().take(ids, axis=0)
        bags = functional.embedding_bag(
            torch.from_numpy(ids.values), weight, torch.from_numpy(ids.offsets), mode="mean", include_last_offset=True
        )
        return bags.numpy()
