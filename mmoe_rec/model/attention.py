"""Histories that look at the candidate: what each event of a user's history says of it, added up.

The activation unit of the Deep Interest Network (Zhou et al., KDD 2018) reads an event, the candidate and their
product, without a softmax, so that two events say more than one. There it gives the weight of the event's vector in a
sum. Here its hidden layer itself is added up and then mapped to the history's width: an event says not only how much of
it is to be seen, but what it means for this candidate. The sum is added to the mean of the events' vectors; before
training it is 0.

Shapes: E events, N candidates, P pairs of them, W width of all that an event holds, C that of what candidates have too,
U hidden units.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmoe_rec.batches.batch import AttentionEvents
from mmoe_rec.model.matmul import Linear
from mmoe_rec.model.model_layout import ModelLayout

HIDDEN_UNITS = 32
_PAIRS = 65_536  # at a time, where no gradient needs all of them


class TargetAttention(nn.Module):
    """What the events of a history say of candidates, as wide as the history.

    shared: widths of what both events and candidates have; own: of what events alone have; length: events of a list.
    """

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

    def encode_events(self, vectors: Tensor, later: Tensor) -> Tensor:
        """What does not depend on candidates: (E, W) float32, and (E,) int64 events that come after each -> (E, U)."""
        hidden: Tensor = self.event(vectors)
        return hidden + self.later.index_select(0, later).to(hidden.dtype)

    def forward(
        self,
        read: Tensor,
        vectors: Tensor,
        candidates: Tensor,
        rows: Tensor,
        same: Tensor,
        events: Tensor | None = None,
    ) -> Tensor:
        """(N, outputs) float32.

        read: (E, U), see `encode_events`; vectors: (E, W); candidates: (N, C); rows: (P,) int64 the candidate of each
        pair; same: (P, number of `shared`) float32, see `AttentionEvents`; events: (P,) int64 the event of each, None
        where pairs are events.
        """
        asked = self.candidate(candidates)
        added = read.new_zeros(len(candidates), HIDDEN_UNITS)
        step = max(1, len(rows)) if torch.is_grad_enabled() else _PAIRS
        for first in range(0, max(1, len(rows)), step):
            pairs = slice(first, first + step)
            row = rows[pairs]
            hidden, event = (
                each[pairs] if events is None else each.index_select(0, events[pairs]) for each in (read, vectors)
            )
            product = self.product(event[:, : self._shared] * candidates.index_select(0, row))
            hidden = hidden + product + asked.index_select(0, row) + self.same(same[pairs])
            added = added.index_add(0, row, functional.silu(hidden))
        return self.output(added * self._scale).float()


class HistoryAttention(nn.ModuleDict):
    """All histories of a model that attention pools, by name: what they add to the inputs that hold their means."""

    def __init__(self, layout: ModelLayout) -> None:
        super().__init__()
        dims = {each.name: layout.table(each.table).dim for each in layout.ids}
        columns, start = dict[str, slice](), 0
        for name in layout.id_names(placement=False):
            columns[name] = slice(start, start + dims[name])
            start += dims[name]
        self._columns: dict[str, tuple[slice, list[slice]]] = {}  # of the mean, and of the candidate's counterparts
        for each in layout.attention:
            parts = layout.history_inputs(each)
            partners = [partner for _, partner in parts if partner is not None]
            widths = [dims[name] for name in partners], [dims[name] for name, partner in parts if partner is None]
            self[each.history] = TargetAttention(*widths, dims[each.history], each.length)
            self._columns[each.history] = columns[each.history], [columns[name] for name in partners]

    def forward(self, inputs: Tensor, events: AttentionEvents, vectors: Sequence[Tensor]) -> Tensor:
        """(N, W) inputs of N rows with their own events -> the same, with what these say. vectors: as of the events."""
        first = 0
        for name, size, own in zip(self, events.sizes, vectors, strict=True):
            rows, later, same = (each[first : first + size] for each in (events.rows, events.later, events.same))
            inputs = self.attend(name, inputs, own, later, rows, same)
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
        """(N, W) inputs of N candidates with what the events of one history say of each; see `TargetAttention`."""
        pool, (own, partners) = self[name], self._columns[name]
        assert isinstance(pool, TargetAttention)
        asked = torch.cat([inputs[:, columns] for columns in partners], dim=1)
        said = pool(pool.encode_events(vectors, later), vectors, asked, rows, same[:, : pool.parts], events)
        return torch.cat([inputs[:, : own.start], inputs[:, own] + said, inputs[:, own.stop :]], dim=1)
