"""Several networks in one model, each trained on its own: their mean logit counts (deep ensembles: Lakshminarayanan,
Pritzel and Blundell, NeurIPS 2017).

Networks that saw the rows in different orders err differently, so their mean ranks better than each. A table of the
model holds the members' own tables side by side: a row of `members` x `dim` numbers, so ids are looked up once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmoe_rec.model.layout import ModelLayout
from mmoe_rec.model.levels import Gates


class Members(nn.Module):
    """The dense parts of several networks, to be scored with: takes the place of a `Mixture`.

    Experts are numbered one member after the other. State: `members.<number>.*`, each that of a `Mixture`. columns: of
    the inputs and of the placement that each member reads, int64. histories: none; settings refuse both together.
    """

    histories = None

    def __init__(self, members: Sequence[nn.Module], columns: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        for number, (inputs, placement) in enumerate(columns):
            self.register_buffer(f"inputs_{number}", inputs, persistent=False)
            self.register_buffer(f"placement_{number}", placement, persistent=False)

    def each_member(self) -> list[Any]:
        """The members, each a `Mixture`, in order."""
        return list(self.members)

    @property
    def gates(self) -> list[Gates]:
        """The gates of each level, member by member."""
        return [gates for member in self.each_member() for gates in member.gates]

    def forward(
        self, inputs: Tensor, placement: Tensor | None, top_k: int | None = None, usable: Tensor | None = None
    ) -> Any:
        """`Outputs` of the mean logits and the routings of all members; arguments as of a `Mixture`, with E experts of
        all members together."""
        parts = [None] * len(self.members) if usable is None else usable.chunk(len(self.members))
        found = []
        for number, member in enumerate(self.members):
            own = inputs.index_select(1, self.get_buffer(f"inputs_{number}"))
            placed = None if placement is None else self._placement(number, placement)
            found.append(member(own, placed, top_k, parts[number]))
        logits = torch.stack([each.logits for each in found]).mean(0)
        routings = tuple(routing for each in found for routing in each.routings)
        return found[0]._replace(logits=logits, routings=routings, members=len(found))

    def place(self, placement: Tensor) -> Tensor | None:
        """(B, P) -> (B, T) what the placement towers add in training, on average; None without such inputs."""
        found = [each.place(self._placement(number, placement)) for number, each in enumerate(self.each_member())]
        added = [each for each in found if each is not None]
        return torch.stack(added).mean(0) if added else None

    def _placement(self, number: int, placement: Tensor) -> Tensor:
        return placement.index_select(1, self.get_buffer(f"placement_{number}"))


def member_columns(layout: ModelLayout, placement: bool, count: int) -> list[Tensor]:
    """Which columns of a model's inputs, or of its placement, each of `count` members reads, int64: its part of every
    embedding, and all numbers."""
    columns: list[list[int]] = [[] for _ in range(count)]
    start = 0
    for each in (each for each in layout.ids if each.placement == placement):
        own = layout.table(each.table).dim // count
        for number in range(count):
            columns[number] += range(start + number * own, start + (number + 1) * own)
        start += count * own
    numbers = range(start, start + len(layout.dense_names(placement)))
    return [torch.tensor([*each, *numbers], dtype=torch.int64) for each in columns]


def join_members(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The state of a `RankingModel` from those of its members, which were trained alone."""
    if len(states) == 1:
        return states[0]
    first = states[0]
    tables = {name: torch.cat([each[name] for each in states], dim=1) for name in first if name.startswith("tables.")}
    return tables | {
        name.replace("mixture.", f"mixture.members.{number}.", 1): weight
        for number, state in enumerate(states)
        for name, weight in state.items()
        if name not in tables
    }
