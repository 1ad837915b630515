"""How many different values there are, in bounded memory."""

from __future__ import annotations

import numpy as np
import pandas as pd

_MOST = np.iinfo(np.uint64).max


class DistinctCount:
    """Different 64-bit hashes seen: exact while fewer than `keep`, estimated from the `keep` smallest beyond.

    A mergeable sum of at most 8 x `keep` bytes. The estimate (k - 1) / u, where u in (0, 1] is the k-th smallest hash,
    is unbiased with a relative standard error of 1 / sqrt(k - 2) (Beyer et al., SIGMOD 2007).
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.smallest = np.empty(0, np.uint64)

    def add(self, hashes: np.ndarray) -> None:
        """Counts (N,) uint64 hashes."""
        if not self.exact:
            hashes = hashes[hashes < self.smallest[-1]]
        if len(hashes):
            self.smallest = np.unique(np.concatenate([self.smallest, pd.unique(hashes)]))[: self.keep]

    @property
    def exact(self) -> bool:
        """Whether `count` is the exact number."""
        return len(self.smallest) < self.keep

    def share_in(self, other: DistinctCount) -> float | None:
        """Which share of the different hashes the other one has seen as well, or its estimate; None where there are
        none."""
        # Below this bound both hold all that they have seen: hashes are as good as random, so it is a fair sample.
        bound = min(_MOST if each.exact else each.smallest[-1] for each in (self, other))
        mine = self.smallest[self.smallest <= bound]
        return float(np.isin(mine, other.smallest).mean()) if len(mine) else None

    def count(self) -> int:
        """The number of different hashes, or its estimate."""
        if self.exact:
            return len(self.smallest)
        return round((self.keep - 1) / (float(self.smallest[-1]) / 2.0**64))
