"""Attention of candidates to the events of a user's history.

The activation unit of the Deep Interest Network (Zhou et al., KDD 2018) reads an event, the candidate and their
product. There is no softmax, so two events count more than one. In the paper, the unit returns a weight for the event's
vector. Here, the hidden layers of all events are summed, and the sum is mapped to the history's width. An event can
thus add a different vector for each candidate. The result is added to the mean of the events' vectors. Before training,
the result is 0.

Shapes: E events, N candidates, P pairs of event and candidate, W width of an event's embeddings, C width of the
embeddings that candidates have too (such as the item's), U hidden units.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmoe_rec.batches.batch import AttentionEvents
from mmoe_rec.model.matmul import Linear
from mmoe_rec.model.model_layout import ModelLayout

HIDDEN_UNITS = 32
_PAIRS = 65_536  # Number of pairs processed at a time without gradients, to limit memory.


class _TargetAttention(nn.Module):
    """Attention to one history. Embeddings have widths `shared` if candidates have the same input, otherwise `own`."""

    def __init__(self, shared: Sequence[int], own: Sequence[int], outputs: int, length: int) -> None:
        super().__init__()
        self.parts, self._shared, self._scale = len(shared), sum(shared), length**-0.5
        self.event = Linear(self._shared + sum(own), HIDDEN_UNITS)
        self.candidate = Linear(self._shared, HIDDEN_UNITS, bias=False)
        self.product = Linear(self._shared, HIDDEN_UNITS, bias=False)
        self.same = Linear(self.parts, HIDDEN_UNITS, bias=False)
        self.later = nn.Parameter(torch.zeros(length, HIDDEN_UNITS))
        self.output = Linear(HIDDEN_UNITS, outputs, bias=False)
        nn.init.zeros_(self.output.weight)

    def forward(
        self, vectors: Tensor, later: Tensor, candidates: Tensor, rows: Tensor, same: Tensor, events: Tensor | None
    ) -> Tensor:
        """Return the results (N, outputs) for `candidates` (N, C). See `HistoryAttention.attend` for the arguments."""
        encoded: Tensor = self.event(vectors)
        encoded = encoded + self.later.index_select(0, later).to(encoded.dtype)  # (E, U)
        queries = self.candidate(candidates)
        total = encoded.new_zeros(len(candidates), HIDDEN_UNITS)
        step = max(1, len(rows)) if torch.is_grad_enabled() else _PAIRS
        for first in range(0, max(1, len(rows)), step):
            pairs = slice(first, first + step)
            row = rows[pairs]
            parts = (encoded, vectors)
            hidden, event = (x[pairs] if events is None else x.index_select(0, events[pairs]) for x in parts)
            product = self.product(event[:, : self._shared] * candidates.index_select(0, row))
            hidden = hidden + product + queries.index_select(0, row) + self.same(same[pairs])
            total = total.index_add(0, row, functional.silu(hidden))
        return self.output(total * self._scale).float()


class HistoryAttention(nn.ModuleDict):
    """Attention to histories by name. Each result is added to the input columns that hold the history's mean."""

    def __init__(self, layout: ModelLayout) -> None:
        super().__init__()
        dims = {history.name: layout.table(history.table).dim for history in layout.ids}
        columns, start = dict[str, slice](), 0
        for name in layout.id_names(placement=False):
            columns[name] = slice(start, start + dims[name])
            start += dims[name]
        self._columns: dict[str, tuple[slice, list[slice]]] = {}  # Columns of the mean and of the candidate's inputs.
        for history in layout.attention:
            parts = layout.history_inputs(history)
            partners = [partner for _, partner in parts if partner is not None]
            widths = [dims[name] for name in partners], [dims[name] for name, partner in parts if partner is None]
            self[history.history] = _TargetAttention(*widths, dims[history.history], history.length)
            self._columns[history.history] = columns[history.history], [columns[name] for name in partners]

    def forward(self, inputs: Tensor, events: AttentionEvents, vectors: Sequence[Tensor]) -> Tensor:
        """Return the inputs of N rows after adding the attention to each history.

        Args:
            inputs: Inputs of the rows, as in `RankingModel.concat_inputs`.
            events: Events of the rows.
            vectors: For each history, the embeddings (E, W) of its events.
        """
        parts = (values.split(events.sizes) for values in (events.later, events.rows, events.same))
        for name, event_vectors, later, rows, same in zip(self, vectors, *parts, strict=True):
            inputs = self.attend(name, inputs, event_vectors, later, rows, same)
        return inputs

    def attend(
        self,
        name: str,
        inputs: Tensor,
        vectors: Tensor,
        later: Tensor,
        rows: Tensor,
        same: Tensor,
        events: Tensor | None = None,
    ) -> Tensor:
        """Return the inputs of N candidates after adding the attention to one history.

        Args:
            name: Name of the history.
            inputs: Inputs of the candidates, as in `RankingModel.concat_inputs`.
            vectors: (E, W) float32 embeddings of the events.
            later: (E,) int64, the number of later events in the same history.
            rows: (P,) int64, the candidate of each pair.
            same: (P, K) float32, which inputs of a pair are equal (see `AttentionEvents`).
            events: (P,) int64, the event of each pair. None if pair i has event i.
        """
        pool, (mean, partners) = self[name], self._columns[name]
        assert isinstance(pool, _TargetAttention)
        candidates = torch.cat([inputs[:, columns] for columns in partners], dim=1)
        pooled = pool(vectors, later, candidates, rows, same[:, : pool.parts], events)
        return torch.cat([inputs[:, : mean.start], inputs[:, mean] + pooled, inputs[:, mean.stop :]], dim=1)
