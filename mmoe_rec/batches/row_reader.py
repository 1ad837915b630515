"""Training batches in one seeded order of all rows per epoch, of which each rank reads its slices.

The row groups of all files are permuted and cut into windows of about `shuffle_buffer_rows` rows. Within a row group
the rows are permuted. Within a window the groups are mixed in proportion to their sizes: row j of group g with n rows
has the key (j + u_g) / n, and rows are ordered by key (equal keys by group). So the order is known without reading any
rows.

A global batch is the next `batch_size` rows of the order, arranged by row group, and each rank takes its slots. Order
and batches don't depend on the number of ranks, so a run can resume exactly from a position in the order. A rank has
the same slots in every batch, so it reads only a fraction of the row groups. Two neighboring ranks both read the group
at their border.

A background thread prepares batches ahead of their consumer.
"""

import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
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
    """A range of an epoch's order with the rows of G row groups.

    Attributes:
        start: First position of the range.
        groups: (G,) int64 indices of the row groups.
        sizes: (G,) int64 numbers of rows.
        shift: Offset of u_g, in [0, 1).
    """

    start: int
    groups: np.ndarray
    sizes: np.ndarray
    shift: float

    @property
    def stop(self) -> int:
        """End of the range (exclusive)."""
        return self.start + int(self.sizes.sum())

    def group_per_row(self) -> np.ndarray:
        """Return the group (0 to G - 1) of each row of the window, shape (stop - start,), int64."""
        group = np.arange(len(self.sizes))
        # Multiples of the golden ratio are evenly distributed, also for a few neighboring groups (Kronecker sequence).
        # So the rows that a batch has of the first g groups are closer to their proportion than with random u_g.
        offsets = (self.shift + group * GOLDEN) % 1.0
        within = np.arange(self.sizes.sum()) - np.repeat(np.cumsum(self.sizes) - self.sizes, self.sizes)
        keys = (within + np.repeat(offsets, self.sizes)) / np.repeat(self.sizes, self.sizes)
        return np.repeat(group, self.sizes)[np.argsort(keys, kind="stable")]


@dataclass(frozen=True, eq=False)
class WindowSlice:
    """The rows of a global batch in one window, as ranges of the G permuted groups.

    Attributes:
        window: Window with the groups.
        starts: (G,) int64 first row of each group.
        counts: (G,) int64 number of rows of each group.
    """

    window: ShuffleWindow
    starts: np.ndarray
    counts: np.ndarray

    def keys(self) -> np.ndarray:
        """Return the relative position (0 to 1) of each row in the window if rows were ordered by group.

        Returns:
            (sum of counts,) ascending float64.
        """
        sizes, counts = self.window.sizes, self.counts
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        before = np.repeat(np.cumsum(sizes) - sizes, counts)
        spacing = np.repeat(sizes / np.maximum(counts, 1), counts)
        return (before + (within + 0.5) * spacing) / sizes.sum()


class EpochOrder:
    """The order of rows in one epoch.

    Attributes:
        epoch: Index of the epoch.
        windows: Windows in order.
    """

    def __init__(self, row_group_sizes: np.ndarray, *, shuffle_buffer_rows: int, seed: int, epoch: int) -> None:
        """Draw the order of row groups and cut it into windows.

        Args:
            row_group_sizes: (number of row groups,) int64 numbers of rows, all positive.
            shuffle_buffer_rows: Maximum number of rows in a window with more than one row group.
            seed: Seed of the order.
            epoch: Index of the epoch.
        """
        self._row_group_sizes, self._seed, self.epoch = row_group_sizes, seed, epoch
        self.windows = list(self._cut(shuffle_buffer_rows))

    def permutation(self, group: int) -> np.ndarray:
        """Return the order of the rows of a row `group`, shape (rows of the group,), int64."""
        return self._generator(1 + group).permutation(int(self._row_group_sizes[group]))

    def batches(self, batch_size: int, position: int = 0) -> Iterator[list[WindowSlice]]:
        """Yield global batches as slices of windows.

        The rows of a batch are arranged by `WindowSlice.keys`. So the same slots of all batches need the same few
        groups.

        Args:
            batch_size: Number of rows. The last batch can have fewer rows.
            position: First row in the order.
        """
        parts: list[WindowSlice] = []
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
                parts.append(WindowSlice(window, starts, counts))
                starts, missing, start = starts + counts, missing - (stop - start), stop
                if not missing:
                    yield parts
                    parts, missing = [], batch_size
        if parts:
            yield parts

    def _cut(self, shuffle_buffer_rows: int) -> Iterator[ShuffleWindow]:
        generator = self._generator(0)
        order = generator.permutation(len(self._row_group_sizes))
        ends = np.cumsum(self._row_group_sizes[order])
        shifts = generator.random(len(order))
        first = 0
        while first < len(order):
            start = int(ends[first - 1]) if first else 0
            # Take as many groups as fit, but at least one.
            last = max(first + 1, int(np.searchsorted(ends, start + shuffle_buffer_rows, side="right")))
            groups = order[first:last]
            yield ShuffleWindow(start, groups, self._row_group_sizes[groups], float(shifts[first]))
            first = last

    def _generator(self, draw: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, self.epoch, draw])


@dataclass(frozen=True, eq=False)
class RankSlice:
    """The n rows of one rank in a global batch.

    Attributes:
        pieces: Row group, first row and end (exclusive) of each piece, in the permuted order of the group.
        index: (n,) int64 index of each row in the concatenated pieces, None if the pieces are in order.
        is_copy: (n,) bool, whether a row is a copy of the row before it, which can belong to another rank.
    """

    pieces: list[tuple[int, int, int]]
    index: np.ndarray | None
    is_copy: np.ndarray


def slice_for_rank(parts: list[WindowSlice], *, rank: int, world_size: int, rows_per_rank: int) -> RankSlice:
    """Compute a rank's slice of a global batch without reading any rows.

    Each rank has `rows_per_rank` slots. If a batch has fewer rows than slots, some evenly spread rows take several
    slots.

    Args:
        parts: Slices of windows that form the batch.
        rank: Index of the rank.
        world_size: Number of ranks.
        rows_per_rank: Number of slots of each rank.
    """
    counts = np.concatenate([part.counts for part in parts])
    size, all_slots = int(counts.sum()), rows_per_rank * world_size
    assert size <= all_slots
    slots = rank * rows_per_rank + np.arange(rows_per_rank)
    # Index of the row in the batch for each slot, in ascending order.
    within = slots * size // all_slots
    is_copy = within == (slots - 1) * size // all_slots
    first, stop = int(within[0]), int(within[-1]) + 1
    arranged = np.argsort(np.concatenate([part.keys() for part in parts]), kind="stable")
    chosen = arranged[first:stop]
    # A segment has the rows of one group in order, so the chosen rows of a segment are contiguous.
    segments = np.repeat(np.arange(len(counts)), counts)
    low = np.bincount(segments[arranged[:first]], minlength=len(counts))
    high = low + np.bincount(segments[chosen], minlength=len(counts))
    index = np.argsort(np.argsort(chosen))[within - first]
    groups = np.concatenate([part.window.groups for part in parts])
    starts = np.concatenate([part.starts for part in parts])
    pieces = [(int(groups[i]), int(starts[i] + low[i]), int(starts[i] + high[i])) for i in np.flatnonzero(high > low)]
    in_order = np.array_equal(index, np.arange(stop - first))
    return RankSlice(pieces, None if in_order else index, is_copy)


@dataclass(frozen=True)
class Position:
    """A position in the order of an epoch.

    Attributes:
        epoch: Index of the epoch.
        row: Number of rows that all ranks together have consumed.
        seed: Seed of the order and of the random draws of steps.
    """

    epoch: int
    row: int
    seed: int


@dataclass
class TrainingReader:
    """A reader of one rank's slices of all global batches.

    Every rank gets `batches_per_epoch` batches of `rows_per_rank` = ceil(batch_size / world_size) rows. If a global
    batch has fewer rows, some rows are followed by copies of themselves with NaN labels. So no row is lost or counted
    twice, and the rows are spread evenly over the ranks.

    Threads decode row groups one window ahead. Memory contains the rank's row groups of two windows (the current and
    the next window). A window has at most `shuffle_buffer_rows` rows, or one larger row group.

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
        """Return the position after some rows of an epoch.

        Args:
            epoch: Index of the epoch.
            row: Number of consumed rows.
        """
        return Position(epoch, row, self.seed)

    def resume(self, position: Position, epochs: int) -> Iterator[tuple[LabeledRows, Position]]:
        """Yield this rank's rows of each global batch, and the position after the batch.

        From a position that all ranks reached, any world size and batch size reads exactly the remaining rows.

        Args:
            position: Position to start from.
            epochs: Number of epochs in all. The last epoch is `epochs` - 1.

        Raises:
            UserError: A file can't be read.
        """
        decoded: dict[tuple[int, int], Future[LabeledRows]] = {}
        current: list[tuple[EpochOrder, RankSlice, Position]] = []
        pool = ThreadPoolExecutor(_THREADS, "reader")
        try:
            for ahead in chain(self._windows(position, epochs), [[]]):
                needed = {
                    (order.epoch, group): order for order, part, _ in current + ahead for group, *_ in part.pieces
                }
                # This also releases the groups that no batch needs any more.
                decoded = {
                    (epoch, group): decoded.get((epoch, group))
                    or pool.submit(self.rows.read_row_group, self.rows.row_groups[group], order.permutation(group))
                    for (epoch, group), order in needed.items()
                }
                for order, part, after in current:
                    pieces = [decoded[order.epoch, group].result().slice(*ends) for group, *ends in part.pieces]
                    rows = LabeledRows.concatenate(pieces)
                    rows = rows if part.index is None else rows.take(part.index)
                    rows.labels[part.is_copy] = np.nan
                    yield rows, after
                current = ahead
        finally:
            pool.shutdown(cancel_futures=True)

    def _windows(self, start: Position, epochs: int) -> Iterator[list[tuple[EpochOrder, RankSlice, Position]]]:
        """Yield one list per window with this rank's slices of its batches and the positions after the batches.

        A batch belongs to the window of its first row.
        """
        for epoch in range(start.epoch, epochs):
            order = self.order(epoch)
            row = start.row if epoch == start.epoch else 0
            for _, batches in groupby(order.batches(self.batch_size, row), key=lambda parts: parts[0].window.start):
                window = []
                for parts in batches:
                    row += sum(int(piece.counts.sum()) for piece in parts)
                    part = slice_for_rank(
                        parts, rank=self.rank, world_size=self.world_size, rows_per_rank=self.rows_per_rank
                    )
                    window.append((order, part, self.position(epoch, row)))
                yield window

    def order(self, epoch: int) -> EpochOrder:
        """Return the order of rows in an `epoch`."""
        return EpochOrder(
            self.rows.row_group_sizes, shuffle_buffer_rows=self.shuffle_buffer_rows, seed=self.seed, epoch=epoch
        )


class Prefetch(Generic[T]):
    """A one-time iterator over a generator that computes items ahead in a background thread.

    An exception of the source is raised in the consumer, after the items before it. If the consumer stops early, the
    thread ends after its current item, and the source is closed. The thread starts with the first item.

    Attributes:
        wait_seconds: Seconds that the consumer waited.
    """

    def __init__(self, source: Generator[T, None, None], depth: int = 4) -> None:
        """Wrap a generator.

        Args:
            source: Generator to read.
            depth: Maximum number of items that are computed ahead.
        """
        self.wait_seconds = 0.0
        self._source, self._depth = source, depth

    def __iter__(self) -> Generator[T, None, None]:
        pool = ThreadPoolExecutor(1, "prefetch")
        try:
            ahead = deque(pool.submit(next, self._source, _END) for _ in range(self._depth))
            while True:
                start = time.perf_counter()
                item = ahead.popleft().result()
                self.wait_seconds += time.perf_counter() - start
                if item is _END:
                    return
                ahead.append(pool.submit(next, self._source, _END))
                yield cast("T", item)
        finally:
            pool.shutdown(cancel_futures=True)
            self._source.close()
