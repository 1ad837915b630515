"""Adds new files of a log to existing features: the state of the days before and the new rows give the next state.

Only rows of the new files are read. What a trained model relies on stays: rows of known ids, statistics, scales of
labels; ids that have become frequent get rows at the end of their tables. Counters and histories go on from what they
remember, so new requests must be later than all earlier ones, while events of other logs may come late. So may rows of
an earlier request: they have its time, so counters and histories take their labels, but they are not encoded, as what
they could have known is no longer remembered; users and candidates keep later attributes. A history
remembers table rows: an item that was in a hashed bucket when it was remembered stays there, and a model that starts
from the one before (see `mmoe_rec.training.warm_start`) begins with the same weights in the bucket and the new row. Of
a user's items that become known in one instant, a history takes those with the greatest rows, whatever these are by
then.

Only new rows are encoded, into the splits of the settings. Earlier rows whose labels have matured since are not encoded
again, but counters and histories see these labels on time. Nothing looks for a request that has the same
candidate in an old and in a new file.

No old file is needed: one that is gone stays counted, one that was written again is refused. A file that was left out
counts as new once it is mended, so it is taken in where all its requests are later, and stays left out otherwise. Since
events may come late, those of a file that is gone could come again, in a file of another name or merged with others:
where new files hold as many events of its time as it did, they are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.atomic import atomic_folder, one_at_a_time
from mmoe_rec.build.checks import check_apart, place
from mmoe_rec.build.count import Counted
from mmoe_rec.build.logs import DEFAULTS, BuildOptions, Logs
from mmoe_rec.build.prepare import (
    ADVICE,
    BUILD,
    Prepared,
    describe,
    fingerprint_of,
    load_counts,
    save_counts,
    save_latest,
    settings_of,
    vocabularies,
)
from mmoe_rec.build.requests import Requests
from mmoe_rec.build.splits import SplitCounts
from mmoe_rec.build.steps import Steps
from mmoe_rec.build.taken import Changes, Taken
from mmoe_rec.errors import UserError
from mmoe_rec.features.latest import LatestParts
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.locks import writing
from mmoe_rec.log.checks import BadFile, format_time
from mmoe_rec.log.columns import UTC_MICROSECONDS
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time.windows import Window
from mmoe_rec.schema import Schema
from mmoe_rec.settings.differences import differences

ANEW = "build the features anew, without --extend"


@dataclass(frozen=True)
class Extended:
    """Features after new files were added.

    rows: of the interaction log that were new; new_ids: by feature; gone: files that the features hold and the log
    does not.
    """

    prepared: Prepared
    files: int
    rows: int
    new_ids: Mapping[str, int]
    gone: Sequence[str]


def extend(
    log_source: str, schema: Schema, windows: dict[str, Window], work: Path, options: BuildOptions = DEFAULTS
) -> Extended | None:
    """Adds new files to the features in `work`; None where there are none, and nothing changes.

    The folder is replaced at the end; before that, and after an error, it is the old one.

    Args:
        windows: request times [start, end) in microseconds of each split. They may differ from those before: they say
            what becomes of the new rows.

    Raises:
        UserError: there are no features to extend, or they are of another schema; an old file has changed; new requests
            are not later than old ones, or in no split; new events may be those of a file that is gone; no new file can
            be used, or the log can't be read.
    """
    check_apart(log_source, schema, work)
    prepared = Prepared(work / "features")
    if not (prepared.folder / "manifest.json").is_file():
        raise UserError(f"'{prepared.folder}' holds no features that could be extended; build them without --extend")
    with one_at_a_time(prepared.folder), writing(prepared.folder, BUILD, ADVICE, queue=True):
        _check_schema(prepared, schema)
        taken = Taken.read(prepared.folder)
        logs = Logs(log_source, schema, options, [log.types for log in taken.logs])
        changes = taken.changes(logs)
        _check_unchanged(changes, logs)
        if not any(each.new for each in changes):
            if bad := [left for each in changes for left in each.bad]:
                raise UserError(
                    f"none of the new files of the log '{log_source}' can be used; the first: {bad[0].reason}"
                )
            return None
        with atomic_folder(prepared.folder) as folder:
            extension = _Extension(prepared, logs, taken, changes, windows, folder)
            new_ids = extension.build()
    prepared.say_exact_from(options)
    new, gone = extension.new, [address for each in changes for address in each.gone]
    return Extended(prepared, sum(len(each.files) for each in new.all), new.log.rows, new_ids, gone)


def _check_schema(prepared: Prepared, schema: Schema) -> None:
    before = FeaturePipeline.load(prepared.serving, memories=False).schema
    found = next(differences(before.identity(), schema.identity()), None)
    for section in ("tasks", "features", "events"):  # layouts, look-ups and files follow their order
        old_order, order = list(getattr(before, section)), list(getattr(schema, section))
        if found is None and old_order != order:
            found = (section, f"in the order {', '.join(old_order)}", f"in the order {', '.join(order)}")
    if found is not None:
        where, old, new = found
        raise UserError(
            f"setting '{where}' is {old} in the features in '{prepared.folder}' and {new} now; {ANEW}, or "
            "restore the setting"
        )


def _check_unchanged(changes: Sequence[Changes], logs: Logs) -> None:
    reasons = {each.address: each.reason for log in logs.all for each in log.left_out}
    for address in (address for each in changes for address in each.changed):
        what = f"can't be used any more ({reasons[address]})" if address in reasons else "has changed"
        raise UserError(f"'{address}' {what} since the features were built from it; put it back, or {ANEW}")


class _Extension:
    """One extension. logs: all files; changes: of each log's files; new: the same logs, but only new files are read."""

    def __init__(
        self,
        before: Prepared,
        logs: Logs,
        taken: Taken,
        changes: Sequence[Changes],
        windows: dict[str, Window],
        folder: Path,
    ) -> None:
        self.before, self.logs, self.taken, self.changes = before, logs, taken, changes
        self.windows, self.folder = windows, folder
        self.new = logs.rest([log.found.keys() - each.new for log, each in zip(logs.all, changes, strict=True)])
        self.manifest = before.manifest
        self.first, self.last = self.manifest["request_microseconds"]

    def build(self) -> dict[str, int]:
        """Writes the new folder; gives the number of new ids of each feature."""
        serving, counts = self.folder / "serving", self.folder / "counts"
        for each in (serving, counts):
            each.mkdir()
        with Steps(self.new, self._new_windows, self.folder / "scratch") as steps:
            counted = self._count(steps)
            if late := self._late_mended(counted):
                steps.leave_out(late)
                counted = self._count(steps)
            self.new, requests = steps.logs, steps.requests
            self.taken = self.taken.with_new(self.new, counted.spans)
            self._check_times(counted, requests)
            self._check_events(counted)
            self._check_splits(counted, requests)
            pipeline = self._load()
            pipeline.merge(counted.counts, counted.key_types)
            new_ids = pipeline.grow()
            save_counts(pipeline, counts)
            end, before = self.logs.options.asked_from(counted.last[0]), self.before.serving.resolve()
            steps.look_up(pipeline, serving, end=end, training=None, before=before)
            pipeline.save(serving)
            self._add_latest(counted)
            save_latest(counted, serving)
            train_end = self.windows["train"][1]
            assert train_end is not None
            known_by = {"train": train_end, "validation": counted.last[0], "test": counted.last[0]}
            splits = steps.encode(serving, self.folder / "encoded", known_by)
        self.taken.write(self.folder)
        self._write_manifest(pipeline, counted, requests, splits, new_ids)
        return new_ids

    def _count(self, steps: Steps) -> Counted:
        old_requests = self.before.folder / "requests" if self._has_requests else None
        return steps.count(statistics=True, kept=self.folder / "requests", before=old_requests)

    @property
    def _has_requests(self) -> bool:
        return self.logs.schema.columns.request is not None

    @property
    def _new_windows(self) -> dict[str, Window]:
        """The splits without the time of old requests."""
        later = self.last + 1
        return {
            name: (later if start is None else max(start, later), end) for name, (start, end) in self.windows.items()
        }

    def _load(self) -> FeaturePipeline:
        pipeline = FeaturePipeline.load(self.before.serving, memories=False)
        try:
            load_counts(pipeline, self.before.folder / "counts")
        except (OSError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the features in '{self.before.folder}' are damaged: {reason}; {ANEW}") from None
        return pipeline

    def _late_mended(self, counted: Counted) -> list[BadFile]:
        """Files that were left out and are good by now, but have requests that are not later than all before."""
        return [
            BadFile(
                f"'{address}' was left out before and holds requests from {format_time(span[0])} on, but the features "
                f"hold requests up to {format_time(self.last)}, so what its rows could have known is no longer "
                "remembered; to take it in, set another `data.work`, where features are built anew from all files of "
                "the log",
                address,
            )
            for (source, address), span in sorted(counted.spans.items(), key=lambda each: each[0][1])
            if source is None and address in self.changes[0].mended and span[0] <= self.last
        ]

    def _check_events(self, counted: Counted) -> None:
        """Raises UserError where new files hold as many events of the time of a file that is gone as that one did."""
        for log, before, changes in zip(self.new.events, self.taken.logs[1:], self.changes[1:], strict=True):
            times: dict[str, np.ndarray] = {}
            for old in (before.files[address] for address in changes.gone):
                found: dict[str, int] = {}
                for file in log.files:
                    first, last = counted.spans.get((log.name, file.address), (0, -1))
                    if old.first is None or old.last is None or first > old.last or last < old.first:
                        continue
                    if file.address not in times:
                        times[file.address] = log.times(file)
                    inside = (times[file.address] >= old.first) & (times[file.address] <= old.last)
                    found[file.address] = int(inside.sum())
                if found and sum(found.values()) >= old.rows:
                    raise UserError(
                        f"'{max(found, key=lambda address: found[address])}' holds events '{log.name}' of the time of "
                        f"'{old.address}', which is gone, and there are as many as that file held ({old.rows:,}): if "
                        f"they are the same, they would count twice; put that file back, or {ANEW}"
                    )

    def _check_times(self, counted: Counted, requests: Requests) -> None:
        first = requests.begin if self._has_requests else counted.first[0]
        if first > self.last:
            return
        early, row, start = 0, -1, 0
        for rows in self.new.log.stream():
            early += int((rows.times() <= self.last).sum())
            if row < 0 and (rows.times() == first).any():
                row = start + int((rows.times() == first).argmax())
            start += len(rows)
        raise UserError(
            f"{place(self.new.log, row)} was requested {format_time(first)}, but the features in "
            f"'{self.before.folder}' hold requests up to {format_time(self.last)} already, and so do {early:,} of "
            f"{self.new.log.rows:,} new rows: what such rows could have known is no longer remembered; {ANEW}"
        )

    def _check_splits(self, counted: Counted, requests: Requests) -> None:
        if any(counted.rows.values()):
            return
        first, rows = requests.begin if self._has_requests else counted.first[0], self.new.log.rows
        if first > counted.last[0]:  # no request is new
            raise UserError(
                f"all {rows:,} new rows belong to requests of the files before, by column "
                f"'{self.logs.schema.columns.request}', so none of them would be encoded: give each request an id of "
                "its own if ids were used again, or add these rows together with those of new requests"
            )
        raise UserError(
            f"none of the {rows:,} new rows lies in a split: they were requested from {format_time(first)} to "
            f"{format_time(counted.last[0])}; set `split.train_start`, `split.train_end`, `split.validation_end` and "
            "`split.test_end` around them"
        )

    def _add_latest(self, counted: Counted) -> None:
        """Old values as of the last old request: rows of requests since are later. Those of earlier requests only add
        users and candidates that were unknown."""
        schema, found = self.logs.schema, (counted.users, counted.candidates)
        for role, parts in zip(("user", "candidate"), found, strict=True):
            assert parts is not None
            old = pq.read_table(self.before.serving / f"latest.{role}.parquet")
            times = pa.array(np.full(old.num_rows, self.last)).cast(UTC_MICROSECONDS)
            earlier = LatestParts(schema, role)  # type: ignore[arg-type]
            earlier.add(LogRows(old.append_column(schema.columns.time, times), schema))
            parts.merge(earlier)

    def _write_manifest(
        self,
        pipeline: FeaturePipeline,
        counted: Counted,
        requests: Requests,
        splits: dict[str, SplitCounts],
        new_ids: dict[str, int],
    ) -> None:
        counted.first = (self.first, 0)
        stands_for, before = fingerprint_of(self.logs, self.windows), self.manifest["fingerprint"]
        # Not that of a build of all files, whose ids have other rows: a model knows its features by the fingerprint.
        fingerprint = hashlib.sha256(f"{before} {stands_for}".encode()).hexdigest()[:16]
        manifest = {
            "fingerprint": fingerprint,
            "settings": settings_of(self.logs.schema, self.windows),
            **describe(self.logs, self.taken, counted, requests, splits),
            "unchecked": sorted({*self.manifest["unchecked"], *self.logs.options.unchecked}),
            "vocabularies": vocabularies(pipeline),
            "extends": {
                "fingerprint": before,
                "stands_for": stands_for,
                "rows_before": self.manifest["rows"],
                "new_ids": new_ids,
            },
        }
        (self.folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
