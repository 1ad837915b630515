"""Areas under the ROC and precision-recall curves, from counts of positive and negative rows.

The area under the ROC curve (AUC) is the Mann-Whitney statistic: the fraction of pairs of a positive and a negative
row in the right order. A tie counts one half. Rows can have weights. Without weights, counts are integers, so their
sums are exact in any order.
"""

import numpy as np

MIN_RARER_ROWS = 50
"""Minimum number of rows with the rarer label for a meaningful AUC. At 50 rows, an AUC of .75 has a standard error of
about .03 (Hanley and McNeil, 1982). The AUCs of different steps of a training run differ by less than that."""
SUSPICIOUS_AUC = 0.995
"""AUC of a model above which a feature probably contains the label."""
SUSPICIOUS_AUC_ADVICE = (
    "too good to be true: a feature may contain the label, or data written after it. Run mmoe-rec inspect to see "
    "the AUC of each feature"
)


def auc_of_counts(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """Compute the area under the ROC curve of predictions in B bins. Rows of one bin are ties.

    Args:
        positives: Number or weight of positive rows in each bin, by rising prediction. Shape (B, ...).
        negatives: Number or weight of negative rows in each bin. Shape (B, ...).

    Returns:
        Areas, NaN without a positive or a negative row. Shape (...), float64.
    """
    below = np.cumsum(negatives, axis=0) - 0.5 * negatives
    pairs_won = np.einsum("b...,b...->...", positives, below)
    pairs = positives.sum(axis=0) * np.asarray(negatives.sum(axis=0), np.float64)
    return np.divide(pairs_won, pairs, out=np.full(pairs.shape, np.nan), where=pairs > 0)


def average_precision_of_counts(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """Compute the average precision, as scikit-learn does, without interpolation.

    The average precision is a mean over positive rows. For each of them, the precision is the fraction of positives
    among all rows with the same or a higher prediction.

    Args:
        positives: Number or weight of positive rows in each bin, by rising prediction. Shape (B, ...).
        negatives: Number or weight of negative rows in each bin. Shape (B, ...).

    Returns:
        Average precisions, NaN without a positive row. Shape (...), float64.
    """
    positives_above, negatives_above = (np.cumsum(counts[::-1], axis=0)[::-1] for counts in (positives, negatives))
    rows_above = np.asarray(positives_above + negatives_above, np.float64)
    precision = np.divide(positives_above, rows_above, out=np.zeros(rows_above.shape), where=rows_above > 0)
    summed, total = np.einsum("b...,b...->...", positives, precision), np.asarray(positives.sum(axis=0), np.float64)
    return np.divide(summed, total, out=np.full(total.shape, np.nan), where=total > 0)


def grouped_auc(
    group: np.ndarray, value: np.ndarray, positives: np.ndarray, negatives: np.ndarray, groups: int
) -> np.ndarray:
    """Compute the area under the ROC curve within each of G groups, such as requests or users.

    Args:
        group: Group of each entry, in [0, groups). Shape (N,), int64.
        value: Predictions, or other values that sort the entries in the same order. Shape (N,).
        positives: Number or weight of positive rows that each entry stands for. Shape (N,).
        negatives: Number or weight of negative rows that each entry stands for. Shape (N,).
        groups: Number of groups G.

    Returns:
        Areas, NaN for a group without a positive or a negative row. Shape (G,), float64.
    """
    order = np.lexsort((value, group))
    group, value = group[order], value[order]
    run = run_index(group, value)
    run_group = group[run_starts(run)]
    run_positives = np.bincount(run, positives[order])
    run_negatives = np.bincount(run, negatives[order])
    all_positives = np.bincount(run_group, run_positives, groups)
    all_negatives = np.bincount(run_group, run_negatives, groups)
    negatives_before = _sum_before_in_group(run_group, run_negatives)
    pairs_won = np.bincount(run_group, run_positives * (negatives_before + 0.5 * run_negatives), groups)
    pairs = all_positives * all_negatives
    return np.divide(pairs_won, pairs, out=np.full(groups, np.nan), where=pairs > 0)


def _sum_before_in_group(group: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return for each entry the sum of its group's earlier values. Groups are sorted, and values are at least 0."""
    total = values.sum()
    if total < 2**53 and (values == np.rint(values)).all():  # Float64 is exact for these sums of integers.
        before = exclusive_cumsum(values)
        first = run_starts(group)
        return before - np.repeat(before[first], np.diff(first, append=len(group)))
    # For other values, a cumulative sum over all groups would have rounding errors from large earlier groups. So add
    # only values of the same group: first neighbors, then sums of 2, of 4 values and so on.
    sums, step = values.copy(), 1
    while (same := np.flatnonzero(group[step:] == group[:-step])).size:
        sums[same + step] += sums[same]
        step *= 2
    return sums - values


def run_index(group: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Return the index of each row's run, shape (N,). A run is all rows with the same group and value.

    Args:
        group: Groups, shape (N,). Rows are sorted by group and value.
        value: Values, shape (N,).
    """
    is_new = np.ones(len(group), dtype=bool)
    is_new[1:] = (group[1:] != group[:-1]) | (value[1:] != value[:-1])
    return np.cumsum(is_new) - 1


def run_starts(run: np.ndarray) -> np.ndarray:
    """Return the index of each run's first row, shape (runs,). A run is consecutive rows with equal values."""
    return np.flatnonzero(np.diff(run, prepend=-1))


def exclusive_cumsum(values: np.ndarray) -> np.ndarray:
    """Return the sum of all values before each value."""
    return np.cumsum(values) - values
