"""Drift and ranking power from counts.

PSI, the population stability index, between training shares p and test shares q of the same bins:

    PSI = sum over bins of (q - p) ln(q / p),    p = (rows in bin + 1/2) / (all rows + bins / 2), q likewise

The half row keeps empty bins finite. It is usually read as: below .1 stable, .1 to .25 some drift, above .25 strong
drift (Siddiqi, Credit Risk Scorecards, 2006). Without any drift it is still about (bins - 1) (1 / N + 1 / M) for N and
M rows, `psi_noise`, which matters where a split has few rows.
"""

from __future__ import annotations

import numpy as np

from mmoe_rec.auc import auc_of_counts

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
