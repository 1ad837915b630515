"""The mergeable sums that an inspection makes of encoded rows: their size follows the tables, not the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from mmoe_rec.batches.encoded_rows import Rows
from mmoe_rec.features.layout import Layout
from mmoe_rec.inspection.binary_labels import BinaryLabels
from mmoe_rec.inspection.distinct import DistinctCount
from mmoe_rec.inspection.ids import IdSums
from mmoe_rec.inspection.inputs import FeatureInputs
from mmoe_rec.inspection.numbers import NumberSums
from mmoe_rec.log.hashing import hash_column

COLUMNS = ("user", "candidate", "request", "time")  # read beside the model's inputs
WHOS = COLUMNS[:3]
DISTINCT = 65_536
_DAY = 86_400_000_000
_MONDAY = 3 * _DAY  # 1970-01-01 was a Thursday


@dataclass
class Labels:
    """Per task: observed labels and their sum."""

    observed: np.ndarray
    total: np.ndarray
    rows: int = 0

    @staticmethod
    def none(tasks: int) -> Labels:
        """No labels yet."""
        return Labels(np.zeros(tasks, np.int64), np.zeros(tasks))

    def add(self, labels: np.ndarray) -> None:
        """Counts (N, T) labels, NaN is unobserved."""
        self.rows += len(labels)
        self.observed += (~np.isnan(labels)).sum(0)
        self.total += np.nansum(labels, axis=0, dtype=np.float64)


@dataclass
class SplitSums:
    """Labels, times (microseconds) and different users, candidates and requests of a split."""

    labels: Labels
    first: int = np.iinfo(np.int64).max
    last: int = np.iinfo(np.int64).min
    who: dict[str, DistinctCount] = field(default_factory=lambda: {name: DistinctCount(DISTINCT) for name in WHOS})


class Sums:
    """All sums; training rows come first, then `learn_rates`, then the others, in any number of parts."""

    def __init__(self, layout: Layout, features: Sequence[FeatureInputs], grids: Sequence[np.ndarray]) -> None:
        """grids: edges of each dense input's fine histogram, in the order of the layout."""
        tasks = len(layout.tasks)
        self.layout, self.features = layout, features
        self.splits: dict[str, SplitSums] = {}
        self.weeks: dict[tuple[int, str], Labels] = {}  # (start of the week, split)
        self.ids = {each.name: IdSums(layout.table(each.table).rows, tasks, each.many) for each in layout.ids}
        self.numbers = {
            each.name: NumberSums(grids[each.place], tasks) for feature in features for each in feature.numbers
        }

    def learn_rates(self) -> None:
        """Called once when all training rows are in."""
        for each in self.ids.values():
            each.learn_rates()

    def add(self, split: str, rows: Rows, columns: pa.Table) -> None:
        """Counts N rows of a split; columns: their `COLUMNS`."""
        times = columns.column("time").cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).to_numpy()
        self._add_overview(split, rows.labels, columns, times)
        labels = BinaryLabels.of(rows.labels, self.layout)
        for name, sums in self.ids.items():
            sums.add(split, rows.encoded.ids[name], labels)
        dense = rows.encoded.dense
        for feature in self.features:
            for each, missing in zip(feature.numbers, _missing(feature, dense), strict=True):
                values = np.ascontiguousarray(dense[:, each.place])
                self.numbers[each.name].add(split, values, missing, labels)

    def _add_overview(self, split: str, labels: np.ndarray, columns: pa.Table, times: np.ndarray) -> None:
        tasks = labels.shape[1]
        sums = self.splits.setdefault(split, SplitSums(Labels.none(tasks)))
        sums.labels.add(labels)
        sums.first, sums.last = min(sums.first, int(times.min())), max(sums.last, int(times.max()))
        for name, count in sums.who.items():
            count.add(hash_column(columns.column(name).combine_chunks()))
        weeks = (times + _MONDAY) // (7 * _DAY) * (7 * _DAY) - _MONDAY
        for week in np.unique(weeks):
            self.weeks.setdefault((int(week), split), Labels.none(tasks)).add(labels[weeks == week])


def _missing(feature: FeatureInputs, dense: np.ndarray) -> list[np.ndarray | None]:
    """For each number of a feature, in which of N rows it is missing, or None where the encoded rows don't tell.

    A missing vector is all zeros. Any other number without an indicator was never missing in training rows.
    """
    if feature.meaning.zeros_missing:
        none: np.ndarray = ~np.any(dense[:, [each.place for each in feature.numbers]], axis=1)
        return [none] * len(feature.numbers)
    return [None if each.indicator is None else dense[:, each.indicator] > 0.5 for each in feature.numbers]
