"""Training batches in a seeded order of all rows per epoch. Each rank reads only its own rows of a batch.

The row groups of all files are permuted and cut into windows of about `shuffle_buffer_rows` rows. Rows are permuted
within their row group. Then a window mixes its row groups in proportion to their sizes: row j of group g with n rows
has the key (j + u_g) / n, and rows are sorted by key. The offsets u_g follow from seed and epoch, so the order is known
without reading any rows.

A global batch has the next `batch_size` rows of the order. The number of ranks doesn't change it, so a run can resume
from any position with another number of ranks. Within a batch, rows are sorted by row group, and each rank has the same
range of every batch. A rank therefore reads only a fraction of the row groups.
"""

import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from itertools import chain, groupby
from typing import Generic, TypeVar, cast

import numpy as np

from mmoe_rec.batches.encoded_dataset import EncodedDataset, LabeledRows

GOLDEN = (5**0.5 - 1) / 2
T = TypeVar("T")
_END = object()
# Threads that decode row groups.
_THREADS = 2


@dataclass(frozen=True, eq=False)
class ShuffleWindow:
    """All rows of G row groups, which are shuffled together.

    Attributes:
        start: Position of the first row in the epoch's order.
        groups: (G,) int64 indices of the row groups.
        sizes: (G,) int64 numbers of rows.
        shift: Random number in [0, 1), which is added to all offsets u_g (see the module).
    """

    start: int
    groups: np.ndarray
    sizes: np.ndarray
    shift: float

    @property
    def stop(self) -> int:
        """Position after the last row."""
        return self.start + int(self.sizes.sum())

    def group_per_row(self) -> np.ndarray:
        """Return the group (0 to G - 1) of each row of the window, shape (stop - start,), int64."""
        group = np.arange(len(self.sizes))
        # Multiples of the golden ratio are spread evenly (Kronecker sequence). A batch then has rows of each group
        # closer to the group's proportion than with random u_g.
        offsets = (self.shift + group * GOLDEN) % 1.0
        within = np.arange(self.sizes.sum()) - np.repeat(np.cumsum(self.sizes) - self.sizes, self.sizes)
        keys = (within + np.repeat(offsets, self.sizes)) / np.repeat(self.sizes, self.sizes)
        return np.repeat(group, self.sizes)[np.argsort(keys, kind="stable")]


@dataclass(frozen=True, eq=False)
class _WindowSlice:
    """The rows of a global batch in one window: a first row and a number of rows for each of the G groups."""

    window: ShuffleWindow
    starts: np.ndarray
    counts: np.ndarray

    def keys(self) -> np.ndarray:
        """Return ascending sort keys, which spread the rows of each group evenly over the group's share of (0, 1)."""
        sizes, counts = self.window.sizes, self.counts
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        before = np.repeat(np.cumsum(sizes) - sizes, counts)
        spacing = np.repeat(sizes / np.maximum(counts, 1), counts)
        return (before + (within + 0.5) * spacing) / sizes.sum()


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """The order of rows in one epoch.

    Attributes:
        row_group_sizes: (number of row groups,) int64 numbers of rows, all positive.
        shuffle_buffer_rows: Maximum number of rows in a window with more than one row group.
        seed: Seed of the order.
        epoch: Index of the epoch.
    """

    row_group_sizes: np.ndarray
    _: KW_ONLY
    shuffle_buffer_rows: int
    seed: int
    epoch: int

    def permutation(self, group: int) -> np.ndarray:
        """Return the order of the rows of row group number `group`, shape (rows of the group,), int64."""
        return self._generator(1 + group).permutation(int(self.row_group_sizes[group]))

    def batches(self, batch_size: int, position: int = 0) -> Iterator[list[_WindowSlice]]:
        """Yield global batches. A batch has rows of one or several windows.

        Args:
            batch_size: Number of rows. The last batch can have fewer rows.
            position: Position of the first row in the order.
        """
        parts: list[_WindowSlice] = []
        missing = batch_size
        for window in self.windows:
            size = window.stop - window.start
            if window.stop <= position:
                continue
            group_per_row = window.group_per_row()
            start = max(position - window.start, 0)
            starts = np.bincount(group_per_row[:start], minlength=len(window.groups))
            while start < size:
                stop = min(start + missing, size)
                counts = np.bincount(group_per_row[start:stop], minlength=len(window.groups))
                parts.append(_WindowSlice(window, starts, counts))
                starts, missing, start = starts + counts, missing - (stop - start), stop
                if not missing:
                    yield parts
                    parts, missing = [], batch_size
        if parts:
            yield parts

    @cached_property
    def windows(self) -> list[ShuffleWindow]:
        """Windows in the order in which they are read. Together, they have all row groups in a random order."""
        generator = self._generator(0)
        order = generator.permutation(len(self.row_group_sizes))
        ends = np.cumsum(self.row_group_sizes[order])
        shifts = generator.random(len(order))
        windows, first = list[ShuffleWindow](), 0
        while first < len(order):
            start = int(ends[first - 1]) if first else 0
            # Take as many groups as fit, but at least one.
            last = max(first + 1, int(np.searchsorted(ends, start + self.shuffle_buffer_rows, side="right")))
            groups = order[first:last]
            windows.append(ShuffleWindow(start, groups, self.row_group_sizes[groups], float(shifts[first])))
            first = last
        return windows

    def _generator(self, draw: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, draw])


@dataclass(frozen=True, eq=False)
class _RankSlice:
    """The n rows of one rank in a global batch.

    Attributes:
        ranges: Row group, first row and end (exclusive) of each range of rows. First row and end are positions in the
            permuted row group (see `EpochOrder.permutation`).
        index: (n,) int64 index of each row in the concatenated ranges, None if the ranges are in order.
        is_copy: (n,) bool, whether a row only fills up a batch with too few rows. It is a copy of the batch's row
            before it, which may be the last row of the previous rank.
    """

    ranges: list[tuple[int, int, int]]
    index: np.ndarray | None
    is_copy: np.ndarray


def _slice_for_rank(parts: list[_WindowSlice], rank: int, world_size: int, rows_per_rank: int) -> _RankSlice:
    """Return a rank's rows of a batch with the given `parts`. A batch with too few rows repeats evenly spread rows."""
    counts = np.concatenate([part.counts for part in parts])
    size, all_slots = int(counts.sum()), rows_per_rank * world_size
    assert size <= all_slots
    slots = rank * rows_per_rank + np.arange(rows_per_rank)
    # All ranks together have `all_slots` slots for rows. This is the index in the batch of each slot's row, ascending.
    within = slots * size // all_slots
    is_copy = within == (slots - 1) * size // all_slots
    first, stop = int(within[0]), int(within[-1]) + 1
    arranged = np.argsort(np.concatenate([part.keys() for part in parts]), kind="stable")
    chosen = arranged[first:stop]
    # A segment has the batch's rows of one group in one window. The chosen rows of a segment are contiguous.
    segments = np.repeat(np.arange(len(counts)), counts)
    low = np.bincount(segments[arranged[:first]], minlength=len(counts))
    high = low + np.bincount(segments[chosen], minlength=len(counts))
    index = np.argsort(np.argsort(chosen))[within - first]
    groups = np.concatenate([part.window.groups for part in parts])
    starts = np.concatenate([part.starts for part in parts])
    ranges = [(int(groups[i]), int(starts[i] + low[i]), int(starts[i] + high[i])) for i in np.flatnonzero(high > low)]
    in_order = np.array_equal(index, np.arange(stop - first))
    return _RankSlice(ranges, None if in_order else index, is_copy)


@dataclass(frozen=True)
class Position:
    """A position in the order of an epoch.

    Attributes:
        epoch: Index of the epoch.
        row: Number of rows of the epoch that all ranks together have consumed.
        seed: Seed of the order and of the random draws of steps.
    """

    epoch: int
    row: int
    seed: int


@dataclass
class TrainingReader:
    """A reader of one rank's rows of all global batches.

    Every rank gets `batches_per_epoch` batches of `rows_per_rank` = ceil(batch_size / world_size) rows. If a global
    batch has too few rows, some rows are followed by copies of themselves with NaN labels. The copies have no loss, so
    every row counts once.

    Threads decode row groups one window ahead. Memory contains the rank's row groups of two windows.

    Attributes:
        rows: Dataset to read.
        batch_size: Number of rows of a global batch.
        shuffle_buffer_rows: Maximum number of rows in a window with more than one row group.
        seed: Seed of the order.
        rank: Index of the rank.
        world_size: Number of ranks.
    """

    rows: EncodedDataset
    _: KW_ONLY
    batch_size: int
    shuffle_buffer_rows: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        assert self.batch_size >= 1
        assert 0 <= self.rank < self.world_size
        self.rows_per_rank = -(-self.batch_size // self.world_size)
        self.batches_per_epoch = -(-self.rows.rows // self.batch_size)

    def position(self, epoch: int, row: int = 0) -> Position:
        """Return the position after the first `row` rows of an epoch.

        Args:
            epoch: Index of the epoch.
            row: Number of consumed rows.
        """
        return Position(epoch, row, self.seed)

    def resume(self, position: Position, epochs: int) -> Iterator[tuple[LabeledRows, Position]]:
        """Yield this rank's rows of each global batch, and the position after the batch.

        Args:
            position: Position to start from. World size and batch size may have changed since.
            epochs: Number of epochs of the whole run.

        Raises:
            UserError: A file can't be read.
        """
        decoded: dict[tuple[int, int], Future[LabeledRows]] = {}
        current: list[tuple[EpochOrder, _RankSlice, Position]] = []
        pool = ThreadPoolExecutor(_THREADS, "reader")
        try:
            for ahead in chain(self._windows(position, epochs), [[]]):
                batches = current + ahead
                needed = {(order.epoch, group): order for order, part, _ in batches for group, *_ in part.ranges}
                # This also releases the groups that no batch needs any more.
                decoded = {
                    (epoch, group): decoded.get((epoch, group))
                    or pool.submit(self.rows.read_row_group, self.rows.row_groups[group], order.permutation(group))
                    for (epoch, group), order in needed.items()
                }
                for order, part, after in current:
                    parts = [decoded[order.epoch, group].result().slice(*ends) for group, *ends in part.ranges]
                    rows = LabeledRows.concatenate(parts)
                    rows = rows if part.index is None else rows.take(part.index)
                    rows.labels[part.is_copy] = np.nan
                    yield rows, after
                current = ahead
        finally:
            pool.shutdown(cancel_futures=True)

    def _windows(self, start: Position, epochs: int) -> Iterator[list[tuple[EpochOrder, _RankSlice, Position]]]:
        """Yield, for each window, the batches that begin in it: order, this rank's rows, and the position after."""
        for epoch in range(start.epoch, epochs):
            order = self.order(epoch)
            row = start.row if epoch == start.epoch else 0
            for _, batches in groupby(order.batches(self.batch_size, row), key=lambda parts: parts[0].window.start):
                window = []
                for parts in batches:
                    row += sum(int(part.counts.sum()) for part in parts)
                    own = _slice_for_rank(parts, self.rank, self.world_size, self.rows_per_rank)
                    window.append((order, own, self.position(epoch, row)))
                yield window

    def order(self, epoch: int) -> EpochOrder:
        """Return the order of rows in an `epoch`."""
        sizes, buffer = self.rows.row_group_sizes, self.shuffle_buffer_rows
        return EpochOrder(sizes, shuffle_buffer_rows=buffer, seed=self.seed, epoch=epoch)


@dataclass
class Prefetch(Generic[T]):
    """An iterator over a generator, for one pass, that computes items ahead in a background thread.

    The thread starts with the first item. An exception of the source is raised in the consumer, after the items before
    it. If the consumer stops early, the thread ends after its current item, and the source is closed.

    Attributes:
        source: Generator to read.
        depth: Maximum number of items that are computed ahead.
        wait_seconds: Seconds that the consumer has waited for items.
    """

    source: Generator[T, None, None]
    depth: int = 4
    wait_seconds: float = field(default=0.0, init=False)

    def __iter__(self) -> Generator[T, None, None]:
        pool = ThreadPoolExecutor(1, "prefetch")
        try:
            ahead = deque(pool.submit(next, self.source, _END) for _ in range(self.depth))
            while True:
                start = time.perf_counter()
                item = ahead.popleft().result()
                self.wait_seconds += time.perf_counter() - start
                if item is _END:
                    return
                ahead.append(pool.submit(next, self.source, _END))
                yield cast("T", item)
        finally:
            pool.shutdown(cancel_futures=True)
            self.source.close()
