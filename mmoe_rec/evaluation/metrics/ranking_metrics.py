"""How well the score, or a task's prediction, ranks the rows of a request: means over requests whose rows differ in
relevance. And what the first rows of all requests show together of the catalog, which is all candidates.

Relevance is graded for NDCG; for the others a row is relevant or not. The metrics are computed for all requests at
once, without a Python loop: sums over requests and over *runs*, rows of one request with equal scores. Rows of a run
have no order of their own, so each metric is its expected value over a random order of them: none can gain from ties.
What is computed of ranked lists is (Q,) float64 in [0, 1], and NaN for a request without a relevant row.
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

    row: (N,) int64, where each stands in the order in which they were given; request: (N,) int64 in [0, requests);
    gain: (N,) float64, at least 0, a row is relevant where it is positive; position: (N,) int64, from 0 within each
    request; run: (N,) int64, of each row; run_first, run_length: (runs,) int64, its first position, and its rows.
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
        """Sort rows; `request` (N,) int64, `score` (N,) float, `gain` (N,) float, all in the same row order."""
        order = np.lexsort((-score, request))
        request, score = request[order], score[order]
        run = run_index(request, score)
        position = np.arange(len(request)) - exclusive_cumsum(np.bincount(request, minlength=requests))[request]
        first, length = position[run_starts(run)], np.bincount(run)
        return RankedRequests(order, request, requests, gain[order], position, run, first, length)


class RankingMetric(Ratio[RankedRequests]):
    """The mean of what `of_list` gives over the requests that rank something.

    of_list: (Q,) float64 of ranked lists; it may be NaN for requests that rank nothing.
    """

    kinds, better, is_ranking_metric = ("binary", "regression", "score"), "higher", True
    is_within_group = is_fraction = True

    def __init__(self, name: str, of_list: Callable[[RankedRequests], np.ndarray], is_headline: bool = True) -> None:
        self.name, self._of_list, self.is_headline = name, of_list, is_headline
        self.required_sums = (name, "ranked_requests")

    def measure(self, lists: RankedRequests) -> dict[str, np.ndarray]:
        return {self.name: self._of_list(lists)}


def make_ranking_metrics(cutoffs: Sequence[int]) -> Iterator[RankingMetric]:
    """All of them, those of the first `cutoff` rows for each of several."""
    for cutoff in cutoffs:
        yield RankingMetric(f"ndcg_at_{cutoff}", partial(ndcg, cutoff=cutoff))
    yield RankingMetric("mrr", reciprocal_rank)
    yield RankingMetric("map", average_precision, is_headline=False)
    for cutoff in cutoffs:
        yield RankingMetric(f"recall_at_{cutoff}", partial(recall, cutoff=cutoff), is_headline=False)
    for cutoff in cutoffs:
        yield RankingMetric(f"hit_rate_at_{cutoff}", partial(hit_rate, cutoff=cutoff), is_headline=False)


def find_uninformative_requests(lists: RankedRequests) -> dict[str, np.ndarray]:
    """The requests for which every order is as good as any other: why -> (Q,) bool, each under the first that holds.

    `of_one_row`; `without_relevant_row`; `of_equal_relevance`, where all rows have the same positive gain. NDCG and
    reciprocal rank are 1, or undefined, whatever the scores.
    """
    largest, least = np.full(lists.requests, -np.inf), np.full(lists.requests, np.inf)
    np.maximum.at(largest, lists.request, lists.gain)
    np.minimum.at(least, lists.request, lists.gain)
    single = np.bincount(lists.request, minlength=lists.requests) == 1
    irrelevant = ~single & (largest == 0)
    equal = ~single & ~irrelevant & (least == largest)
    return {"of_one_row": single, "without_relevant_row": irrelevant, "of_equal_relevance": equal}


def ndcg(lists: RankedRequests, cutoff: int) -> np.ndarray:
    """Normalised discounted cumulative gain of the first `cutoff` rows, with linear gains.

    DCG = sum over positions i < cutoff of gain_i / log2(i + 2), divided by that of the best possible order
    (Jarvelin and Kekalainen, 2002); tied rows share the mean discount of their positions (McSherry and Najork, 2008).
    """
    discount_before = _discount_before(cutoff)
    first = np.minimum(lists.run_first, cutoff)
    end = np.minimum(lists.run_first + lists.run_length, cutoff)
    run_discount = (discount_before[end] - discount_before[first]) / lists.run_length
    dcg = np.bincount(lists.request, lists.gain * run_discount[lists.run], lists.requests)
    return ratio(dcg, _ideal_dcg(lists, cutoff))


def random_ndcg(lists: RankedRequests, cutoff: int) -> np.ndarray:
    """The mean of the `ndcg` of all orders."""
    rows = np.bincount(lists.request, minlength=lists.requests)
    gain = np.bincount(lists.request, lists.gain, lists.requests)
    discount = _discount_before(cutoff)[np.minimum(rows, cutoff)]
    return ratio(ratio(gain * discount, rows), _ideal_dcg(lists, cutoff))


def _discount_before(cutoff: int) -> np.ndarray:
    """(cutoff + 1,) the sum of the discounts of the positions before each."""
    return np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(cutoff) + 2))])


def _ideal_dcg(lists: RankedRequests, cutoff: int) -> np.ndarray:
    """(Q,) the DCG of the best order."""
    # Sorting within requests leaves `request` and `position`, which depend on list lengths only, as they are.
    gain = lists.gain[np.lexsort((-lists.gain, lists.request))]
    discount_before = _discount_before(cutoff)
    discount = np.diff(discount_before, append=discount_before[-1])[np.minimum(lists.position, cutoff)]
    return np.bincount(lists.request, gain * discount, lists.requests)


def reciprocal_rank(lists: RankedRequests) -> np.ndarray:
    """1 / the rank of the first relevant row, rank 1 being the highest score.

    Only the first run that holds a relevant row matters. With r relevant among its n rows, the first relevant one is
    the run's j-th with probability C(n - j, r - 1) / C(n, r).
    """
    run_relevant, run_request = _relevant(lists), lists.request[run_starts(lists.run)]
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


def average_precision(lists: RankedRequests) -> np.ndarray:
    """The mean, over the relevant rows, of the share of relevant rows among all rows down to them.

    Of a run of n rows, r of which are relevant, each row is relevant with probability r / n; the j-th, if it is, has
    (j - 1) (r - 1) / (n - 1) relevant ones of the run before it, on average.
    """
    run_relevant, run_request = _relevant(lists), lists.request[run_starts(lists.run)]
    total = np.bincount(run_request, run_relevant, lists.requests)
    before = exclusive_cumsum(run_relevant) - exclusive_cumsum(total)[run_request]
    length, relevant = lists.run_length[lists.run], run_relevant[lists.run]
    place = lists.position - lists.run_first[lists.run]
    others = np.divide(place * (relevant - 1), length - 1, out=np.zeros(len(place)), where=length > 1)
    precision = (before[lists.run] + 1 + others) / (lists.position + 1)
    summed = np.bincount(lists.request, relevant / length * precision, lists.requests)
    return ratio(summed, total)


def recall(lists: RankedRequests, cutoff: int) -> np.ndarray:
    """The share of the relevant rows that are among the first `cutoff`."""
    run_relevant, run_request = _relevant(lists), lists.request[run_starts(lists.run)]
    total = np.bincount(run_request, run_relevant, lists.requests)
    found = np.bincount(run_request, run_relevant * _inside(lists, cutoff) / lists.run_length, lists.requests)
    return ratio(found, total)


def hit_rate(lists: RankedRequests, cutoff: int) -> np.ndarray:
    """Whether a relevant row is among the first `cutoff`: the probability of that where a run reaches beyond them."""
    run_relevant, run_request = _relevant(lists), lists.request[run_starts(lists.run)]
    inside, length = _inside(lists, cutoff), lists.run_length
    # Of the run's rows, those inside are all irrelevant in C(n - r, inside) of C(n, inside) cases.
    log_missed = _log_choose(length - run_relevant, inside) - _log_choose(length, inside)
    missed = np.exp(np.bincount(run_request, log_missed, lists.requests))
    total = np.bincount(run_request, run_relevant, lists.requests)
    return np.where(total > 0, 1 - missed, np.nan)


def _relevant(lists: RankedRequests) -> np.ndarray:
    """(runs,) float64, the relevant rows of each run."""
    return np.bincount(lists.run, lists.gain > 0)


def _inside(lists: RankedRequests, cutoff: int) -> np.ndarray:
    """(runs,) int64, how many rows of each run are among the first `cutoff` of their request."""
    return np.clip(cutoff - lists.run_first, 0, lists.run_length)


def _log_choose(n: np.ndarray, k: np.ndarray) -> np.ndarray:
    """log of the binomial coefficient; -inf where k > n."""
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)


class CatalogMetric(BaseMetric):
    """One metric of the first `cutoff` rows of all requests; it has no interval.

    A candidate is shown as often as it is among the first rows of a request; where rows of equal score reach beyond
    them, by the probability of that in a random order.
    """

    def __init__(
        self,
        of_catalog: Callable[[np.ndarray, np.ndarray, np.ndarray], float],
        better: Literal["higher", "lower"],
        cutoff: int,
        is_headline: bool,
    ) -> None:
        self._of_catalog, self.cutoff = of_catalog, cutoff
        self.name, self.better, self.is_headline = f"{of_catalog.__name__}_at_{cutoff}", better, is_headline

    def summarize(self, catalog: pa.Table, requests: int) -> float:
        """The value. catalog: of `EvaluationSums`; requests: how many there are."""
        shown, log_missed = (catalog[f"{name}_at_{self.cutoff}"].to_numpy() for name in ("shown", "log_missed"))
        return float(self._of_catalog(shown, log_missed, catalog["rows"].to_numpy() / requests))


# Of C candidates, (C,) each: how often it is shown, the logarithm of the probability that it never is, and the share of
# requests that have it in their list.
def coverage(shown: np.ndarray, log_missed: np.ndarray, listed: np.ndarray) -> float:
    """Share of the catalog that is shown at all (Ge, Delgado-Battenfeld and Jannach, 2010)."""
    return np.mean(-np.expm1(log_missed))


def gini(shown: np.ndarray, log_missed: np.ndarray, listed: np.ndarray) -> float:
    """Gini coefficient of how often candidates are shown: 0 where all are equally often, near 1 where one alone is."""
    shown, count = np.sort(shown), len(shown)
    return (2 * np.arange(1, count + 1) - count - 1) @ shown / (count * shown.sum())


def novelty(shown: np.ndarray, log_missed: np.ndarray, listed: np.ndarray) -> float:
    """Mean information, in bits, of what is shown: -log2 of the share of requests that have the candidate in their list
    (Zhou et al., 2010)."""
    return shown @ -np.log2(np.minimum(listed, 1.0)) / shown.sum()


def exposure_by_row(lists: RankedRequests, cutoffs: Sequence[int]) -> dict[str, np.ndarray]:
    """What each of N rows, in the order in which they were given, adds to the sums of its candidate: `shown_at_K`, the
    probability to be among the first K, and `log_missed_at_K`, the logarithm of that not to be."""
    found: dict[str, np.ndarray] = {}
    for cutoff in cutoffs:
        shown = np.zeros(len(lists.row))
        shown[lists.row] = (_inside(lists, cutoff) / lists.run_length)[lists.run]
        with np.errstate(divide="ignore"):
            found |= {f"shown_at_{cutoff}": shown, f"log_missed_at_{cutoff}": np.log1p(-shown)}
    return found
