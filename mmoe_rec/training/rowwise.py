"""Look-up in embedding tables on a CPU and their update by row-wise Adagrad, in plain PyTorch.

All tables lie in one flat storage, rows one after the other, and so does Adagrad's one number a row. Inputs whose
tables are equally wide are looked up and updated together, as rows of one matrix: an update sorts the rows that were
looked up, adds up the gradients of equal ones (in the order of the batch, so that a result never depends on threads),
and then touches each row once. For F inputs, B rows of a batch, D columns of a table.

Row-wise Adagrad (as in fbgemm; Duchi et al. 2011, with one sum of squares for a row of D columns):
    momentum += mean(g^2);  w -= rate * g / (sqrt(momentum) + eps)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mmoe_rec.errors import UserError

_MOST_INT32 = 2**31 - 1  # sorting numbers of 32 bits takes two thirds of the time


@dataclass(frozen=True)
class Place:
    """Where the table of an input lies: number of its first weight, and of its first row's momentum."""

    table: str
    rows: int
    width: int
    weight: int
    momentum: int


@dataclass(frozen=True)
class Storage:
    """Weights and momentum of all tables, flat float32; rate: () float32, the learning rate of the next update."""

    weights: Tensor
    momentum: Tensor
    rate: Tensor
    eps: float


class RowWise:
    """Looks up inputs in tables, and updates these in the backward pass. places: of each input's table."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = places
        self._widths = [place.width for place in places]
        alike: dict[tuple[int, int], list[int]] = {}
        for number, place in enumerate(places):
            alike.setdefault((place.width, place.weight % place.width), []).append(number)
        self._groups = [_Group.of(places, numbers) for numbers in alike.values()]

    def look_up(self, storage: Storage, ids: Tensor, offsets: Tensor, graph: Tensor) -> Tensor:
        """(B, sum of widths) float32: the sums of each input's rows.

        Args:
            storage: is updated in the backward pass of what is returned.
            ids: (n,) integers, key-major.
            offsets: (F * B + 1,) where each row's ids of each input begin.
            graph: a tensor that takes a gradient, but will not get one.

        Raises:
            UserError: a table has no such row.
        """
        pooled: Tensor = _LookUp.apply(graph, self, storage, ids, offsets)
        return pooled

    def forward(self, storage: Storage, ids: Tensor, offsets: Tensor) -> tuple[Tensor, list[_Found]]:
        """What `look_up` returns, and what `update` needs to know of it."""
        batch = (len(offsets) - 1) // len(self.places)
        single = len(ids) == len(offsets) - 1 and bool((offsets.diff() == 1).all())
        ends = offsets[::batch].tolist() if batch else [0] * (len(self.places) + 1)
        self._check(ids, ends)
        sums, found = [], []
        for group in self._groups:
            matrix = group.matrix(storage.weights)
            if single:
                rows = group.single(ids.view(len(self.places), batch))
                found.append(_Found(rows, None))
                sums.append(matrix.index_select(0, rows).view(batch, len(group.inputs) * group.width))
            else:
                rows, lengths = group.ragged(ids, offsets, ends, batch)
                starts = functional.pad(lengths.cumsum(0, dtype=rows.dtype), (1, 0))
                pooled = functional.embedding_bag(rows, matrix, starts, mode="sum", include_last_offset=True)
                inputs = len(group.inputs)
                parts = pooled.view(inputs, batch, group.width)
                sums.append(parts.transpose(0, 1).reshape(batch, inputs * group.width))
                bags = torch.arange(inputs * batch).view(batch, inputs).t().reshape(-1)
                found.append(_Found(rows, bags.repeat_interleave(lengths)))
        return self._in_order(sums), found

    def update(self, storage: Storage, found: Sequence[_Found], gradient: Tensor) -> None:
        """One step of the tables. gradient: (B, sum of widths), of what was looked up."""
        for group, each, part in zip(self._groups, found, self._by_group(gradient), strict=True):
            group.update(storage, each, part.reshape(-1, group.width))

    def _check(self, ids: Tensor, ends: list[int]) -> None:
        for place, (first, last) in zip(self.places, pairwise(ends), strict=True):
            if first == last:
                continue
            low, high = ids[first:last].aminmax()
            if low < 0 or high >= place.rows:
                raise UserError(
                    f"table '{place.table}' has {place.rows:,} rows, and row {int(low if low < 0 else high)} was "
                    "looked up: the encoded rows are not of the features that the model was made for; build them again"
                )

    def _in_order(self, sums: list[Tensor]) -> Tensor:
        """Columns of all groups, in the order of inputs."""
        if len(sums) == 1:
            return sums[0]
        parts: dict[int, Tensor] = {}
        for group, each in zip(self._groups, sums, strict=True):
            parts |= dict(zip(group.inputs, each.split(group.width, dim=1), strict=True))
        return torch.cat([parts[number] for number in range(len(parts))], dim=1)

    def _by_group(self, gradient: Tensor) -> list[Tensor]:
        """The columns of each group."""
        if len(self._groups) == 1:
            return [gradient]
        parts = gradient.split(self._widths, dim=1)
        return [torch.cat([parts[number] for number in group.inputs], dim=1) for group in self._groups]


@dataclass(frozen=True)
class _Found:
    """Rows of a group's matrix that were looked up, and the row of the gradient that each gets.

    bags: None where rows and gradient have the same order.
    """

    rows: Tensor
    bags: Tensor | None


@dataclass(frozen=True)
class _Group:
    """Inputs whose tables are rows of one matrix.

    first: number of the matrix' first weight; starts: (F,) first row of each input's table; bounds: first rows of the
    tables, ascending; shifts: what leads from a row of each table to the number of its momentum; every: whether all
    inputs are in this group.
    """

    inputs: list[int]
    width: int
    first: int
    starts: Tensor
    bounds: Tensor
    shifts: Tensor
    every: bool

    @staticmethod
    def of(places: Sequence[Place], inputs: list[int]) -> _Group:
        width, first = places[inputs[0]].width, places[inputs[0]].weight % places[inputs[0]].width
        own = [places[number] for number in inputs]
        starts = [(place.weight - first) // width for place in own]
        last = max(start + place.rows for start, place in zip(starts, own, strict=True))
        kind = torch.int32 if last <= _MOST_INT32 else torch.int64
        tables = sorted({start: place.momentum - start for start, place in zip(starts, own, strict=True)}.items())
        bounds, shifts = (torch.tensor(each) for each in zip(*tables, strict=True))
        every = len(inputs) == len(places)
        return _Group(inputs, width, first, torch.tensor(starts, dtype=kind), bounds.to(kind), shifts, every)

    def matrix(self, weights: Tensor) -> Tensor:
        """(rows, width) of the weights themselves."""
        rows = (len(weights) - self.first) // self.width
        return weights.detach().as_strided((rows, self.width), (self.width, 1), weights.storage_offset() + self.first)

    def single(self, ids: Tensor) -> Tensor:
        """(B * F,) rows, batch by batch, of ids (F, B) of all inputs."""
        own = ids if self.every else ids[self.inputs]
        return (own.to(self.starts.dtype) + self.starts[:, None]).t().reshape(-1)

    def ragged(self, ids: Tensor, offsets: Tensor, ends: list[int], batch: int) -> tuple[Tensor, Tensor]:
        """(n,) rows of the group's inputs, key-major, and (F * B,) how many of them each bag has."""
        lengths = offsets.diff()
        if not self.every:
            ids = torch.cat([ids[ends[number] : ends[number + 1]] for number in self.inputs])
            lengths = lengths.view(len(ends) - 1, batch)[self.inputs].view(-1)
        counts = torch.tensor([ends[number + 1] - ends[number] for number in self.inputs])
        return ids.to(self.starts.dtype) + self.starts.repeat_interleave(counts), lengths

    def update(self, storage: Storage, found: _Found, gradient: Tensor) -> None:
        """gradient: (B * F, D)."""
        if len(found.rows) == 0:
            return
        ordered, order = found.rows.sort(stable=True)
        new = torch.ones(len(ordered), dtype=torch.bool)
        torch.ne(ordered[1:], ordered[:-1], out=new[1:])
        runs = new.nonzero().view(-1)
        rows = ordered.index_select(0, runs)
        bags = order if found.bags is None else found.bags.index_select(0, order)
        sums = functional.embedding_bag(bags, gradient, runs, mode="sum")
        places = rows + self._shifts_of(rows)
        storage.momentum.index_add_(0, places, sums.square().mean(1))
        scale = -storage.rate / storage.momentum.index_select(0, places).sqrt_().add_(storage.eps)
        matrix = self.matrix(storage.weights)
        matrix.index_copy_(0, rows.long(), matrix.index_select(0, rows).add_(sums.mul_(scale[:, None])))

    def _shifts_of(self, rows: Tensor) -> Tensor:
        if (self.shifts == self.shifts[0]).all():
            return self.shifts[0]
        return self.shifts[torch.bucketize(rows, self.bounds, right=True) - 1]


class _LookUp(torch.autograd.Function):
    """Has the backward pass update the tables, which take no gradient."""

    @staticmethod
    def forward(ctx: Any, graph: Tensor, tables: RowWise, storage: Storage, ids: Tensor, offsets: Tensor) -> Tensor:
        pooled, ctx.found = tables.forward(storage, ids, offsets)
        ctx.tables, ctx.storage = tables, storage
        return pooled

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        ctx.tables.update(ctx.storage, ctx.found, gradient.contiguous())
        return None, None, None, None, None
