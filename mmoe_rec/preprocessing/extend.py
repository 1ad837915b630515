"""Adds new files of a log to existing features: the state of the days before and the new rows give the next state.

Only rows of the new files are read and encoded, into the splits of the settings; no old file is needed. What a trained
model relies on stays: rows of known ids, statistics, scales of labels; ids that have become frequent get rows at the
end of their tables. Counters and histories go on from what they remember, so new requests must be later than all
earlier ones, while events of other logs may come late. So may rows of an earlier request: counters and histories take
their labels, but they are not encoded, as what they could have known is no longer remembered. A history remembers table
rows: an item that was in a hashed bucket when it was remembered stays there, and a model that starts from the one
before (see `mmoe_rec.training.warm_start`) begins with the same weights in the bucket and the new row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from mmoe_rec.atomic import atomic_folder
from mmoe_rec.errors import UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.locks import writing
from mmoe_rec.log.checks import LogFile, format_time
from mmoe_rec.log.files import first_line
from mmoe_rec.log.reader import ROWS_PER_PART, LogReader, cut
from mmoe_rec.log.rows import LogRows
from mmoe_rec.log.stand_ins import require_all
from mmoe_rec.point_in_time.join import Window
from mmoe_rec.preprocessing.checks import check_apart, place
from mmoe_rec.preprocessing.count import LogCounts
from mmoe_rec.preprocessing.files import HeldFiles, of_journal
from mmoe_rec.preprocessing.logs import DEFAULTS, BuildOptions, Logs
from mmoe_rec.preprocessing.prepare import (
    ADVICE,
    BUILD,
    Prepared,
    add_latest,
    fingerprint_of,
    load_counts,
    manifest_of,
    write_features,
    write_manifest,
)
from mmoe_rec.preprocessing.requests import Requests
from mmoe_rec.preprocessing.steps import Steps
from mmoe_rec.progress import say
from mmoe_rec.settings.schema import Schema
from mmoe_rec.settings.sections import differences


@dataclass(frozen=True)
class Holder:
    """What took files in, for messages. what: in the plural, such as "the features in 'work'"; anew: what to do where
    files can't be added; last: microseconds of the last request that it knows."""

    what: str
    anew: str
    last: int


class NewFiles:
    """The new files of logs. logs: all files; taken: those that the holder knows; gone: those that the logs don't have.

    Raises UserError where a file that was taken in has changed, or no new file can be used.
    """

    def __init__(self, logs: Logs, taken: HeldFiles, holder: Holder) -> None:
        self.logs, self.taken, self.holder = logs, taken, holder
        self.changes = taken.changes(logs)
        self._check_unchanged()
        self.gone = [address for each in self.changes for address in each.gone]
        if not self.any and (bad := [left for each in self.changes for left in each.bad]):
            raise UserError(
                f"none of the new files of the log '{logs.log.source}' can be used; the first: {bad[0].reason}"
            )

    @property
    def any(self) -> bool:
        """Whether there is a new file."""
        return any(each.new for each in self.changes)

    def only(self, events_alone: bool = False) -> Logs:
        """The logs, of which only new files are read. events_alone: these may be of logs of events alone.

        Raises UserError where there are no rows to read.
        """
        old = [log.found.keys() - each.new for log, each in zip(self.logs.all, self.changes, strict=True)]
        return self.logs.rest(old, events_alone)

    def count(self, steps: Steps, statistics: bool, kept: Path, before: Path) -> LogCounts:
        """Counts the rows of the new files.

        kept, before: folders of requests, see `Steps.count`. Raises UserError where rows can't be added.
        """
        has_requests = self.logs.schema.columns.request is not None
        counted = steps.count(statistics=statistics, kept=kept, before=before if has_requests else None)
        self._check_times(counted, steps.requests, steps.logs)
        self._check_events(counted, steps.logs)
        if steps.requests.continued and self.logs.options.duplicates == "error":
            self._check_repeats(steps)
        return counted

    def begin(self, counted: LogCounts, requests: Requests) -> int:
        """Microseconds of the first new request."""
        return requests.begin if self.logs.schema.columns.request is not None else counted.first[0]

    def _check_unchanged(self) -> None:
        reasons = {each.address: each.reason for log in self.logs.all for each in log.left_out}
        for address in (address for each in self.changes for address in each.changed):
            what = f"can't be used any more ({reasons[address]})" if address in reasons else "has changed"
            raise UserError(
                f"'{address}' {what} since {self.holder.what} were built from it; put it back, or {self.holder.anew}"
            )

    def _check_times(self, counted: LogCounts, requests: Requests, new: Logs) -> None:
        first, known = self.begin(counted, requests), self.holder.last
        if first > known:
            return
        if all(of_journal(file) for (log, file), span in counted.spans.items() if log is None and span[0] <= known):
            say(
                f"rows of a server's journal are of requests up to {format_time(known)}, so they came late: they "
                "count, but are no rows to train on, as what they could have known is no longer remembered"
            )
            return
        row = 0
        for rows in new.log.stream():
            if (here := rows.times() == first).any():
                row += int(here.argmax())
                break
            row += len(rows)
        raise UserError(
            f"{place(new.log, row)} was requested {format_time(first)}, but {self.holder.what} hold requests up to "
            f"{format_time(known)} already: what such rows could have known is no longer remembered; take them out of "
            f"the log, or {self.holder.anew}"
        )

    def _check_events(self, counted: LogCounts, new: Logs) -> None:
        """Raises UserError where new files hold as many events of the time of a file that is gone as that one did."""
        for log, before, changes in zip(new.events, self.taken.logs[1:], self.changes[1:], strict=True):
            for old in (before.files[address] for address in changes.gone):
                inside: dict[str, int] = {}
                for file in log.files:
                    if old.overlaps(*counted.spans.get((log.name, file.address), (0, -1))):
                        times = log.times(file)
                        inside[file.address] = int(((times >= old.first) & (times <= old.last)).sum())
                if inside and sum(inside.values()) >= old.rows:
                    raise UserError(
                        f"'{max(inside, key=lambda address: inside[address])}' holds events '{log.name}' of the time "
                        f"of '{old.address}', which is gone, and there are as many as that file held ({old.rows:,}): "
                        f"if they are the same, they would count twice; put that file back, or {self.holder.anew}"
                    )

    def _check_repeats(self, steps: Steps) -> None:
        """Raises UserError where rows of new files came before by the other way: by a server's journal, or in a file
        of another program that is still there."""
        new, taken, columns = steps.logs.log, self.taken.logs[0].files, steps.logs.schema.columns
        needed = {columns.request, columns.user, columns.candidate, columns.time}
        reader = replace(new.reader, uses={name: use for name, use in new.uses.items() if name in needed})
        # The same row may have other times in other files: all rows of the requests' times are looked at.
        before = [file for file in self.logs.log.files if file.address in taken]
        before = [file for file in before if taken[file.address].overlaps(*steps.requests.continued_times)]
        repeated: list[np.ndarray] = []
        for by_journal in (False, True):
            mine, others = (
                [file for file in files if file.rows and of_journal(file.address) == way]
                for files, way in ((new.files, by_journal), (before, not by_journal))
            )
            if mine and others:
                keys = np.unique(np.concatenate([rows.row_hashes() for rows in _read(reader, mine)]))
                repeated += [np.intersect1d(rows.row_hashes(), keys) for rows in _read(reader, others)]
        keys = np.unique(np.concatenate([np.empty(0, np.uint64), *repeated]))
        row, count, example = 0, 0, 0
        for rows in _read(reader, new.files) if len(keys) else ():
            again = np.isin(rows.row_hashes(), keys)
            example = row + int(again.argmax()) if again.any() and not count else example
            row, count = row + len(rows), count + int(again.sum())
        if count:
            raise UserError(
                f"{place(new, example)} repeats request and candidate of a row that {self.holder.what} hold, and one "
                f"of the two came by a server's journal; {count:,} rows of new files do so, and would count twice: "
                "remove them from these files, or set data.duplicates to keep if they are meant"
            )


def _read(reader: LogReader, files: Sequence[LogFile]) -> Iterator[LogRows]:
    for part in cut(files, ROWS_PER_PART):
        yield from reader.read(part)


ANEW = "build the features anew, without --extend"


@dataclass(frozen=True)
class Extension:
    """Features with `files` that were added. rows: new ones of the interaction log; new_ids: by feature; gone: files
    that the features hold and the log does not."""

    prepared: Prepared
    files: int
    rows: int
    new_ids: Mapping[str, int]
    gone: Sequence[str]


def extend(
    log_source: str, schema: Schema, windows: dict[str, Window], work: Path, options: BuildOptions = DEFAULTS
) -> Extension | None:
    """Adds new files to the features in `work`; None where there are none. After an error they are the old ones.

    windows: request times [start, end) in microseconds of each split of the new rows.

    Raises UserError where there are no features to extend, or they are of another schema; an old file has changed; new
    requests are not later than old ones, or in no split; new events may be those of a file that is gone; no new file
    can be used, or the log can't be read.
    """
    require_all(schema, "adding days to features")
    check_apart(log_source, schema, work)
    prepared = Prepared(work / "features")
    if not (prepared.folder / "manifest.json").is_file():
        raise UserError(f"'{prepared.folder}' holds no features that could be extended; build them without --extend")
    with writing(prepared.folder, BUILD, ADVICE, queue=True):
        _check_schema(prepared, schema)
        taken = HeldFiles.read(prepared.folder)
        logs = Logs(log_source, schema, options, [log.types for log in taken.logs])
        last = prepared.manifest["request_microseconds"][1]
        files = NewFiles(logs, taken, Holder(f"the features in '{prepared.folder}'", ANEW, last))
        if not files.any:
            return None
        with atomic_folder(prepared.folder) as folder:
            extended = _extend(prepared, files, windows, folder)
    prepared.say_exact_from(options)
    return extended


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


def _extend(before: Prepared, files: NewFiles, windows: dict[str, Window], folder: Path) -> Extension:
    logs, new, was = files.logs, files.only(), before.manifest
    first, last = was["request_microseconds"]
    # The splits without the time of old requests.
    later = {name: (last + 1 if start is None else max(start, last + 1), end) for name, (start, end) in windows.items()}
    with Steps(new, later, folder / "scratch") as steps:
        counted = files.count(steps, statistics=True, kept=folder / "requests", before=before.folder / "requests")
        new = steps.logs
        taken = files.taken.with_new(new, counted.spans)
        _check_splits(files, counted, steps)
        pipeline = FeaturePipeline.load(before.serving, memories=False)
        try:
            load_counts(pipeline, before.folder / "counts")
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"the features in '{before.folder}' are damaged: {first_line(error)}; {ANEW}") from None
        pipeline.merge(counted.counts, counted.key_types)
        new_ids = pipeline.grow()
        add_latest(counted, logs.schema, before.serving)
        splits = write_features(steps, pipeline, counted, windows["train"], folder, before.serving.resolve())
    taken.write(folder)
    counted.first = (first, 0)
    stands_for = fingerprint_of(logs, windows)
    # Not that of a build of all files, whose ids have other rows: a model knows its features by the fingerprint.
    fingerprint = hashlib.sha256(f"{was['fingerprint']} {stands_for}".encode()).hexdigest()[:16]
    manifest = manifest_of(steps, windows, taken, counted, splits, pipeline)
    manifest["unchecked"] = sorted({*was["unchecked"], *logs.options.unchecked})
    extends = {
        "fingerprint": was["fingerprint"],
        "stands_for": stands_for,
        "rows_before": was["rows"],
        "new_ids": new_ids,
    }
    write_manifest(folder, {"fingerprint": fingerprint, **manifest, "extends": extends})
    return Extension(before, sum(len(each.files) for each in new.all), new.log.rows, new_ids, files.gone)


def _check_splits(files: NewFiles, counted: LogCounts, steps: Steps) -> None:
    if any(counted.rows.values()):
        return
    first, rows = files.begin(counted, steps.requests), steps.logs.log.rows
    if first > counted.last[0]:  # no request is new
        raise UserError(
            f"all {rows:,} new rows belong to requests of the files before, by column "
            f"'{steps.logs.schema.columns.request}', so none of them would be encoded: give each request an id of "
            "its own if ids were used again, or add these rows together with those of new requests"
        )
    raise UserError(
        f"none of the {rows:,} new rows lies in a split: they were requested from {format_time(first)} to "
        f"{format_time(counted.last[0])}; set `split.train_start`, `split.train_end`, `split.validation_end` and "
        "`split.test_end` around them"
    )
