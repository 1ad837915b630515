"""What the first rows of all requests show together: how much of the catalogue, how unevenly, and how little known.

The catalogue is all candidates of the evaluated rows. A candidate is shown as often as it is among the first rows of a
request; where rows of equal score reach beyond them, by the probability of that in a random order.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from mmoe_rec.evaluation.metrics.metric import Named
from mmoe_rec.evaluation.metrics.ranking import RankedLists


class CatalogueMetric(Named):
    """One metric of the first `cutoff` rows of all requests; it has no interval."""

    what: str

    def __init__(self, cutoff: int, is_headline: bool) -> None:
        self.name, self.cutoff, self.is_headline = f"{self.what}_at_{cutoff}", cutoff, is_headline

    @abstractmethod
    def summarise(self, catalogue: pa.Table, requests: int) -> float:
        """The value. catalogue: of `EvaluationSums`; requests: how many there are."""

    def _shown(self, catalogue: pa.Table) -> np.ndarray:
        """(C,) how often each candidate is shown; their sum is positive."""
        found: np.ndarray = catalogue[f"shown_at_{self.cutoff}"].to_numpy()
        return found


class Coverage(CatalogueMetric):
    """Share of the catalogue that is shown at all (Ge, Delgado-Battenfeld and Jannach, 2010)."""

    what, better = "coverage", "higher"

    def summarise(self, catalogue: pa.Table, requests: int) -> float:
        log_missed = catalogue[f"log_missed_at_{self.cutoff}"].to_numpy()
        return float(np.mean(-np.expm1(log_missed)))


class Gini(CatalogueMetric):
    """Gini coefficient of how often candidates are shown: 0 where all are equally often, near 1 where one alone is."""

    what, better = "gini", "lower"

    def summarise(self, catalogue: pa.Table, requests: int) -> float:
        shown = np.sort(self._shown(catalogue))
        count = len(shown)
        return float((2 * np.arange(1, count + 1) - count - 1) @ shown / (count * shown.sum()))


class Novelty(CatalogueMetric):
    """Mean information, in bits, of what is shown: -log2 of the share of requests that have the candidate in their list
    (Zhou et al., 2010)."""

    what, better = "novelty", "higher"

    def summarise(self, catalogue: pa.Table, requests: int) -> float:
        shown, listed = self._shown(catalogue), np.minimum(catalogue["rows"].to_numpy() / requests, 1.0)
        return float(shown @ -np.log2(listed) / shown.sum())


def catalogue_metrics(cutoffs: Sequence[int]) -> Iterator[CatalogueMetric]:
    """All of them, for each of several cutoffs."""
    for metric in (Coverage, Gini, Novelty):
        for cutoff in cutoffs:
            yield metric(cutoff, is_headline=cutoff == max(cutoffs))


def shown_rows(lists: RankedLists, cutoffs: Sequence[int]) -> dict[str, np.ndarray]:
    """What each of N rows, in the order in which they were given, adds to the sums of its candidate: `shown_at_K`, the
    probability to be among the first K, and `log_missed_at_K`, the logarithm of that not to be."""
    found: dict[str, np.ndarray] = {}
    for cutoff in cutoffs:
        inside = np.clip(cutoff - lists.run_first, 0, lists.run_length) / lists.run_length
        shown = np.zeros(len(lists.row))
        shown[lists.row] = inside[lists.run]
        with np.errstate(divide="ignore"):
            found |= {f"shown_at_{cutoff}": shown, f"log_missed_at_{cutoff}": np.log1p(-shown)}
    return found
