"""Everything the metrics need to know about any number of rows, as sums that merge.

The rows may be cut into parts in any way that keeps the rows of a request together; the parts may be measured in any
place and merged in any order: counts come out equal, floating-point sums equal up to rounding. All sums are kept per
user, because the intervals resample users.

    total = merge_all(measure(tasks, ...) for batch in batches)
    total.save("evaluation/")

AUC and average precision need the order of all rows: so a binary task's rows are kept by user and predicted value.

`close_sums` readies sums of all rows: what needs all rows of a user is computed, and their size is bounded. Of more
than `MOST_UNITS` users, groups by a hash are redrawn instead, so that a resample costs no more: groups are as
independent of each other as users are, and differ as much as their users do.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmoe_rec.atomic import atomic_folder
from mmoe_rec.auc import grouped_auc
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.metrics import CUTOFFS, metrics_of
from mmoe_rec.evaluation.metrics.auc import bin_edges, counts_by_value
from mmoe_rec.evaluation.metrics.catalogue import shown_rows
from mmoe_rec.evaluation.metrics.metric import Metric, TaskRows, UserRows
from mmoe_rec.evaluation.metrics.ranking import RankedLists, least_and_random_ndcg, ranks_nothing
from mmoe_rec.evaluation.rows import MeasuredRows, MeasuredTask, check_rows
from mmoe_rec.log.hashing import combine, hash_column

__all__ = ["EvaluationSums", "MeasuredTask", "measure", "merge_all"]

NOTED_CUTOFF = 10  # of the NDCG whose least value is kept, for a note

_FORMAT = 5
_MANIFEST = "sums.json"
_KEYS = ("user", "value", "candidate")


@dataclass(frozen=True)
class EvaluationSums:
    """Sums over rows, per user. `user` and `candidate` are int64 or string, counts are int64, all else is float64.

    Attributes:
        tasks: what was measured.
        tables: table name -> rows sorted by their keys:

            `ranking`, one row a user: `rows`, `requests`; `digest`, which tells other requests, candidates and
            weights apart; how many of these rank nothing, each counted under the first
            that holds: `requests_of_one_row`, `requests_without_relevant_row`, `requests_of_equal_relevance`; the
            others, `ranked_requests`, and over them the sums of the metrics of the score, and of `least_ndcg` and
            `random_ndcg`, the NDCG@10 of their worst orders and the mean of that of all orders.

            `TASK.users`, one row a user with an observed label: `rows`; `digest`, as above with the labels; the
            weighted sums `weight`, `label` and `prediction`, of a binary task `positives`; of its requests, ranked by
            the task's prediction, the same as in `ranking`; and the sums of the task's metrics.

            `TASK.values`, one row a user and `value`, the predicted probability, binary tasks only: `rows`,
            `positives`, and the weighted sums `label`, `negative` (of rows whose label is 0) and `prediction`.

            `catalogue`, one row a `candidate`, where candidates were given: `rows`, and of each cutoff how often it is
            shown, and the logarithm of the probability that it never is (see `catalogue.shown_rows`).
    """

    tasks: tuple[MeasuredTask, ...]
    tables: dict[str, pa.Table]

    def merge(self, *others: EvaluationSums) -> EvaluationSums:
        """The sums over the rows of all.

        Raises:
            UserError: the tasks, the metrics or the type of the ids differ, or some know candidates and some do not.
        """
        for other in others:
            if other.tasks != self.tasks:
                raise UserError(f"cannot merge sums of different tasks: {self.tasks} and {other.tasks}")
            if other.tables.keys() != self.tables.keys():
                raise UserError("cannot merge sums with candidates and sums without")
            for table, key in (("ranking", "user"), ("catalogue", "candidate")):
                if table in self.tables:
                    mine, theirs = (each.tables[table].schema.field(key).type for each in (self, other))
                    if mine != theirs:
                        raise UserError(f"cannot merge sums of {mine} {key}s with sums of {theirs} {key}s")
            for name, table in self.tables.items():
                if apart := set(table.column_names) ^ set(other.tables[name].column_names):
                    raise UserError(f"cannot merge sums of different metrics: only one side has {sorted(apart)}")
        stacked = {
            name: pa.concat_tables([table, *(other.tables[name].select(table.column_names) for other in others)])
            for name, table in self.tables.items()
        }
        return _merged(self.tasks, stacked)

    def save(self, folder: str | Path) -> None:
        """Write `sums.json` and one Parquet file a table to a folder of their own, replacing sums saved there before.

        Raises:
            UserError: the folder holds something else.
        """
        save_tables(folder, self.tasks, self.tables, is_closed=False)

    @staticmethod
    def load(folder: str | Path) -> EvaluationSums:
        """Read what `save` wrote.

        Raises:
            UserError: there are no sums in the folder, or in a format this version does not read.
        """
        tasks, tables, is_closed = load_tables(folder)
        if is_closed:
            raise UserError(f"'{folder}' holds sums that can't be merged with others any more")
        return EvaluationSums(tasks, tables)


def save_tables(
    folder: str | Path, tasks: Sequence[MeasuredTask], tables: Mapping[str, pa.Table], is_closed: bool
) -> None:
    """Writes sums, see `EvaluationSums.save`. is_closed: whether they are `ClosedSums`."""
    folder = Path(folder)
    check_folder(folder)
    manifest = {"format": _FORMAT, "closed": is_closed, "tasks": [asdict(task) for task in tasks]}
    with atomic_folder(folder) as temporary:
        (temporary / _MANIFEST).write_text(json.dumps(manifest | {"tables": list(tables)}, indent=2))
        for name, table in tables.items():
            pq.write_table(table, temporary / f"{name}.parquet")


def check_folder(folder: Path) -> None:
    """Raises UserError where a folder for sums holds something else."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _MANIFEST).exists():
        raise UserError(f"'{folder}' holds other files, and sums need a folder of their own; name another one")


def load_tables(folder: str | Path) -> tuple[tuple[MeasuredTask, ...], dict[str, pa.Table], bool]:
    """Tasks and tables of sums in a folder, and whether they are `ClosedSums`. Raises UserError as `load` does."""
    path = Path(folder) / _MANIFEST
    if not path.is_file():
        raise UserError(f"'{path}' does not exist; expected a folder that an evaluation saved its sums to")
    manifest = json.loads(path.read_text())
    if manifest.get("format") != _FORMAT:
        raise UserError(f"'{path}' has format {manifest.get('format')!r}; this version reads format {_FORMAT}")
    tasks = tuple(MeasuredTask(**task) for task in manifest["tasks"])
    tables = {name: pq.read_table(path.parent / f"{name}.parquet") for name in manifest["tables"]}
    return tasks, tables, manifest["closed"]


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
    tasks: Sequence[MeasuredTask],
    users: Any,
    requests: Any,
    predictions: Mapping[str, Any],
    labels: Mapping[str, Any],
    *,
    score: Any,
    weight: Any = None,
    candidates: Any = None,
    precision: Mapping[str, float] | None = None,
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
        weight: (N,) positive importance weights, such as 1 / the rate a row was sampled at: a row counts by them in all
            metrics of a task, but not in a request's ranking, such as NDCG, where requests count alike.
        candidates: (N,) integers or strings, for what is shown of the catalogue; None leaves it out.
        precision: task -> machine precision by which its predictions are clipped; None takes that of their dtype.

    Raises:
        UserError, ValueError: see `checked_rows.check_rows`.
    """
    rows = check_rows(tasks, users, requests, predictions, labels, score=score, weight=weight, candidates=candidates)
    lists, keys = RankedLists.of(rows.request, rows.score, _gain(tasks, rows), len(rows.request_user)), _keys(rows)
    tables = {"ranking": _ranking_table(rows, lists, keys)}
    if rows.candidates is not None:
        sums = {"rows": np.ones(len(rows.request), dtype=np.int64), **shown_rows(lists, CUTOFFS)}
        tables["catalogue"] = pa.table({"candidate": rows.candidates.take(pa.array(rows.candidate)), **sums})
    for task in tasks:
        tables |= _task_tables(task, rows, keys, None if precision is None else precision[task.name])
    return _merged(tuple(tasks), tables)


def _ranking_table(rows: MeasuredRows, lists: RankedLists, keys: np.ndarray) -> pa.Table:
    columns = {
        "rows": np.bincount(rows.request, minlength=lists.requests),
        "requests": np.ones(lists.requests, dtype=np.int64),
    }
    columns["digest"] = np.zeros(lists.requests, np.int64)
    np.add.at(columns["digest"], rows.request, _digest(keys))
    columns |= _of_lists("score", lists, columns)
    return pa.table({"user": rows.users.take(pa.array(rows.request_user)), **_complete("score", columns)})


def _keys(rows: MeasuredRows) -> np.ndarray:
    """(N,) uint64 hashes of request, candidate and weight."""
    keys = [hash_column(rows.requests)[rows.request], rows.weight.view(np.uint64)]
    if rows.candidates is not None and rows.candidate is not None:
        keys.append(hash_column(rows.candidates)[rows.candidate])
    return combine(keys)


def _digest(keys: np.ndarray) -> np.ndarray:
    """(N,) int64 of 32 bits, so that billions may be added up."""
    return (keys >> np.uint64(32)).astype(np.int64)


def _of_lists(kind: str, lists: RankedLists, taken: Collection[str]) -> dict[str, np.ndarray]:
    """What requests add, name -> (Q,), to the sums of the score, or of a task of this kind; taken: names of others."""
    left_out = ranks_nothing(lists)
    ranked = ~np.any(list(left_out.values()), axis=0)
    counted = {f"requests_{why}": each for why, each in left_out.items()} | {"ranked_requests": ranked}
    least, random = least_and_random_ndcg(lists, NOTED_CUTOFF)
    measured = {"least_ndcg": least, "random_ndcg": random}
    metrics = [each for each in metrics_of(kind) if each.of_lists or kind == "score"]
    measured |= _measured(metrics, lists, {*taken, *counted, *measured})
    found = {name: each.astype(np.int64) for name, each in counted.items()}
    return found | {name: np.where(ranked, each, 0.0) for name, each in measured.items()}


def _gain(tasks: Sequence[MeasuredTask], rows: MeasuredRows) -> np.ndarray:
    """(N,) relevance to 12 digits: what is left of 0.1 + 0.2 - 0.3 is rounding, and makes no row relevant."""
    gain, size = np.zeros(len(rows.request)), np.zeros(len(rows.request))
    for task in tasks:
        worth = task.weight * np.maximum(np.nan_to_num(rows.labels[task.name], nan=0.0), 0.0)
        gain, size = gain + worth, size + np.abs(worth)
    digits = 12 - np.ceil(np.log10(size, out=np.zeros_like(size), where=size > 0))
    unit = 10.0 ** -np.clip(digits, -290, 290)
    return np.maximum(np.round(gain / unit) * unit, 0.0)


def _task_tables(
    task: MeasuredTask, rows: MeasuredRows, keys: np.ndarray, precision: float | None
) -> dict[str, pa.Table]:
    observed = ~np.isnan(rows.labels[task.name])
    label, weight, given = (
        each[observed] for each in (rows.labels[task.name], rows.weight, rows.predictions[task.name])
    )
    prediction = given.astype(np.float64)
    precision = float(np.finfo(given.dtype).eps) if precision is None else precision
    requests, request = np.unique(rows.request[observed], return_inverse=True)
    known = TaskRows(label, prediction, weight, precision, request, len(requests))
    lists = RankedLists.of(request, prediction, np.maximum(label, 0.0), len(requests))
    users = rows.users.take(pa.array(rows.user[observed]))
    sums = {"rows": np.ones(len(label), dtype=np.int64)}
    sums |= {"positives": label.astype(np.int64)} if task.kind == "binary" else {}
    sums |= {"weight": weight, "label": weight * label, "prediction": weight * prediction}
    # Of values not the weight but that of negative rows: one less the other would round small ones by large ones.
    by_value = {name: each for name, each in sums.items() if name != "weight"} | {"negative": weight * (1 - label)}
    own = _measured([each for each in metrics_of(task.kind) if not each.of_lists], known, sums)
    own |= known.at_first_rows(_of_lists(task.kind, lists, {*sums, *own, "digest"}))
    # Fractions are the same that single precision has the same; whole numbers, such as moments, are not. -0 is 0.
    known_label = np.where(label == np.rint(label), label, label.astype(np.float32)) + 0.0
    own["digest"] = _digest(combine([keys[observed], known_label.view(np.uint64)]))
    tables = {f"{task.name}.users": pa.table({"user": users, **_complete(task.kind, sums | own)})}
    if task.kind == "binary":
        tables[f"{task.name}.values"] = pa.table({"user": users, "value": prediction, **by_value})
    return tables


def _measured(metrics: Iterable[Metric[Any]], given: Any, taken: Collection[str]) -> dict[str, np.ndarray]:
    """The sums that are the metrics' own, of what they are given; taken: names of other sums."""
    columns: dict[str, np.ndarray] = {}
    for metric in metrics:
        found = metric.measure(given)
        if twice := [name for name in found if name in taken or name in columns]:
            raise ValueError(f"metric {metric.name!r} measures {twice}, and so does another; expected names of its own")
        columns |= found
    return columns


def _of_users(kind: str) -> set[str]:
    """Names of sums that are made of all rows of a user (see `closed`)."""
    nobody = UserRows(*np.zeros((3, 0)))
    return {name for metric in metrics_of(kind) for name in metric.of_users(nobody)}


def _complete(kind: str, columns: dict[str, Any]) -> dict[str, Any]:
    """The sums, which have to hold all that the metrics of a kind read."""
    for metric in metrics_of(kind):
        if missing := set(metric.totals) - {*columns, *_of_users(kind)}:
            raise ValueError(f"metric {metric.name!r} reads {sorted(missing)}, which no metric measures")
    return columns


def _merged(tasks: tuple[MeasuredTask, ...], tables: Mapping[str, pa.Table]) -> EvaluationSums:
    """Rows of equal keys merged."""
    kinds = {"ranking": "score"} | {f"{task.name}.users": task.kind for task in tasks}
    return EvaluationSums(tasks, {name: by_key(table, _KEYS, kinds.get(name)) for name, table in tables.items()})


def by_key(table: pa.Table, names: Sequence[str], kind: str | None) -> pa.Table:
    """Merges rows with equal keys, and sorts by key. One thread: equal input gives equal output to the last bit.

    names: of keys, those of which the table has a column; kind: whose metrics' sums the table holds, None for others.
    """
    keys = [name for name in names if name in table.column_names]
    how: dict[str, str] = {name: "sum" for name in table.column_names if name not in keys}
    for metric in metrics_of(kind) if kind else ():
        table = metric.before_merging(table)
        how |= {name: each for name, each in metric.merged.items() if name in how}
    grouped = table.group_by(keys, use_threads=False).aggregate(list(how.items()))
    grouped = grouped.select([*keys, *(f"{name}_{each}" for name, each in how.items())]).rename_columns([*keys, *how])
    return grouped.sort_by([(key, "ascending") for key in keys]).combine_chunks()


MOST_UNITS = 4_096
"""Of users, or groups of them; a power of two."""
_UNIT_KEYS = ("user", "bin")


@dataclass(frozen=True)
class ClosedSums:
    """Sums over rows by unit, a user or a group of users, which stands in the column `user`.

    Attributes:
        tasks: what was measured.
        tables: table name -> rows sorted by their keys: `ranking` and `TASK.users` as in `EvaluationSums`, with the
            number of `users` in the first, and with the sums of each metric's `of_users` in the others; `catalogue` as
            there;

            `TASK.bins`, one row a unit and `bin` of rising prediction, binary tasks only: `rows`, `positives`, and the
            weighted sums `label`, `negative`, `prediction`;

            `TASK.counts`, binary tasks only: predicted `value`, and the weight of its `positive` and `negative` rows;
            rows of one value may be told in several.
    """

    tasks: tuple[MeasuredTask, ...]
    tables: dict[str, pa.Table]

    @property
    def users(self) -> int:
        """How many were measured."""
        return int(self.tables["ranking"]["users"].to_numpy().sum())

    def save(self, folder: str | Path) -> None:
        """As `EvaluationSums.save`."""
        save_tables(folder, self.tasks, self.tables, is_closed=True)

    @staticmethod
    def load(folder: str | Path) -> ClosedSums:
        """Reads what this or `EvaluationSums.save` wrote. Raises UserError as `EvaluationSums.load`."""
        tasks, tables, is_closed = load_tables(folder)
        return ClosedSums(tasks, tables) if is_closed else close_sums(EvaluationSums(tasks, tables))


def as_closed(sums: EvaluationSums | ClosedSums) -> ClosedSums:
    """The sums, closed if they are not yet."""
    return sums if isinstance(sums, ClosedSums) else close_sums(sums)


def close_sums(
    sums: EvaluationSums, edges: Mapping[str, np.ndarray] | None = None, grouped: bool | None = None
) -> ClosedSums:
    """Sums that hold all rows of each of their users.

    edges: binary task -> first value of each bin but the first; None makes them of the values. grouped: whether units
    are groups of users; None: where there are more than `MOST_UNITS`.
    """
    users = sums.tables["ranking"]["user"].combine_chunks()
    grouped = len(users) > MOST_UNITS if grouped is None else grouped
    ranking = sums.tables["ranking"].append_column("users", pa.array(np.ones(len(users), np.int64)))
    tables = {"ranking": ranking}
    for task in sums.tasks:
        name = f"{task.name}.users"
        tables[name] = sums.tables[name]
        if task.kind == "binary":
            values = sums.tables[f"{task.name}.values"]
            tables[name] = _with_sums_of_users(task.kind, tables[name], values)
            known = None if edges is None else edges[task.name]
            tables |= {f"{task.name}.{kind}": each for kind, each in _binned(values, known).items()}
    kinds = {"ranking": "score"} | {f"{task.name}.users": task.kind for task in sums.tasks}
    for name, table in tables.items():
        if "user" in table.column_names:
            tables[name] = by_key(_by_group(table) if grouped else table, _UNIT_KEYS, kinds.get(name))
    if "catalogue" in sums.tables:
        tables["catalogue"] = sums.tables["catalogue"]
    return ClosedSums(sums.tasks, tables)


def join_sums(parts: Sequence[ClosedSums]) -> ClosedSums:
    """The sums of all parts, no two of which have a unit in common, and whose bins are the same."""
    tables = {name: pa.concat_tables([part.tables[name] for part in parts]) for name in parts[0].tables}
    for name, table in tables.items():
        if name == "catalogue":
            tables[name] = by_key(table, ["candidate"], None)
        elif not name.endswith(".counts"):
            keys = [key for key in _UNIT_KEYS if key in table.column_names]
            tables[name] = table.sort_by([(key, "ascending") for key in keys]).combine_chunks()
    return ClosedSums(parts[0].tasks, tables)


def group_of(users: np.ndarray) -> np.ndarray:
    """(N,) int64 in [0, MOST_UNITS), the group of each user of a hash (N,) uint64: rising with the hash."""
    return (users >> np.uint64(64 - (MOST_UNITS - 1).bit_length())).astype(np.int64)


def units_of(users: pa.Array) -> tuple[np.ndarray, int]:
    """(N,) int64, which unit of those that are redrawn each row belongs to, a user or a group of them; how many there
    are.

    users: (N,) integers or strings.
    """
    encoded = users.dictionary_encode()
    codes = encoded.indices.to_numpy().astype(np.int64)
    if len(encoded.dictionary) <= MOST_UNITS:
        return codes, len(encoded.dictionary)
    groups, place = np.unique(group_of(hash_column(encoded.dictionary)), return_inverse=True)
    return place[codes], len(groups)


def _by_group(table: pa.Table) -> pa.Table:
    place = table.column_names.index("user")
    return table.set_column(place, "user", pa.array(group_of(hash_column(table["user"].combine_chunks()))))


def _with_sums_of_users(kind: str, table: pa.Table, values: pa.Table) -> pa.Table:
    """Sums by user of a binary task with those that need all rows of a user. values: `TASK.values`, sorted."""
    user = pc.index_in(values["user"], value_set=table["user"].combine_chunks()).to_numpy().astype(np.int64)
    value, label, negative, rows = (values[name].to_numpy() for name in ("value", "label", "negative", "rows"))
    auc = grouped_auc(user, value, label, negative, len(table))
    given = UserRows(auc, np.bincount(user, rows, len(table)), np.bincount(user, label + negative, len(table)))
    for metric in metrics_of(kind):
        for name, each in metric.of_users(given).items():
            table = table.append_column(name, pa.array(each))
    return table


def _binned(values: pa.Table, edges: np.ndarray | None) -> dict[str, pa.Table]:
    value, rows, positives = (values[name].to_numpy() for name in ("value", "rows", "positives"))
    if edges is None:
        edges = bin_edges(*counts_by_value(value, positives, rows - positives))
    bins = pa.array(np.searchsorted(edges, value, side="right"))
    names = ("rows", "positives", "label", "negative", "prediction")
    counted = pa.table({"value": value, "positive": values["label"], "negative": values["negative"]})
    return {
        "bins": pa.table({"user": values["user"], "bin": bins, **{name: values[name] for name in names}}),
        "counts": by_key(counted, ["value"], None),
    }
