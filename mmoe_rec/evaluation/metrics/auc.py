"""AUC and average precision over all rows, and AUC within users and requests (GAUC).

GAUC is the mean AUC of groups with both classes, weighted by their observed rows (Zhou et al., 2018) or not. Rows that
have weights count by them. All are exact. In resamples of users, AUC and average precision over all rows are computed
from `MOST_BINS` bins where there are more predicted values than that, as if rows of one bin were ties, and corrected by
what that changes for the rows themselves (`bins.Bins`).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmoe_rec.auc import auc_of_counts, average_precision_of_counts, grouped_auc
from mmoe_rec.evaluation.metrics.bins import Bins
from mmoe_rec.evaluation.metrics.metric import Drawn, Metric, Ratio, TaskRows, UserRows, UserSums

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
