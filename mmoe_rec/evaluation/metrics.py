"""Metrics as functions of how often each user counts.

Every metric is computed by `at(counts)`, where `counts` (U, R) float64 says how often each of U users counts in each of
R resamples. One column of ones gives the metric itself; columns drawn by `resampling.py` give its bootstrap
distribution, by the same code. A metric that is undefined in a resample (no positive row, say) is NaN there.
"""

from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import csr_matrix

from mmoe_rec.evaluation.grouped import grouped_auc
from mmoe_rec.evaluation.spread import Spread
from mmoe_rec.evaluation.sums import NDCG_CUTOFFS, EvaluationSums, TaskSpec


class Metrics(Protocol):
    """Metrics of one task, or of the score."""

    def at(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Metric name -> (R,) float64, for `counts` (U, R) float64."""
        ...


def metrics_of(sums: EvaluationSums) -> dict[str, Metrics]:
    """Task name -> its metrics, and `score` -> those of the fused score, over the users of `sums.tables["ranking"]`."""
    users = sums.tables["ranking"]["user"]
    metrics: dict[str, Metrics] = {task.name: _task_metrics(sums, task, users) for task in sums.tasks}
    return metrics | {"score": ScoreMetrics(sums.tables["ranking"])}


def _task_metrics(sums: EvaluationSums, task: TaskSpec, users: pa.ChunkedArray) -> Metrics:
    table = sums.tables[f"{task.name}.users"]
    if task.kind == "regression":
        return RegressionMetrics(table, users)
    return BinaryMetrics(table, sums.tables[f"{task.name}.histogram"], users)


class ScoreMetrics:
    """NDCG and mean reciprocal rank: the mean over requests whose rows differ in relevance."""

    def __init__(self, ranking: pa.Table) -> None:
        self._names = [*(f"ndcg_at_{cutoff}" for cutoff in NDCG_CUTOFFS), "reciprocal_rank"]
        self._columns = _UserColumns(ranking, ranking["user"], ["ranked_requests", *self._names])

    def at(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """See `Metrics`."""
        total = self._columns.totals(counts)
        means = {name: _ratio(total[name], total["ranked_requests"]) for name in self._names}
        means["mrr"] = means.pop("reciprocal_rank")
        return means


class RegressionMetrics:
    """Root mean squared error, mean absolute error and the coefficient of determination, over observed rows."""

    def __init__(self, table: pa.Table, users: pa.ChunkedArray) -> None:
        names = ["weight", "squared_error", "absolute_error"]
        self._columns = _UserColumns(table, users, names)
        self._spread = Spread(
            *_UserColumns(table, users, ["weight", "label", "label_spread"]).values,
            *_UserColumns(table, users, ["least_label"], np.inf).values,
            *_UserColumns(table, users, ["largest_label"], -np.inf).values,
        )

    def at(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """See `Metrics`."""
        total = self._columns.totals(counts)
        mean_squared_error = _ratio(total["squared_error"], total["weight"])
        return {
            "rmse": np.sqrt(mean_squared_error),
            "mae": _ratio(total["absolute_error"], total["weight"]),
            "r2": 1 - _ratio(mean_squared_error, self._spread.variance(counts)),
        }


class BinaryMetrics:
    """Logloss, normalised entropy, AUC, GAUC by user and by request, and calibration, over observed rows.

    Normalised entropy is the logloss over the entropy of the base rate (He et al., 2014). GAUC is the mean AUC of
    groups weighted by their observed rows (Zhou et al., 2018), over groups with both classes. Calibration is the sum of
    the predictions over the sum of the labels.

    Attributes:
        user_auc: (U,) float64, NaN for a user without both classes.
        user_rows: (U,) float64, observed rows.
    """

    def __init__(self, table: pa.Table, histogram: pa.Table, users: pa.ChunkedArray) -> None:
        names = ["weight", "label", "prediction", "logloss", "request_auc_rows", "request_auc"]
        self._columns = _UserColumns(table, users, names)
        user = _index(histogram["user"], users)
        positives, rows = histogram["positives"].to_numpy(), histogram["rows"].to_numpy()
        bins, bin_index = np.unique(histogram["bin"].to_numpy(), return_inverse=True)
        shape = (len(bins), len(users))
        self._positives = csr_matrix((positives.astype(np.float64), (bin_index, user)), shape)
        self._negatives = csr_matrix(((rows - positives).astype(np.float64), (bin_index, user)), shape)
        self._positives.eliminate_zeros()
        self._negatives.eliminate_zeros()

        self.user_auc = grouped_auc(user, bin_index, positives, rows - positives, len(users))
        self.user_rows = np.bincount(user, rows, len(users))
        self._user_auc_rows = np.where(np.isnan(self.user_auc), 0.0, self.user_rows)
        self._user_auc_sum = self._user_auc_rows * np.nan_to_num(self.user_auc)

    def at(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """See `Metrics`."""
        total = self._columns.totals(counts)
        logloss = _ratio(total["logloss"], total["weight"])
        return {
            "logloss": logloss,
            "normalised_entropy": _ratio(logloss, _entropy(_ratio(total["label"], total["weight"]))),
            "auc": self._auc(counts),
            "gauc_user": _ratio(self._user_auc_sum @ counts, self._user_auc_rows @ counts),
            "gauc_request": _ratio(total["request_auc"], total["request_auc_rows"]),
            "calibration": _ratio(total["prediction"], total["label"]),
        }

    def _auc(self, counts: np.ndarray) -> np.ndarray:
        positives, negatives = self._positives @ counts, self._negatives @ counts  # (bins, R), bins in rising order
        negatives_before = np.cumsum(negatives, axis=0) - 0.5 * negatives
        pairs_won = np.einsum("br,br->r", positives, negatives_before)
        return _ratio(pairs_won, positives.sum(axis=0) * negatives.sum(axis=0))


class _UserColumns:
    """Sums per user, aligned to all users: `values` (names, U) float64, `absent` for users without a row."""

    def __init__(self, table: pa.Table, users: pa.ChunkedArray, names: list[str], absent: float = 0.0) -> None:
        self._names = names
        self.values = np.full((len(names), len(users)), absent)
        self.values[:, _index(table["user"], users)] = [table[name].to_numpy() for name in names]

    def totals(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Column name -> (R,) float64, the sum over users counted `counts` (U, R) times."""
        return dict(zip(self._names, self.values @ counts, strict=True))


def _index(ids: pa.ChunkedArray, users: pa.ChunkedArray) -> np.ndarray:
    """(N,) int64, where each id stands among the users."""
    return pc.index_in(ids, value_set=users.combine_chunks()).to_numpy().astype(np.int64)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """(R,) float64; NaN where the denominator is not positive."""
    return np.divide(numerator, denominator, out=np.full(len(numerator), np.nan), where=denominator > 0)


def _entropy(rate: np.ndarray) -> np.ndarray:
    """(R,) float64 in nats; 0 for a rate of 0 or 1."""
    inside = np.where((rate > 0) & (rate < 1), rate, 0.5)
    entropy = -inside * np.log(inside) - (1 - inside) * np.log1p(-inside)
    return np.where(inside == rate, entropy, 0.0)
