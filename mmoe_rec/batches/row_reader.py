"""Training batches: one seeded order of all rows an epoch, of which each rank reads its slices.

The row groups of all files are permuted and cut into windows of about `shuffle_buffer_rows` rows. Within a row group
the rows are permuted; within a window the groups are mixed in proportion: row j of group g, of n rows, has the key
(j + u_g) / n, and the window's rows come by rising key (equal keys by group). So every stretch of the order holds rows
of each group of its window in proportion to the group's size, and any slice of the order is known without reading any.

The global batch is the next `batch_size` rows of the order, arranged by row group, and each rank takes its slots of it.
Neither depends on the number of ranks, so a position in the order is all that an exact resume needs. As a rank's slots
lie at the same place of every batch, it reads only its share of the row groups; the ranks overlap in one group for each
border between two of them.

Batches are made ahead of their consumer, in a background thread.
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
_THREADS = 2  # that decode row groups


@dataclass(frozen=True, eq=False)
class ShuffleWindow:
    """Places start to stop (exclusive) of an epoch's order: the rows of G row groups.

    groups: (G,) int64, which ones; sizes: (G,) int64, the rows of each; shift: in [0, 1), where u_g begins.
    """

    start: int
    groups: np.ndarray
    sizes: np.ndarray
    shift: float

    @property
    def stop(self) -> int:
        """The place after the window's last."""
        return self.start + int(self.sizes.sum())

    def group_per_row(self) -> np.ndarray:
        """(stop - start,) int64: to which of the window's groups, 0 to G - 1, the row at each place belongs."""
        numbers = np.arange(len(self.sizes))
        # Multiples of the golden ratio lie evenly, those of any few neighbouring groups too (Kronecker sequence): a
        # batch's rows of the first g groups differ less from their proportion than with random u_g.
        offsets = (self.shift + numbers * GOLDEN) % 1.0
        within = np.arange(self.sizes.sum()) - np.repeat(np.cumsum(self.sizes) - self.sizes, self.sizes)
        keys = (within + np.repeat(offsets, self.sizes)) / np.repeat(self.sizes, self.sizes)
        return np.repeat(numbers, self.sizes)[np.argsort(keys, kind="stable")]


@dataclass(frozen=True, eq=False)
class WindowSlice:
    """The rows of a global batch that lie in one window: of each of its G groups, permuted, `counts` from `starts` on.

    Both (G,) int64.
    """

    window: ShuffleWindow
    starts: np.ndarray
    counts: np.ndarray

    def keys(self) -> np.ndarray:
        """(sum of counts,) float64, rising: where each row, by group, would lie among all the window's rows, 0 to 1."""
        sizes, counts = self.window.sizes, self.counts
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        before = np.repeat(np.cumsum(sizes) - sizes, counts)
        shares = np.repeat(sizes / np.maximum(counts, 1), counts)
        return (before + (within + 0.5) * shares) / sizes.sum()


class EpochOrder:
    """The order of one epoch. group_rows: (number of row groups,) int64, the rows of each, none of them 0."""

    def __init__(self, row_group_sizes: np.ndarray, *, shuffle_buffer_rows: int, seed: int, epoch: int) -> None:
        self._group_rows, self._seed, self.epoch = row_group_sizes, seed, epoch
        self.windows = list(self._cut(shuffle_buffer_rows))

    def permutation(self, group: int) -> np.ndarray:
        """(rows of the group,) int64: the rows of a row group, in the order in which they come."""
        return self._generator(1 + group).permutation(int(self._group_rows[group]))

    def batches(self, batch_size: int, position: int = 0) -> Iterator[list[WindowSlice]]:
        """Global batches of the next `batch_size` rows (the last one fewer), from `position` on, as parts of windows.

        The rows of a batch are arranged by `WindowSlice.keys`, so a slice of every batch at the same place needs only
        the same few groups.
        """
        parts: list[WindowSlice] = []
        wanted = batch_size
        for window in self.windows:
            size = window.stop - window.start
            if window.stop <= position:
                continue
            group_per_row = window.group_per_row()
            place = max(position - window.start, 0)
            starts = np.bincount(group_per_row[:place], minlength=len(window.groups))
            while place < size:
                stop = min(place + wanted, size)
                counts = np.bincount(group_per_row[place:stop], minlength=len(window.groups))
                parts.append(WindowSlice(window, starts, counts))
                starts, wanted, place = starts + counts, wanted - (stop - place), stop
                if not wanted:
                    yield parts
                    parts, wanted = [], batch_size
        if parts:
            yield parts

    def _cut(self, shuffle_buffer_rows: int) -> Iterator[ShuffleWindow]:
        generator = self._generator(0)
        order = generator.permutation(len(self._group_rows))
        ends = np.cumsum(self._group_rows[order])
        shifts = generator.random(len(order))
        first = 0
        while first < len(order):
            start = int(ends[first - 1]) if first else 0
            # As many groups as fit, but at least one.
            last = max(first + 1, int(np.searchsorted(ends, start + shuffle_buffer_rows, side="right")))
            groups = order[first:last]
            yield ShuffleWindow(start, groups, self._group_rows[groups], float(shifts[first]))
            first = last

    def _generator(self, draw: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, self.epoch, draw])


@dataclass(frozen=True, eq=False)
class RankSlice:
    """A rank's n rows of one global batch.

    pieces: where they are, a row group and rows start to stop (exclusive) of it, permuted; index: (n,) int64, each
    row's place in the joined pieces, None where they are in order; copies: (n,) bool, whether a row is a copy of the
    one before it, which may be another rank's.
    """

    pieces: list[tuple[int, int, int]]
    index: np.ndarray | None
    is_copy: np.ndarray


def slice_for_rank(parts: list[WindowSlice], *, rank: int, world_size: int, rows_per_rank: int) -> RankSlice:
    """A rank's share of a global batch, found without reading any row.

    Each rank has `rows_per_rank` slots, and some rows of a batch with fewer rows than slots take several, spread
    evenly.
    """
    counts = np.concatenate([part.counts for part in parts])
    size, all_slots = int(counts.sum()), rows_per_rank * world_size
    assert size <= all_slots
    slots = rank * rows_per_rank + np.arange(rows_per_rank)
    within = slots * size // all_slots  # places in the batch, never falling
    is_copy = within == (slots - 1) * size // all_slots
    first, stop = int(within[0]), int(within[-1]) + 1
    arranged = np.argsort(np.concatenate([part.keys() for part in parts]), kind="stable")
    chosen = arranged[first:stop]
    # A segment is the rows of one group. Its rows are arranged in order, so those chosen follow each other.
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
    """The first `row` rows of an epoch's order are consumed, by all ranks together; the rest is to come.

    seed: of that order, and of what a step draws.
    """

    epoch: int
    row: int
    seed: int


@dataclass
class TrainingReader:
    """Reads one rank's share of every global batch.

    Every rank gets `batches_per_epoch` batches of `rows_per_rank` = ceil(batch_size / world_size) rows. A global batch
    with fewer rows than that takes is stretched: some rows appear again right after themselves, and such a copy has
    only NaN labels. So no row is lost or counted twice, and the real rows are spread evenly over the ranks.

    Row groups are decoded by threads of their own, one window ahead. Memory: this rank's row groups of two windows, the
    one in use and the one ahead. A window has at most `shuffle_buffer_rows` rows, or one row group where that has more.
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
        """The position after `row` rows of an epoch."""
        return Position(epoch, row, self.seed)

    def resume(self, position: Position, epochs: int) -> Iterator[tuple[LabeledRows, Position]]:
        """This rank's rows of each global batch after `position` and up to epoch `epochs` - 1, and the position then.

        From a position that this gave to all ranks, any world size and batch size gets exactly the rest. Raises
        UserError for a file that cannot be read.
        """
        decoded: dict[tuple[int, int], Future[LabeledRows]] = {}
        current: list[tuple[EpochOrder, RankSlice, Position]] = []
        pool = ThreadPoolExecutor(_THREADS, "reader")
        try:
            for ahead in chain(self._windows(position, epochs), [[]]):
                needed = {
                    (order.epoch, group): order for order, share, _ in current + ahead for group, *_ in share.pieces
                }
                # Also lets go of the groups that no batch needs any more.
                decoded = {
                    (epoch, group): decoded.get((epoch, group))
                    or pool.submit(self.rows.read_row_group, self.rows.row_groups[group], order.permutation(group))
                    for (epoch, group), order in needed.items()
                }
                for order, share, after in current:
                    pieces = [decoded[order.epoch, group].result().slice(*ends) for group, *ends in share.pieces]
                    rows = LabeledRows.concatenate(pieces)
                    rows = rows if share.index is None else rows.take(share.index)
                    rows.labels[share.is_copy] = np.nan
                    yield rows, after
                current = ahead
        finally:
            pool.shutdown(cancel_futures=True)

    def _windows(self, start: Position, epochs: int) -> Iterator[list[tuple[EpochOrder, RankSlice, Position]]]:
        """This rank's share of each global batch after `start`, and the position after it; each list holds the batches
        that begin in the same window.
        """
        for epoch in range(start.epoch, epochs):
            order = self.order(epoch)
            row = start.row if epoch == start.epoch else 0
            for _, batches in groupby(order.batches(self.batch_size, row), key=lambda parts: parts[0].window.start):
                window = []
                for parts in batches:
                    row += sum(int(part.counts.sum()) for part in parts)
                    share = slice_for_rank(
                        parts, rank=self.rank, world_size=self.world_size, rows_per_rank=self.rows_per_rank
                    )
                    window.append((order, share, self.position(epoch, row)))
                yield window

    def order(self, epoch: int) -> EpochOrder:
        return EpochOrder(
            self.rows.row_group_sizes, shuffle_buffer_rows=self.shuffle_buffer_rows, seed=self.seed, epoch=epoch
        )


class Prefetch(Generic[T]):
    """Iterates over a generator once, with up to `depth` items being made or ready ahead of the one in use.

    An exception of the source is raised in the consumer, after the items before it. When the consumer stops early, the
    thread ends after the item that it is making, and the source is closed. No thread runs before the first item is
    asked for. `wait_seconds`: seconds the consumer waited.
    """

    def __init__(self, source: Generator[T, None, None], depth: int = 4) -> None:
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
