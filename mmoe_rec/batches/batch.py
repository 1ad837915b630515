"""A batch of encoded rows as tensors.

Ids are key-major, as in torchrec's KeyedJaggedTensor, which means that all ids of input 0 come before the ids of input
1. Serving and single-process training use `KeyedIds`, which needs only torch. Training with sharded tables uses a
KeyedJaggedTensor. Shapes have B rows, F id inputs, D dense inputs and T tasks.
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
    """A group of tensors that move between devices together."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Copy the tensors to a `device`, asynchronously if `non_blocking` is true and the memory is page-locked."""
        return self._map(lambda part: part.to(torch.device(device), non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Copy the tensors to page-locked memory, from which copies to a GPU overlap with computation."""
        return self._map(lambda part: part.pin_memory())

    def record_stream(self, stream: Any) -> None:
        """Mark the tensors as used by a CUDA `stream`, so that their memory is not reused too early."""
        for part in self._parts().values():
            part.record_stream(stream)

    def _map(self, change: Callable[[Any], Any]) -> Self:
        init_fields = {field.name for field in fields(self) if field.init}  # type: ignore[arg-type]
        parts = {name: change(part) for name, part in self._parts().items() if name in init_fields}
        return replace(self, **parts)  # type: ignore[type-var]

    def _parts(self) -> dict[str, Any]:
        return {name: part for name, part in vars(self).items() if hasattr(part, "record_stream")}


@dataclass(frozen=True, eq=False)
class KeyedIds(_Tensors):
    """Lists of ids for F inputs and B rows. All lists of an input come before the lists of the next input.

    Attributes:
        keys: Names of the inputs.
        values: (sum of lengths,) int64 ids.
        lengths: (F * B,) int32 numbers of ids in the lists.
        starts: F + 1 bounds of the inputs in `values`. If it is None, the constructor computes the bounds from
            `lengths`, which makes the host wait for a GPU.
        offsets: (F * B + 1,) int64 bounds of the lists in `values`.
    """

    keys: tuple[str, ...]
    values: Tensor
    lengths: Tensor
    starts: tuple[int, ...] | None = field(default=None, repr=False)
    offsets: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        starts_at_zero = torch.zeros(1, dtype=torch.int64, device=self.lengths.device)
        ends = torch.cat([starts_at_zero, self.lengths.cumsum(0, dtype=torch.int64)])
        object.__setattr__(self, "offsets", ends)
        if self.starts is None:
            object.__setattr__(self, "starts", tuple(ends[:: max(1, self.rows)].tolist()))

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.lengths) // len(self.keys) if self.keys else 0

    def column(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the ids of the input called `name` as (n,) int64 values and (B + 1,) int64 offsets."""
        assert self.starts is not None
        index = self.keys.index(name)
        ends = self.offsets[index * self.rows : (index + 1) * self.rows + 1]
        start, end = self.starts[index : index + 2] if self.rows else (0, 0)
        return self.values[start:end], ends - start


@dataclass(frozen=True, eq=False)
class AttentionEvents(_Tensors):
    """Events of the histories that attention pools, ordered by history, row and position (oldest first).

    Attributes:
        sizes: Number of events of each history, E in total.
        rows: (E,) int64 row of each event.
        positions: (E,) int64 position of each event in its history.
        later: (E,) int64 number of later events in the same history.
        same: (E, K) float32, 1 where an input of the event, such as its brand, has the same id as the candidate. K is
            the largest number of inputs that a history shares with the candidate.
        vectors: For each history, embeddings (size, width) float32 of its events. Empty until a model looks them up.
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
        position: Position at which a reader continues after this batch, None outside training.
        weights: (B,) float64 weights of the rows in the loss, None if all rows count alike.
        row_numbers: (B,) int64 numbers of the rows in the files, for `seeded_draws`.
        ragged_inputs: Names of the R inputs in which some rows don't have exactly one id, except for histories that
            attention pools.
        pooling_weights: (R, B) float32 factors from sums to means: 1 / number of ids, 0 without ids. None if R is 0.
        events: Events of the histories that attention pools, None without such histories.
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
        """Number of observed labels (int64), or the sum of their weights (float64), shape (T,)."""
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
    """Convert encoded rows and labels to a batch.

    Args:
        encoded: B encoded rows.
        layout: Layout of the rows.
        labels: (B, T) float32 or float64, NaN where unobserved. None leaves all labels unobserved.
        position: Position at which a reader continues after this batch.
        weights: (B,) float64 weights of the rows.
        row_numbers: (B,) int64 numbers of the rows in the files.
        torchrec: Whether to return ids as a KeyedJaggedTensor.

    Raises:
        ValueError: Labels, weights or dense inputs don't fit the layout.
        KeyError: An id input is missing.
    """
    rows = len(encoded)
    # torchrec expects inputs of the same table next to each other, and would reorder them otherwise.
    tables = {table.name: index for index, table in enumerate(layout.tables)}
    id_inputs = sorted(layout.ids, key=lambda key: tables[key.table]) if torchrec else layout.ids
    inputs = {key.name: encoded.ids[key.name] for key in id_inputs}
    events = _attention_events(inputs, layout) if layout.attention else None
    max_lengths = {name: history.length for history in layout.attention for name, _ in layout.history_inputs(history)}
    values, lengths, totals = _key_major(list(inputs.values()), rows)
    ragged = {
        name: lists
        for name, lists in inputs.items()
        if isinstance(lists, Ragged) and (lists.lengths != 1).any() and name not in max_lengths
    }
    dense = _float_tensor(encoded.dense, (rows, len(layout.dense)), "dense inputs")
    if labels is None:
        labels = np.full((rows, len(layout.tasks)), np.nan, np.float32)
    label_type = np.float64 if labels.dtype == np.float64 else np.float32
    label_tensor = _float_tensor(labels, (rows, len(layout.tasks)), "labels", label_type)
    observed = ~label_tensor.isnan()
    weight_tensor = None if weights is None else _float_tensor(weights, (rows,), "weights", np.float64)
    number_tensor = None if row_numbers is None else torch.from_numpy(np.require(row_numbers, np.int64, ["C", "W"]))
    pooling = None
    if ragged:
        counts = np.stack([lists.lengths for lists in ragged.values()])
        pooling = torch.from_numpy(np.divide(1.0, counts, out=np.zeros(counts.shape, np.float32), where=counts > 0))
    ids: Any = KeyedIds(tuple(inputs), values, lengths) if max_lengths or not torchrec else None
    if torchrec:
        from torchrec import KeyedJaggedTensor

        names = list(inputs)
        if max_lengths:
            split = split_by_position(ids, max_lengths)
            names, values, lengths = list(split.keys), split.values, split.lengths
            totals = lengths.view(len(names), rows).sum(1).tolist()
        # Pass the totals, because torchrec would otherwise read them back from the device.
        ids = KeyedJaggedTensor(names, values, lengths=lengths, stride=rows, length_per_key=totals)
    row_fields = label_tensor.masked_fill(~observed, 0.0), observed, position, weight_tensor, number_tensor
    return Batch(ids, dense, *row_fields, tuple(ragged), pooling, events)


def split_by_position(ids: KeyedIds, lengths: Mapping[str, int]) -> KeyedIds:
    """Split each input in `lengths` into inputs for single list positions, which have one id per row or none.

    Args:
        ids: Ids of all inputs.
        lengths: Name of an input to split -> number of positions. Other inputs stay as they are.

    Raises:
        ValueError: A list has more ids than positions.
    """
    keys, values, counts = list[str](), list[Tensor](), list[Tensor]()
    for name in ids.keys:
        column, offsets = ids.column(name)
        list_lengths = offsets.diff()
        if name not in lengths:
            keys, values, counts = [*keys, name], [*values, column], [*counts, list_lengths]
            continue
        if len(list_lengths) and int(list_lengths.max()) > lengths[name]:
            longest = int(list_lengths.max())
            raise ValueError(f"'{name}' has a list of {longest} ids, and at most {lengths[name]} are read")
        position = torch.arange(lengths[name])[:, None]
        inside = position < list_lengths  # (positions, B)
        keys += [position_input(name, index) for index in range(lengths[name])]
        values.append(column[(offsets[:-1] + position)[inside]])
        counts.append(inside.flatten())
    return KeyedIds(tuple(keys), torch.cat(values), torch.cat([count.int() for count in counts]))


def _attention_events(inputs: Mapping[str, Any], layout: Layout) -> AttentionEvents:
    sizes, rows, positions, later, same = list[int](), *(list[np.ndarray]() for _ in range(4))
    history_inputs = {history.history: layout.history_inputs(history) for history in layout.attention}
    max_pairs = max(sum(partner is not None for _, partner in parts) for parts in history_inputs.values())
    for name, parts in history_inputs.items():
        lists = inputs[name]
        row = np.arange(len(lists.lengths)).repeat(lists.lengths)
        sizes.append(len(row))
        rows.append(row)
        positions.append(np.arange(len(row)) - lists.offsets[row])
        later.append(lists.lengths[row] - 1 - positions[-1])
        equal = np.zeros((len(row), max_pairs), np.float32)
        pairs = [(part, partner) for part, partner in parts if partner is not None]
        for column, (part, partner) in enumerate(pairs):
            equal[:, column] = same_ids(inputs[part].values, inputs[partner][row])
        same.append(equal)
    joined = (torch.from_numpy(np.concatenate(arrays)) for arrays in (rows, positions, later, same))
    return AttentionEvents(tuple(sizes), *joined)


def same_ids(events: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Return whether each event has the same id as its candidate, (E,) bool. Missing ids, stored as 0, never match.

    Args:
        events: (E,) ids of the events.
        candidates: (E,) ids of the events' candidates.
    """
    return (events == candidates) & (events != 0)


def _float_tensor(
    values: np.ndarray, shape: tuple[int, ...], name: str, dtype: type[np.floating[Any]] = np.float32
) -> Tensor:
    if values.shape != shape:
        raise ValueError(f"{name}: expected shape {shape} (rows x columns of the layout), found {values.shape}")
    # This copies only arrays that are not contiguous, have another type, or are read-only (like arrays from Arrow).
    return torch.from_numpy(np.require(values, dtype, ["C", "W"]))


def _key_major(columns: Sequence[np.ndarray | Ragged], rows: int) -> tuple[Tensor, Tensor, list[int]]:
    """Return the ids of F `columns` as int64 values and (F * B,) int32 lengths, and each column's number of ids."""
    flat = [column.values if isinstance(column, Ragged) else column for column in columns]
    totals = [len(values) for values in flat]
    lengths = np.ones((len(columns), rows), np.int32)
    for index, column in enumerate(columns):
        if isinstance(column, Ragged):
            lengths[index] = column.lengths
    assert lengths.sum(1).tolist() == totals, "ids do not fit their lengths"
    values = np.concatenate(flat, dtype=np.int64) if flat else np.empty(0, np.int64)
    return torch.from_numpy(values), torch.from_numpy(lengths.ravel()), totals


# Random numbers for a row or a whole step, which don't depend on how rows are split among processes.

_DRAWS: ContextVar[tuple[Batch, Iterator[int]] | None] = ContextVar("draws", default=None)


@contextmanager
def seeded_draws(batch: Batch) -> Iterator[None]:
    """Make `draw_uniform` and `draw_integer` reproducible for one step with a `batch`.

    A draw depends on the seed and epoch of `batch.position`, the number of earlier draws in this context, and either
    row numbers (`draw_uniform`) or the position's row (`draw_integer`).
    """
    token = _DRAWS.set((batch, itertools.count(1)))
    try:
        yield
    finally:
        _DRAWS.reset(token)


def draw_uniform(shape: Sequence[int], device: torch.device) -> Tensor:
    """Draw uniform float32 numbers, reproducibly within `seeded_draws` and otherwise with torch's own generator.

    Within `seeded_draws`, numbers are in (0, 1) and each row's numbers depend on its row number and not on the other
    rows of the batch. They come from a counter-based generator (Salmon et al., SC 2011) with the mixing function of
    SplitMix64 (Steele et al., OOPSLA 2014).

    Args:
        shape: Shape (B, ...) of the result.
        device: Device of the result.
    """
    if (draws := _DRAWS.get()) is None:
        return torch.rand(tuple(shape), device=device)
    (batch, draw), first = draws, int(_generator(draws[0], 0).integers(-(2**63), 2**63))
    assert batch.row_numbers is not None, "these rows have no numbers"
    indices = torch.arange(math.prod(shape[1:]), device=device) + (next(draw) << 32)
    # Keep 23 bits, which float32 represents exactly.
    bits = _mix(_mix(batch.row_numbers + first)[:, None] + indices * -0x61C8864680B583EB) >> 41
    return (((bits & (1 << 23) - 1).float() + 0.5) * 2.0**-23).view(*shape)


def draw_integer(low: int, high: int) -> int:
    """Draw an integer, which is the same on all ranks within `seeded_draws`, and otherwise from torch's generator.

    Args:
        low: Smallest result.
        high: Largest result, inclusive.
    """
    if (draws := _DRAWS.get()) is None:
        return int(torch.randint(low, high + 1, ()))
    batch, draw = draws
    return int(_generator(batch, next(draw)).integers(low, high + 1))


def _generator(batch: Batch, draw: int) -> np.random.Generator:
    """Return a generator, equal on all ranks, for draw number `draw` of a step. Draw 0 is for a whole epoch."""
    position = batch.position
    assert position is not None, "this batch has no position"
    return np.random.default_rng([position.seed, position.epoch, position.row if draw else 0, 1 + draw])


def _mix(values: Tensor) -> Tensor:
    """Apply the mixing function of SplitMix64 to int64 values, with wraparound."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        values = (values ^ (values >> shift & (1 << 64 - shift) - 1)) * factor
    return values
