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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from mmoe_rec.atomic import atomic_folder
from mmoe_rec.errors import UserError
from mmoe_rec.features.latest import LatestParts
from mmoe_rec.features.layout import Layout
from mmoe_rec.features.log import EventRows, Log, format_time
from mmoe_rec.features.pipeline import FORMAT, EventStreams, FeaturePipeline, in_window
from mmoe_rec.features.rows import LogRows
from mmoe_rec.features.splits import SplitCounts, Window, encode_splits
from mmoe_rec.progress import over_rows
from mmoe_rec.schema import Schema


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
    found = at_hand(log_source, schema, windows, work)
    if found is not None:
        return found
    log = Log(log_source, schema)
    events = [EventRows(name, log) for name in schema.events]
    prepared = Prepared(work / "features")
    with atomic_folder(prepared.folder) as folder:
        _build(log, events, windows, folder, _fingerprint(log, events, windows))
    return prepared


def at_hand(log_source: str, schema: Schema, windows: dict[str, Window], work: Path) -> Prepared | None:
    """What `prepare` would give, where it is there already. Raises UserError if the log can't be read."""
    log = Log(log_source, schema)
    fingerprint = _fingerprint(log, [EventRows(name, log) for name in schema.events], windows)
    prepared = Prepared(work / "features")
    return prepared if _built_from(prepared.folder / "manifest.json") == fingerprint else None


def _built_from(manifest: Path) -> str | None:
    try:
        return json.loads(manifest.read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _fingerprint(log: Log, events: Sequence[EventRows], windows: dict[str, Window]) -> str:
    files = [log.files, *(each.files for each in events)]
    # A file that is written again with other values may keep its size and row count.
    written = [[(file.path.name, file.bytes, file.path.stat().st_mtime_ns) for file in each] for each in files]
    text = json.dumps([FORMAT, written, log.schema.model_dump(mode="json"), windows], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _build(log: Log, events: Sequence[EventRows], windows: dict[str, Window], folder: Path, fingerprint: str) -> None:
    schema = log.schema
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
    pipeline = FeaturePipeline.fit(schema, stream, (start, end), event_streams(events))
    for name in ("pipeline", "serving"):
        (folder / name).mkdir()
    pipeline.save(folder / "pipeline")
    pipeline.save(folder / "serving", latest_at=overview.last + 1)
    for name, parts in (("user", overview.users), ("candidate", overview.candidates)):
        pq.write_table(parts.finish().table, folder / "serving" / f"latest.{name}.parquet", compression="zstd")
    # Training may use only labels that had matured when training ended; judging waits until the log's end.
    known_by = {"train": end, "validation": overview.last, "test": overview.last}
    counts = encode_splits(log, pipeline, windows, folder / "encoded", known_by)
    _check_classes(schema, counts["train"])
    manifest = {
        "fingerprint": fingerprint,
        "log": log.source,
        "digest": log.digest(),
        "files": len(log.files),
        "rows": log.rows,
        "events": {each.name: {"files": len(each.files), "rows": each.rows} for each in events},
        "first_request": format_time(overview.first),
        "last_request": format_time(overview.last),
        "splits": {name: asdict(each) for name, each in counts.items()},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def event_streams(events: Sequence[EventRows]) -> EventStreams:
    """The events' rows under a progress bar, as the pipeline reads them."""

    def stream(each: EventRows) -> Callable[[], Iterator[LogRows]]:
        return lambda: over_rows(each.stream(), each.rows, f"reading events '{each.name}'")

    return {each.name: stream(each) for each in events}


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
