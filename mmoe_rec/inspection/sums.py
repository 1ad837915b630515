"""The mergeable sums that an inspection makes of encoded rows: their size follows the tables, not the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from mmoe_rec.batches.encoded_rows import EncodedRows, Rows
from mmoe_rec.features.layout import Layout
from mmoe_rec.inspection.inputs import FeatureInputs, IdSums, NumberSums, feature_inputs, grid_edges
from mmoe_rec.inspection.statistics import BinaryLabels, DistinctCount
from mmoe_rec.log.hashing import hash_column
from mmoe_rec.preprocessing.prepare import Prepared
from mmoe_rec.progress import bar
from mmoe_rec.settings.schema import Schema

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


SPLITS = ("train", "validation", "test")
_SAMPLE, _SAMPLED_GROUPS = 65_536, 16
_BATCH_VALUES = 1 << 24


def collect(prepared: Prepared, schema: Schema) -> Sums:
    """Sums of all encoded rows. Raises UserError for a split without rows, and for rows that can't be read."""
    prepared.require_rows(*SPLITS)
    layout = prepared.layout
    splits = {name: EncodedRows(prepared.split(name), layout) for name in SPLITS}
    sums = Sums(layout, feature_inputs(schema, layout), _grids(splits["train"], layout))
    batch_size = max(1024, min(65_536, _BATCH_VALUES // (len(layout.dense) + len(layout.ids))))
    with bar() as progress:
        task = progress.add_task("inspecting", total=sum(each.rows for each in splits.values()))
        for name, encoded in splits.items():
            if name == "validation":
                sums.learn_rates()
            for rows, columns in encoded.stream(batch_size, COLUMNS):
                sums.add(name, rows, columns)
                progress.advance(task, len(rows))
    return sums


def _grids(train: EncodedRows, layout: Layout) -> list[np.ndarray]:
    """Edges of each dense input's histogram, from rows spread evenly over the training rows."""
    chosen = np.unique(np.linspace(0, len(train.groups) - 1, _SAMPLED_GROUPS).round().astype(np.int64))
    sample = []
    for group in chosen:
        rows = int(train.group_rows[group])
        take = np.unique(np.linspace(0, rows - 1, min(rows, _SAMPLE // len(chosen))).round().astype(np.int64))
        sample.append(train.read_row_groups([train.groups[group]], take).encoded.dense)
    dense = np.concatenate(sample)
    return [grid_edges(dense[:, place], each.edges) for place, each in enumerate(layout.dense)]
