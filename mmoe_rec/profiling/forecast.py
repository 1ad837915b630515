"""How small a gain test rows can show, told before anything is trained.

A quick model stands for the one to come: a logistic regression, fitted on validation rows, of the numbers and of what
each id's training rate says. It leaves out placement features because they are absent in serving. Of its AUC A on test
rows each user u has the influence

    d_u = sum over u's positive rows of (share of negative rows below - A) / P
        + sum over u's negative rows of (share of positive rows above - A) / N

and the standard error is the root of sum d_u^2 U / (U - 1) (DeLong et al., 1988; by clusters: Obuchowski, 1997). Two
good models rank most rows alike, so their difference errs by a share of that, `PAIRED`, as was measured over trainings
(`tests/benchmarks/LOG.md`). Rows count alike, whatever their weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from mmoe_rec.auc import FEWEST, grouped_auc

PAIRED = 0.15
"""Standard error of the difference of two settings, five trainings each, as a share of that of one model's AUC."""
TRAININGS = 5
MOST_ROWS = {"validation": 50_000, "test": 250_000}
"""Rows that are read for it; of test more, as few users may have most of them."""
MOST_VALUES = 20_000_000
"""Numbers that are read of a split: fewer rows of wide ones."""
LEAST_USERS = 300  # of test rows that are kept where rows are drawn, rather than fewer with all of their rows
_LEVEL, _POWER = 0.05, 0.9
_LEAST_USERS = 2.0  # equal ones, of which an interval tells something
_SMALLEST_RATE = 1e-6
_RIDGE = 0.01  # 1 / strength: 1 lost up to .07 of AUC where few rows have many inputs, .01 at most .0015 elsewhere


@dataclass(frozen=True)
class Drawn:
    """Rows that stand for validation and test rows.

    values: (N, F) float32, numbers of the rows; rates: (N, I, T) float32, for each id input and task the mean training
    rate, both without placement; positive: (N, T), 1 or 0, NaN where unobserved; user: (N,) int64 from 0; is_test: (N,)
    bool; share: of the test rows' users, times that of their requests.
    """

    values: np.ndarray
    rates: np.ndarray
    positive: np.ndarray
    user: np.ndarray
    is_test: np.ndarray
    share: float


@dataclass(frozen=True)
class Forecast:
    """What test rows can tell of a binary task. auc, error: of the quick model, with its standard error over users;
    gauc_user, gauc_error: the same within users, None where none has both labels; half_width: of the 95% interval of
    the difference of two settings' AUC, `TRAININGS` each; detectable: the size that nine of ten comparisons would show.
    """

    auc: float
    error: float
    gauc_user: float | None
    gauc_error: float | None
    half_width: float
    detectable: float


def forecast(drawn: Drawn, tasks: Sequence[int]) -> Forecast | None:
    """What test rows can tell of the mean AUC of tasks; None where one has fewer than `FEWEST` rows of a label, or
    hardly any users."""
    found = [each for task in tasks if (each := _measure(drawn, task)) is not None]
    if not found or len(found) < len(tasks):
        return None
    auc, influence = (np.mean(each, axis=0) for each in list(zip(*found, strict=True))[:2])
    influence = influence[influence != 0]
    users, squares = len(influence), float((influence**2).sum())
    effective = min(float(users), 3 * squares**2 / float((influence**4).sum())) if squares else 0.0  # if normal: users
    if effective < _LEAST_USERS:
        return None
    error = float(np.sqrt(squares * users / (users - 1) * drawn.share))
    reach, extra = PAIRED * error * student.ppf([1 - _LEVEL / 2, _POWER], effective - 1)
    gauc, gauc_error = found[0][2:] if len(found) == 1 else (None, None)
    return Forecast(float(auc), error, gauc, gauc_error, float(reach), float(reach + extra))


def _measure(drawn: Drawn, task: int) -> tuple[float, np.ndarray, float | None, float | None] | None:
    """AUC and (U,) influence of each user, GAUC and its standard error, of a quick model of a task."""
    # scikit-learn takes a second to import.
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rates = np.clip(drawn.rates[:, :, task], _SMALLEST_RATE, 1 - _SMALLEST_RATE)
    values = np.nan_to_num(np.hstack([drawn.values, np.log(rates / (1 - rates))]), posinf=0.0, neginf=0.0)
    positive = drawn.positive[:, task]
    fit, test = (~np.isnan(positive) & (drawn.is_test == is_test) for is_test in (False, True))
    if not values.shape[1] or any(min(positive[its].sum(), (1 - positive[its]).sum()) < FEWEST for its in (fit, test)):
        return None
    model = make_pipeline(StandardScaler(), LogisticRegression(C=_RIDGE, solver="newton-cholesky"))
    model.fit(values[fit], positive[fit])
    prediction, label, user = model.decision_function(values[test]), positive[test], drawn.user[test]
    users = int(drawn.user.max()) + 1
    auc, influence = influence_on_auc(prediction, label > 0, user, users)
    within, rows = grouped_auc(user, prediction, label, 1 - label, users), np.bincount(user, minlength=users)
    weights = np.where(np.isnan(within), 0, rows) / max(rows[~np.isnan(within)].sum(), 1)
    if not weights.any():
        return auc, influence, None, None
    within = np.nan_to_num(within)
    gauc = float(weights @ within)
    return auc, influence, gauc, float(np.sqrt((weights**2) @ (within - gauc) ** 2 * drawn.share))


def influence_on_auc(
    prediction: np.ndarray, positive: np.ndarray, user: np.ndarray, users: int
) -> tuple[float, np.ndarray]:
    """AUC, and (U,) float64, what each user adds to its deviation. prediction, positive, user: (N,)"""
    above, below = np.sort(prediction[positive]), np.sort(prediction[~positive])

    def share_of(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
        """Share of ordered values that are smaller, ties a half."""
        smaller, equal_too = np.searchsorted(ordered, values, "left"), np.searchsorted(ordered, values, "right")
        return (smaller + equal_too) / (2 * len(ordered))

    won, lost = share_of(prediction[positive], below), share_of(prediction[~positive], above)
    auc = float(won.mean())
    influence = np.bincount(user[positive], won - auc, users) / len(above)
    return auc, influence + np.bincount(user[~positive], 1 - lost - auc, users) / len(below)
