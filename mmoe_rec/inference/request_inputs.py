"""From the features of requests to the matrix that the model's dense part reads."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmoe_rec.batches.batch import same_ids
from mmoe_rec.features.encoder import Inputs
from mmoe_rec.model.attention import Histories
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.model.tables import Int8Bag, PlainTables
from mmoe_rec.point_in_time.arrays import Ragged, consecutive


class RequestInputs:
    """Puts the inputs of requests (all but placement) side by side, as `RankingModel.side_by_side` does those of a
    batch: what describes user and context is looked up once, and spread over candidates.
    """

    def __init__(self, layout: ModelLayout, tables: PlainTables, with_ids: bool, histories: Histories | None) -> None:
        """with_ids: for a model with trees; histories: those that attention pools."""
        self._tables, self._histories = tables, histories
        self._parts = {each.history: layout.parts(each) for each in layout.attention}
        bags: Mapping[str, Any] = dict(tables.embedding_bags.items())
        self._weights = {name: b.weight.detach().numpy() for name, b in bags.items() if not isinstance(b, Int8Bag)}
        self._table_of = {each.name: each.table for each in layout.ids}
        self._columns: list[tuple[str, str, slice]] = []  # input, table, columns of the matrix
        width = 0
        for name in layout.id_names(placement=False):
            columns = slice(width, width + layout.table(self._table_of[name]).dim)
            self._columns.append((name, self._table_of[name], columns))
            width = columns.stop
        self._numbers = list(enumerate(layout.dense_names(placement=False), width))
        width += len(self._numbers)
        self._ids = list(enumerate(layout.single_ids() if with_ids else [], width))
        self.width = width + len(self._ids)

    def matrix(self, shared: Inputs, own: Inputs, of: np.ndarray) -> Tensor:
        """(N, width) float32 of N candidates. shared: inputs of R requests; own: of the candidates; of: (N,) int64 the
        request of each."""
        requests = int(of[-1]) + 1 if len(of) else 0
        spread = np.empty((requests, self.width), np.float32)
        self._write(spread, shared)
        matrix = spread.take(of, axis=0)
        self._write(matrix, own)
        inputs = torch.from_numpy(matrix)
        for name, parts in self._parts.items():
            inputs = self._look_at_candidates(name, parts, inputs, {**shared.ids, **own.ids}, of)
        return inputs

    def _look_at_candidates(
        self,
        name: str,
        parts: Sequence[tuple[str, str | None]],
        inputs: Tensor,
        ids: Mapping[str, Any],
        of: np.ndarray,
    ) -> Tensor:
        """Inputs (N, width) with what a history's events say of each candidate; events are read once a request."""
        lists = ids[name]
        assert self._histories is not None
        assert isinstance(lists, Ragged)
        lengths = lists.lengths[of]
        events, rows = consecutive(lists.offsets[of], lengths), np.arange(len(of)).repeat(lengths)
        values = {part: ids[part].values for part, _ in parts}
        pairs = [(part, partner) for part, partner in parts if partner is not None]
        same = np.empty((len(rows), len(pairs)), np.float32)
        for column, (part, partner) in enumerate(pairs):
            same[:, column] = same_ids(values[part][events], ids[partner][rows])
        later = lists.offsets[1:].repeat(lists.lengths) - 1 - np.arange(len(lists.values))
        with torch.inference_mode():
            own = [self._tables.rows(self._table_of[part], torch.from_numpy(each)) for part, each in values.items()]
            of_events = (torch.from_numpy(each) for each in (later, rows, same, events))
            return self._histories.look(name, inputs, torch.cat(own, dim=1), *of_events)

    def _write(self, matrix: np.ndarray, inputs: Inputs) -> None:
        for name, table, columns in self._columns:
            if (ids := inputs.ids.get(name)) is not None:
                matrix[:, columns] = self._embed(table, ids)
        for column, name in self._numbers:
            if (numbers := inputs.dense.get(name)) is not None:
                matrix[:, column] = numbers
        for column, name in self._ids:
            if (ids := inputs.ids.get(name)) is not None:
                matrix[:, column] = ids

    def _embed(self, table: str, ids: np.ndarray | Ragged) -> np.ndarray:
        if not isinstance(ids, Ragged) and table in self._weights:
            return self._weights[table].take(ids, axis=0)
        bag: Any = self._tables.embedding_bags[table]
        if isinstance(ids, Ragged):
            embedded = bag(torch.from_numpy(ids.values), torch.from_numpy(ids.offsets)).detach()
        else:
            embedded = bag.rows(torch.from_numpy(ids))
        return np.asarray(embedded)
