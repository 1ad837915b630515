"""Attention of candidates to the events of a user's history.

The activation unit of the Deep Interest Network (Zhou et al., KDD 2018) reads an event, the candidate and their
product. It uses no softmax, so that two events count more than one. In the paper, the unit weights the event's vector
in a sum. Here, the hidden layers of all events are summed, and the sum is mapped to the history's width. An event can
thus add a different vector for each candidate, not only a different weight. The result is added to the mean of the
events' vectors. Before training, the result is 0, so training starts from the mean.

Shapes: E events, N candidates, P pairs of event and candidate, W width of an event's inputs, C width of the inputs that
candidates have too, U hidden units.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmoe_rec.batches.batch import AttentionEvents
from mmoe_rec.model.matmul import Linear
from mmoe_rec.model.model_layout import ModelLayout

HIDDEN_UNITS = 32
_PAIRS = 65_536  # Pairs per step without gradients, to limit memory.


class TargetAttention(nn.Module):
    """Attention to the events of one history. The output is as wide as the embedding of the history."""

    def __init__(self, shared: Sequence[int], own: Sequence[int], outputs: int, length: int) -> None:
        """Create the layers.

        Args:
            shared: Widths of the inputs that both events and candidates have.
            own: Widths of the inputs that only events have.
            outputs: Width of the output.
            length: Maximum number of events.
        """
        super().__init__()
        self.parts, self._shared, self._scale = len(shared), sum(shared), length**-0.5
        self.event = Linear(self._shared + sum(own), HIDDEN_UNITS)
        self.candidate = Linear(self._shared, HIDDEN_UNITS, bias=False)
        self.product = Linear(self._shared, HIDDEN_UNITS, bias=False)
        self.same = Linear(self.parts, HIDDEN_UNITS, bias=False)
        self.later = nn.Parameter(torch.zeros(length, HIDDEN_UNITS))
        self.output = Linear(HIDDEN_UNITS, outputs, bias=False)
        nn.init.zeros_(self.output.weight)

    def encode_events(self, vectors: Tensor, later: Tensor) -> Tensor:
        """Compute the part of the hidden layer that doesn't depend on candidates.

        Args:
            vectors: (E, W) float32.
            later: (E,) int64, the number of later events in the same history.

        Returns:
            (E, U).
        """
        hidden: Tensor = self.event(vectors)
        return hidden + self.later.index_select(0, later).to(hidden.dtype)

    def forward(
        self,
        encoded: Tensor,
        vectors: Tensor,
        candidates: Tensor,
        rows: Tensor,
        same: Tensor,
        events: Tensor | None = None,
    ) -> Tensor:
        """Return the pooled events of each candidate, (N, outputs) float32.

        Args:
            encoded: (E, U), see `encode_events`.
            vectors: (E, W).
            candidates: (N, C).
            rows: (P,) int64, the candidate of each pair.
            same: (P, number of `shared`) float32, see `AttentionEvents`.
            events: (P,) int64, the event of each pair. None if pair i belongs to event i, so that P = E.
        """
        queries = self.candidate(candidates)
        total = encoded.new_zeros(len(candidates), HIDDEN_UNITS)
        step = max(1, len(rows)) if torch.is_grad_enabled() else _PAIRS
        for first in range(0, max(1, len(rows)), step):
            pairs = slice(first, first + step)
            row = rows[pairs]
            hidden, event = (
                part[pairs] if events is None else part.index_select(0, events[pairs]) for part in (encoded, vectors)
            )
            product = self.product(event[:, : self._shared] * candidates.index_select(0, row))
            hidden = hidden + product + queries.index_select(0, row) + self.same(same[pairs])
            total = total.index_add(0, row, functional.silu(hidden))
        return self.output(total * self._scale).float()


class HistoryAttention(nn.ModuleDict):
    """A `TargetAttention` for each history by name. Its output is added to the input columns with the history's mean.

    Here, W is the width of a candidate's inputs, as in `RankingModel.concat_inputs`.
    """

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
            self[history.history] = TargetAttention(*widths, dims[history.history], history.length)
            self._columns[history.history] = columns[history.history], [columns[name] for name in partners]

    def forward(self, inputs: Tensor, events: AttentionEvents, vectors: Sequence[Tensor]) -> Tensor:
        """Add the attention to the events of all histories to the inputs.

        Args:
            inputs: (N, W).
            events: Events of the N rows.
            vectors: Embeddings of the events of each history, (E, width).

        Returns:
            (N, W).
        """
        first = 0
        for name, size, event_vectors in zip(self, events.sizes, vectors, strict=True):
            rows, later, same = (values[first : first + size] for values in (events.rows, events.later, events.same))
            inputs = self.attend(name, inputs, event_vectors, later, rows, same)
            first += size
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
        """Add the attention to the events of one history to the inputs of N candidates.

        Args:
            name: Name of the history.
            inputs: (N, W).
            vectors: As in `TargetAttention.forward`.
            later: As in `TargetAttention.encode_events`.
            rows: As in `TargetAttention.forward`.
            same: As in `TargetAttention.forward`.
            events: As in `TargetAttention.forward`.

        Returns:
            (N, W).
        """
        pool, (mean_columns, partners) = self[name], self._columns[name]
        assert isinstance(pool, TargetAttention)
        candidates = torch.cat([inputs[:, columns] for columns in partners], dim=1)
        pooled = pool(pool.encode_events(vectors, later), vectors, candidates, rows, same[:, : pool.parts], events)
        return torch.cat(
            [inputs[:, : mean_columns.start], inputs[:, mean_columns] + pooled, inputs[:, mean_columns.stop :]], dim=1
        )
