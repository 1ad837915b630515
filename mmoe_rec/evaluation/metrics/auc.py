"""AUC and average precision over all rows, and AUC within users and requests (GAUC).

GAUC is the mean AUC of groups with both classes, weighted by their observed rows (Zhou et al., 2018) or not. Rows that
have weights count by them. All are exact. In resamples of users, AUC and average precision over all rows are computed
from `MOST_BINS` bins where there are more predicted values than that, as if rows of one bin were ties, and corrected by
what that changes for the rows themselves (`Bins`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from mmoe_rec.auc import auc_of_counts, average_precision_of_counts, grouped_auc
from mmoe_rec.evaluation.metrics.metric import Drawn, Metric, Ratio, TaskRows, UserRows, UserSums

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


NO_REQUEST = "No request has rows of both labels: metrics by request are undefined."


def one_class(_: Metric[Any], group: Mapping[str, Any]) -> str:
    """Why metrics of a binary task are undefined where its observed labels are all alike."""
    label = int(group["positives"] > 0)
    also = "" if label else " So is calibration."
    return f"All {group['rows']:,} labels are {label}: AUC, GAUC and normalised entropy are undefined.{also}"


def _without_group(gauc: Metric[Any], group: Mapping[str, Any]) -> str:
    if group["positives"] in (0, group["rows"]):
        return one_class(gauc, group)
    if "request" in gauc.name:
        return NO_REQUEST
    return "No user has rows of both labels: GAUC by user is undefined."


class _OfBothClasses(Metric[TaskRows]):
    """A metric that needs rows of either label."""

    def sizes(self, sums: UserSums) -> list[np.ndarray]:
        positive = sums.column("label")
        return [positive, sums.column("weight") - positive]


class Auc(_OfBothClasses):
    """Area under the ROC curve over all observed rows."""

    name, kinds, better, totals = "auc", ("binary",), "higher", ()
    why_undefined = one_class

    def summarise(self, drawn: Drawn) -> np.ndarray:
        return drawn.sums.once(Bins).resampled(auc_of_counts, drawn)


class AveragePrecision(_OfBothClasses):
    """Area under the curve of precision by recall, in steps, over all observed rows."""

    name, kinds, better, totals = "average_precision", ("binary",), "higher", ()

    def summarise(self, drawn: Drawn) -> np.ndarray:
        return drawn.sums.once(Bins).resampled(average_precision_of_counts, drawn)

    def why_undefined(self, group: Mapping[str, Any]) -> str:
        return "Without a positive label, average precision is undefined."


class GaucUser(Ratio[TaskRows]):
    """Mean AUC within users, weighted by their rows."""

    name, kinds, better, totals = "gauc_user", ("binary",), "higher", ("user_auc", "user_auc_weight")
    ranks_within, why_undefined = True, _without_group

    def of_users(self, users: UserRows) -> dict[str, np.ndarray]:
        """`single_class_users`, and their rows; of the others, `user_auc_weight`, of their rows, `user_auc`, each one's
        AUC x that, `users_with_auc`, and `user_auc_unweighted`, the sum of AUC."""
        both, auc = ~np.isnan(users.auc), np.nan_to_num(users.auc)
        return {
            "single_class_users": (~both).astype(np.int64),
            "single_class_user_rows": np.where(both, 0.0, users.rows),
            "user_auc_weight": np.where(both, users.weight, 0.0),
            "user_auc": auc * users.weight,
            "users_with_auc": both.astype(np.int64),
            "user_auc_unweighted": auc,
        }

    def details(self, sums: UserSums, resamples: int, seed: int) -> dict[str, Any]:
        """The users that are left out."""
        single, rows = (sums.column(f"single_class_user{each}").sum() for each in ("s", "_rows"))
        return {"single_class_users": _left_out(sums, single, rows)}


class GaucUserUnweighted(Ratio[TaskRows]):
    """Mean AUC within users, each of which counts alike."""

    name, kinds, better = "gauc_user_unweighted", ("binary",), "higher"
    totals = ("user_auc_unweighted", "users_with_auc")
    is_headline = False
    ranks_within, why_undefined = True, _without_group


class GaucRequest(Ratio[TaskRows]):
    """Mean AUC within requests, weighted by their rows."""

    name, kinds, better, totals = "gauc_request", ("binary",), "higher", ("request_auc", "request_auc_weight")
    ranks_within, why_undefined = True, _without_group

    def measure(self, rows: TaskRows) -> dict[str, np.ndarray]:
        """`requests`; `single_class_requests` of them, and their rows; of the others, `request_auc_weight`, of their
        rows, `request_auc`, each one's AUC x that, `requests_with_auc`, and `request_auc_unweighted`, the sum of AUC.
        """
        positives, negatives = rows.weight * rows.label, rows.weight * (1 - rows.label)
        auc = grouped_auc(rows.request, rows.prediction, positives, negatives, rows.requests)
        both, weight = ~np.isnan(auc), np.bincount(rows.request, rows.weight, rows.requests)
        return rows.at_first_rows(
            {
                "requests": np.ones(rows.requests, dtype=np.int64),
                "single_class_requests": (~both).astype(np.int64),
                "single_class_request_rows": np.where(both, 0, np.bincount(rows.request, minlength=rows.requests)),
                "request_auc_weight": np.where(both, weight, 0.0),
                "request_auc": weight * np.nan_to_num(auc),
                "requests_with_auc": both.astype(np.int64),
                "request_auc_unweighted": np.nan_to_num(auc),
            }
        )

    def details(self, sums: UserSums, resamples: int, seed: int) -> dict[str, Any]:
        """The requests that are left out."""
        single, rows = (sums.column(f"single_class_request{each}").sum() for each in ("s", "_rows"))
        return {"single_class_requests": _left_out(sums, single, rows)}


class GaucRequestUnweighted(Ratio[TaskRows]):
    """Mean AUC within requests, each of which counts alike."""

    name, kinds, better = "gauc_request_unweighted", ("binary",), "higher"
    totals = ("request_auc_unweighted", "requests_with_auc")
    is_headline = False
    ranks_within, why_undefined = True, _without_group


def _left_out(sums: UserSums, groups: float, rows: float) -> dict[str, Any]:
    observed = sums.column("rows").sum()
    return {"count": int(groups), "share_of_rows": float(rows / observed) if observed else None}
