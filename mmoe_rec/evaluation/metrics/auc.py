"""AUC and average precision over all rows, and AUC within users and requests (GAUC).

GAUC is the mean AUC of groups with both classes, weighted by their observed rows (Zhou et al., 2018) or not. All are
exact. In resamples of users, AUC and average precision over all rows are computed from `MOST_BINS` bins where there are
more predicted values than that, as if rows of one bin were ties, and corrected by what that changes for the rows
themselves. The bins are narrow where there are many rows of either class, however rare positive ones are.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.sparse import csr_matrix

from mmoe_rec.auc import auc_of_counts, average_precision_of_counts, grouped_auc
from mmoe_rec.evaluation.metrics.metric import Drawn, Metric, Ratio, TaskRows, UserSums, ratio

MOST_BINS = 4_096
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


class Auc(Metric[TaskRows]):
    """Area under the ROC curve over all observed rows."""

    name, kinds, better, totals = "auc", ("binary",), "higher", ()
    why_undefined = one_class

    def summarise(self, drawn: Drawn) -> np.ndarray:
        return drawn.sums.once(_Values).resampled(auc_of_counts, drawn)


class AveragePrecision(Metric[TaskRows]):
    """Area under the curve of precision by recall, in steps, over all observed rows."""

    name, kinds, better, totals = "average_precision", ("binary",), "higher", ()

    def summarise(self, drawn: Drawn) -> np.ndarray:
        return drawn.sums.once(_Values).resampled(average_precision_of_counts, drawn)

    def why_undefined(self, group: Mapping[str, Any]) -> str:
        return "Without a positive label, average precision is undefined."


class GaucUser(Metric[TaskRows]):
    """Mean AUC within users. weighted: by their rows; else each user counts alike."""

    kinds, better, totals = ("binary",), "higher", ()
    why_undefined = _without_group

    def __init__(self, weighted: bool = True) -> None:
        self.name = f"gauc_user{'' if weighted else '_unweighted'}"
        self.is_headline = self.weighted = weighted
        super().__init__()

    def summarise(self, drawn: Drawn) -> np.ndarray:
        users = drawn.sums.once(_Values)
        weight = users.user_auc_rows if self.weighted else users.user_has_auc
        return ratio((weight * users.user_auc) @ drawn.counts, weight @ drawn.counts)

    def details(self, sums: UserSums, resamples: int, seed: int) -> dict[str, Any]:
        """The users that are left out."""
        users = sums.once(_Values)
        single = (users.user_has_auc == 0) & (users.user_rows > 0)
        return {"single_class_users": _left_out(sums, single.sum(), users.user_rows[single].sum())}


class GaucRequest(Ratio[TaskRows]):
    """Mean AUC within requests, weighted by their rows."""

    name, kinds, better, totals = "gauc_request", ("binary",), "higher", ("request_auc", "request_auc_rows")
    why_undefined = _without_group

    def measure(self, rows: TaskRows) -> dict[str, np.ndarray]:
        """`requests`; `single_class_requests` of them; of the others, `request_auc_rows`, their rows, `request_auc`,
        each one's AUC x its rows, `requests_with_auc`, and `request_auc_unweighted`, the sum of AUC.
        """
        auc = grouped_auc(rows.request, rows.prediction, rows.label, 1 - rows.label, rows.requests)
        both, request_rows = ~np.isnan(auc), np.bincount(rows.request, minlength=rows.requests)
        return rows.at_first_rows(
            {
                "requests": np.ones(rows.requests, dtype=np.int64),
                "single_class_requests": (~both).astype(np.int64),
                "request_auc_rows": np.where(both, request_rows, 0),
                "request_auc": request_rows * np.nan_to_num(auc),
                "requests_with_auc": both.astype(np.int64),
                "request_auc_unweighted": np.nan_to_num(auc),
            }
        )

    def details(self, sums: UserSums, resamples: int, seed: int) -> dict[str, Any]:
        """The requests that are left out."""
        single, rows = sums.column("single_class_requests").sum(), sums.column("rows").sum()
        return {"single_class_requests": _left_out(sums, single, rows - sums.column("request_auc_rows").sum())}


class GaucRequestUnweighted(Ratio[TaskRows]):
    """Mean AUC within requests, each of which counts alike."""

    name, kinds, better = "gauc_request_unweighted", ("binary",), "higher"
    totals = ("request_auc_unweighted", "requests_with_auc")
    is_headline = False
    why_undefined = _without_group


def _left_out(sums: UserSums, groups: float, rows: float) -> dict[str, Any]:
    observed = sums.column("rows").sum()
    return {"count": int(groups), "share_of_rows": float(rows / observed) if observed else None}


class _Values:
    """Rows by user and predicted value.

    Attributes:
        user_auc: (U,) float64, 0 for a user without both classes.
        user_has_auc: (U,) float64, 0 or 1.
        user_rows, user_auc_rows: (U,) float64, observed rows; 0 in the second where there is no `user_auc`.
    """

    def __init__(self, sums: UserSums) -> None:
        table, users = sums.values, len(sums.users)
        assert table is not None  # of a binary task
        user = sums.index(table["user"])
        positives, rows = table["positives"].to_numpy(), table["rows"].to_numpy()
        values, place = np.unique(table["value"].to_numpy(), return_inverse=True)
        counts = positives, rows - positives
        self._by_value = tuple(np.bincount(place, each, len(values)) for each in counts)
        self._is_exact = len(values) <= MOST_BINS
        bins = place if self._is_exact else equal_mass(table, _shares(counts[0]) + _shares(counts[1]), MOST_BINS)
        shape = int(bins.max(initial=-1)) + 1, users
        self._by_bin = tuple(csr_matrix((each.astype(np.float64), (bins, user)), shape) for each in counts)
        for each in self._by_bin:
            each.eliminate_zeros()
        auc = grouped_auc(user, place, *counts, users)
        self.user_has_auc = (~np.isnan(auc)).astype(np.float64)
        self.user_auc = np.nan_to_num(auc)
        self.user_rows = np.bincount(user, rows, users)
        self.user_auc_rows = self.user_has_auc * self.user_rows

    def resampled(self, of_counts: Callable[[np.ndarray, np.ndarray], np.ndarray], drawn: Drawn) -> np.ndarray:
        """(R,) an area, from counts of positive and negative rows by rising value."""
        found = of_counts(*(each @ drawn.counts for each in self._by_bin))
        if self._is_exact:
            return found
        binned = of_counts(*(np.asarray(each.sum(axis=1)).ravel() for each in self._by_bin))
        return np.clip(found + (of_counts(*self._by_value) - binned), 0.0, 1.0)


def _shares(counts: np.ndarray) -> np.ndarray:
    return counts / max(counts.sum(), 1)


def equal_mass(table: pa.Table, mass: np.ndarray, bins: int) -> np.ndarray:
    """(rows of a table `TASK.values`,) int64, the bin of each, of at most so many of rising value and about equal mass.

    mass: (rows,). Rows of one value share a bin, and no bin is empty.
    """
    values, place = np.unique(table["value"].to_numpy(), return_inverse=True)
    each = np.bincount(place, mass, len(values))
    middle = np.cumsum(each) - 0.5 * each
    found = np.minimum((bins * middle / each.sum()).astype(np.int64), bins - 1)
    return np.unique(found, return_inverse=True)[1][place]
