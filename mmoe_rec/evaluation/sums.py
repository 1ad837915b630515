"""Everything the metrics need to know about any number of rows, as sums per user, because the intervals redraw users.

Of more than `MAX_BOOTSTRAP_UNITS` users, groups by a hash are redrawn instead, so that a resample costs no more: groups
are as independent of each other as users are, and differ as much as their users do.

AUC and average precision need the order of all rows: so a binary task's rows are kept in bins of rising prediction.
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
"""At most so many users, or groups of users, are kept apart; a power of two."""
_KEYS = ("user", "bin")


SCORE_RULE: ValueRule = ("a number", lambda values: ~np.isnan(values))
# Products of sums of larger weights would overflow, and of smaller ones vanish.
_LEAST, _LARGEST = np.float64(1e-50), np.float64(1e50)
WEIGHT_RULE: ValueRule = ("a positive number, 1e-50 to 1e50", lambda values: (values > _LEAST) & (values < _LARGEST))


@dataclass(frozen=True)
class MeasuredTask:
    """One predicted behaviour, as the metrics see it.

    name: letters, digits, `_` and `-`, as it becomes a part of metric and file names; kind: a kind, or its name;
    weight: in the fused score, and so in the relevance of a row for NDCG and MRR.
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
        tables: Tables by name. Their rows are sorted by key. The column `user` (int64 or string) holds the unit. Counts
            are int64, all else is float64.

            `ranking` has one row for each unit. `rows`, `requests` and `users` are counts. `digest` differs if
            requests, candidates or weights differ. A request that ranks nothing counts in the first column that
            applies: `requests_of_one_row`, `requests_without_relevant_row` or `requests_of_equal_relevance`. All others
            count in `ranked_requests`. Over these it holds the sums of the score's metrics, and of `random_ndcg` (mean
            NDCG@10 of all orders).

            `TASK.users` has one row for each unit with an observed label: `rows`, `digest` (with the labels), the
            weighted sums `weight`, `label` and `prediction`, and `positives` of a binary task. It also holds the
            columns of `ranking` for requests ranked by the task's prediction, and the sums of the task's metrics.

            `TASK.bins` has one row for each unit and `bin` of rising prediction, for binary tasks: `rows`, `positives`,
            and the weighted sums `label`, `negative` (rows with label 0) and `prediction`.

            `TASK.counts` has the weights of `positive` and `negative` rows for each predicted `value`, for binary
            tasks.

            `catalog` has one row for each `candidate`, if candidates were given: `rows`, and for each cutoff the
            number of times that it is shown, and the logarithm of the probability that it never is (`exposure_by_row`).
    """

    tasks: tuple[MeasuredTask, ...]
    tables: dict[str, pa.Table]

    @property
    def users(self) -> int:
        """How many users were measured."""
        return self.total("users")

    def total(self, column: str, task: str | None = None) -> int:
        """The sum of a column of counts over all users, of the table `ranking`, or of that of a task."""
        return int(self.tables["ranking" if task is None else f"{task}.users"][column].to_numpy().sum())


@dataclass(frozen=True)
class _Rows:
    """N rows. user, request, unit: (N,) int64 from 0 on; units: (V,) ids; weight: (N,) float64; key: (N,) uint64, which
    tells rows of other requests, candidates or weights apart."""

    user: np.ndarray
    request: np.ndarray
    unit: np.ndarray
    units: pa.Array
    weight: np.ndarray
    key: np.ndarray


@dataclass(frozen=True)
class PredictedRows:
    """N rows of any order, with the predictions of a model or of another system.

    Attributes:
        tasks: Predicted tasks; their weights say what a row is worth.
        users: (N,) integers or strings.
        requests: (N,) integers or strings. A request belongs to one user.
        candidates: (N,) integers or strings, None if unknown: then nothing is said of the catalog.
        predictions: Task name -> (N,) probabilities (binary; near 0 and 1 see `Logloss`) or values (regression).
        labels: Task name -> (N,) 0 or 1 (binary) or values (regression), NaN where unobserved.
        score: (N,) ranking score, higher is better.
        weight: (N,) positive weights, such as 1 / the rate a row was sampled at, None if all rows count alike. A row
            counts by them in all metrics of a task, but not in a request's ranking, where requests count alike.
        row: (N,) numbers of the rows in their log, if it has no candidates.
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
        """Sum what all metrics need, by user or group of users.

        A row's relevance for NDCG and MRR is max(0, sum over tasks of task weight x label), where an unobserved label
        and a negative label of a regression count as 0. A request of one row, or whose rows are all of one relevance,
        ranks nothing, as every order of it is as good: it is left out of NDCG and MRR, and counted.

        Args:
            grouped: Whether units are groups of users, None for groups where there are more than `MAX_BOOTSTRAP_UNITS`
            users.

        Raises:
            UserError: There is no row.
        """
        if not (rows := len(self.users)):
            raise UserError("there is no row to evaluate; expected at least one")
        all_users, user = _index(self.users)
        all_requests, request = _index(self.requests)
        weight = np.ones(rows) if self.weight is None else np.asarray(self.weight, np.float64)
        known = {task.name: np.asarray(self.labels[task.name], np.float64) for task in self.tasks}
        gain = _gain([(task.weight, known[task.name]) for task in self.tasks], rows)
        lists = RankedRequests.of(request, self.score, gain, len(all_requests))
        keys, tables = [hash_column(all_requests)[request], weight.view(np.uint64)], dict[str, pa.Table]()
        if self.candidates is not None:
            all_candidates, candidate = _index(self.candidates)
            keys.append(hash_column(all_candidates)[candidate])
            shown = {"rows": np.ones(rows, dtype=np.int64), **exposure_by_row(lists, CUTOFFS)}
            tables["catalog"] = _sum_by({"candidate": all_candidates.take(pa.array(candidate)), **shown})
        unit, units = assign_units(all_users, grouped)
        given = _Rows(user, request, unit[user], units, weight, combine_hashes(keys))
        tables["ranking"] = _ranking_table(given, lists)
        for task in self.tasks:
            tables |= _task_tables(task, given, np.asarray(self.predictions[task.name]), known[task.name])
        return EvaluationSums(self.tasks, tables)

    def with_predictions(self, predictions: Mapping[str, np.ndarray], score: np.ndarray) -> "PredictedRows":
        """The same rows as another model predicts them, which may lack tasks."""
        tasks = tuple(task for task in self.tasks if task.name in predictions)
        labels = {task.name: self.labels[task.name] for task in tasks}
        return replace(self, tasks=tasks, predictions=predictions, labels=labels, score=score)

    def take(self, rows: np.ndarray) -> "PredictedRows":
        """Select rows by their numbers."""
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
    """How many rows have the rarer label of a binary task, or an observed label of a regression."""
    rows = sums.total("rows", task)
    if "positives" not in sums.tables[f"{task}.users"].column_names:
        return rows
    positives = sums.total("positives", task)
    return min(positives, rows - positives)


def check_same_rows(name: str, sums: EvaluationSums, against: str, base: EvaluationSums) -> None:
    """Raises UserError where two models were not measured on the same rows with the same labels."""
    if (what := describe_row_mismatch(sums, base)) is not None:
        raise UserError(
            f"'{name}' and '{against}' were not measured on the same rows ({what}): differences of models need the "
            "same requests and candidates, with the same labels"
        )


def describe_row_mismatch(sums: EvaluationSums, base: EvaluationSums) -> str | None:
    """What differs between the rows of two models, or their labels; None where they are the same."""
    for task in [None, *(task.name for task in base.tasks if f"{task.name}.users" in sums.tables)]:
        table, of = ("ranking", "") if task is None else (f"{task}.users", f" with a label of '{task}'")
        mine, its = (each.tables[table].select(["user", "rows", "requests", "digest"]) for each in (sums, base))
        rows = [each.total("rows", task) for each in (sums, base)]
        if rows[0] != rows[1] or sums.users != base.users:
            return f"{rows[0]:,} rows{of} of {sums.users:,} users, and {rows[1]:,} of {base.users:,}"
        if not mine["user"].equals(its["user"]):
            return f"the users of rows{of} differ"
        if not mine.equals(its):
            return "their requests or candidates differ" if task is None else f"labels of '{task}' differ"
    return None


def hash_to_group(users: np.ndarray) -> np.ndarray:
    """(N,) int64 in [0, MOST_UNITS), the group of each user of a hash (N,) uint64: rising with the hash."""
    return (users >> np.uint64(64 - (MAX_BOOTSTRAP_UNITS - 1).bit_length())).astype(np.int64)


def assign_units(users: pa.Array, grouped: bool | None = None) -> tuple[np.ndarray, pa.Array]:
    """(N,) int64, which of the V units that are redrawn each row belongs to; and (V,) the users, or groups of them.

    users: (N,) integers or strings; grouped: as for `PredictedRows.sum`.
    """
    encoded = users.dictionary_encode()
    codes, distinct = encoded.indices.to_numpy().astype(np.int64), encoded.dictionary
    if not (len(distinct) > MAX_BOOTSTRAP_UNITS if grouped is None else grouped):
        return codes, distinct
    groups, place = np.unique(hash_to_group(hash_column(distinct)), return_inverse=True)
    return place[codes], pa.array(groups)


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
    label, weight, unit, key = (each[observed] for each in (labels, rows.weight, rows.unit, rows.key))
    prediction = predictions[observed].astype(np.float64)
    ids = (np.unique(each[observed], return_inverse=True)[1] for each in (rows.user, rows.request, rows.unit))
    known = TaskRows(label, prediction, weight, *ids)
    requests = int(known.request.max(initial=-1)) + 1
    lists = RankedRequests.of(known.request, prediction, np.maximum(label, 0.0), requests)
    units = rows.units.take(pa.array(unit))
    sums = {"rows": np.ones(len(label), dtype=np.int64)}
    sums |= {"positives": label.astype(np.int64)} if task.kind.is_binary else {}
    sums |= {"weight": weight, "label": weight * label, "prediction": weight * prediction}
    # Fractions are the same that single precision has the same; whole numbers, such as moments, are not. -0 is 0.
    known_label = np.where(label == np.rint(label), label, label.astype(np.float32)) + 0.0
    own = {"digest": _digest(combine_hashes([key, known_label.view(np.uint64)]))}
    own |= _measure_own(
        [each for each in metrics_for_kind(task.kind) if not each.is_ranking_metric], known, {*sums, *own}
    )
    of_requests = {"requests": np.ones(requests, np.int64)} | _sums_of_lists(task.kind, lists, {*sums, *own})
    own |= known.assign_to_first_rows(known.request, of_requests)
    tables = {f"{task.name}.users": _sum_by({"user": units, **sums, **own})}
    if task.kind.is_binary:
        edges = bin_edges(*counts_by_value(prediction, label, 1 - label))
        bins = {"user": units, "bin": np.searchsorted(edges, prediction, side="right")}
        # Not the weight but that of negative rows: one less the other would round small ones by large ones.
        del sums["weight"]
        negative = weight * (1 - label)
        tables[f"{task.name}.bins"] = _sum_by({**bins, **sums, "negative": negative}, _KEYS)
        tables[f"{task.name}.counts"] = _sum_by({"value": prediction, "positive": sums["label"], "negative": negative})
    return tables


def _sums_of_lists(kind: str, lists: RankedRequests, taken: Iterable[str]) -> dict[str, np.ndarray]:
    """What requests add, name -> (Q,), to the sums of the score, or of a task of this kind; taken: names of others."""
    left_out = find_uninformative_requests(lists)
    ranked = ~np.any(list(left_out.values()), axis=0)
    counted = {f"requests_{why}": each for why, each in left_out.items()} | {"ranked_requests": ranked}
    measured = {"random_ndcg": random_ndcg(lists, 10)} if kind == "score" else {}
    metrics = [each for each in metrics_for_kind(kind) if each.is_ranking_metric or kind == "score"]
    measured |= _measure_own(metrics, lists, {*taken, *counted, *measured})
    found = {name: each.astype(np.int64) for name, each in counted.items()}
    return found | {name: np.where(ranked, each, 0.0) for name, each in measured.items()}


def _measure_own(metrics: Iterable[Metric[Any]], given: Any, taken: Iterable[str]) -> dict[str, np.ndarray]:
    """The sums that are the metrics' own, of what they are given; taken: names of other sums."""
    columns: dict[str, np.ndarray] = {}
    for metric in metrics:
        found = metric.measure(given)
        if twice := [name for name in found if name in {*taken, *columns}]:
            raise ValueError(f"metric {metric.name!r} measures {twice}, and so does another; expected names of its own")
        columns |= found
    return columns


def _gain(tasks: Iterable[tuple[float, np.ndarray]], rows: int) -> np.ndarray:
    """(N,) relevance to 12 digits: what is left of 0.1 + 0.2 - 0.3 is rounding, and makes no row relevant.

    tasks: weights and labels.
    """
    gain, size = np.zeros((2, rows))
    for weight, labels in tasks:
        worth = weight * np.maximum(np.nan_to_num(labels, nan=0.0), 0.0)
        gain, size = gain + worth, size + np.abs(worth)
    digits = 12 - np.ceil(np.log10(size, out=np.zeros_like(size), where=size > 0))
    unit = 10.0 ** -np.clip(digits, -290, 290)
    return np.maximum(np.round(gain / unit) * unit, 0.0)


def _digest(keys: np.ndarray) -> np.ndarray:
    """(N,) int64 of 32 bits of uint64 hashes, so that billions may be added up."""
    return (keys >> np.uint64(32)).astype(np.int64)


def _sum_by(columns: Mapping[str, Any], keys: Sequence[str] = ()) -> pa.Table:
    """Adds up rows of equal keys, by default the first column, sorted by key; by one thread, so that bits repeat."""
    table = pa.table(columns)
    keys = keys or table.column_names[:1]
    names = [name for name in table.column_names if name not in keys]
    grouped = table.group_by(list(keys), use_threads=False).aggregate([(name, "sum") for name in names])
    grouped = grouped.select([*keys, *(f"{name}_sum" for name in names)]).rename_columns([*keys, *names])
    return grouped.sort_by([(key, "ascending") for key in keys]).combine_chunks()


def _index(ids: Any) -> tuple[pa.Array, np.ndarray]:
    """The distinct ids, and for each row an index into them."""
    array = pa.array(ids)
    encoded = array.cast(pa.int64() if pa.types.is_integer(array.type) else pa.string()).dictionary_encode()
    return encoded.dictionary, encoded.indices.to_numpy().astype(np.int64)
