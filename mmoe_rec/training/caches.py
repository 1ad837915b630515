"""How often the rows of a table are looked up, and how many of them a cache has to hold.

Tables that don't fit into GPUs lie in main memory, and each GPU holds the rows that were looked up last (torchrec's
`fused_uvm_caching`). Which share of the look-ups such a cache answers follows from how often each row is asked for, by
the approximation of Che, Tung and Wang (2002): a row stays for a time T since it was last asked for, the same for all
rows, so that with probability p of being the next one asked for it is there with probability 1 - exp(-p T).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.errors import UserError
from mmoe_rec.model.layout import EmbeddingTable, ModelLayout
from mmoe_rec.model.tables import used_tables

_HALVINGS = 100
_LONGEST = 1e18  # T, in look-ups


class LookUps:
    """Look-ups of a table.

    counts: (n,) how often a row is looked up, in any unit; rows: (n,) how many rows are so frequent; a_step: look-ups
    of a step of all ranks. Has what torchrec's planner asks of its `CacheStatistics`.
    """

    def __init__(self, counts: np.ndarray, rows: np.ndarray, a_step: int) -> None:
        self.rows, seen = int(rows.sum()), counts > 0
        self._rows = rows[seen]
        self._shares = counts[seen] / max(float(counts @ rows), 1.0)  # of all look-ups, of one row
        self._a_step = a_step

    def _cached(self, time: float) -> np.ndarray:
        return -np.expm1(-self._shares * time)

    def _rows_cached(self, time: float) -> float:
        return float(self._rows @ self._cached(time))

    def _found(self, time: float) -> float:
        return float((self._rows * self._shares) @ self._cached(time))

    def load_factor(self, hit_rate: float) -> float:
        """The smallest share of the rows in a cache that answers a share of the look-ups."""
        rows = self._rows_cached(_solve(self._found, hit_rate)) if len(self._shares) else 0.0
        # torchrec takes no cache of no row, or of all.
        return min(max(math.ceil(rows), 1) / self.rows, 1 - 1e-6)

    def hit_rate(self, load_factor: float) -> float:
        """The share of the look-ups that a cache with a share of the rows answers."""
        return self._found(_solve(self._rows_cached, load_factor * self.rows)) if len(self._shares) else 1.0

    def expected_miss_rate(self, clf: float) -> float:
        """That it does not answer. clf: torchrec's word for the load factor."""
        return 1 - self.hit_rate(clf)

    @property
    def expected_lookups(self) -> float:
        """Different rows of a step."""
        return self._rows_cached(self._a_step)

    def stable_fingerprint(self) -> tuple[object, ...]:
        """What distinguishes it from others, for torchrec's keys of plans."""
        return "mmoe_rec", self.rows, self._a_step, self._shares.tobytes(), self._rows.tobytes()

    def __deepcopy__(self, memo: Any) -> LookUps:
        return self  # the planner copies what it tries, and this never changes


def _solve(rising: Any, value: float) -> float:
    """Where a rising function of times has a value."""
    low, high = 0.0, math.log1p(_LONGEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(math.expm1(middle)) < value else (low, middle)
    return math.expm1(high)


def read_look_ups(features: Path, layout: ModelLayout, rows_of_step: int) -> dict[str, LookUps]:
    """Table -> its look-ups, by the counts of ids that the features in a folder were fitted with.

    Where there are none, as of hashed crosses or before features are built, each row is taken to be as frequent.
    """
    inputs = {table.name: sum(each.table == table.name for each in layout.ids) for table in layout.tables}
    return {
        table.name: LookUps(*_count_rows(features, table), rows_of_step * inputs[table.name])
        for table in used_tables(layout)
    }


def _count_rows(features: Path, table: EmbeddingTable) -> tuple[np.ndarray, np.ndarray]:
    file = features / "counts" / f"feature.{table.name}.parquet"
    vocabulary = features / "serving" / f"{table.name}.vocabulary.parquet"
    if not file.is_file() or not vocabulary.is_file():
        return np.ones(1), np.array([table.rows])
    try:
        counts = pq.read_table(file, columns=["count"])["count"].to_numpy()  # the most frequent ones first
        known = pq.read_metadata(vocabulary).num_rows
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"the counts of the ids of '{table.name}' can't be read: {error}") from None
    values, rows = np.unique(counts[:known], return_counts=True)
    buckets = table.rows - 1 - known
    shared = counts[known:].sum() / max(buckets, 1)  # ids without a row of their own
    return np.append(values, [shared, 0.0]), np.append(rows, [buckets, table.rows - rows.sum() - buckets])
