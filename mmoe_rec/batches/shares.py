"""What one rank takes of each global batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mmoe_rec.batches.order import Part


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
    """How a global batch is split over ranks, in slots of which each rank has `rank_rows`.

    A batch with fewer rows than slots is stretched: some rows take several slots, spread evenly, so that the ranks'
    numbers of real rows differ by one at most. `within`: (rank_rows,) int64, the rank's rows as places in the batch,
    never falling; `copies` as in `Share`.
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
