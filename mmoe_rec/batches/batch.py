"""A batch of encoded rows as tensors.

Ids are key-major, as in torchrec's KeyedJaggedTensor: first the whole batch of input 0, then that of input 1. Serving
and single-process use carry them in `KeyedIds`, which needs torch alone; training over sharded tables in a
KeyedJaggedTensor. Shapes: B rows, F id inputs, D dense inputs, T tasks.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mmoe_rec.batches.row_reader import Position
from mmoe_rec.features.layout import EncodedInputs, Layout, position_input
from mmoe_rec.point_in_time.arrays import Ragged


class _Tensors:
    """Tensors that move together."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same on another device."""
        return self._map(lambda part: part.to(torch.device(device), non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same in page-locked memory, from which copies to a GPU overlap with its work."""
        return self._map(lambda part: part.pin_memory())

    def record_stream(self, stream: Any) -> None:
        """Marks the tensors as used by a CUDA stream, so that their memory is not reused before it is done."""
        for part in self._parts().values():
            part.record_stream(stream)

    def _map(self, change: Callable[[Any], Any]) -> Self:
        given = {each.name for each in fields(self) if each.init}  # type: ignore[arg-type]
        parts = {name: change(part) for name, part in self._parts().items() if name in given}
        return replace(self, **parts)  # type: ignore[type-var]

    def _parts(self) -> dict[str, Any]:
        return {name: part for name, part in vars(self).items() if hasattr(part, "record_stream")}


@dataclass(frozen=True, eq=False)
class KeyedIds(_Tensors):
    """Any number of ids for each of F inputs and B rows.

    keys: F names; values: (sum of lengths,) int64; lengths: (F * B,) int32. Both tensors are key-major. starts: F + 1
    places in `values` where inputs begin and the last one ends; read from the lengths where not given, for which the
    host waits if they are on a GPU. offsets: (F * B + 1,) int64, where the ids of each row of each input begin.
    """

    keys: tuple[str, ...]
    values: Tensor
    lengths: Tensor
    starts: tuple[int, ...] | None = field(default=None, repr=False)
    offsets: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        starts_at_zero = torch.zeros(1, dtype=torch.int64, device=self.lengths.device)
        ends = torch.cat([starts_at_zero, self.lengths.cumsum(0, dtype=torch.int64)])
        object.__setattr__(self, "offsets", ends)  # frozen: set once, so that each column is a slice
        if self.starts is None:
            object.__setattr__(self, "starts", tuple(ends[:: max(1, self.rows)].tolist()))

    @property
    def rows(self) -> int:
        return len(self.lengths) // len(self.keys) if self.keys else 0

    def column(self, name: str) -> tuple[Tensor, Tensor]:
        """The ids of one input: values (n,) int64 and offsets (B + 1,) int64 into them."""
        assert self.starts is not None
        index = self.keys.index(name)
        ends = self.offsets[index * self.rows : (index + 1) * self.rows + 1]
        start, end = self.starts[index : index + 2] if self.rows else (0, 0)
        return self.values[start:end], ends - start


@dataclass(frozen=True, eq=False)
class AttentionEvents(_Tensors):
    """The events of the histories that attention pools, one history after the other; those of each by row, the oldest
    first.

    sizes: how many each history has, which add up to E; rows, places, later: (E,) int64 the row of each event, its
    place in the row's list, and how many come after it; same: (E, K) float32, 1 where an event's part, of at most K
    with a counterpart in the candidate, has the candidate's id. vectors: of each history, (its size, W) float32 what
    its events hold, once a model has looked them up.
    """

    sizes: tuple[int, ...]
    rows: Tensor
    positions: Tensor
    later: Tensor
    same: Tensor
    vectors: tuple[Tensor, ...] = field(default=(), kw_only=True)


@dataclass(eq=False)
class Batch(_Tensors):
    """B rows of a `Layout` as tensors.

    Attributes:
        ids: `KeyedIds` or torchrec's KeyedJaggedTensor over all of `layout.ids`.
        dense: (B, D) float32 over all of `layout.dense`.
        labels: (B, T) float32, or float64 if a task is a regression. Unobserved labels are 0.
        observed: (B, T) bool, whether a label is known.
        position: Position at which a reader continues after this batch, None outside a training.
        weights: (B,) float64 weights of the rows in the loss, None if all rows count alike.
        row_numbers: (B,) int64 numbers of the rows in the files, for `seeded_draws`.
        ragged: Names of the R inputs that don't have exactly one id in every row.
        shares: (R, B) float32 weight of one id in the mean of its row: 1 / number of ids, or 0 without ids. None if
            R is 0.
        events: Events of the histories that attention pools.
    """

    ids: Any
    dense: Tensor
    labels: Tensor
    observed: Tensor
    position: Position | None = None
    weights: Tensor | None = None
    row_numbers: Tensor | None = None
    ragged_inputs: tuple[str, ...] = ()
    pooling_weights: Tensor | None = None
    events: AttentionEvents | None = None

    def __len__(self) -> int:
        return len(self.dense)

    @property
    def observed_weights(self) -> Tensor:
        """(T,) observed labels of each task: their number, int64, or the sum of their rows' weights, float64."""
        if self.weights is None:
            return self.observed.sum(0)
        return (self.observed * self.weights[:, None]).sum(0)


def make_batch(
    encoded: EncodedInputs,
    layout: Layout,
    labels: np.ndarray | None = None,
    position: Position | None = None,
    weights: np.ndarray | None = None,
    row_numbers: np.ndarray | None = None,
    *,
    torchrec: bool,
) -> Batch:
    """Encoded rows and their labels as a batch.

    labels: (B, T) float32 or float64 with NaN where unobserved; None leaves every label unobserved. weights: (B,)
    float64, numbers: (B,) int64, as in `Batch`. torchrec: give ids as a KeyedJaggedTensor. Raises ValueError
    where labels, weights or dense inputs do not fit the layout, KeyError where an id input is missing.
    """
    rows = len(encoded)
    # Those that share a table side by side, as torchrec takes them: it would have to order them otherwise.
    tables = {table.name: number for number, table in enumerate(layout.tables)}
    in_order = sorted(layout.ids, key=lambda each: tables[each.table]) if torchrec else layout.ids
    inputs = {each.name: encoded.ids[each.name] for each in in_order}
    events = _events_of(inputs, layout) if layout.attention else None
    looked_at = {name: each.length for each in layout.attention for name, _ in layout.history_inputs(each)}
    values, lengths, totals = _key_major(list(inputs.values()), rows)
    ragged = {
        name: each
        for name, each in inputs.items()
        if isinstance(each, Ragged) and (each.lengths != 1).any() and name not in looked_at
    }
    dense = _float_tensor(encoded.dense, (rows, len(layout.dense)), "dense inputs")
    if labels is None:
        labels = np.full((rows, len(layout.tasks)), np.nan, np.float32)
    precision = np.float64 if labels.dtype == np.float64 else np.float32
    given = _float_tensor(labels, (rows, len(layout.tasks)), "labels", precision)
    observed = ~given.isnan()
    rows_weights = None if weights is None else _float_tensor(weights, (rows,), "weights", np.float64)
    rows_numbers = None if row_numbers is None else torch.from_numpy(np.require(row_numbers, np.int64, ["C", "W"]))
    shares = None
    if ragged:
        counts = np.stack([each.lengths for each in ragged.values()])
        shares = torch.from_numpy(np.divide(1.0, counts, out=np.zeros(counts.shape, np.float32), where=counts > 0))
    ids: Any = None
    if looked_at or not torchrec:
        ids = KeyedIds(tuple(inputs), values, lengths)
    if torchrec:
        from torchrec import KeyedJaggedTensor

        names = list(inputs)
        if looked_at:
            apart = split_by_position(ids, looked_at)
            names, values, lengths = list(apart.keys), apart.values, apart.lengths
            totals = lengths.view(len(names), rows).sum(1).tolist()
        # The totals are known on the host; without them torchrec would read them back from the device.
        ids = KeyedJaggedTensor(names, values, lengths=lengths, stride=rows, length_per_key=totals)
    known = given.masked_fill(~observed, 0.0)
    rows_own = (position, rows_weights, rows_numbers)
    return Batch(ids, dense, known, observed, *rows_own, tuple(ragged), shares, events)


def split_by_position(ids: KeyedIds, lengths: Mapping[str, int]) -> KeyedIds:
    """The same ids, those of the inputs named with an input for each place of their lists. lengths: name -> places.

    Raises ValueError for a list that has more ids.
    """
    keys, values, counts = list[str](), list[Tensor](), list[Tensor]()
    for name in ids.keys:
        own, offsets = ids.column(name)
        counted = offsets.diff()
        if name not in lengths:
            keys, values, counts = [*keys, name], [*values, own], [*counts, counted]
            continue
        if len(counted) and int(counted.max()) > lengths[name]:
            raise ValueError(f"'{name}' has a list of {int(counted.max())} ids, and at most {lengths[name]} are read")
        place = torch.arange(lengths[name])[:, None]
        inside = place < counted  # (places, B)
        keys += [position_input(name, each) for each in range(lengths[name])]
        values.append(own[(offsets[:-1] + place)[inside]])
        counts.append(inside.flatten())
    return KeyedIds(tuple(keys), torch.cat(values), torch.cat([each.int() for each in counts]))


def _events_of(inputs: Mapping[str, Any], layout: Layout) -> AttentionEvents:
    sizes, rows, places, later, same = list[int](), *(list[np.ndarray]() for _ in range(4))
    history_inputs = {each.history: layout.history_inputs(each) for each in layout.attention}
    most = max(sum(partner is not None for _, partner in each) for each in history_inputs.values())
    for name, own in history_inputs.items():
        lists = inputs[name]
        row = np.arange(len(lists.lengths)).repeat(lists.lengths)
        sizes.append(len(row))
        rows.append(row)
        places.append(np.arange(len(row)) - lists.offsets[row])
        later.append(lists.lengths[row] - 1 - places[-1])
        equal = np.zeros((len(row), most), np.float32)
        pairs = [(part, partner) for part, partner in own if partner is not None]
        for column, (part, partner) in enumerate(pairs):
            equal[:, column] = same_ids(inputs[part].values, inputs[partner][row])
        same.append(equal)
    joined = (torch.from_numpy(np.concatenate(each)) for each in (rows, places, later, same))
    return AttentionEvents(tuple(sizes), *joined)


def same_ids(events: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """(E,) bool: where (E,) table rows are those of the candidates, and not of missing ids, which row 0 is."""
    return (events == candidates) & (events != 0)


def _float_tensor(
    values: np.ndarray, shape: tuple[int, ...], what: str, precision: type[np.floating[Any]] = np.float32
) -> Tensor:
    if values.shape != shape:
        raise ValueError(f"{what}: expected shape {shape} (rows x columns of the layout), found {values.shape}")
    # Copies only what is not contiguous, of another type, or read-only (as arrays from Arrow are).
    return torch.from_numpy(np.require(values, precision, ["C", "W"]))


def _key_major(columns: Sequence[np.ndarray | Ragged], rows: int) -> tuple[Tensor, Tensor, list[int]]:
    """values (sum of lengths,) int64, lengths (F * B,) int32, and the number of values of each input."""
    flat = [each.values if isinstance(each, Ragged) else each for each in columns]
    totals = [len(each) for each in flat]
    lengths = np.ones(len(columns) * rows, np.int32)
    for index, each in enumerate(columns):
        if isinstance(each, Ragged):
            assert int(each.lengths.sum()) == totals[index], "ids do not fit their lengths"
            lengths[index * rows : (index + 1) * rows] = each.lengths
        assert isinstance(each, Ragged) or totals[index] == rows, "ids do not fit the rows"
    values = np.concatenate(flat, dtype=np.int64) if flat else np.empty(0, np.int64)
    return torch.from_numpy(values), torch.from_numpy(lengths), totals


# Random numbers of rows and steps, which are the same however rows are spread over batches and processes.

_DRAWS: ContextVar[tuple[Batch, Iterator[int]] | None] = ContextVar("draws", default=None)


@contextmanager
def seeded_draws(batch: Batch) -> Iterator[None]:
    """Within it, `draw_uniform` and `draw_integer` draw for a step of a batch, by the seed and epoch of its position,
    the numbers of its rows and how many draws came before; elsewhere from torch's own generator.
    """
    token = _DRAWS.set((batch, itertools.count(1)))
    try:
        yield
    finally:
        _DRAWS.reset(token)


def draw_uniform(shape: Sequence[int], device: torch.device) -> Tensor:
    """(B, ...) float32, even over (0, 1), by a counter-based generator (Salmon et al., SC 2011): the mixing function of
    SplitMix64 (Steele et al., OOPSLA 2014) on a row's key and the place of the draw.
    """
    if (draws := _DRAWS.get()) is None:
        return torch.rand(tuple(shape), device=device)
    (batch, draw), first = draws, int(_generator(draws[0], 0).integers(-(2**63), 2**63))
    assert batch.row_numbers is not None, "these rows have no numbers"
    places = torch.arange(math.prod(shape[1:]), device=device) + (next(draw) << 32)
    bits = _mix(_mix(batch.row_numbers + first)[:, None] + places * -0x61C8864680B583EB) >> 41  # 23 of them
    return (((bits & (1 << 23) - 1).float() + 0.5) * 2.0**-23).view(*shape)


def draw_integer(low: int, high: int) -> int:
    """A whole number from low to high, the same on all ranks."""
    if (draws := _DRAWS.get()) is None:
        return int(torch.randint(low, high + 1, ()))
    batch, draw = draws
    return int(_generator(batch, next(draw)).integers(low, high + 1))


def _generator(batch: Batch, draw: int) -> np.random.Generator:
    """That of all ranks for a draw of the step, or of the whole epoch for draw 0."""
    position = batch.position
    assert position is not None, "this batch has no position"
    return np.random.default_rng([position.seed, position.epoch, position.row if draw else 0, 1 + draw])


def _mix(values: Tensor) -> Tensor:
    """(...) int64, which wraps around."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        values = (values ^ (values >> shift & (1 << 64 - shift) - 1)) * factor
    return values
