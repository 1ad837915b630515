"""Bins of predicted values, by which areas over all rows are computed in resamples of users."""

from collections.abc import Callable

import numpy as np
from scipy.sparse import csr_matrix

from mmoe_rec.evaluation.metrics.metric import Drawn, UserSums

MOST_BINS = 4_096
Area = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From numbers of positive and of negative rows by rising value, (B, ...) each."""
_DENSE_FROM = 0.05  # of all cells, from which share on a dense matrix is faster


class Bins:
    """Weights of the rows of both classes by user and bin of the predicted value, and by value."""

    def __init__(self, sums: UserSums) -> None:
        assert sums.bins is not None  # of a binary task
        assert sums.counts is not None
        _, *self._by_value = counts_by_value(*(each.to_numpy() for each in sums.counts.columns))
        self._corrections: dict[Area, float] = {}
        both = [sums.bins[name].to_numpy() for name in ("label", "negative")]
        bins, place = np.unique(sums.bins["bin"].to_numpy(), return_inverse=True)
        shape, user = (len(bins), len(sums.users)), sums.index(sums.bins["user"])
        # Single precision has whole numbers of rows in a bin only, and up to a size.
        is_whole = all((each == np.rint(each)).all() for each in both)
        is_small = is_whole and np.bincount(place, sum(both), len(bins)).max(initial=0) < 2**24
        is_dense = is_small and len(place) > _DENSE_FROM * shape[0] * shape[1]
        self._by_bin = []
        for each in both:
            by_user = csr_matrix((each, (place, user)), shape)
            by_user.eliminate_zeros()
            self._by_bin.append(by_user.astype(np.float32).toarray() if is_dense else by_user)

    def resampled(self, area: Area, drawn: Drawn) -> np.ndarray:
        """(R,) an area; exact where all are drawn once."""
        counts = drawn.counts.astype(np.float32) if isinstance(self._by_bin[0], np.ndarray) else drawn.counts
        found = area(*((each @ counts).astype(np.float64) for each in self._by_bin))
        return np.clip(found + self._correction(area), 0.0, 1.0)

    def _correction(self, area: Area) -> float:
        """By how much that of the values differs from that of the bins."""
        if area not in self._corrections:
            binned = area(*(np.asarray(each.sum(axis=1), np.float64).ravel() for each in self._by_bin))
            self._corrections[area] = float(area(*self._by_value) - binned)
        return self._corrections[area]


def counts_by_value(
    values: np.ndarray, positives: np.ndarray, negatives: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct ones of N values, rising, with all positive and negative rows of each."""
    distinct, place = np.unique(values, return_inverse=True)
    return distinct, np.bincount(place, positives, len(distinct)), np.bincount(place, negatives, len(distinct))


def bin_edges(values: np.ndarray, positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """(B - 1,) the first value of each bin but the first, of (V,) rising values with numbers of rows.

    A bin for each value, if there are at most `MOST_BINS`; else bins of about equal shares of both classes, so that
    they are narrow where there are many rows of either class, however rare positive ones are.
    """
    if len(values) <= MOST_BINS:
        return values[1:]
    mass = positives / max(positives.sum(), 1) + negatives / max(negatives.sum(), 1)
    bins = equal_mass(np.arange(len(values)), mass, MOST_BINS)
    return values[1:][np.diff(bins) > 0]


def equal_mass(values: np.ndarray, mass: np.ndarray, bins: int) -> np.ndarray:
    """(N,) int64, the bin of each of N values of some mass: at most so many, of rising value and about equal mass.

    Equal values share a bin, and no bin is empty.
    """
    distinct, place = np.unique(values, return_inverse=True)
    each = np.bincount(place, mass, len(distinct))
    middle = np.cumsum(each) - 0.5 * each
    found = np.minimum((bins * middle / max(each.sum(), np.finfo(float).tiny)).astype(np.int64), bins - 1)
    return np.unique(found, return_inverse=True)[1][place]
