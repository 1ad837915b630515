"""The seeded order of all rows of an epoch, known without reading any.

The row groups of all files are permuted and cut into windows of about `shuffle_window` rows. Within a row group the
rows are permuted; within a window the groups are mixed in proportion: row j of group g, of n rows, has the key
(j + u_g) / n, and the window's rows come by rising key (equal keys by group). So every stretch of the order holds rows
of each group of its window in proportion to the group's size, and any slice of the order is known from a few counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

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

        The rows of a batch are arranged by `Part.keys` (equal keys: the earlier window first), so by row group where it
        lies in one window: a slice of every batch at the same place needs only the same few groups.
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
