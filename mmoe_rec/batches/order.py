"""The seeded order of all rows of an epoch, known without reading any; what one rank takes of each global batch; and
where training stands, as plain data for a checkpoint.

The row groups of all files are permuted and cut into windows of about `shuffle_window` rows. Within a row group the
rows are permuted; within a window the groups are mixed in proportion: row j of group g, of n rows, has the key
(j + u_g) / n, and the window's rows come by rising key (equal keys by group). So every stretch of the order holds rows
of each group of its window in proportion to the group's size, and any slice of the order is known from a few counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mmoe_rec.errors import UserError

GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, eq=False)
class Window:
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

    def mixed(self) -> np.ndarray:
        """(stop - start,) int64: to which of the window's groups, 0 to G - 1, the row at each place belongs."""
        numbers = np.arange(len(self.sizes))
        # Multiples of the golden ratio lie evenly, those of any few neighbouring groups too (Kronecker sequence): a
        # batch's rows of the first g groups differ less from their proportion than with random u_g.
        offsets = (self.shift + numbers * GOLDEN) % 1.0
        within = np.arange(self.sizes.sum()) - np.repeat(np.cumsum(self.sizes) - self.sizes, self.sizes)
        keys = (within + np.repeat(offsets, self.sizes)) / np.repeat(self.sizes, self.sizes)
        return np.repeat(numbers, self.sizes)[np.argsort(keys, kind="stable")]


@dataclass(frozen=True, eq=False)
class Part:
    """The rows of a global batch that lie in one window: of each of its G groups, permuted, `counts` from `starts` on.

    Both (G,) int64.
    """

    window: Window
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

    def __init__(self, group_rows: np.ndarray, *, shuffle_window: int, seed: int, epoch: int) -> None:
        self.rows = int(group_rows.sum())
        self._group_rows = group_rows
        self.epoch = epoch
        self._seed = seed
        self.windows = list(self._cut(shuffle_window))

    def permutation(self, group: int) -> np.ndarray:
        """(rows of the group,) int64: the rows of a row group, in the order in which they come."""
        return self._generator(1 + group).permutation(int(self._group_rows[group]))

    def batches(self, batch_size: int, position: int = 0) -> Iterator[list[Part]]:
        """Global batches of the next `batch_size` rows (the last one fewer), from `position` on, as parts of windows.

        The rows of a batch are arranged by `Part.keys`, so a slice of every batch at the same place needs only the same
        few groups.
        """
        parts: list[Part] = []
        wanted = batch_size
        for window in self.windows:
            size = window.stop - window.start
            if window.stop <= position:
                continue
            mixed = window.mixed()
            place = max(position - window.start, 0)
            starts = np.bincount(mixed[:place], minlength=len(window.groups))
            while place < size:
                stop = min(place + wanted, size)
                counts = np.bincount(mixed[place:stop], minlength=len(window.groups))
                parts.append(Part(window, starts, counts))
                starts, wanted, place = starts + counts, wanted - (stop - place), stop
                if not wanted:
                    yield parts
                    parts, wanted = [], batch_size
        if parts:
            yield parts

    def _cut(self, shuffle_window: int) -> Iterator[Window]:
        generator = self._generator(0)
        order = generator.permutation(len(self._group_rows))
        ends = np.cumsum(self._group_rows[order])
        shifts = generator.random(len(order))
        first = 0
        while first < len(order):
            start = int(ends[first - 1]) if first else 0
            # As many groups as fit, but at least one.
            last = max(first + 1, int(np.searchsorted(ends, start + shuffle_window, side="right")))
            groups = order[first:last]
            yield Window(start, groups, self._group_rows[groups], float(shifts[first]))
            first = last

    def _generator(self, draw: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, self.epoch, draw])


class Piece(NamedTuple):
    """Rows start to stop (exclusive) of a row group, permuted."""

    group: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Share:
    """A rank's n rows of one global batch.

    pieces: where they are; index: (n,) int64, each row's place in the joined pieces, None where they are in order;
    copies: (n,) bool, whether a row is a copy of the one before it, which may be another rank's, None where none is.
    """

    pieces: list[Piece]
    index: np.ndarray | None
    copies: np.ndarray | None


class Split:
    """How a global batch is split over ranks: each has `rank_rows` slots, and some rows of a batch with fewer rows than
    slots take several, spread evenly.

    `within`: (rank_rows,) int64, the rank's rows as places in the batch, never falling; `copies` as in `Share`.
    """

    def __init__(self, size: int, *, rank: int, world_size: int, rank_rows: int) -> None:
        slots = rank * rank_rows + np.arange(rank_rows)
        all_slots = rank_rows * world_size
        assert size <= all_slots
        self.size = size
        self.within = slots * size // all_slots
        self.copies = None if size == all_slots else self.within == (slots - 1) * size // all_slots

    def share(self, parts: list[Part]) -> Share:
        """The rank's share of a batch of `size` rows, found without reading any."""
        first, stop = int(self.within[0]), int(self.within[-1]) + 1
        counts = np.concatenate([part.counts for part in parts])
        if len(parts) == 1:
            begins = np.cumsum(counts) - counts
            low, high = np.clip(first - begins, 0, counts), np.clip(stop - begins, 0, counts)
            index = self.within - first
        else:
            arranged = np.argsort(np.concatenate([part.keys() for part in parts]), kind="stable")
            chosen = arranged[first:stop]
            # A segment is the rows of one group. Its rows are arranged in order, so those chosen follow each other.
            segments = np.repeat(np.arange(len(counts)), counts)
            low = np.bincount(segments[arranged[:first]], minlength=len(counts))
            high = low + np.bincount(segments[chosen], minlength=len(counts))
            index = np.argsort(np.argsort(chosen))[self.within - first]
        groups = np.concatenate([part.window.groups for part in parts])
        starts = np.concatenate([part.starts for part in parts])
        pieces = [
            Piece(int(groups[i]), int(starts[i] + low[i]), int(starts[i] + high[i])) for i in np.flatnonzero(high > low)
        ]
        in_order = np.array_equal(index, np.arange(stop - first))
        return Share(pieces, None if in_order else index, self.copies)


@dataclass(frozen=True)
class Position:
    """The first `row` rows of an epoch's order are consumed, by all ranks together; the rest is to come.

    seed, shuffle_window, rows and fingerprint (of the encoded rows, see `EncodedRows`) fix that order, with any number
    of ranks and any batch size.
    """

    epoch: int
    row: int
    seed: int
    shuffle_window: int
    rows: int
    fingerprint: str

    def check(self, own: Position) -> None:
        """Raises UserError unless this position lies in the same order of rows as `own`, and inside its epoch."""
        cannot = f"cannot resume at row {self.row} of epoch {self.epoch}"
        for name in ("rows", "fingerprint", "seed", "shuffle_window"):
            before, now = getattr(self, name), getattr(own, name)
            if before != now:
                raise UserError(
                    f"{cannot}: the checkpoint was made with {name} {before} of the encoded rows, now it is {now}; "
                    "bring those rows or that setting back, or train from the start"
                )
        if self.epoch < 0 or not 0 <= self.row <= self.rows:
            raise UserError(f"{cannot}: an epoch has {self.rows} rows; train from the start")
