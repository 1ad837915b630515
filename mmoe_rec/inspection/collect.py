"""Streams prepared features into sums: first a sample of the training rows for the histograms, then all rows once."""

from __future__ import annotations

import numpy as np

from mmoe_rec.batches.encoded_rows import EncodedRows
from mmoe_rec.features.layout import Layout
from mmoe_rec.inspection.inputs import feature_inputs
from mmoe_rec.inspection.numbers import grid_edges
from mmoe_rec.inspection.sums import COLUMNS, Sums
from mmoe_rec.preprocessing.prepare import Prepared
from mmoe_rec.progress import bar
from mmoe_rec.settings.schema import Schema

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
