"""From a log to encoded rows: fits the features, encodes each split, keeps both until what they rest on changes.

    <work>/features/
        manifest.json          fingerprint, log digest, times, rows and labels of each split
        pipeline/              state of the features, the whole past
        serving/               what requests after the log's end can ask for, + latest values of users and candidates
        encoded/layout.json    order of the model's inputs
        encoded/{train,validation,test}/part-00000.parquet

The folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.atomic import atomic_folder
from mmoe_rec.errors import UserError
from mmoe_rec.features.latest import LatestParts
from mmoe_rec.features.layout import Layout
from mmoe_rec.features.log import Log, format_time
from mmoe_rec.features.pipeline import FORMAT, FeaturePipeline, in_window
from mmoe_rec.features.rows import LogRows
from mmoe_rec.progress import over_rows
from mmoe_rec.schema import Schema

SPLITS = ("train", "validation", "test")
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


@dataclass(frozen=True)
class Prepared:
    """A folder of fitted features and encoded rows."""

    folder: Path

    @property
    def layout(self) -> Layout:
        """Order of the model's inputs."""
        return Layout.read(self.folder / "encoded")

    @property
    def manifest(self) -> dict:
        """What was built from what."""
        return json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))

    def split(self, name: str) -> Path:
        """Folder of a split's encoded rows."""
        return self.folder / "encoded" / name


def prepare(log_source: str, schema: Schema, windows: dict[str, Window], work: Path) -> Prepared:
    """Fits and encodes, or takes what is there if log, schema and split are the same.

    Args:
        windows: request times [start, end) in microseconds of each split.

    Raises:
        UserError: the log can't be read, a split is empty, or a binary task has one class in training.
    """
    log = Log(log_source, schema)
    prepared = Prepared(work / "features")
    fingerprint = _fingerprint(log, schema, windows)
    if _built_from(prepared.folder / "manifest.json") == fingerprint:
        return prepared
    with atomic_folder(prepared.folder) as folder:
        _build(log, schema, windows, folder, fingerprint)
    return prepared


def _built_from(manifest: Path) -> str | None:
    try:
        return json.loads(manifest.read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _fingerprint(log: Log, schema: Schema, windows: dict[str, Window]) -> str:
    # A file that is written again with other values may keep its size and row count.
    written = [file.path.stat().st_mtime_ns for file in log.files]
    text = json.dumps([FORMAT, log.digest(), written, schema.model_dump(mode="json"), windows], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _build(log: Log, schema: Schema, windows: dict[str, Window], folder: Path, fingerprint: str) -> None:
    overview = _Overview(schema, windows)
    passes = iter(("reading the log", "fitting counters"))

    def stream() -> Iterator[LogRows]:
        what = next(passes)
        for rows in over_rows(log.stream(), log.rows, what):
            if what == "reading the log":
                overview.add(rows)
            yield rows
        if what == "reading the log":
            overview.check_splits(log.source)

    start, end = windows["train"]
    assert end is not None
    pipeline = FeaturePipeline.fit(schema, stream, (start, end))
    for name in ("pipeline", "serving"):
        (folder / name).mkdir()
    pipeline.save(folder / "pipeline")
    pipeline.save(folder / "serving", latest_at=overview.last + 1)
    for name, parts in (("user", overview.users), ("candidate", overview.candidates)):
        pq.write_table(parts.finish().table, folder / "serving" / f"latest.{name}.parquet", compression="zstd")
    counts = _encode(log, pipeline, windows, folder / "encoded", overview.last)
    _check_classes(schema, counts["train"])
    manifest = {
        "fingerprint": fingerprint,
        "log": log.source,
        "digest": log.digest(),
        "files": len(log.files),
        "rows": log.rows,
        "first_request": format_time(overview.first),
        "last_request": format_time(overview.last),
        "splits": {name: asdict(each) for name, each in counts.items()},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


class _Overview:
    """First and last request, rows of each split, latest values of users and candidates."""

    def __init__(self, schema: Schema, windows: dict[str, Window]) -> None:
        roles = schema.input_columns()
        self.windows = windows
        self.first, self.last = np.iinfo(np.int64).max, np.iinfo(np.int64).min
        self.rows = dict.fromkeys(windows, 0)
        self.users = LatestParts(schema.columns.user, [c for c, role in roles.items() if role == "user"])
        self.candidates = LatestParts(schema.columns.candidate, [c for c, role in roles.items() if role == "candidate"])

    def add(self, rows: LogRows) -> None:
        times = rows.times()
        if not len(times):
            return
        self.first, self.last = min(self.first, int(times.min())), max(self.last, int(times.max()))
        for name, window in self.windows.items():
            self.rows[name] += int(in_window(times, window).sum())
        self.users.add(rows)
        self.candidates.add(rows)

    def check_splits(self, source: str) -> None:
        for name, rows in self.rows.items():
            if rows == 0 and self.first <= self.last:
                raise UserError(
                    f"the {name} split is empty: the log '{source}' has requests from {format_time(self.first)} to "
                    f"{format_time(self.last)}; set `split.train_end`, `split.validation_end` and `split.test_end` "
                    "inside (and `columns.time_unit`, if these times are wrong)"
                )


def _encode(
    log: Log, pipeline: FeaturePipeline, windows: dict[str, Window], folder: Path, log_end: int
) -> dict[str, SplitCounts]:
    schema, layout = pipeline.schema, pipeline.layout
    # Training may use only labels that had matured when training ended; judging waits until the log's end.
    known_by = {"train": windows["train"][1] or log_end, "validation": log_end, "test": log_end}
    counts = {name: SplitCounts() for name in SPLITS}
    writers = {name: SplitWriter(folder / name) for name in SPLITS}
    for rows in over_rows(log.stream(), log.rows, "encoding"):
        for name in SPLITS:
            inside = rows.filter(in_window(rows.times(), windows[name]))
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


def _check_classes(schema: Schema, counts: SplitCounts) -> None:
    for name, task in schema.tasks.items():
        observed, positive = counts.observed[name], counts.label_sum[name]
        if observed == 0:
            reasons = [f"column '{task.label}' is null in all training rows"]
            if task.observed_when is not None:
                reasons.append(f"column '{task.observed_when.column}' never equals {task.observed_when.equals!r}")
            if task.matures_after_days:
                reasons.append(
                    f"no label had matured by split.train_end, {task.matures_after_days:g} days after its request"
                )
            raise UserError(
                f"task '{name}' has no observed label in training: {', or '.join(reasons)}; "
                "give it labels, train on a longer time, or remove the task"
            )
        if task.kind == "binary" and positive in (0, observed):
            raise UserError(
                f"task '{name}' has one class in training: all {observed} observed labels in column '{task.label}' "
                f"are {positive / observed:g}; a task needs both 0 and 1, so train on a longer time or remove it"
            )
