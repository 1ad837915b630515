"""Everything the metrics need to know about any number of rows, as sums that merge.

The rows may be cut into parts in any way that keeps the rows of a request together; the parts may be measured in any
place and merged in any order: counts come out equal, floating-point sums equal up to rounding. All sums are kept per
user, because the intervals resample users.

    total = merge_all(measure(tasks, ...) for batch in batches)
    total.save("evaluation/")

A predicted probability enters as its exact value in the sums and as a bin of its logit in the histogram. AUC over all
rows and AUC by user come from the histogram, where two rows of one bin count as tied; all other metrics are exact.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.atomic import atomic_folder
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation import spread
from mmoe_rec.evaluation.checked_rows import Rows, TaskSpec, check_rows
from mmoe_rec.evaluation.grouped import RankedLists, grouped_auc, least_ndcg, ndcg, ranks_nothing, reciprocal_rank

__all__ = ["BINS_PER_LOGIT", "LARGEST_LOGIT", "EvaluationSums", "TaskSpec", "measure", "merge_all"]

BINS_PER_LOGIT = 1024
LARGEST_LOGIT = 32  # probabilities from 1.3e-14 to 1 - 1.3e-14
NDCG_CUTOFFS = (5, 10)

_FORMAT = 3
_MANIFEST = "sums.json"
_KEYS = ("user", "bin")
_MERGED = {"least_label": "min", "largest_label": "max"}  # all other columns are added up


@dataclass(frozen=True)
class EvaluationSums:
    """Sums over rows, per user. `user` is int64 or string, other keys and counts int64, other sums float64.

    Attributes:
        tasks: what was measured.
        tables: table name -> rows sorted by their keys:

            `ranking`, one row a user: `rows`, `requests`; how many of these rank nothing, each counted under the first
            that holds: `requests_of_one_row`, `requests_without_relevant_row`, `requests_of_equal_relevance`; the
            others, `ranked_requests`, and over them the sums of `ndcg_at_5`, `ndcg_at_10`, `reciprocal_rank` and
            `least_ndcg`, the NDCG@10 of their worst orders.

            `TASK.users`, one row a user with an observed label: `rows`; the weighted sums `weight`, `label` and
            `prediction`; of a regression those of `squared_error` and `absolute_error`, the squares about the user's
            mean label (`label_spread`, see `spread`), and `least_label` and `largest_label`; of a binary task those of
            `logloss` (nats), `positives`, `requests`, `single_class_requests`, `request_auc_rows` (rows of requests
            with both classes) and `request_auc` (each such request's AUC x its rows).

            `TASK.histogram`, one row a user and bin of the logit, binary tasks only: `rows`, `positives`, and the
            weighted sums `weight`, `label`, `prediction`.
    """

    tasks: tuple[TaskSpec, ...]
    tables: dict[str, pa.Table]

    def merge(self, *others: "EvaluationSums") -> "EvaluationSums":
        """The sums over the rows of all.

        Raises:
            UserError: the tasks or the type of the user ids differ.
        """
        user_type = self.tables["ranking"].schema.field("user").type
        for other in others:
            if other.tasks != self.tasks:
                raise UserError(f"cannot merge sums of different tasks: {self.tasks} and {other.tasks}")
            other_type = other.tables["ranking"].schema.field("user").type
            if other_type != user_type:
                raise UserError(f"cannot merge sums of {user_type} users with sums of {other_type} users")
        parts = (self, *others)
        stacked = {name: pa.concat_tables([part.tables[name] for part in parts]) for name in self.tables}
        return EvaluationSums(self.tasks, {name: _sum_by_key(table) for name, table in stacked.items()})

    def save(self, folder: str | Path) -> None:
        """Write `sums.json` and one Parquet file a table to a folder of their own, replacing sums saved there before.

        Raises:
            UserError: the folder holds something else.
        """
        folder = Path(folder)
        if folder.is_dir() and any(folder.iterdir()) and not (folder / _MANIFEST).exists():
            raise UserError(f"'{folder}' holds other files, and sums need a folder of their own; name another one")
        manifest = {"format": _FORMAT, "tasks": [asdict(task) for task in self.tasks], "tables": list(self.tables)}
        with atomic_folder(folder) as temporary:
            (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=2))
            for name, table in self.tables.items():
                pq.write_table(table, temporary / f"{name}.parquet")

    @staticmethod
    def load(folder: str | Path) -> "EvaluationSums":
        """Read what `save` wrote.

        Raises:
            UserError: there are no sums in the folder, or in a format this version does not read.
        """
        path = Path(folder) / _MANIFEST
        if not path.is_file():
            raise UserError(f"'{path}' does not exist; expected a folder that an evaluation saved its sums to")
        manifest = json.loads(path.read_text())
        if manifest.get("format") != _FORMAT:
            raise UserError(f"'{path}' has format {manifest.get('format')!r}; this version reads format {_FORMAT}")
        tasks = tuple(TaskSpec(**task) for task in manifest["tasks"])
        tables = {name: pq.read_table(path.parent / f"{name}.parquet") for name in manifest["tables"]}
        return EvaluationSums(tasks, tables)


def merge_all(parts: Iterable[EvaluationSums]) -> EvaluationSums:
    """Merge a stream of sums, holding few of them at a time and copying each row a logarithmic number of times.

    Raises:
        UserError: the stream is empty, or see `EvaluationSums.merge`.
    """
    pending: list[tuple[int, EvaluationSums]] = []  # (parts inside, sums), fewer and fewer, as in a binary counter
    for part in parts:
        size, sums = 1, part
        while pending and pending[-1][0] <= size:
            earlier_size, earlier = pending.pop()
            size, sums = size + earlier_size, earlier.merge(sums)
        pending.append((size, sums))
    if not pending:
        raise UserError("there are no sums to merge; expected at least one part")
    first, *rest = (sums for _, sums in pending)
    return first.merge(*rest)


def measure(
    tasks: Sequence[TaskSpec],
    users: Any,
    requests: Any,
    predictions: Mapping[str, Any],
    labels: Mapping[str, Any],
    *,
    score: Any,
    weight: Any = None,
) -> EvaluationSums:
    """Sums of N rows. All rows of a request have to be in one call; rows may come in any order.

    A row's relevance for NDCG and MRR is max(0, sum over tasks of task weight x label), where an unobserved label and a
    negative label of a regression count as 0. A request of one row, or whose rows are all of one relevance, ranks
    nothing, as every order of it is as good: it is left out of NDCG and MRR, and counted.

    Args:
        tasks: one or more, with distinct names.
        users: (N,) integers or strings, NumPy or Arrow.
        requests: (N,) integers or strings; a request belongs to one user.
        predictions: task name -> (N,) probabilities in [0, 1] (binary) or values (regression). For the logloss they are
            clipped to [eps, 1 - eps], eps being the machine precision of their dtype, as scikit-learn does.
        labels: task name -> (N,) 0 or 1 (binary) or values (regression); NaN or null where unobserved.
        score: (N,) fused ranking score, higher is better.
        weight: (N,) positive importance weights, such as 1 / the rate a row was sampled at. They weight the logloss,
            the calibration and the regression errors. AUC, GAUC, NDCG and MRR rank rows and never use them.

    Raises:
        UserError, ValueError: see `rows.check_rows`.
    """
    rows = check_rows(tasks, users, requests, predictions, labels, score=score, weight=weight)
    tables = {"ranking": _ranking_table(tasks, rows)}
    for task in tasks:
        tables[f"{task.name}.users"] = _user_table(task, rows)
        if task.kind == "binary":
            tables[f"{task.name}.histogram"] = _histogram_table(task, rows)
    return EvaluationSums(tuple(tasks), {name: _sum_by_key(table) for name, table in tables.items()})


def _ranking_table(tasks: Sequence[TaskSpec], rows: Rows) -> pa.Table:
    requests = len(rows.request_user)
    lists = RankedLists.of(rows.request, rows.score, _gain(tasks, rows), requests)
    metrics = {f"ndcg_at_{cutoff}": ndcg(lists, cutoff) for cutoff in NDCG_CUTOFFS}
    metrics["reciprocal_rank"] = reciprocal_rank(lists)
    metrics["least_ndcg"] = least_ndcg(lists, NDCG_CUTOFFS[-1])
    left_out = ranks_nothing(lists)
    ranked = ~np.any(list(left_out.values()), axis=0)
    columns = {
        "rows": np.bincount(rows.request, minlength=requests),
        "requests": np.ones(requests, dtype=np.int64),
        **{f"requests_{why}": each.astype(np.int64) for why, each in left_out.items()},
        "ranked_requests": ranked.astype(np.int64),
        **{name: np.where(ranked, values, 0.0) for name, values in metrics.items()},
    }
    return pa.table({"user": rows.users.take(pa.array(rows.request_user)), **columns})


def _gain(tasks: Sequence[TaskSpec], rows: Rows) -> np.ndarray:
    gain = np.zeros(len(rows.request))
    for task in tasks:
        gain += task.weight * np.maximum(np.nan_to_num(rows.labels[task.name], nan=0.0), 0.0)
    return np.maximum(gain, 0.0)


def _user_table(task: TaskSpec, rows: Rows) -> pa.Table:
    observed = ~np.isnan(rows.labels[task.name])
    label, weight = rows.labels[task.name][observed], rows.weight[observed]
    raw = rows.predictions[task.name][observed]
    prediction = raw.astype(np.float64)
    columns = {
        "rows": np.ones(len(label), dtype=np.int64),
        "weight": weight,
        "label": weight * label,
        "prediction": weight * prediction,
    }
    if task.kind == "regression":
        columns["squared_error"] = weight * (prediction - label) ** 2
        columns["absolute_error"] = weight * np.abs(prediction - label)
        columns |= {spread.COLUMN: np.zeros(len(label)), "least_label": label, "largest_label": label}
        return pa.table({"user": rows.users.take(pa.array(rows.user[observed])), **columns})
    clipped = _clip(raw)
    columns["logloss"] = -weight * np.where(label == 1, np.log(clipped), np.log1p(-clipped))
    columns["positives"] = label.astype(np.int64)
    columns |= _request_columns(rows.request[observed], raw, label, len(rows.request_user))
    return pa.table({"user": rows.users.take(pa.array(rows.user[observed])), **columns})


def _request_columns(
    request: np.ndarray, prediction: np.ndarray, label: np.ndarray, requests: int
) -> dict[str, np.ndarray]:
    """AUC within requests, written on the first row of each request so that sums over a user's rows come out right."""
    auc = grouped_auc(request, prediction, label, 1 - label, requests)
    request_rows = np.bincount(request, minlength=requests)
    present, first = np.unique(request, return_index=True)
    has_auc = ~np.isnan(auc[present])
    columns = {
        "requests": np.ones(len(present), dtype=np.int64),
        "single_class_requests": (~has_auc).astype(np.int64),
        "request_auc_rows": np.where(has_auc, request_rows[present], 0),
        "request_auc": np.where(has_auc, request_rows[present] * np.nan_to_num(auc[present]), 0.0),
    }
    spread = {name: np.zeros(len(request), dtype=values.dtype) for name, values in columns.items()}
    for name, values in columns.items():
        spread[name][first] = values
    return spread


def _histogram_table(task: TaskSpec, rows: Rows) -> pa.Table:
    observed = ~np.isnan(rows.labels[task.name])
    label, weight = rows.labels[task.name][observed], rows.weight[observed]
    raw = rows.predictions[task.name][observed]
    return pa.table(
        {
            "user": rows.users.take(pa.array(rows.user[observed])),
            "bin": _logit_bin(raw),
            "rows": np.ones(len(label), dtype=np.int64),
            "positives": label.astype(np.int64),
            "weight": weight,
            "label": weight * label,
            "prediction": weight * raw,
        }
    )


def _clip(probability: np.ndarray) -> np.ndarray:
    """(N,) float64 in [eps, 1 - eps], eps being the precision of the input's dtype."""
    eps = np.finfo(probability.dtype).eps
    return np.clip(probability, eps, 1 - eps).astype(np.float64)


def _logit_bin(probability: np.ndarray) -> np.ndarray:
    """(N,) int64 in [0, 2 x LARGEST_LOGIT x BINS_PER_LOGIT), rising with the probability."""
    inside = np.clip(probability.astype(np.float64), 1e-15, 1 - 1e-15)
    logit = np.clip(np.log(inside) - np.log1p(-inside), -LARGEST_LOGIT, LARGEST_LOGIT)
    bins = np.floor((logit + LARGEST_LOGIT) * BINS_PER_LOGIT).astype(np.int64)
    return np.minimum(bins, 2 * LARGEST_LOGIT * BINS_PER_LOGIT - 1)


def _sum_by_key(table: pa.Table) -> pa.Table:
    """Merge rows with equal keys, and sort by key. One thread: equal input gives equal output to the last bit."""
    keys = [name for name in _KEYS if name in table.column_names]
    sums = [name for name in table.column_names if name not in keys]
    if spread.COLUMN in sums:
        table = spread.merged_spread(table)
    how = [(name, _MERGED.get(name, "sum")) for name in sums]
    grouped = table.group_by(keys, use_threads=False).aggregate(how)
    grouped = grouped.select([*keys, *(f"{name}_{each}" for name, each in how)]).rename_columns([*keys, *sums])
    return grouped.sort_by([(key, "ascending") for key in keys]).combine_chunks()
