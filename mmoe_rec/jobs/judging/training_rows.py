"""What the rows that a model is measured on have to do with those that it was trained on: who is new, who comes often,
and whether it has seen the labels before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmoe_rec.jobs.places import log_and_place
from mmoe_rec.preprocessing.prepare import existing
from mmoe_rec.settings.sections import Settings

if TYPE_CHECKING:
    from mmoe_rec.evaluation.scoring import ScoredRows

ACTIVITY = 10  # groups of users of equal size, by how many training rows they have


@dataclass(frozen=True)
class TrainingRows:
    """How many training rows there are of each user and candidate: (U,) ids and (U,) int64 of either, None where the
    log has no such ids; fingerprint: of the features that they are of."""

    fingerprint: str
    users: tuple[pa.Array, np.ndarray] | None
    candidates: tuple[pa.Array, np.ndarray] | None

    @staticmethod
    def of(settings: Settings) -> TrainingRows | None:
        """Those of the settings' log and split, where features were built of them."""
        prepared = existing(*log_and_place(settings))
        if prepared is None:
            return None
        columns, folder = settings.columns, prepared.split("train")
        return TrainingRows(
            prepared.manifest["fingerprint"],
            _counts(folder, "user") if columns.has_user else None,
            _counts(folder, "candidate") if columns.has_candidate else None,
        )

    def of_users_in_both(self, scored: ScoredRows) -> tuple[int, int]:
        """How many users of N scored rows have training rows, and how many users there are."""
        if self.users is None:
            return 0, 0
        users = pc.unique(scored.users)
        return int((_seen(users, self.users) > 0).sum()), len(users)

    def slices(self, scored: ScoredRows) -> dict[str, dict[str, np.ndarray]]:
        """What rows are sliced by -> slice -> (n,) numbers of its rows among those that were scored."""
        found = {}
        for name, ids, known in (
            ("user", scored.users, self.users),
            ("candidate", scored.candidates, self.candidates),
        ):
            if ids is not None and known is not None:
                found[name] = np.where(_seen(ids, known) > 0, "returning", "new")
        if self.users is not None:
            found["training rows of the user"] = _by_size(_seen(scored.users, self.users))
        return {by: dict(_distinct(names)) for by, names in found.items()}


def _counts(folder: Path, name: str) -> tuple[pa.Array, np.ndarray]:
    """The distinct values of a column of encoded rows, and how often each comes."""
    tables = []
    for file in sorted(folder.glob("*.parquet")):
        counted = pq.read_table(file, columns=[name])[name].combine_chunks().value_counts()
        tables.append(pa.table({"id": counted.field("values"), "rows": counted.field("counts")}))
    if not tables:
        return pa.nulls(0), np.zeros(0, np.int64)
    total = pa.concat_tables(tables).group_by("id").aggregate([("rows", "sum")]).combine_chunks()
    return total["id"].combine_chunks(), total["rows_sum"].to_numpy()


def _seen(ids: pa.Array, known: tuple[pa.Array, np.ndarray]) -> np.ndarray:
    """(N,) int64, how many training rows there are of each of N ids."""
    values, counts = known
    if not len(values) or values.type != ids.type:
        return np.zeros(len(ids), np.int64)
    place = pc.fill_null(pc.index_in(ids, value_set=values), -1).to_numpy()
    return np.where(place >= 0, counts[place], 0)


def _by_size(rows: np.ndarray) -> np.ndarray:
    """(N,) str: none, or a range of which about equally many rows are in each."""
    some = np.unique(rows[rows > 0], return_counts=False)
    edges = (
        np.unique(np.quantile(rows[rows > 0], np.arange(1, ACTIVITY) / ACTIVITY, method="lower")) if len(some) else some
    )
    group = np.searchsorted(edges, rows, side="left")
    names = np.full(len(rows), "none", object)
    for number in np.unique(group[rows > 0]):
        inside = (group == number) & (rows > 0)
        low, high = int(rows[inside].min()), int(rows[inside].max())
        names[inside] = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    return names.astype(str)


def _distinct(slices: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Each value with the places of its rows, in the order in which they are best read: numbers by size."""
    values, place = np.unique(slices, return_inverse=True)

    def size(number: int) -> tuple[int, str]:
        first = str(values[number]).split(" ")[0].replace(",", "")
        return (int(first) if first.isdigit() else -1, str(values[number]))

    for number in sorted(range(len(values)), key=size):
        yield str(values[number]), np.flatnonzero(place == number)
