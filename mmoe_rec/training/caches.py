"""How often the rows of a table are looked up, and how many of them a cache has to hold.

Tables that don't fit into GPUs lie in main memory, and each GPU holds the rows that were looked up last (torchrec's
`fused_uvm_caching`). Which share of the look-ups such a cache answers follows from how often each row is asked for, by
the approximation of Che, Tung and Wang (2002): a row stays for a time T since it was last asked for, the same for all
rows of a cache, so that with probability p of being the next one asked for it is there with probability 1 - exp(-p T).
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

_HALVINGS = 60
_LONGEST = 1e18  # T, in look-ups


class RowFrequencies:
    """How often the rows of a table are looked up.

    counts: (n,) how often a row is looked up, in any unit; rows: (n,) how many rows are so frequent; a_step: look-ups
    of a step of all ranks; parts: with a cache each, which the rows are split into, the most frequent ones first, as
    vocabularies have them. Has what torchrec's planner asks of its `CacheStatistics`.
    """

    def __init__(self, counts: np.ndarray, rows: np.ndarray, a_step: int, parts: int = 1) -> None:
        self.rows, order = int(rows.sum()), np.argsort(-counts, kind="stable")
        shares = counts[order] / max(float(counts @ rows), 1.0)  # of all look-ups, of one row
        ends = np.cumsum(rows[order])
        self._part_rows = -(-self.rows // parts)
        cuts = np.unique([*ends, *range(self._part_rows, self.rows, self._part_rows)])
        cuts = cuts[cuts > 0]
        seen = (found := shares[np.searchsorted(ends, cuts)]) > 0
        self._rows = np.diff(cuts, prepend=0)[seen]
        self._shares = found[seen]
        self._part = ((cuts - 1) // self._part_rows)[seen]
        self._a_step = a_step

    def _cached(self, time: float | np.ndarray) -> np.ndarray:
        return -np.expm1(-self._shares * time)

    def _rows_cached(self, time: float) -> float:
        return float(self._rows @ self._cached(time))

    def load_factor(self, hit_rate: float) -> float:
        """The smallest share of the rows in a cache that answers a share of the look-ups."""
        low, high = 0, self._part_rows  # of a part
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.hit_rate(middle / self._part_rows) < hit_rate else (low, middle)
        return min(high / self._part_rows, 1 - 1e-6)  # torchrec takes no cache of all

    def hit_rate(self, load_factor: float) -> float:
        """The share of the look-ups that a cache with a share of the rows answers."""
        if not len(self._shares):
            return 1.0
        low, high = np.zeros(self._part[-1] + 1), np.full(self._part[-1] + 1, math.log1p(_LONGEST))
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            cached = self._cached(np.expm1(middle)[self._part])
            few = np.bincount(self._part, self._rows * cached) < load_factor * self._part_rows
            low, high = np.where(few, middle, low), np.where(few, high, middle)
        return float((self._rows * self._shares) @ self._cached(np.expm1(high)[self._part]))

    def expected_miss_rate(self, clf: float) -> float:
        """That it does not answer. clf: torchrec's word for the load factor."""
        return 1 - self.hit_rate(clf)

    @property
    def expected_lookups(self) -> float:
        """Different rows of a step."""
        return self._rows_cached(self._a_step)

    def stable_fingerprint(self) -> tuple[object, ...]:
        """What distinguishes it from others, for torchrec's keys of plans."""
        return "mmoe_rec", self.rows, self._part_rows, self._a_step, self._shares.tobytes(), self._rows.tobytes()

    def __deepcopy__(self, memo: Any) -> RowFrequencies:
        return self  # the planner copies what it tries, and this never changes


def read_row_frequencies(
    features: Path, layout: ModelLayout, rows_of_step: int, parts: int = 1
) -> dict[str, RowFrequencies]:
    """Table -> how often its rows are looked up, by the counts of ids that the features in a folder were fitted with.

    parts: that the rows of each table are split into.
    Where there are none, as of hashed crosses or before features are built, each row is taken to be as frequent.
    """
    inputs = {table.name: sum(each.table == table.name for each in layout.ids) for table in layout.tables}
    return {
        table.name: RowFrequencies(*_count_rows(features, table), rows_of_step * inputs[table.name], parts)
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
