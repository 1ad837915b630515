"""Sums of all rows, ready to be summarised: what needs all rows of a user is computed, and their size is bounded.

Intervals redraw users. Of more than `MOST_UNITS` users, groups that a hash makes are redrawn instead, so that a
resample costs no more: they are as independent of each other as users are, and differ as much as their users do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmoe_rec.auc import grouped_auc
from mmoe_rec.evaluation.checked_rows import MeasuredTask
from mmoe_rec.evaluation.metrics.bins import bin_edges, counts_by_value
from mmoe_rec.evaluation.metrics.metric import UserRows
from mmoe_rec.evaluation.metrics.registered import metrics_of
from mmoe_rec.evaluation.sums import EvaluationSums, by_key, load_tables, save_tables
from mmoe_rec.log.hashing import hash_column

MOST_UNITS = 4_096
"""Of users, or groups of them; a power of two."""
_KEYS = ("user", "bin")


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
        return ClosedSums(tasks, tables) if is_closed else closed(EvaluationSums(tasks, tables))


def as_closed(sums: EvaluationSums | ClosedSums) -> ClosedSums:
    """The sums, closed if they are not yet."""
    return sums if isinstance(sums, ClosedSums) else closed(sums)


def closed(
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
            tables[name] = by_key(_by_group(table) if grouped else table, _KEYS, kinds.get(name))
    if "catalogue" in sums.tables:
        tables["catalogue"] = sums.tables["catalogue"]
    return ClosedSums(sums.tasks, tables)


def joined(parts: Sequence[ClosedSums]) -> ClosedSums:
    """The sums of all parts, no two of which have a unit in common, and whose bins are the same."""
    tables = {name: pa.concat_tables([part.tables[name] for part in parts]) for name in parts[0].tables}
    for name, table in tables.items():
        if name == "catalogue":
            tables[name] = by_key(table, ["candidate"], None)
        elif not name.endswith(".counts"):
            keys = [key for key in _KEYS if key in table.column_names]
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
