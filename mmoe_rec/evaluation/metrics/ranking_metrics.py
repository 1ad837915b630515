"""Ranking metrics of the score or of a task's prediction, and metrics of the catalog (the set of all candidates).

Ranking metrics measure the order of the rows of a request. They are means over requests whose rows differ in relevance.
NDCG uses graded relevance. The other ranking metrics use binary relevance: a row with a positive gain is relevant.
Catalog metrics measure how the first rows of all requests together spread over the candidates.

All requests are computed at once, without a Python loop. Rows of a request with equal scores form a *run*. Their order
is arbitrary, so each metric is its expected value over random orders of the run, and ties can't improve a metric.
Results for Q requests are (Q,) float64 in [0, 1], and NaN for a request without a relevant row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import pyarrow as pa
from scipy.special import gammaln

from mmoe_rec.auc import exclusive_cumsum, run_index, run_starts
from mmoe_rec.evaluation.metrics.metric import BaseMetric, Ratio, ratio


@dataclass(frozen=True)
class RankedRequests:
    """N rows sorted by request and falling score, with the runs of equal scores.

    Attributes:
        row: Index of the row in the original order, shape (N,) int64.
        request: Index of the row's request, shape (N,) int64 in [0, requests).
        requests: Number of requests.
        gain: Relevance of the row, at least 0, shape (N,) float64. A row with a positive gain is relevant.
        position: Position of the row in its request, from 0, shape (N,) int64.
        run: Index of the row's run, shape (N,) int64.
        run_first: `position` of the first row of each run, shape (runs,) int64.
        run_length: Number of rows of each run, shape (runs,) int64.
    """

    row: np.ndarray
    request: np.ndarray
    requests: int
    gain: np.ndarray
    position: np.ndarray
    run: np.ndarray
    run_first: np.ndarray
    run_length: np.ndarray

    @staticmethod
    def of(request: np.ndarray, score: np.ndarray, gain: np.ndarray, requests: int) -> "RankedRequests":
        """Sort N rows by request and falling score.

        Args:
            request: Index of each row's request, shape (N,) int64.
            score: Score of each row, shape (N,).
            gain: Gain of each row, shape (N,).
            requests: Number of requests.
        """
        order = np.lexsort((-score, request))
        request, score = request[order], score[order]
        run = run_index(request, score)
        position = np.arange(len(request)) - exclusive_cumsum(np.bincount(request, minlength=requests))[request]
        first, length = position[run_starts(run)], np.bincount(run)
        return RankedRequests(order, request, requests, gain[order], position, run, first, length)


class RankingMetric(Ratio[RankedRequests]):
    """Mean over requests of a function such as `ndcg`. Requests whose rows are equally relevant are left out."""

    kinds, better, is_ranking_metric = ("binary", "regression", "score"), "higher", True
    is_within_group = is_fraction = True

    def __init__(self, name: str, of_list: Callable[[RankedRequests], np.ndarray], is_headline: bool = True) -> None:
        """Define the metric.

        Args:
            name: Name of the metric.
            of_list: Function from Q requests to values (Q,) float64. Requests without a relevant row may have NaN.
            is_headline: Whether the table on the terminal has the metric.
        """
        self.name, self._of_list, self.is_headline = name, of_list, is_headline
        self.required_sums = (name, "ranked_requests")

    def measure(self, lists: RankedRequests) -> dict[str, np.ndarray]:
        return {self.name: self._of_list(lists)}


def make_ranking_metrics(cutoffs: Sequence[int]) -> Iterator[RankingMetric]:
    """Yield all ranking metrics. Metrics of the first K rows, such as NDCG@K, are yielded for each cutoff K."""
    for cutoff in cutoffs:
        yield RankingMetric(f"ndcg_at_{cutoff}", partial(ndcg, cutoff=cutoff))
    yield RankingMetric("mrr", reciprocal_rank)
    yield RankingMetric("map", average_precision, is_headline=False)
    for cutoff in cutoffs:
        yield RankingMetric(f"recall_at_{cutoff}", partial(recall, cutoff=cutoff), is_headline=False)
    for cutoff in cutoffs:
        yield RankingMetric(f"hit_rate_at_{cutoff}", partial(hit_rate, cutoff=cutoff), is_headline=False)


def find_uninformative_requests(lists: RankedRequests) -> dict[str, np.ndarray]:
    """Find the requests for which all orders are equally good.

    NDCG and reciprocal rank of these requests are 1, or undefined, for any scores.

    Returns:
        Reason -> mask (Q,) bool of the requests. The reasons are `of_one_row`, `without_relevant_row` and
            `of_equal_relevance` (all rows have the same positive gain). A request has only the first that applies.
    """
    largest, least = np.full(lists.requests, -np.inf), np.full(lists.requests, np.inf)
    np.maximum.at(largest, lists.request, lists.gain)
    np.minimum.at(least, lists.request, lists.gain)
    single = np.bincount(lists.request, minlength=lists.requests) == 1
    irrelevant = ~single & (largest == 0)
    equal = ~single & ~irrelevant & (least == largest)
    return {"of_one_row": single, "without_relevant_row": irrelevant, "of_equal_relevance": equal}


def ndcg(lists: RankedRequests, cutoff: int) -> np.ndarray:
    """Compute the normalized discounted cumulative gain of the first `cutoff` rows, with linear gains.

    NDCG is DCG, the sum over positions i < cutoff of gain_i / log2(i + 2), divided by DCG of the best order (Jarvelin
    and Kekalainen, 2002). Tied rows share the mean discount of their positions (McSherry and Najork, 2008).

    Args:
        lists: Ranked lists.
        cutoff: Number of first rows.

    Returns:
        NDCG of the requests, shape (Q,).
    """
    discount_before = _discount_before(cutoff)
    first = np.minimum(lists.run_first, cutoff)
    end = np.minimum(lists.run_first + lists.run_length, cutoff)
    run_discount = (discount_before[end] - discount_before[first]) / lists.run_length
    dcg = np.bincount(lists.request, lists.gain * run_discount[lists.run], lists.requests)
    return ratio(dcg, _ideal_dcg(lists, cutoff))


def random_ndcg(lists: RankedRequests, cutoff: int) -> np.ndarray:
    """Compute the mean of `ndcg` over all orders of a request's rows, which random scores have on average.

    Args:
        lists: Ranked lists.
        cutoff: Number of first rows.

    Returns:
        Mean NDCG of the requests, shape (Q,).
    """
    rows = np.bincount(lists.request, minlength=lists.requests)
    gain = np.bincount(lists.request, lists.gain, lists.requests)
    discount = _discount_before(cutoff)[np.minimum(rows, cutoff)]
    return ratio(ratio(gain * discount, rows), _ideal_dcg(lists, cutoff))


def _discount_before(cutoff: int) -> np.ndarray:
    """Return the sum of the discounts before each of the positions 0 to `cutoff`, shape (cutoff + 1,)."""
    return np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(cutoff) + 2))])


def _ideal_dcg(lists: RankedRequests, cutoff: int) -> np.ndarray:
    """Return the DCG of the best order of each request, shape (Q,)."""
    # `request` and `position` depend on the lengths of lists only, so they also hold for rows sorted by gain.
    gain = lists.gain[np.lexsort((-lists.gain, lists.request))]
    discount_before = _discount_before(cutoff)
    discount = np.diff(discount_before, append=discount_before[-1])[np.minimum(lists.position, cutoff)]
    return np.bincount(lists.request, gain * discount, lists.requests)


def reciprocal_rank(lists: RankedRequests) -> np.ndarray:
    """Compute 1 / rank of the first relevant row. The highest score has rank 1.

    Only a request's first run with a relevant row matters. If r of the run's n rows are relevant, the first relevant
    row is the j-th row of the run with probability C(n - j, r - 1) / C(n, r).
    """
    run_relevant, run_request = _relevant(lists), lists.request[run_starts(lists.run)]
    with_relevant = np.flatnonzero(run_relevant)
    requests_with_relevant, first = np.unique(run_request[with_relevant], return_index=True)
    is_deciding = np.zeros(len(run_relevant), dtype=bool)
    is_deciding[with_relevant[first]] = True

    row = np.flatnonzero(is_deciding[lists.run])
    run, position = lists.run[row], lists.position[row]
    length, relevant = lists.run_length[run], run_relevant[run]
    rank_in_run = position - lists.run_first[run] + 1
    probability = np.exp(_log_choose(length - rank_in_run, relevant - 1) - _log_choose(length, relevant))
    expected = np.bincount(lists.request[row], probability / (position + 1), lists.requests)
    result = np.full(lists.requests, np.nan)
    result[requests_with_relevant] = expected[requests_with_relevant]
    return result


def average_precision(lists: RankedRequests) -> np.ndarray:
    """Compute the mean precision at the positions of relevant rows, for each request.

    The precision at a position is the fraction of relevant rows among the rows up to and including this position. In a
    run of n rows with equal scores and r relevant rows, each row is relevant with probability r / n. If the j-th row is
    relevant, (j - 1) (r - 1) / (n - 1) relevant rows precede it in the run, on average.
    """
    run_relevant, run_request = _relevant(lists), lists.request[run_starts(lists.run)]
    total = np.bincount(run_request, run_relevant, lists.requests)
    before = exclusive_cumsum(run_relevant) - exclusive_cumsum(total)[run_request]
    length, relevant = lists.run_length[lists.run], run_relevant[lists.run]
    index_in_run = lists.position - lists.run_first[lists.run]
    relevant_before_in_run = np.divide(
        index_in_run * (relevant - 1), length - 1, out=np.zeros(len(index_in_run)), where=length > 1
    )
    precision = (before[lists.run] + 1 + relevant_before_in_run) / (lists.position + 1)
    summed = np.bincount(lists.request, relevant / length * precision, lists.requests)
    return ratio(summed, total)


def recall(lists: RankedRequests, cutoff: int) -> np.ndarray:
    """Compute the fraction of a request's relevant rows that are among its first `cutoff` rows.

    Args:
        lists: Ranked lists.
        cutoff: Number of first rows.

    Returns:
        Recall of the requests, shape (Q,).
    """
    run_relevant, run_request = _relevant(lists), lists.request[run_starts(lists.run)]
    total = np.bincount(run_request, run_relevant, lists.requests)
    relevant_inside = np.bincount(run_request, run_relevant * _inside(lists, cutoff) / lists.run_length, lists.requests)
    return ratio(relevant_inside, total)


def hit_rate(lists: RankedRequests, cutoff: int) -> np.ndarray:
    """Compute the probability that a relevant row is among a request's first `cutoff` rows. Without ties, it is 0 or 1.

    Args:
        lists: Ranked lists.
        cutoff: Number of first rows.

    Returns:
        Probability for the requests, shape (Q,).
    """
    run_relevant, run_request = _relevant(lists), lists.request[run_starts(lists.run)]
    inside, length = _inside(lists, cutoff), lists.run_length
    # `inside` of the n rows of a run are among the first `cutoff` rows. If r rows of the run are relevant, the rows
    # inside are all irrelevant in C(n - r, inside) of C(n, inside) cases.
    log_missed = _log_choose(length - run_relevant, inside) - _log_choose(length, inside)
    missed = np.exp(np.bincount(run_request, log_missed, lists.requests))
    total = np.bincount(run_request, run_relevant, lists.requests)
    return np.where(total > 0, 1 - missed, np.nan)


def _relevant(lists: RankedRequests) -> np.ndarray:
    """Count the relevant rows of each run, shape (runs,) float64."""
    return np.bincount(lists.run, lists.gain > 0)


def _inside(lists: RankedRequests, cutoff: int) -> np.ndarray:
    """Count the rows of each run among the first `cutoff` rows of its request, shape (runs,) int64."""
    return np.clip(cutoff - lists.run_first, 0, lists.run_length)


def _log_choose(n: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Return the log of the binomial coefficient, -inf if k > n."""
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)


class CatalogMetric(BaseMetric):
    """Metric of the candidates that all requests together show, without an interval.

    A request shows the candidates of its first `cutoff` rows. If rows with equal scores lie on both sides of the
    cutoff, each row counts as its probability of being shown in a random order.
    """

    def __init__(
        self,
        of_catalog: Callable[[np.ndarray, np.ndarray, np.ndarray], float],
        better: Literal["higher", "lower"],
        cutoff: int,
        is_headline: bool,
    ) -> None:
        """Define the metric.

        Args:
            of_catalog: Function that computes the metric, such as `coverage`. The metric has the function's name.
            better: Whether `higher` or `lower` values are better.
            cutoff: Number of rows with the highest scores that each request shows.
            is_headline: Whether the table on the terminal has the metric.
        """
        self._of_catalog, self.cutoff = of_catalog, cutoff
        self.name, self.better, self.is_headline = f"{of_catalog.__name__}_at_{cutoff}", better, is_headline

    def summarize(self, catalog: pa.Table, requests: int) -> float:
        """Compute the metric.

        Args:
            catalog: Table `catalog` of `EvaluationSums`.
            requests: Number of requests.
        """
        shown, log_missed = (catalog[f"{name}_at_{self.cutoff}"].to_numpy() for name in ("shown", "log_missed"))
        return float(self._of_catalog(shown, log_missed, catalog["rows"].to_numpy() / requests))


def coverage(shown: np.ndarray, log_missed: np.ndarray, listed: np.ndarray) -> float:
    """Compute the fraction of the catalog that is shown (Ge, Delgado-Battenfeld and Jannach, 2010).

    Args:
        shown: Expected number of requests that show each of C candidates, shape (C,).
        log_missed: Log of the probability that no request shows the candidate, shape (C,).
        listed: Fraction of requests that have the candidate among all of their rows, shape (C,).
    """
    return np.mean(-np.expm1(log_missed))


def gini(shown: np.ndarray, log_missed: np.ndarray, listed: np.ndarray) -> float:
    """Compute the Gini coefficient of exposure.

    It is 0 if all candidates are shown equally often, and near 1 if a single candidate is shown.

    Args:
        shown: As in `coverage`.
        log_missed: As in `coverage`.
        listed: As in `coverage`.
    """
    shown, count = np.sort(shown), len(shown)
    return (2 * np.arange(1, count + 1) - count - 1) @ shown / (count * shown.sum())


def novelty(shown: np.ndarray, log_missed: np.ndarray, listed: np.ndarray) -> float:
    """Compute the mean information, in bits, of the shown candidates (Zhou et al., 2010).

    The information of a candidate is -log2 `listed`. Candidates of few requests are more novel.

    Args:
        shown: As in `coverage`.
        log_missed: As in `coverage`.
        listed: As in `coverage`.
    """
    return shown @ -np.log2(np.minimum(listed, 1.0)) / shown.sum()


def exposure_by_row(lists: RankedRequests, cutoffs: Sequence[int]) -> dict[str, np.ndarray]:
    """Compute the contributions of rows to the table `catalog` of `EvaluationSums`, which adds them up by candidate.

    Args:
        lists: Ranked lists.
        cutoffs: Numbers K of first rows that a request shows.

    Returns:
        For each K, `shown_at_K` is the probability that the row is among its request's first K rows, and
            `log_missed_at_K` is log(1 - shown_at_K). Both have shape (N,), in the order of rows before sorting.
    """
    columns: dict[str, np.ndarray] = {}
    for cutoff in cutoffs:
        shown = np.zeros(len(lists.row))
        shown[lists.row] = (_inside(lists, cutoff) / lists.run_length)[lists.run]
        with np.errstate(divide="ignore"):
            columns |= {f"shown_at_{cutoff}": shown, f"log_missed_at_{cutoff}": np.log1p(-shown)}
    return columns
