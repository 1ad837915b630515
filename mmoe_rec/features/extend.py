"""Adds new files of a log to features at hand: the state of the days before and the new rows give the next state.

Only rows of the new files are read. What a trained model relies on stays: rows of known ids, statistics, scales of
labels; ids that have become frequent get rows at the end of their tables. Counters and histories go on from what they
remember, so new requests must be later than all earlier ones, while events of other logs may come late. A history
remembers table rows: an item that was in a hashed bucket when it was remembered stays there, and a model that starts
from the one before (see `mmoe_rec.training.warm_start`) begins with the same weights in the bucket and the new row. Of
a user's items that become known in one instant, a history takes those with the greatest rows, whatever these are by
then.

Only new rows are encoded, into the splits of the settings. Earlier rows whose labels have matured since are not encoded
again, but counters and histories get to know these labels on time. Nothing looks for a request that has the same
candidate in an old and in a new file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.atomic import atomic_folder, one_at_a_time
from mmoe_rec.errors import UserError
from mmoe_rec.features.build import (
    ADVICE,
    BUILD,
    Prepared,
    describe,
    fingerprint_of,
    load_counts,
    save_counts,
    save_files,
    save_latest,
    vocabularies,
)
from mmoe_rec.features.checks import place
from mmoe_rec.features.columns import UTC_MICROSECONDS
from mmoe_rec.features.latest import LatestParts
from mmoe_rec.features.learn import Learnt, Window
from mmoe_rec.features.log import format_time
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.features.rows import LogRows
from mmoe_rec.features.splits import SplitCounts
from mmoe_rec.features.steps import DEFAULTS, BuildOptions, Logs, Steps
from mmoe_rec.locks import writing
from mmoe_rec.schema import Schema
from mmoe_rec.settings.differences import differences

ANEW = "build the features anew, without --extend"


@dataclass(frozen=True)
class Extended:
    """Features after new files were added. rows: of the interaction log that were new; new_ids: by feature."""

    prepared: Prepared
    files: int
    rows: int
    new_ids: Mapping[str, int]


def extend(
    log_source: str, schema: Schema, windows: dict[str, Window], work: Path, options: BuildOptions = DEFAULTS
) -> Extended | None:
    """Adds the files that are new since to the features in `work`; None where there are none, and all stays.

    The folder is replaced at the end; before that, and after an error, it is the old one.

    Args:
        windows: request times [start, end) in microseconds of each split. They may differ from those before: they say
            what becomes of the new rows.

    Raises:
        UserError: there are no features to extend, or they are of another schema; an old file has changed; new requests
            are not later than old ones, or in no split; or the log can't be read.
    """
    prepared = Prepared(work / "features")
    if not (prepared.folder / "manifest.json").is_file():
        raise UserError(f"'{prepared.folder}' holds no features that could be extended; build them without --extend")
    logs = Logs(log_source, schema, options)
    with one_at_a_time(prepared.folder), writing(prepared.folder, BUILD, ADVICE, queue=True):
        _check_schema(prepared, schema)
        old_files = _unchanged_files(prepared, logs)
        new_files = sum(len(each.files) for each in logs.all) - sum(map(len, old_files))
        if not new_files:
            return None
        with atomic_folder(prepared.folder) as folder:
            extended = _Extension(prepared, logs, logs.rest(old_files), windows, folder)
            rows, new_ids = extended.build()
    return Extended(prepared, new_files, rows, new_ids)


def _check_schema(prepared: Prepared, schema: Schema) -> None:
    before = FeaturePipeline.load(prepared.serving, memories=False).schema
    one, other = (each.model_dump(mode="json") for each in (before, schema))
    if found := next(differences(one, other), None):
        where, old, new = found
        raise UserError(
            f"setting '{where}' is {old} in the features in '{prepared.folder}' and {new} now; {ANEW}, or take the "
            "setting back"
        )


def _unchanged_files(prepared: Prepared, logs: Logs) -> list[set[str]]:
    """Addresses of the files that the features hold, for each log. Raises UserError where one is not as it was."""
    try:
        recorded = json.loads((prepared.folder / "files.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"the features in '{prepared.folder}' have no record of the log's files (files.json), as an earlier "
            f"version built them; {ANEW}"
        ) from None
    for log, files in zip(logs.all, recorded, strict=True):
        now = {file.address: file for file in log.files}
        left_out = {each.address: each.reason for each in log.left_out}
        for address, size, version, partition in files:
            file = now.get(address)
            if file is None:
                what = f"can't be used any more ({left_out[address]})" if address in left_out else "is gone"
            elif (file.bytes, file.version, [list(pair) for pair in file.partition]) != (size, version, partition):
                what = "has changed"
            else:
                continue
            raise UserError(f"'{address}' {what} since the features were built from it; put it back, or {ANEW}")
    return [{address for address, *_ in files} for files in recorded]


class _Extension:
    """One extension. logs: all files; new: the same, but only new files are read."""

    def __init__(self, before: Prepared, logs: Logs, new: Logs, windows: dict[str, Window], folder: Path) -> None:
        self.before, self.logs, self.new, self.windows, self.folder = before, logs, new, windows, folder
        self.manifest = before.manifest
        self.first, self.last = self.manifest["request_microseconds"]

    def build(self) -> tuple[int, dict[str, int]]:
        """Writes the new folder; gives the number of new rows, and of new ids of each feature."""
        serving, counts = self.folder / "serving", self.folder / "counts"
        for each in (serving, counts):
            each.mkdir()
        save_files(self.logs, self.folder)
        with Steps(self.new, self.windows, self.folder / "scratch") as steps:
            learnt = steps.learn(statistics=True)
            self.new = steps.logs
            self._check_times(learnt)
            self._check_splits(learnt)
            pipeline = self._load()
            pipeline.merge(learnt.counts, learnt.key_types)
            new_ids = pipeline.grow()
            save_counts(pipeline, counts)
            end, before = learnt.last[0] + 1, self.before.serving.resolve()
            steps.answer(pipeline, serving, end=end, training=None, before=before)
            pipeline.save(serving)
            self._add_latest(learnt)
            save_latest(learnt, serving)
            train_end = self.windows["train"][1]
            assert train_end is not None
            known_by = {"train": train_end, "validation": learnt.last[0], "test": learnt.last[0]}
            splits = steps.encode(serving, self.folder / "encoded", known_by)
        self._write_manifest(pipeline, learnt, splits, new_ids)
        return self.new.log.rows, new_ids

    def _load(self) -> FeaturePipeline:
        pipeline = FeaturePipeline.load(self.before.serving, memories=False)
        try:
            load_counts(pipeline, self.before.folder / "counts")
        except (OSError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the features in '{self.before.folder}' are damaged: {reason}; {ANEW}") from None
        return pipeline

    def _check_times(self, learnt: Learnt) -> None:
        first, row = learnt.first
        if first > self.last:
            return
        parts = self.new.log.parts()
        early = sum(int((rows.times() <= self.last).sum()) for p in parts for rows in self.new.log.reader.read(p))
        raise UserError(
            f"{place(self.new.log, row)} was requested {format_time(first)}, but the features in "
            f"'{self.before.folder}' hold requests up to {format_time(self.last)} already, and so do {early:,} of "
            f"{self.new.log.rows:,} new rows: what such rows could have known is no longer remembered; {ANEW}"
        )

    def _check_splits(self, learnt: Learnt) -> None:
        if not any(learnt.rows.values()):
            raise UserError(
                f"none of the {self.new.log.rows:,} new rows lies in a split: they were requested from "
                f"{format_time(learnt.first[0])} to {format_time(learnt.last[0])}; set `split.train_start`, "
                "`split.train_end`, `split.validation_end` and `split.test_end` around them"
            )

    def _add_latest(self, learnt: Learnt) -> None:
        """Old values as of the last old request: each new row is later."""
        schema, found = self.logs.schema, (learnt.users, learnt.candidates)
        for role, parts in zip(("user", "candidate"), found, strict=True):
            assert parts is not None
            old = pq.read_table(self.before.serving / f"latest.{role}.parquet")
            times = pa.array(np.full(old.num_rows, self.last)).cast(UTC_MICROSECONDS)
            earlier = LatestParts(schema, role)  # type: ignore[arg-type]
            earlier.add(LogRows(old.append_column(schema.columns.time, times), schema))
            parts.merge(earlier)

    def _write_manifest(
        self, pipeline: FeaturePipeline, learnt: Learnt, splits: dict[str, SplitCounts], new_ids: dict[str, int]
    ) -> None:
        bad = {each["file"]: each for each in self.manifest["left_out"]}
        bad |= {e.address: {"file": e.address, "reason": e.reason} for log in self.new.all for e in log.left_out}
        learnt.first = (self.first, 0)
        stands_for, before = fingerprint_of(self.logs, self.windows), self.manifest["fingerprint"]
        # Not that of a build of all files, whose ids have other rows: a model tells its features by the fingerprint.
        fingerprint = hashlib.sha256(f"{before} {stands_for}".encode()).hexdigest()[:16]
        manifest = {
            "fingerprint": fingerprint,
            **describe(self.logs.rest([bad] * len(self.logs.all)), learnt, splits),
            "left_out": list(bad.values()),
            "vocabularies": vocabularies(pipeline),
            "extends": {
                "fingerprint": before,
                "stands_for": stands_for,
                "rows_before": self.manifest["rows"],
                "new_ids": new_ids,
            },
        }
        (self.folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
