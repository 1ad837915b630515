"""A quick model of a binary task, so that `inspect` can say how well the features rank before anything is trained.

A logistic regression stands for the model to come. Validation rows fit it and test rows measure it. Its inputs are the
numbers and the training rate of each id. Placement features are left out because serving lacks them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmoe_rec.auc import FEWEST, grouped_auc

_SMALLEST_RATE = 1e-6
# A weaker ridge lost up to .07 of AUC if few rows have many inputs. This one loses at most .0015 elsewhere.
_RIDGE = 0.01


@dataclass(frozen=True)
class Drawn:
    """Rows that stand for the validation and test rows."""

    values: np.ndarray  # (N, F) float32, numbers
    rates: np.ndarray  # (N, I, T) float32, mean training rate of each id input for each task
    positive: np.ndarray  # (N, T) float32, 1 or 0, NaN where unobserved
    user: np.ndarray  # (N,) int64
    is_test: np.ndarray  # (N,) bool


def measure_quick_model(drawn: Drawn, task: int) -> dict[str, float | None] | None:
    """Fit the quick model of a task. Returns None if a split has fewer than `FEWEST` rows of either label.

    Returns:
        `auc` on test rows, `gauc_user` within users and its standard error over users, `gauc_error`. The latter two are
        None if no user has both labels.
    """
    # Importing scikit-learn takes a second.
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rates = np.clip(drawn.rates[:, :, task], _SMALLEST_RATE, 1 - _SMALLEST_RATE)
    values = np.nan_to_num(np.hstack([drawn.values, np.log(rates / (1 - rates))]), posinf=0.0, neginf=0.0)
    positive = drawn.positive[:, task]
    fit, test = (~np.isnan(positive) & (drawn.is_test == is_test) for is_test in (False, True))
    if not values.shape[1] or any(min(positive[its].sum(), (1 - positive[its]).sum()) < FEWEST for its in (fit, test)):
        return None
    model = make_pipeline(StandardScaler(), LogisticRegression(C=_RIDGE, solver="newton-cholesky"))
    predicted = model.fit(values[fit], positive[fit]).decision_function(values[test])
    label, (_, user) = positive[test], np.unique(drawn.user[test], return_inverse=True)
    auc = float(roc_auc_score(label, predicted))
    within, rows = grouped_auc(user, predicted, label, 1 - label, user.max() + 1), np.bincount(user)
    known = ~np.isnan(within)
    if not known.any():
        return {"auc": auc, "gauc_user": None, "gauc_error": None}
    within, weights = within[known], rows[known] / rows[known].sum()
    gauc = float(weights @ within)
    return {"auc": auc, "gauc_user": gauc, "gauc_error": float(np.sqrt(weights**2 @ (within - gauc) ** 2))}
