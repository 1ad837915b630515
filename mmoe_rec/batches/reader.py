"""Training batches: one seeded order of all rows an epoch, of which each rank reads its slices.

The global batch is the next `batch_size` rows of the order, arranged by row group, and each rank takes its slots of it.
Neither depends on the number of ranks, so a position in the order is all that an exact resume needs. As a rank's slots
lie at the same place of every batch, it reads only its share of the row groups; the ranks overlap in one group for each
border between two of them.

Batches are made ahead of their consumer, in a background thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, groupby
from typing import Generic, TypeVar, cast

import numpy as np

from mmoe_rec.batches.encoded_rows import EncodedRows, Rows
from mmoe_rec.batches.order import EpochOrder, Position, Share, Split

T = TypeVar("T")


_END = object()


class Prefetch(Generic[T]):
    """Iterates over a generator once, with up to `depth` items being made or ready ahead of the one in use.

    An exception of the source is raised in the consumer, after the items before it. When the consumer stops early, the
    thread ends after the item that it is making, and the source is closed. No thread runs before the first item is
    asked for. `waited`: seconds the consumer waited.
    """

    def __init__(self, source: Generator[T, None, None], depth: int = 4) -> None:
        self.waited = 0.0
        self._source, self._depth = source, depth

    def __iter__(self) -> Generator[T, None, None]:
        pool = ThreadPoolExecutor(1, "prefetch")
        try:
            ahead = deque(pool.submit(next, self._source, _END) for _ in range(self._depth))
            while True:
                start = time.perf_counter()
                item = ahead.popleft().result()
                self.waited += time.perf_counter() - start
                if item is _END:
                    return
                ahead.append(pool.submit(next, self._source, _END))
                yield cast("T", item)
        finally:
            pool.shutdown(cancel_futures=True)
            self._source.close()


class TrainingReader:
    """Reads one rank's share of every global batch.

    Every rank gets `batches_per_epoch` batches of `rank_rows` = ceil(batch_size / world_size) rows. A global batch with
    fewer rows than that takes is stretched: some rows appear again right after themselves, and such a copy has only NaN
    labels. So no row is lost or counted twice, and the real rows are spread evenly over the ranks.

    Row groups are decoded by `threads` threads, one window ahead. Memory: this rank's row groups of two windows, the
    one in use and the one ahead. A window has at most `shuffle_window` rows, or one row group where that has more.
    """

    def __init__(
        self,
        rows: EncodedRows,
        *,
        batch_size: int,
        shuffle_window: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 2,
    ) -> None:
        assert batch_size >= 1
        assert 0 <= rank < world_size
        self.rows = rows
        self.batch_size = batch_size
        self.shuffle_window = shuffle_window
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.threads = threads
        self.rank_rows = -(-batch_size // world_size)
        self.batches_per_epoch = -(-rows.rows // batch_size)

    def position(self, epoch: int, row: int = 0) -> Position:
        """The position after `row` rows of an epoch."""
        return Position(epoch, row, self.seed, self.shuffle_window, self.rows.rows, self.rows.fingerprint)

    def resume(self, position: Position, epochs: int) -> Iterator[tuple[Rows, Position]]:
        """This rank's rows of each global batch after `position` and up to epoch `epochs` - 1, and the position then.

        From a position that this gave to all ranks, any world size and batch size gets exactly the rest. Raises
        UserError for a position of other rows, another seed or `shuffle_window`, and for a file that cannot be read.
        """
        position.check(self.position(position.epoch))
        return self._read(position, epochs)

    def _read(self, start: Position, epochs: int) -> Iterator[tuple[Rows, Position]]:
        decoded: dict[tuple[int, int], Future[Rows]] = {}
        current: list[_Batch] = []
        pool = ThreadPoolExecutor(self.threads, "reader")
        try:
            for ahead in chain(self._windows(start, epochs), [[]]):
                needed = {
                    (batch.order.epoch, piece.group): batch.order
                    for batch in current + ahead
                    for piece in batch.share.pieces
                }
                # Also lets go of the groups that no batch needs any more.
                decoded = {
                    (epoch, group): decoded.get((epoch, group))
                    or pool.submit(self.rows.read_row_groups, [self.rows.groups[group]], order.permutation(group))
                    for (epoch, group), order in needed.items()
                }
                for batch in current:
                    pieces = [
                        decoded[batch.order.epoch, group].result().slice(first, stop)
                        for group, first, stop in batch.share.pieces
                    ]
                    rows, share = Rows.concatenate(pieces), batch.share
                    rows = rows if share.index is None else rows.take(share.index)
                    if share.copies is not None:
                        rows.labels[share.copies] = np.nan
                    yield rows, batch.after
                current = ahead
        finally:
            pool.shutdown(cancel_futures=True)

    def _windows(self, start: Position, epochs: int) -> Iterator[list[_Batch]]:
        """This rank's batches after `start`; each list holds those that begin in the same window."""
        split = cache(partial(Split, rank=self.rank, world_size=self.world_size, rank_rows=self.rank_rows))
        for epoch in range(start.epoch, epochs):
            order = self.order(epoch)
            row = start.row if epoch == start.epoch else 0
            for _, batches in groupby(order.batches(self.batch_size, row), key=lambda parts: parts[0].window.start):
                found = []
                for parts in batches:
                    size = sum(int(part.counts.sum()) for part in parts)
                    row += size
                    found.append(_Batch(order, split(size).share(parts), self.position(epoch, row)))
                yield found

    def order(self, epoch: int) -> EpochOrder:
        """The order of an epoch's rows."""
        return EpochOrder(self.rows.group_rows, shuffle_window=self.shuffle_window, seed=self.seed, epoch=epoch)


@dataclass(frozen=True, eq=False)
class _Batch:
    """This rank's share of a global batch, and the position after it."""

    order: EpochOrder
    share: Share
    after: Position
