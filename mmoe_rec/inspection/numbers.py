"""Sums of a dense input: its histogram in training and test rows, and that of each task's classes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from mmoe_rec.inspection.binary_labels import BinaryLabels
from mmoe_rec.inspection.distinct import DistinctCount
from mmoe_rec.inspection.formulas import auc
from mmoe_rec.log.hashing import mix

GRID = 1000  # quantiles of the fine histogram
PSI_BINS = 20
DISTINCT = 4096


def grid_edges(sample: np.ndarray, edges: tuple[float, ...]) -> np.ndarray:
    """Rising float32 edges of the fine histogram: quantiles of an (N,) sample of training values, and given `edges`.

    Bin i holds the values in (edge i-1, edge i], so that a value that many rows share has a bin of its own.
    """
    quantiles = np.quantile(sample, np.linspace(0, 1, GRID + 1), method="inverted_cdf") if len(sample) else np.empty(0)
    return np.unique(np.concatenate([quantiles, np.array(edges)]).astype(np.float32))


class NumberSums:
    """Mergeable sums of one dense input. edges: (B - 1,) of `grid_edges`; the last of the B + 1 bins is 'missing'."""

    def __init__(self, edges: np.ndarray, tasks: int) -> None:
        self.edges = edges
        bins = len(edges) + 2
        self.counts = {split: np.zeros(bins, np.int64) for split in ("train", "test")}
        self.positives, self.negatives = np.zeros((2, tasks, bins), np.int64)  # of validation rows
        self.distinct = DistinctCount(DISTINCT)

    def add(self, split: str, values: np.ndarray, missing: np.ndarray | None, labels: BinaryLabels) -> None:
        """Counts (N,) float32 values; missing: (N,) bool, None where that is not known."""
        bins = np.searchsorted(self.edges, values, side="left")
        if missing is not None:
            bins[missing] = len(self.edges) + 1
        if split in self.counts:
            self.counts[split] += self._count(bins)
        if split == "train":
            present = values if missing is None else values[~missing]
            self.distinct.add(mix((present + np.float32(0)).view(np.uint32).astype(np.uint64)))
        if split == "validation":
            for task in range(len(self.positives)):
                self.positives[task] += self._count(bins[labels.positive[task]])
                self.negatives[task] += self._count(bins[labels.negative[task]])

    def _count(self, bins: np.ndarray) -> np.ndarray:
        return np.bincount(bins, minlength=len(self.edges) + 2)

    def missing(self, split: str) -> int:
        """Rows without a value."""
        return int(self.counts[split][-1])

    def constant(self) -> bool:
        """Whether all training rows have one value, or all have none."""
        return self.distinct.count() + bool(self.missing("train")) <= 1

    def auc(self, task: int) -> float | None:
        """How well the number alone ranks validation rows, whichever way round, missing values at the better end."""
        positives, negatives = self.positives[task], self.negatives[task]
        found = [auc(positives, negatives), auc(np.roll(positives, 1), np.roll(negatives, 1))]
        return None if found[0] is None else max(max(each, 1 - each) for each in found if each is not None)

    def psi_counts(self, edges: tuple[float, ...]) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Names, training and test counts of the bins that drift is measured in: at `edges`, if there are any, else
        about `PSI_BINS` of equal training mass; then missing values."""
        at = np.array(edges, np.float32) if len(edges) > 1 else self._equal_mass()
        uppers = np.append(self.edges, np.float32(np.inf))
        bins = np.append(np.searchsorted(at, uppers, side="left"), len(at) + 1)
        train, test = (np.bincount(bins, self.counts[split], len(at) + 2) for split in ("train", "test"))
        return [*_names(at), "missing"], train, test

    def _equal_mass(self) -> np.ndarray:
        mass = np.cumsum(self.counts["train"][:-2])
        if not len(mass) or not mass[-1]:
            return self.edges[:1]
        positions = np.searchsorted(mass, np.arange(1, PSI_BINS + 1) / PSI_BINS * mass[-1])
        return self.edges[np.unique(np.minimum(positions, len(mass) - 1))]


def _names(edges: np.ndarray) -> list[str]:
    if not len(edges):
        return ["all values"]
    words = [f"{edge:.3g}" for edge in edges]
    between = [f"{low} to {high}" for low, high in pairwise(words)]
    return [f"up to {words[0]}", *between, f"over {words[-1]}"]
