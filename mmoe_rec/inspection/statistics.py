"""What an inspection counts and computes: labels as two classes, different values, drift and ranking power.

Drift and ranking power from counts.

PSI, the population stability index, between training shares p and test shares q of the same bins:

    PSI = sum over bins of (q - p) ln(q / p),    p = (rows in bin + 1/2) / (all rows + bins / 2), q likewise

The half row keeps empty bins finite. It is usually read as: below .1 stable, .1 to .25 some drift, above .25 strong
drift (Siddiqi, Credit Risk Scorecards, 2006). Without any drift it is still about (bins - 1) (1 / N + 1 / M) for N and
M rows, `psi_noise`, which matters where a split has few rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from mmoe_rec.auc import auc_of_counts
from mmoe_rec.features.layout import Layout


@dataclass(frozen=True)
class BinaryLabels:
    """Indices of the positive and of the negative rows among N, per task; an unobserved row is in neither.

    A regression's row is positive where its label is above the task's mean in training.
    """

    positive: list[np.ndarray]
    negative: list[np.ndarray]

    @staticmethod
    def of(labels: np.ndarray, layout: Layout) -> BinaryLabels:
        """Of (N, T) labels, NaN is unobserved."""
        bounds = [0.5 if task.kind == "binary" else task.mean for task in layout.tasks]
        above = [labels[:, task] > bound for task, bound in enumerate(bounds)]
        seen = ~np.isnan(labels)
        return BinaryLabels(
            [np.flatnonzero(each) for each in above],
            [np.flatnonzero(seen[:, task] & ~each) for task, each in enumerate(above)],
        )


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


RATE_SMOOTHING = 20.0  # rows of the overall rate that the rate of an id is mixed with


def psi(train: np.ndarray, test: np.ndarray) -> float | None:
    """Population stability index of (B,) counts; None where a split has no rows."""
    if not train.sum() or not test.sum():
        return None
    p = (train + 0.5) / (train.sum() + 0.5 * len(train))
    q = (test + 0.5) / (test.sum() + 0.5 * len(test))
    return float(((q - p) * np.log(q / p)).sum())


def psi_noise(train: np.ndarray, test: np.ndarray) -> float | None:
    """What `psi` is on average if nothing has drifted; None where a split has no rows."""
    if not train.sum() or not test.sum():
        return None
    return float((len(train) - 1) * (1 / train.sum() + 1 / test.sum()))


def auc(positives: np.ndarray, negatives: np.ndarray) -> float | None:
    """Area under the ROC curve of a score in (B,) rising bins, ties within a bin; None where a class is missing."""
    area = float(auc_of_counts(positives, negatives))
    return None if np.isnan(area) else area


def auc_of_scores(scores: np.ndarray, positives: np.ndarray, negatives: np.ndarray) -> float | None:
    """AUC where (B,) bins have scores in any order; bins of equal score are ties."""
    _, rank = np.unique(scores, return_inverse=True)
    return auc(np.bincount(rank, positives), np.bincount(rank, negatives))


def smoothed_rates(positives: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """(R,) share of positives, each mixed with `RATE_SMOOTHING` rows of the overall share (0 where there is none)."""
    overall = positives.sum() / max(observed.sum(), 1)
    return (positives + RATE_SMOOTHING * overall) / (observed + RATE_SMOOTHING)
