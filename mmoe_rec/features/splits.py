"""Encodes the splits of a log into Parquet files that training and evaluation read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.features.layout import Layout
from mmoe_rec.features.log import Log
from mmoe_rec.features.pipeline import FeaturePipeline, in_window
from mmoe_rec.features.rows import LogRows
from mmoe_rec.progress import over_rows

ROWS_PER_GROUP = 32_768
Window = tuple[int | None, int | None]


@dataclass
class SplitCounts:
    """Rows of a split, and per task the observed labels and their sum."""

    rows: int = 0
    observed: dict[str, int] = field(default_factory=dict)
    label_sum: dict[str, float] = field(default_factory=dict)

    def add(self, labels: dict[str, np.ndarray], rows: int) -> None:
        """Counts a batch."""
        self.rows += rows
        for task, values in labels.items():
            known = values[~np.isnan(values)]
            self.observed[task] = self.observed.get(task, 0) + len(known)
            self.label_sum[task] = self.label_sum.get(task, 0.0) + float(known.sum())


def encode_splits(
    log: Log, pipeline: FeaturePipeline, windows: dict[str, Window], folder: Path, known_by: dict[str, int]
) -> dict[str, SplitCounts]:
    """Encodes the rows of each split into `folder`/SPLIT, and writes the layout beside them.

    windows: request times [start, end) of each split; known_by: when a split's labels must have matured to count. Both
    in microseconds.
    """
    schema, layout = pipeline.schema, pipeline.layout
    counts = {name: SplitCounts() for name in windows}
    writers = {name: SplitWriter(folder / name) for name in windows}
    for rows in over_rows(log.stream(), log.rows, "encoding"):
        for name, window in windows.items():
            inside = rows.filter(in_window(rows.times(), window))
            if len(inside):
                labels = {task: inside.labels(rule, known_by[name]) for task, rule in schema.tasks.items()}
                counts[name].add(labels, len(inside))
                writers[name].write(encoded_table(pipeline, layout, inside, labels))
    for writer in writers.values():
        writer.close()
    (folder / "layout.json").write_text(layout.to_json(), encoding="utf-8")
    return counts


def encoded_table(pipeline: FeaturePipeline, layout: Layout, rows: LogRows, labels: dict[str, np.ndarray]) -> pa.Table:
    """Encoded rows as Arrow: `id.*`, `dense.*`, `label.*` (null is unobserved), user, request, time and so on."""
    columns = pipeline.encode(rows).to_arrow(layout)
    for task, values in labels.items():
        columns[f"label.{task}"] = pa.array(values.astype(np.float32), mask=np.isnan(values))
    names = rows.schema.columns
    columns["user"], columns["candidate"] = rows.column(names.user), rows.column(names.candidate)
    columns["request"], columns["time"] = rows.requests(), rows.column(names.time)
    rate = np.ones(len(rows)) if names.sampling_rate is None else rows.numbers(names.sampling_rate)
    columns["sampling_rate"] = pa.array(rate.astype(np.float32))
    return pa.table(columns)


class SplitWriter:
    """Writes a split as Parquet files of bounded size."""

    def __init__(self, folder: Path, rows_per_file: int = 4_000_000) -> None:
        folder.mkdir(parents=True)
        self.folder, self.rows_per_file = folder, rows_per_file
        self._parts, self._rows = 0, 0
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        """Appends rows."""
        if self._writer is None or self._rows >= self.rows_per_file:
            self.close()
            path = self.folder / f"part-{self._parts:05d}.parquet"
            self._writer = pq.ParquetWriter(path, table.schema, compression="zstd", compression_level=1)
            self._parts, self._rows = self._parts + 1, 0
        self._writer.write_table(table, row_group_size=ROWS_PER_GROUP)
        self._rows += table.num_rows

    def close(self) -> None:
        """Finishes the last file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
