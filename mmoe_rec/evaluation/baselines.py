"""What a model has to beat: the rate of each candidate, and gradient-boosted trees on the same rows and features."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.sums import plain

_CATEGORIES = 255  # what scikit-learn's histograms can hold; the last one stands for all rarer values


class PopularityBaseline:
    """Predicts a label by the mean label of the candidate, whoever the user is.

    The mean is smoothed toward the mean of all rows: (sum of labels + smoothing x overall mean) / (rows + smoothing).
    """

    def __init__(
        self, candidates_train: Any, labels_train: Any, smoothing: float = 20.0, weights: np.ndarray | None = None
    ) -> None:
        """Count.

        Args:
            candidates_train: (N,) integers or strings, NumPy or Arrow.
            labels_train: (N,) 0 or 1, or any real values; NaN where unobserved.
            smoothing: how many rows of the overall mean are added to each candidate, at least 0.
            weights: (N,) what each row counts; None is 1.

        Raises UserError where no label is observed.
        """
        labels = np.asarray(labels_train, dtype=np.float64)
        observed = ~np.isnan(labels)
        if not observed.any():
            raise UserError("no training row has an observed label; expected at least one")
        rows = np.ones(len(labels)) if weights is None else np.asarray(weights, np.float64)
        labels, rows = labels[observed], rows[observed]
        self.overall = float(np.average(labels, weights=rows))
        candidates = plain(candidates_train).filter(pa.array(observed))
        table = pa.table({"candidate": candidates, "label": labels * rows, "rows": rows})
        counted = table.group_by("candidate", use_threads=False).aggregate([("label", "sum"), ("rows", "sum")])
        self._candidates = counted["candidate"].combine_chunks()
        total, rows = counted["label_sum"].to_numpy(), counted["rows_sum"].to_numpy()
        self._means = (total + smoothing * self.overall) / (rows + smoothing)

    def predict(self, candidates: Any) -> np.ndarray:
        """(N,) float64 for (N,) candidates of the training type; the overall mean for one that was not seen."""
        place = pc.index_in(plain(candidates).cast(self._candidates.type), value_set=self._candidates)
        index = pc.fill_null(place, -1).to_numpy(zero_copy_only=False)
        return np.append(self._means, self.overall)[index]


@dataclass(frozen=True)
class TreeBaseline:
    """Gradient-boosted trees for one task. Made by `gradient_boosting`.

    Attributes:
        model: the fitted scikit-learn estimator.
        categories: column -> its frequent values, the most frequent first.
    """

    model: HistGradientBoostingClassifier | HistGradientBoostingRegressor
    categories: dict[int, np.ndarray]

    def predict(self, x: np.ndarray) -> np.ndarray:
        """(N,) float64, probabilities or values, for features (N, F) in the order of training."""
        folded = _fold(x, self.categories)
        if isinstance(self.model, HistGradientBoostingClassifier):
            return np.asarray(self.model.predict_proba(folded)[:, 1])
        return np.asarray(self.model.predict(folded))


def gradient_boosting(
    x_train: np.ndarray,
    y_train: np.ndarray,
    categorical: np.ndarray,
    *,
    kind: Literal["binary", "regression"] = "binary",
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    weights: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
    iterations: int = 150,
    learning_rate: float = 0.1,
) -> TreeBaseline:
    """Fit scikit-learn's histogram gradient boosting on the rows whose label is observed.

    Args:
        x_train: (N, F) float, NaN where missing; a categorical column holds any whole numbers.
        y_train: (N,) 0 or 1 (binary) or values (regression); NaN where unobserved.
        categorical: (F,) bool. The 254 most frequent values of such a column are kept apart, all others, and those not
            seen in training, count as one.
        kind: of the task.
        validation: features and labels; when given, boosting stops once their loss has not improved for 15 iterations.
        weights: what rows of training and of validation count; None is 1 each.
        iterations: number of trees, the largest number with `validation`.
        learning_rate: shrinkage of each tree.

    Raises:
        UserError: no label is observed, or a binary task has one class only.
    """
    observed = ~np.isnan(y_train)
    classes = np.unique(y_train[observed])
    if len(classes) == 0:
        raise UserError("no training row has an observed label; expected at least one")
    if kind == "binary" and not np.array_equal(classes, [0, 1]):
        raise UserError(f"the observed training labels are {classes[:5].tolist()}; expected both 0 and 1")
    columns = np.flatnonzero(categorical)
    categories = {int(column): _frequent(x_train[observed, column]) for column in columns}
    estimator = HistGradientBoostingClassifier if kind == "binary" else HistGradientBoostingRegressor
    model = estimator(
        max_iter=iterations,
        learning_rate=learning_rate,
        categorical_features=np.asarray(categorical, dtype=bool),
        early_stopping=validation is not None,
        n_iter_no_change=15,
        random_state=0,
    )
    held_out = {}
    if validation is not None:
        known = ~np.isnan(validation[1])
        held_out = {"X_val": _fold(validation[0][known], categories), "y_val": validation[1][known]}
        if weights[1] is not None:
            held_out["sample_weight_val"] = weights[1][known]
    counted = None if weights[0] is None else weights[0][observed]
    model.fit(_fold(x_train[observed], categories), y_train[observed], sample_weight=counted, **held_out)
    return TreeBaseline(model, categories)


def _frequent(values: np.ndarray) -> np.ndarray:
    """(at most 254,) the most frequent values, the most frequent first and the smaller first among equals."""
    distinct, counts = np.unique(values[~np.isnan(values)], return_counts=True)
    return distinct[np.argsort(-counts, kind="stable")][: _CATEGORIES - 1]


def _fold(x: np.ndarray, categories: dict[int, np.ndarray]) -> np.ndarray:
    """(N, F) float64 in which each categorical value is its rank by frequency, a rare one 254, a missing one NaN."""
    folded = np.array(x, dtype=np.float64)
    for column, frequent in categories.items():
        values = folded[:, column]
        rank = pd.Index(frequent).get_indexer(values).astype(np.float64)
        rank[rank < 0] = _CATEGORIES - 1
        rank[np.isnan(values)] = np.nan
        folded[:, column] = rank
    return folded
