"""Ranking metrics of many groups at once, without a Python loop over groups.

A group is a request or a user, given as an index in [0, G). Every function sorts its rows by (group, value) and then
works with sums over groups and over *runs*: rows of one group with equal values. Rows of a run have no order of their
own, so each metric is its expected value over a random order of them: no metric can gain from ties.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln


def grouped_auc(
    group: np.ndarray, value: np.ndarray, positives: np.ndarray, negatives: np.ndarray, groups: int
) -> np.ndarray:
    """Area under the ROC curve within each group (the Mann-Whitney statistic, a tie counting one half).

    Args:
        group: (N,) int64 in [0, groups).
        value: (N,) the predictions, or anything in the same order.
        positives: (N,) number of positive rows behind each entry; 0 or 1 for single rows, more for histogram bins.
        negatives: (N,) number of negative rows behind each entry.
        groups: G.

    Returns:
        (G,) float64; NaN for a group without a positive or without a negative row.
    """
    order = np.lexsort((value, group))
    group, value = group[order], value[order]
    run = _runs(group, value)
    run_group = group[_starts(run)]
    run_positives = np.bincount(run, positives[order])
    run_negatives = np.bincount(run, negatives[order])
    all_positives = np.bincount(run_group, run_positives, groups)
    all_negatives = np.bincount(run_group, run_negatives, groups)
    negatives_before = _exclusive_sum(run_negatives) - _exclusive_sum(all_negatives)[run_group]
    pairs_won = np.bincount(run_group, run_positives * (negatives_before + 0.5 * run_negatives), groups)
    pairs = all_positives * all_negatives
    return np.divide(pairs_won, pairs, out=np.full(groups, np.nan), where=pairs > 0)


@dataclass(frozen=True)
class RankedLists:
    """N rows sorted by request and falling score, with the runs of equal scores.

    Attributes:
        request: (N,) int64 in [0, requests).
        requests: Q.
        gain: (N,) float64, at least 0; a row is relevant when its gain is positive.
        position: (N,) int64, from 0 within each request.
        run: (N,) int64, the run each row belongs to.
        run_first: (runs,) int64, position of the run's first row.
        run_length: (runs,) int64.
    """

    request: np.ndarray
    requests: int
    gain: np.ndarray
    position: np.ndarray
    run: np.ndarray
    run_first: np.ndarray
    run_length: np.ndarray

    @staticmethod
    def of(request: np.ndarray, score: np.ndarray, gain: np.ndarray, requests: int) -> "RankedLists":
        """Sort rows; `request` (N,) int64, `score` (N,) float, `gain` (N,) float, all in the same row order."""
        order = np.lexsort((-score, request))
        request, score = request[order], score[order]
        run = _runs(request, score)
        position = _positions(request, requests)
        return RankedLists(request, requests, gain[order], position, run, position[_starts(run)], np.bincount(run))


def ranks_nothing(lists: RankedLists) -> dict[str, np.ndarray]:
    """The requests of which every order is as good as any other: why -> (Q,) bool, each under the first that holds.

    `of_one_row`; `without_relevant_row`; `of_equal_relevance`, where all rows have the same positive gain. NDCG and
    reciprocal rank are 1, or undefined, for whatever scores.
    """
    largest, least = np.full(lists.requests, -np.inf), np.full(lists.requests, np.inf)
    np.maximum.at(largest, lists.request, lists.gain)
    np.minimum.at(least, lists.request, lists.gain)
    single = np.bincount(lists.request, minlength=lists.requests) == 1
    irrelevant = ~single & (largest == 0)
    equal = ~single & ~irrelevant & (least == largest)
    return {"of_one_row": single, "without_relevant_row": irrelevant, "of_equal_relevance": equal}


def ndcg(lists: RankedLists, cutoff: int) -> np.ndarray:
    """Normalised discounted cumulative gain of the first `cutoff` rows, with linear gains.

    DCG = sum over positions i < cutoff of gain_i / log2(i + 2), divided by that of the best possible order
    (Jarvelin and Kekalainen, 2002); tied rows share the mean discount of their positions (McSherry and Najork, 2008).

    Returns:
        (Q,) float64 in [0, 1]; NaN for a request without a relevant row.
    """
    discount_before = _discount_before(cutoff)
    first = np.minimum(lists.run_first, cutoff)
    end = np.minimum(lists.run_first + lists.run_length, cutoff)
    run_discount = (discount_before[end] - discount_before[first]) / lists.run_length
    dcg = np.bincount(lists.request, lists.gain * run_discount[lists.run], lists.requests)
    ideal = _dcg_by(-lists.gain, lists, cutoff)
    return np.divide(dcg, ideal, out=np.full(lists.requests, np.nan), where=ideal > 0)


def least_ndcg(lists: RankedLists, cutoff: int) -> np.ndarray:
    """(Q,) float64 in [0, 1]: the `ndcg` of the worst order; NaN for a request without a relevant row."""
    ideal = _dcg_by(-lists.gain, lists, cutoff)
    worst = _dcg_by(lists.gain, lists, cutoff)
    return np.divide(worst, ideal, out=np.full(lists.requests, np.nan), where=ideal > 0)


def _discount_before(cutoff: int) -> np.ndarray:
    """(cutoff + 1,) the sum of the discounts of the positions before each."""
    return np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(cutoff) + 2))])


def _dcg_by(key: np.ndarray, lists: RankedLists, cutoff: int) -> np.ndarray:
    """(Q,) the DCG of the order by rising key."""
    # Sorting within requests leaves `request` and `position`, which depend on list lengths only, as they are.
    gain = lists.gain[np.lexsort((key, lists.request))]
    discount_before = _discount_before(cutoff)
    discount = np.diff(discount_before, append=discount_before[-1])[np.minimum(lists.position, cutoff)]
    return np.bincount(lists.request, gain * discount, lists.requests)


def reciprocal_rank(lists: RankedLists) -> np.ndarray:
    """1 / the rank of the first relevant row, rank 1 being the highest score.

    Only the first run that holds a relevant row matters. With r relevant among its n rows, the first relevant one is
    the run's j-th with probability C(n - j, r - 1) / C(n, r).

    Returns:
        (Q,) float64 in (0, 1]; NaN for a request without a relevant row.
    """
    run_relevant = np.bincount(lists.run, lists.gain > 0)
    run_request = lists.request[_starts(lists.run)]
    with_relevant = np.flatnonzero(run_relevant)
    found, first = np.unique(run_request[with_relevant], return_index=True)
    is_deciding = np.zeros(len(run_relevant), dtype=bool)
    is_deciding[with_relevant[first]] = True

    row = np.flatnonzero(is_deciding[lists.run])
    run, position = lists.run[row], lists.position[row]
    length, relevant = lists.run_length[run], run_relevant[run]
    place = position - lists.run_first[run] + 1
    probability = np.exp(_log_choose(length - place, relevant - 1) - _log_choose(length, relevant))
    expected = np.bincount(lists.request[row], probability / (position + 1), lists.requests)
    result = np.full(lists.requests, np.nan)
    result[found] = expected[found]
    return result


def _log_choose(n: np.ndarray, k: np.ndarray) -> np.ndarray:
    """log of the binomial coefficient; -inf where k > n."""
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)


def _runs(group: np.ndarray, value: np.ndarray) -> np.ndarray:
    """(N,) index of the run of each row, for rows sorted by group and value."""
    is_new = np.ones(len(group), dtype=bool)
    is_new[1:] = (group[1:] != group[:-1]) | (value[1:] != value[:-1])
    return np.cumsum(is_new) - 1


def _starts(run: np.ndarray) -> np.ndarray:
    """(runs,) index of the first row of each run."""
    return np.flatnonzero(np.diff(run, prepend=-1))


def _positions(group: np.ndarray, groups: int) -> np.ndarray:
    """(N,) position of each row within its group, from 0, for rows sorted by group."""
    return np.arange(len(group)) - _exclusive_sum(np.bincount(group, minlength=groups))[group]


def _exclusive_sum(values: np.ndarray) -> np.ndarray:
    """Sum of all values before each one."""
    return np.cumsum(values) - values
