"""AUC over all rows, and within users and requests (GAUC).

GAUC is the mean AUC of groups weighted by their observed rows (Zhou et al., 2018), over groups with both classes. AUC
over all rows and by user come from the histogram of logits, so that they can be merged: rows of one bin are ties.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from mmoe_rec.auc import auc_of_counts, grouped_auc
from mmoe_rec.evaluation.metrics.metric import Drawn, Metric, Ratio, TaskRows, UserSums, ratio


def one_class(_: Metric[Any], group: Mapping[str, Any]) -> str:
    """Why metrics of a binary task are undefined where its observed labels are all alike."""
    label = int(group["positives"] > 0)
    also = "" if label else " So is calibration."
    return f"All {group['rows']:,} labels are {label}: AUC, GAUC and normalised entropy are undefined.{also}"


def _without_group(gauc: Metric[Any], group: Mapping[str, Any]) -> str:
    if group["positives"] in (0, group["rows"]):
        return one_class(gauc, group)
    which = gauc.name.removeprefix("gauc_")
    return f"No {which} has rows of both labels: GAUC by {which} is undefined."


class Auc(Metric[TaskRows]):
    """Area under the ROC curve over all observed rows."""

    name, kinds, better, totals = "auc", ("binary",), "higher", ()
    why_undefined = one_class

    def summarise(self, drawn: Drawn) -> np.ndarray:
        bins = drawn.sums.once(_Bins)
        return auc_of_counts(bins.positives @ drawn.counts, bins.negatives @ drawn.counts)


class GaucUser(Metric[TaskRows]):
    """Mean AUC within users."""

    name, kinds, better, totals = "gauc_user", ("binary",), "higher", ()
    why_undefined = _without_group

    def summarise(self, drawn: Drawn) -> np.ndarray:
        bins = drawn.sums.once(_Bins)
        return ratio(bins.user_auc_sum @ drawn.counts, bins.user_auc_rows @ drawn.counts)

    def details(self, sums: UserSums, resamples: int, seed: int) -> dict[str, Any]:
        """The users that are left out."""
        bins = sums.once(_Bins)
        single = np.isnan(bins.user_auc) & (bins.user_rows > 0)
        return {"single_class_users": _left_out(sums, single.sum(), bins.user_rows[single].sum())}


class GaucRequest(Ratio[TaskRows]):
    """Mean AUC within requests."""

    name, kinds, better, totals = "gauc_request", ("binary",), "higher", ("request_auc", "request_auc_rows")
    why_undefined = _without_group

    def measure(self, rows: TaskRows) -> dict[str, np.ndarray]:
        """`requests`; `single_class_requests` of them; `request_auc_rows`, the rows of the others, and `request_auc`,
        each such request's AUC x its rows. All stand at the first row of a request.
        """
        auc = grouped_auc(rows.request, rows.prediction, rows.label, 1 - rows.label, rows.requests)
        both, request_rows = ~np.isnan(auc), np.bincount(rows.request, minlength=rows.requests)
        first = np.full(rows.requests, -1)
        first[rows.request[::-1]] = np.arange(len(rows.request))[::-1]  # what is written last stays
        is_first = np.zeros(len(rows.request), dtype=bool)
        is_first[first[first >= 0]] = True
        values = {
            "requests": np.ones(rows.requests, dtype=np.int64),
            "single_class_requests": (~both).astype(np.int64),
            "request_auc_rows": np.where(both, request_rows, 0),
            "request_auc": request_rows * np.nan_to_num(auc),
        }
        return {name: np.where(is_first, each[rows.request], 0) for name, each in values.items()}

    def details(self, sums: UserSums, resamples: int, seed: int) -> dict[str, Any]:
        """The requests that are left out."""
        single, rows = sums.column("single_class_requests").sum(), sums.column("rows").sum()
        return {"single_class_requests": _left_out(sums, single, rows - sums.column("request_auc_rows").sum())}


def _left_out(sums: UserSums, groups: float, rows: float) -> dict[str, Any]:
    observed = sums.column("rows").sum()
    return {"count": int(groups), "share_of_rows": float(rows / observed) if observed else None}


class _Bins:
    """Rows by user and by the histogram's B bins.

    Attributes:
        positives, negatives: (B, U) rows, bins in the order of rising prediction.
        user_auc: (U,) float64, NaN for a user without both classes.
        user_rows, user_auc_rows: (U,) float64, observed rows; 0 in the second where there is no `user_auc`.
        user_auc_sum: (U,) `user_auc` x `user_auc_rows`.
    """

    def __init__(self, sums: UserSums) -> None:
        histogram, users = sums.histogram, len(sums.users)
        assert histogram is not None  # of a binary task
        user = sums.index(histogram["user"])
        positives, rows = histogram["positives"].to_numpy(), histogram["rows"].to_numpy()
        bins, bin_index = np.unique(histogram["bin"].to_numpy(), return_inverse=True)
        shape = (len(bins), users)
        self.positives = csr_matrix((positives.astype(np.float64), (bin_index, user)), shape)
        self.negatives = csr_matrix(((rows - positives).astype(np.float64), (bin_index, user)), shape)
        self.positives.eliminate_zeros()
        self.negatives.eliminate_zeros()
        self.user_auc = grouped_auc(user, bin_index, positives, rows - positives, users)
        self.user_rows = np.bincount(user, rows, users)
        self.user_auc_rows = np.where(np.isnan(self.user_auc), 0.0, self.user_rows)
        self.user_auc_sum = self.user_auc_rows * np.nan_to_num(self.user_auc)
