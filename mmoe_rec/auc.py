"""Areas under curves from counts of positive and negative rows by rising prediction.

That under the ROC curve is the Mann-Whitney statistic, the share of pairs of a positive and a negative row in the right
order: a pair of equal predictions counts one half. Where counts are whole numbers, all that is added up for it is
exact, in whatever order; rows may also have weights.
"""

import numpy as np

MIN_RARER_ROWS = 50
"""Rows of the rarer label below which an AUC says little: at 50, one of .75 has a standard error of about .03 (Hanley
and McNeil, 1982), more than states of one training differ by."""
SUSPICIOUS_AUC = 0.995
"""AUC of a model above which a feature holds the outcome, more likely than not."""
SUSPICIOUS_AUC_ADVICE = (
    "too good to be true: a feature may hold the outcome, or what was written after it; mmoe-rec inspect tells how "
    "well each feature ranks alone"
)


def auc_of_counts(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """(...) float64, the area under the ROC curve of predictions in B bins; NaN where there is no positive or no
    negative row. Rows of one bin are ties.

    positives, negatives: (B, ...) number, or weight, of rows in each bin, the bins in the order of rising prediction.
    """
    below = np.cumsum(negatives, axis=0) - 0.5 * negatives
    pairs_won = np.einsum("b...,b...->...", positives, below)
    pairs = positives.sum(axis=0) * np.asarray(negatives.sum(axis=0), np.float64)
    return np.divide(pairs_won, pairs, out=np.full(pairs.shape, np.nan), where=pairs > 0)


def average_precision_of_counts(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """(...) float64, the average precision: the mean, over positive rows, of the precision of all rows that are
    predicted at least as high (as scikit-learn has it, without interpolation); NaN where there is no positive row.

    positives, negatives: as for `auc_of_counts`.
    """
    positives_above, negatives_above = (np.cumsum(each[::-1], axis=0)[::-1] for each in (positives, negatives))
    rows_above = np.asarray(positives_above + negatives_above, np.float64)
    precision = np.divide(positives_above, rows_above, out=np.zeros(rows_above.shape), where=rows_above > 0)
    summed, total = np.einsum("b...,b...->...", positives, precision), np.asarray(positives.sum(axis=0), np.float64)
    return np.divide(summed, total, out=np.full(total.shape, np.nan), where=total > 0)


def grouped_auc(
    group: np.ndarray, value: np.ndarray, positives: np.ndarray, negatives: np.ndarray, groups: int
) -> np.ndarray:
    """(G,) float64, the area under the ROC curve within each of G groups, such as requests or users, without a loop
    over them; NaN for a group without a positive or without a negative row.

    group: (N,) int64 in [0, groups); value: (N,) the predictions, or anything in the same order; positives, negatives:
    (N,) number, or weight, of rows behind each entry, 0 or 1 for single rows that count alike.
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
    """(N,) sum of the values before each one in its group, the groups (N,) rising; `values` are not negative."""
    total = values.sum()
    if total < 2**53 and (values == np.rint(values)).all():  # a running sum of all is exact
        before = exclusive_cumsum(values)
        first = run_starts(group)
        return before - np.repeat(before[first], np.diff(first, append=len(group)))
    # Else it would round small groups by the size of those before them: sums of 1, 2, 4, ... values of a group.
    found, step = values.copy(), 1
    while (same := np.flatnonzero(group[step:] == group[:-step])).size:
        found[same + step] += found[same]
        step *= 2
    return found - values


def run_index(group: np.ndarray, value: np.ndarray) -> np.ndarray:
    """(N,) index of the run of each row, rows of a group with equal values, for rows sorted by group and value."""
    is_new = np.ones(len(group), dtype=bool)
    is_new[1:] = (group[1:] != group[:-1]) | (value[1:] != value[:-1])
    return np.cumsum(is_new) - 1


def run_starts(run: np.ndarray) -> np.ndarray:
    """(runs,) index of the first row of each run."""
    return np.flatnonzero(np.diff(run, prepend=-1))


def exclusive_cumsum(values: np.ndarray) -> np.ndarray:
    """Sum of all values before each one."""
    return np.cumsum(values) - values
