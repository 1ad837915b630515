"""Training batches: one seeded order of all rows an epoch, of which each rank reads its slices.

The order depends on the seed and the epoch, not on the number of ranks: the row groups of all files are permuted and
cut into windows of about `shuffle_window` rows, and the rows of a window are permuted together. The global batch is the
next `batch_size` rows of that order, so a position in it is all that an exact resume needs, with any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from mmoe_rec.batches.prefetch import Prefetch
from mmoe_rec.batches.rows import EncodedRows, Rows
from mmoe_rec.errors import UserError


@dataclass(frozen=True)
class Window:
    """Rows start to stop (exclusive) of an epoch's order: those of `groups`, permuted by draw `number` of the seed."""

    number: int
    start: int
    stop: int
    groups: list[tuple[int, int]]


class TrainingReader:
    """Reads one rank's share of every global batch.

    Every rank gets `batches_per_epoch` batches of `rank_rows` = ceil(batch_size / world_size) rows. A global batch with
    fewer rows than that takes (the last of an epoch, or all where world_size does not divide batch_size) is stretched:
    some rows appear again right after themselves, and such a copy has only NaN labels. So no row is lost or counted
    twice, and the real rows are spread evenly over the ranks.

    Memory: the rank's share of two windows, the one in use and the one that a thread makes ready, and while it does
    that, all rows of the latter. A window has at most `shuffle_window` rows, or one row group where that has more.
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
    ) -> None:
        assert batch_size >= 1
        assert 0 <= rank < world_size
        self.rows = rows
        self.batch_size = batch_size
        self.shuffle_window = shuffle_window
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.rank_rows = -(-batch_size // world_size)
        self.batches_per_epoch = -(-rows.rows // batch_size)

    def epoch(self, number: int, position: int = 0) -> Iterator[tuple[Rows, int]]:
        """This rank's rows of each global batch after `position`, and the position after that batch.

        A position counts the rows of the epoch's order that all ranks together have consumed; from a position that this
        gave, any world size goes on with exactly the rest, given the same files, seed and `shuffle_window`. The arrays
        are views of a window: do not write to them, and keep none, for each keeps its window in memory. Raises
        UserError for a position outside the epoch and for a file that cannot be read.
        """
        if not 0 <= position <= self.rows.rows:
            raise UserError(
                f"cannot resume at row {position} of an epoch of {self.rows.rows} rows: the encoded rows are not those "
                "that the checkpoint was made with; train from the start or bring them back"
            )
        with closing(iter(Prefetch(self._shares(number, position), depth=1))) as shares:
            for batch in cut(shares, self.rank_rows):
                position = min(position + self.batch_size, self.rows.rows)
                yield batch, position

    def windows(self, epoch: int) -> Iterator[Window]:
        """The windows of an epoch in order; together they hold every row once."""
        order = self._generator(epoch, 0).permutation(len(self.rows.groups))
        groups: list[tuple[int, int]] = []
        number, start, stop = 1, 0, 0
        for index in order:
            count = int(self.rows.group_rows[index])
            if groups and stop - start + count > self.shuffle_window:
                # Sorted, so that row groups of one file are read together; the rows are permuted anyway.
                yield Window(number, start, stop, sorted(groups))
                number, start, groups = number + 1, stop, []
            groups.append(self.rows.groups[index])
            stop += count
        yield Window(number, start, stop, sorted(groups))

    def _shares(self, epoch: int, position: int) -> Iterator[Rows]:
        """This rank's rows of each window from `position` on."""
        for window in self.windows(epoch):
            if window.stop > position:
                places, copies = self._places(position, max(window.start, position), window.stop)
                permutation = self._generator(epoch, window.number).permutation(window.stop - window.start)
                share = self.rows.read_row_groups(window.groups, permutation[places - window.start])
                share.labels[copies] = np.nan
                yield share
                del share

    def _places(self, begin: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Which of the rows start to stop of the order this rank reads when it began at `begin`.

        Returns the places in the order, (n,) int64, never falling, and whether each is a copy of the one before, (n,)
        bool.
        """
        batches = np.arange((start - begin) // self.batch_size, (stop - 1 - begin) // self.batch_size + 1)[:, None]
        firsts = begin + batches * self.batch_size
        sizes = np.minimum(self.batch_size, self.rows.rows - firsts)
        slots = self.rank * self.rank_rows + np.arange(self.rank_rows)
        all_slots = self.rank_rows * self.world_size
        within = slots * sizes // all_slots
        copies = within == (slots - 1) * sizes // all_slots
        places = firsts + within
        inside = (places >= start) & (places < stop)
        return places[inside], copies[inside]

    def _generator(self, epoch: int, draw: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, draw])


def cut(parts: Iterator[Rows], size: int) -> Iterator[Rows]:
    """Rows of all parts, `size` at a time: views, or a copy where a batch spans parts; rows left over are dropped."""
    rest: Rows | None = None
    for part in parts:
        start = 0
        if rest is not None:
            start = min(size - len(rest), len(part))
            rest = Rows.concatenate([rest, part.slice(0, start)])
            if len(rest) < size:
                continue
            yield rest
        ends = range(start + size, len(part) + 1, size)
        for end in ends:
            yield part.slice(end - size, end)
        start = ends[-1] if ends else start
        rest = part.slice(start, len(part)) if start < len(part) else None
