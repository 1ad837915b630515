"""Sum the rows of each user. Metrics and their intervals need only these sums, because the bootstrap resamples users.

If there are more than `MAX_BOOTSTRAP_UNITS` users, the bootstrap resamples groups of users, which limits time and
memory. The hash of a user determines the group, so groups are as independent of each other as users are.

AUC and average precision depend on the order of all rows. The rows of a binary task are therefore also summed by bins
of the prediction.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.metrics import CUTOFFS, metrics_for_kind
from mmoe_rec.evaluation.metrics.metric import Metric, TaskRows
from mmoe_rec.evaluation.metrics.ranking_metrics import (
    RankedRequests,
    exposure_by_row,
    find_uninformative_requests,
    random_ndcg,
)
from mmoe_rec.evaluation.metrics.task_metrics import bin_edges, counts_by_value
from mmoe_rec.log.columns import combine_hashes, hash_column
from mmoe_rec.task_kinds import DEFAULT_KIND, find_kind
from mmoe_rec.task_kinds.task_kind import TaskKind, ValueRule

MAX_BOOTSTRAP_UNITS = 4_096
"""Maximum number of users or groups to resample, a power of two."""
SCORE_RULE: ValueRule = ("a number", lambda values: ~np.isnan(values))
# If rows have larger weights, products of sums overflow. If rows have smaller weights, they underflow.
_LEAST, _LARGEST = np.float64(1e-50), np.float64(1e50)
WEIGHT_RULE: ValueRule = ("a positive number, 1e-50 to 1e50", lambda values: (values > _LEAST) & (values < _LARGEST))


@dataclass(frozen=True)
class MeasuredTask:
    """The properties of a task that metrics of the task and of the score depend on.

    Attributes:
        name: Name of letters, digits, `_` and `-`, because it becomes part of metric and file names.
        kind: Kind of the task. The constructor also accepts the name of a kind.
        weight: Weight of the prediction in the score, and of the label in a row's relevance, see `PredictedRows.sum`.
    """

    name: str
    kind: TaskKind = DEFAULT_KIND
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name) or self.name in ("score", "ranking", "catalog"):
            raise ValueError(
                f"task name {self.name!r} cannot be used in metric names: expected letters, digits, '_' and '-', "
                "and neither 'score' nor 'ranking' nor 'catalog'"
            )
        object.__setattr__(self, "kind", find_kind(self.kind))
        if not np.isfinite(self.weight):
            raise ValueError(f"task {self.name!r} has weight {self.weight}; expected a finite number")


@dataclass(frozen=True)
class EvaluationSums:
    """Sums over rows by unit. A unit is a user or a group of users.

    Attributes:
        tasks: The measured tasks.
        tables: Tables by name, see below. The column `user` holds the unit (int64 or string). Counts and digests are
            int64, other sums are float64. Rows are sorted by `user`, then `bin`, or by `value` or `candidate`.

    The table `ranking` has one row for each unit:

    - `rows`, `requests`, `users`: Counts.
    - `digest`: Sum of the rows' hashes. It differs if requests, candidates or weights differ.
    - `requests_of_one_row`, `requests_without_relevant_row`, `requests_of_equal_relevance`: Numbers of requests for
      which all orders are equally good. A request counts in the first column that applies.
    - `ranked_requests`: Number of all other requests.
    - `random_ndcg`: Sum over ranked requests of the mean NDCG@10 of all orders.
    - Metrics of the score, such as `mrr`: Sums over ranked requests.

    The table `TASK.users` has one row for each unit with an observed label of the task:

    - `rows`, `positives`: Numbers of rows with an observed label, and of positive labels of a binary task.
    - `digest`: Sum of the rows' hashes. It also differs if labels differ.
    - `weight`, `label`, `prediction`: Sums of weight, weight x label and weight x prediction.
    - Counts of requests and sums of ranking metrics as in `ranking`, for requests ranked by the task's prediction.
    - Further sums that metrics of the task define in `Metric.measure`.

    Binary tasks have two more tables:

    - `TASK.bins`: For each unit and `bin` (number of a bin of rising prediction), the counts `rows` and `positives`,
      and the sums `label`, `prediction` (as above) and `negative` (weights of rows with label 0).
    - `TASK.counts`: Sums of the weights of `positive` and of `negative` rows for each predicted `value`.

    If the rows have candidate IDs, the table `catalog` has the number of `rows` of each `candidate`, and the columns of
    `exposure_by_row`.
    """

    tasks: tuple[MeasuredTask, ...]
    tables: dict[str, pa.Table]

    @property
    def users(self) -> int:
        """Number of measured users."""
        return self.total("users")

    def total(self, column: str, task: str | None = None) -> int:
        """Return the sum of a column of counts over all users.

        Args:
            column: Name of the column.
            task: Task whose table has the column, None for the table `ranking`.
        """
        return int(self.tables["ranking" if task is None else f"{task}.users"][column].to_numpy().sum())


@dataclass(frozen=True)
class _Rows:
    """N rows of an evaluation, as arrays (N,) of indices and values. `unit` is an index into `units`."""

    user: np.ndarray
    request: np.ndarray
    unit: np.ndarray
    units: pa.Array
    weight: np.ndarray
    key: np.ndarray  # hash of request, candidate and weight, uint64


@dataclass(frozen=True)
class PredictedRows:
    """N rows in any order, with the predictions of a model or of another system.

    Attributes:
        tasks: Predicted tasks. Their weights define the relevance of a row, see `sum`.
        users: (N,) integers or strings.
        requests: (N,) integers or strings. A request belongs to one user.
        candidates: (N,) integers or strings. None if unknown, then there are no metrics of the catalog.
        predictions: Task name -> predictions (N,): probabilities of a binary task, or numbers of a regression.
        labels: Task name -> labels (N,): 0 or 1 of a binary task, or numbers of a regression. NaN if unobserved.
        score: (N,) ranking score, higher is better.
        weight: (N,) positive weights, such as 1 / sampling rate of the row. None weights all rows equally. Metrics over
            the rows of a task use the weights. Metrics of ranked requests ignore them, so requests count equally.
        row: (N,) row numbers in the log, for rows of a log without candidates. None for other rows.
    """

    tasks: tuple[MeasuredTask, ...]
    users: pa.Array
    requests: pa.Array
    candidates: pa.Array | None
    predictions: Mapping[str, np.ndarray]
    labels: Mapping[str, np.ndarray]
    score: np.ndarray
    weight: np.ndarray | None = None
    row: pa.Array | None = None

    def sum(self, grouped: bool | None = None) -> EvaluationSums:
        """Return the sums that all metrics need, by unit. A unit is a user or a group of users.

        The relevance of a row for NDCG and MRR is max(0, sum over tasks of task weight x label). Unobserved labels and
        negative labels of a regression count as 0. If a request has one row, or rows of equal relevance, all orders are
        equally good. NDCG and MRR leave such requests out. The result has their number by reason.

        Args:
            grouped: Whether units are groups of users. None uses groups for more than `MAX_BOOTSTRAP_UNITS` users.

        Raises:
            UserError: There is no row.
        """
        if not (rows := len(self.users)):
            raise UserError("there is no row to evaluate; expected at least one")
        all_users, user = _index(self.users)
        all_requests, request = _index(self.requests)
        weight = np.ones(rows) if self.weight is None else np.asarray(self.weight, np.float64)
        labels = {task.name: np.asarray(self.labels[task.name], np.float64) for task in self.tasks}
        gain = _gain([(task.weight, labels[task.name]) for task in self.tasks], rows)
        lists = RankedRequests.of(request, self.score, gain, len(all_requests))
        keys, tables = [hash_column(all_requests)[request], weight.view(np.uint64)], dict[str, pa.Table]()
        if self.candidates is not None:
            all_candidates, candidate = _index(self.candidates)
            keys.append(hash_column(all_candidates)[candidate])
            shown = {"rows": np.ones(rows, dtype=np.int64), **exposure_by_row(lists, CUTOFFS)}
            tables["catalog"] = _sum_by({"candidate": all_candidates.take(pa.array(candidate)), **shown})
        unit, units = _assign_units(all_users, grouped)
        row_groups = _Rows(user, request, unit[user], units, weight, combine_hashes(keys))
        tables["ranking"] = _ranking_table(row_groups, lists)
        for task in self.tasks:
            tables |= _task_tables(task, row_groups, np.asarray(self.predictions[task.name]), labels[task.name])
        return EvaluationSums(self.tasks, tables)

    def with_predictions(self, predictions: Mapping[str, np.ndarray], score: np.ndarray) -> "PredictedRows":
        """Return the same rows with predictions of another model.

        Args:
            predictions: Task -> predictions (N,). Tasks without predictions are left out of the result.
            score: Ranking score, shape (N,).
        """
        tasks = tuple(task for task in self.tasks if task.name in predictions)
        labels = {task.name: self.labels[task.name] for task in tasks}
        return replace(self, tasks=tasks, predictions=predictions, labels=labels, score=score)

    def take(self, rows: np.ndarray) -> "PredictedRows":
        """Return the rows with the indices `rows` (n,), in this order."""
        return replace(
            self,
            users=self.users.take(rows),
            requests=self.requests.take(rows),
            candidates=None if self.candidates is None else self.candidates.take(rows),
            row=None if self.row is None else self.row.take(rows),
            predictions={name: values[rows] for name, values in self.predictions.items()},
            labels={name: values[rows] for name, values in self.labels.items()},
            score=self.score[rows],
            weight=None if self.weight is None else self.weight[rows],
        )


def count_minority(sums: EvaluationSums, task: str) -> int:
    """Count the rows with the rarer label of a binary task, or with an observed label of a regression.

    Args:
        sums: Sums of the model.
        task: Name of the task.
    """
    rows = sums.total("rows", task)
    if "positives" not in sums.tables[f"{task}.users"].column_names:
        return rows
    positives = sums.total("positives", task)
    return min(positives, rows - positives)


def describe_row_mismatch(sums: EvaluationSums, base: EvaluationSums) -> str | None:
    """Return a phrase that says how the rows or labels of two models differ, None if they are the same.

    Args:
        sums: Sums of the model.
        base: Sums of the reference model.
    """
    for task in [None, *(task.name for task in base.tasks if f"{task.name}.users" in sums.tables)]:
        table, of_task = ("ranking", "") if task is None else (f"{task}.users", f" with a label of '{task}'")
        mine, theirs = (
            model_sums.tables[table].select(["user", "rows", "requests", "digest"]) for model_sums in (sums, base)
        )
        rows = [model_sums.total("rows", task) for model_sums in (sums, base)]
        if rows[0] != rows[1] or sums.users != base.users:
            return f"{rows[0]:,} rows{of_task} of {sums.users:,} users, and {rows[1]:,} of {base.users:,}"
        if not mine["user"].equals(theirs["user"]):
            return f"the users of rows{of_task} differ"
        if not mine.equals(theirs):
            return "their requests or candidates differ" if task is None else f"labels of '{task}' differ"
    return None


def _assign_units(users: pa.Array, grouped: bool | None) -> tuple[np.ndarray, pa.Array]:
    """Return the index of each user's unit, and the units' IDs. `grouped` is as in `PredictedRows.sum`."""
    if not (len(users) > MAX_BOOTSTRAP_UNITS if grouped is None else grouped):
        return np.arange(len(users)), users
    group_bits = (MAX_BOOTSTRAP_UNITS - 1).bit_length()
    groups = (hash_column(users) >> np.uint64(64 - group_bits)).astype(np.int64)  # by the leading bits
    distinct, index = np.unique(groups, return_inverse=True)
    return index, pa.array(distinct)


def _ranking_table(rows: _Rows, lists: RankedRequests) -> pa.Table:
    request_user, request_unit, users, digest = np.zeros((4, lists.requests), np.int64)
    request_user[rows.request], request_unit[rows.request] = rows.user, rows.unit
    users[np.unique(request_user, return_index=True)[1]] = 1
    np.add.at(digest, rows.request, _digest(rows.key))
    columns = {"rows": np.bincount(rows.request), "requests": np.ones_like(users), "users": users, "digest": digest}
    columns |= _sums_of_lists("score", lists, columns)
    return _sum_by({"user": rows.units.take(pa.array(request_unit)), **columns})


def _task_tables(task: MeasuredTask, rows: _Rows, predictions: np.ndarray, labels: np.ndarray) -> dict[str, pa.Table]:
    observed = ~np.isnan(labels)
    label, weight, unit, key = (values[observed] for values in (labels, rows.weight, rows.unit, rows.key))
    prediction = predictions[observed].astype(np.float64)
    ids = (np.unique(values[observed], return_inverse=True)[1] for values in (rows.user, rows.request, rows.unit))
    observed_rows = TaskRows(label, prediction, weight, *ids)
    requests = int(observed_rows.request.max(initial=-1)) + 1
    lists = RankedRequests.of(observed_rows.request, prediction, np.maximum(label, 0.0), requests)
    units = rows.units.take(pa.array(unit))
    sums = {"rows": np.ones(len(label), dtype=np.int64)}
    sums |= {"positives": label.astype(np.int64)} if task.kind.is_binary else {}
    sums |= {"weight": weight, "label": weight * label, "prediction": weight * prediction}
    # The digest compares fractional labels in single precision, and whole numbers, such as times, in double
    # precision. Adding 0.0 turns -0 into 0, which has other bits.
    rounded_label = np.where(label == np.rint(label), label, label.astype(np.float32)) + 0.0
    task_sums = {"digest": _digest(combine_hashes([key, rounded_label.view(np.uint64)]))}
    row_metrics = [metric for metric in metrics_for_kind(task.kind) if not metric.is_ranking_metric]
    task_sums |= _measure_own(row_metrics, observed_rows, {*sums, *task_sums})
    request_sums = {"requests": np.ones(requests, np.int64)} | _sums_of_lists(task.kind, lists, {*sums, *task_sums})
    task_sums |= observed_rows.assign_to_first_rows(observed_rows.request, request_sums)
    tables = {f"{task.name}.users": _sum_by({"user": units, **sums, **task_sums})}
    if task.kind.is_binary:
        edges = bin_edges(*counts_by_value(prediction, label, 1 - label))
        bins = {"user": units, "bin": np.searchsorted(edges, prediction, side="right")}
        # Store the weight of negative rows. Total minus positive weight would lose small weights by rounding.
        del sums["weight"]
        negative = weight * (1 - label)
        tables[f"{task.name}.bins"] = _sum_by({**bins, **sums, "negative": negative}, ("user", "bin"))
        tables[f"{task.name}.counts"] = _sum_by({"value": prediction, "positive": sums["label"], "negative": negative})
    return tables


def _sums_of_lists(kind: str, lists: RankedRequests, taken: Iterable[str]) -> dict[str, np.ndarray]:
    """Return the counts of requests and contributions to ranking metrics: column -> value of each request, (Q,).

    `kind` is the kind of a task, or `score`. Metrics may not use the names of the table's other columns (`taken`).
    """
    uninformative = find_uninformative_requests(lists)
    ranked = ~np.any(list(uninformative.values()), axis=0)
    counted = {f"requests_{reason}": is_left_out for reason, is_left_out in uninformative.items()}
    counted["ranked_requests"] = ranked
    measured = {"random_ndcg": random_ndcg(lists, 10)} if kind == "score" else {}
    metrics = [metric for metric in metrics_for_kind(kind) if metric.is_ranking_metric or kind == "score"]
    measured |= _measure_own(metrics, lists, {*taken, *counted, *measured})
    counts = {name: values.astype(np.int64) for name, values in counted.items()}
    return counts | {name: np.where(ranked, values, 0.0) for name, values in measured.items()}


def _measure_own(metrics: Iterable[Metric[Any]], rows: Any, taken: Iterable[str]) -> dict[str, np.ndarray]:
    """Return the sums that metrics define in `Metric.measure`, or raise ValueError if a name is in `taken`."""
    columns: dict[str, np.ndarray] = {}
    for metric in metrics:
        metric_columns = metric.measure(rows)
        if duplicates := [name for name in metric_columns if name in {*taken, *columns}]:
            raise ValueError(
                f"metric {metric.name!r} measures {duplicates}, and so does another metric; expected unique names"
            )
        columns |= metric_columns
    return columns


def _gain(tasks: Iterable[tuple[float, np.ndarray]], rows: int) -> np.ndarray:
    """Return the relevance (N,) of rows, see `PredictedRows.sum`. `tasks` are pairs of weight and labels (N,).

    The relevance is rounded to 12 digits, so that a sum such as 0.1 + 0.2 - 0.3 is exactly 0.
    """
    gain, size = np.zeros((2, rows))
    for weight, labels in tasks:
        worth = weight * np.maximum(np.nan_to_num(labels, nan=0.0), 0.0)
        gain, size = gain + worth, size + np.abs(worth)
    digits = 12 - np.ceil(np.log10(size, out=np.zeros_like(size), where=size > 0))
    unit = 10.0 ** -np.clip(digits, -290, 290)
    return np.maximum(np.round(gain / unit) * unit, 0.0)


def _digest(keys: np.ndarray) -> np.ndarray:
    """Shorten hashes (N,) uint64 to 32 bits, as int64, so that hashes of billions of rows add up without overflow."""
    return (keys >> np.uint64(32)).astype(np.int64)


def _sum_by(columns: Mapping[str, Any], keys: Sequence[str] = ()) -> pa.Table:
    """Add up rows with equal values in the columns `keys` (default: the first column), and sort by these columns."""
    table = pa.table(columns)
    keys = keys or table.column_names[:1]
    names = [name for name in table.column_names if name not in keys]
    # A single thread adds in a fixed order, so the sums are reproducible.
    grouped = table.group_by(list(keys), use_threads=False).aggregate([(name, "sum") for name in names])
    grouped = grouped.select([*keys, *(f"{name}_sum" for name in names)]).rename_columns([*keys, *names])
    return grouped.sort_by([(key, "ascending") for key in keys]).combine_chunks()


def _index(ids: Any) -> tuple[pa.Array, np.ndarray]:
    """Return the distinct IDs, and each row's index into the distinct IDs, (N,) int64."""
    array = pa.array(ids)
    encoded = array.cast(pa.int64() if pa.types.is_integer(array.type) else pa.string()).dictionary_encode()
    return encoded.dictionary, encoded.indices.to_numpy().astype(np.int64)
