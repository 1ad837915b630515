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

No old file is needed, see `mmoe_rec.preprocessing.extend`, which also says what can't be added.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from mmoe_rec.atomic import atomic_folder, one_at_a_time
from mmoe_rec.errors import UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.locks import writing
from mmoe_rec.log.checks import BadFile, format_time
from mmoe_rec.log.reader import ROWS_PER_PART, Log, LogReader, Noticed, cut
from mmoe_rec.log.stand_ins import require_all
from mmoe_rec.point_in_time.join import Window
from mmoe_rec.preprocessing.checks import check_apart, place
from mmoe_rec.preprocessing.count import Counted
from mmoe_rec.preprocessing.files import Spans, Taken, TakenFile, of_journal
from mmoe_rec.preprocessing.logs import DEFAULTS, BuildOptions, Logs
from mmoe_rec.preprocessing.prepare import (
    ADVICE,
    BUILD,
    Prepared,
    add_latest,
    describe,
    fingerprint_of,
    load_counts,
    save_counts,
    save_latest,
    settings_of,
    vocabularies,
)
from mmoe_rec.preprocessing.requests import KEPT, Requests, read_requests
from mmoe_rec.preprocessing.splits import SplitCounts
from mmoe_rec.preprocessing.steps import Steps
from mmoe_rec.progress import say
from mmoe_rec.settings.schema import Schema
from mmoe_rec.settings.sections import differences


@dataclass(frozen=True)
class Holder:
    """What took files in, for messages.

    what: such as "the features", with which a sentence goes on in the plural; where: the same with its place; anew:
    what to do where files can't be added; last: microseconds of the last request that it knows.
    """

    what: str
    where: str
    anew: str
    last: int


class NewFiles:
    """The new files of logs. logs: all files; taken: those that the holder knows.

    new: the same logs, but only new files are read; mended: addresses of new files of the interaction log that were
    left out before; gone: files that the holder knows and the logs don't have.

    Raises UserError where a file that was taken in has changed, or no new file can be used.
    """

    def __init__(self, logs: Logs, taken: Taken, holder: Holder) -> None:
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

    def count(self, steps: Steps, statistics: bool, kept: Path, before: Path) -> Counted:
        """Counts the rows of the new files, without those that were mended and come too late.

        kept, before: folders of requests, see `Steps.count`. Raises UserError where rows can't be added.
        """
        has_requests = self.logs.schema.columns.request is not None

        def count() -> Counted:
            return steps.count(statistics=statistics, kept=kept, before=before if has_requests else None)

        # At first by the rows' own times: a row of such a file is no error where a journal has it again.
        if late := self._late_mended(self._spans_of_mended(steps.logs)):
            steps.leave_out(late)
        counted = count()
        if late := self._late_mended(counted.spans):
            steps.leave_out(late)
            counted = count()
        self._check_times(counted, steps.requests, steps.logs)
        self._check_events(counted, steps.logs)
        if steps.requests.continued and self.logs.options.duplicates == "error":
            self._check_repeats(steps.logs, before)
        return counted

    def begin(self, counted: Counted, requests: Requests) -> int:
        """Microseconds of the first new request."""
        return requests.begin if self.logs.schema.columns.request is not None else counted.first[0]

    def _check_unchanged(self) -> None:
        reasons = {each.address: each.reason for log in self.logs.all for each in log.left_out}
        for address in (address for each in self.changes for address in each.changed):
            what = f"can't be used any more ({reasons[address]})" if address in reasons else "has changed"
            raise UserError(
                f"'{address}' {what} since {self.holder.what} were built from it; put it back, or {self.holder.anew}"
            )

    def _spans_of_mended(self, new: Logs) -> Spans:
        """First and last time of the rows of files of the interaction log that were left out before."""
        reader, noticed = _key_reader(new.log), Noticed()
        for part in cut([file for file in new.log.files if file.address in self.changes[0].mended], ROWS_PER_PART):
            for _ in reader.read(part, noticed):
                pass
        return {(None, address): span for address, span in noticed.spans.items()}

    def _late_mended(self, spans: Spans) -> list[BadFile]:
        """Files that were left out and are good by now, but have requests that are not later than all before."""
        last, mended = self.holder.last, self.changes[0].mended
        return [
            BadFile(
                f"'{address}' was left out before and holds requests from {format_time(span[0])} on, but "
                f"{self.holder.what} hold requests up to {format_time(last)}, so what its rows could have known is no "
                "longer remembered; to take it in, set another `data.work`, where features are built anew from all "
                "files of the log",
                address,
            )
            for (source, address), span in sorted(spans.items(), key=lambda each: each[0][1])
            if source is None and address in mended and span[0] <= last
        ]

    def _check_events(self, counted: Counted, new: Logs) -> None:
        """Raises UserError where new files hold as many events of the time of a file that is gone as that one did."""
        for log, before, changes in zip(new.events, self.taken.logs[1:], self.changes[1:], strict=True):
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
                        f"they are the same, they would count twice; put that file back, or {self.holder.anew}"
                    )

    def _check_repeats(self, new: Logs, requests: Path) -> None:
        """Raises UserError where rows of new files came before by the other way: by a server's journal, or in a file
        of another program that is still there.

        requests: folder with those that the holder knows. They say when any of their rows were, which tells the files
        to read: the same row may have other times in other files.
        """
        taken, reader = self.taken.logs[0].files, _key_reader(new.log)
        before = [file for file in self.logs.log.files if file.address in taken]
        if not any(of_journal(file.address) for file in (*before, *new.log.files)):
            return
        read = [
            np.unique(rows.request_hashes()) for part in cut(new.log.files, ROWS_PER_PART) for rows in reader.read(part)
        ]
        continued = _known_requests(requests, np.unique(np.concatenate([np.empty(0, np.uint64), *read])))
        known: dict[bool, list[np.ndarray]] = {True: [np.empty(0, np.uint64)], False: [np.empty(0, np.uint64)]}
        for file in before:
            if _may_hold(taken[file.address], continued):
                for part in cut([file], ROWS_PER_PART):
                    for rows in reader.read(part, Noticed()):
                        mine = rows.filter(_among(rows.request_hashes(), continued["request"].to_numpy()))
                        known[of_journal(file.address)].append(mine.row_hashes())
        keys = {way: np.unique(np.concatenate(each)) for way, each in known.items()}
        repeated, example, start = 0, -1, 0
        for file in new.log.files:
            row, others = start, keys[not of_journal(file.address)]
            for part in cut([file], ROWS_PER_PART) if len(others) else []:
                for rows in reader.read(part):
                    again = np.flatnonzero(_among(rows.row_hashes(), others))
                    if len(again):
                        repeated, example = repeated + len(again), row + int(again[0]) if example < 0 else example
                    row += len(rows)
            start += file.rows
        if repeated:
            raise UserError(
                f"{place(new.log, example)} repeats request and candidate of a row that {self.holder.what} hold, and "
                f"one of the two came by a server's journal; {repeated:,} rows of new files do so, and would count "
                "twice: remove them from these files, or set data.duplicates to keep if they are meant"
            )

    def _check_times(self, counted: Counted, requests: Requests, new: Logs) -> None:
        first, known = self.begin(counted, requests), self.holder.last
        if first > known:
            return
        spans = {address: span for (source, address), span in counted.spans.items() if source is None}
        if all(of_journal(address) for address, span in spans.items() if span[0] <= known):
            late = sum(int((rows.times() <= known).sum()) for rows in new.log.stream())
            say(
                f"{late:,} rows of a server's journal are of requests up to {format_time(known)}, so they came late: "
                "they count, but are no rows to train on, as what they could have known is no longer remembered"
            )
            return
        early, row, start = 0, -1, 0
        for rows in new.log.stream():
            early += int((rows.times() <= known).sum())
            if row < 0 and (rows.times() == first).any():
                row = start + int((rows.times() == first).argmax())
            start += len(rows)
        raise UserError(
            f"{place(new.log, row)} was requested {format_time(first)}, but {self.holder.where} hold requests up to "
            f"{format_time(known)} already, and so do {early:,} of {new.log.rows:,} new rows: what such rows could "
            f"have known is no longer remembered; {self.holder.anew}"
        )


def _known_requests(folder: Path, hashes: np.ndarray) -> pa.Table:
    """Those of the requests in a folder whose hashes are among (R,) rising ones, as `read_requests`, by rising hash."""
    if not len(hashes):
        return KEPT.empty_table()
    some = (each.filter(pa.array(_among(each["request"].to_numpy(), hashes))) for each in read_requests(folder))
    return pa.concat_tables([KEPT.empty_table(), *some]).sort_by("request")


def _may_hold(file: TakenFile, requests: pa.Table) -> bool:
    """True if a file has rows of the time of one of the requests."""
    if file.first is None or file.last is None:
        return False
    first, last = requests["first"].to_numpy(), requests["last"].to_numpy()
    return bool(((first <= file.last) & (last >= file.first)).any())


def _among(values: np.ndarray, rising: np.ndarray) -> np.ndarray:
    """(N,) bool: True for the values that are among those that rise."""
    if not len(rising):
        return np.zeros(len(values), bool)
    same: np.ndarray = rising[np.minimum(np.searchsorted(rising, values), len(rising) - 1)] == values
    return same


def _key_reader(log: Log) -> LogReader:
    """Reads request, user, candidate and time alone."""
    columns = log.schema.columns
    needed = {columns.request, columns.user, columns.candidate, columns.time}
    return replace(log.reader, uses={name: use for name, use in log.uses.items() if name in needed})


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
    require_all(schema, "adding days to features")
    check_apart(log_source, schema, work)
    prepared = Prepared(work / "features")
    if not (prepared.folder / "manifest.json").is_file():
        raise UserError(f"'{prepared.folder}' holds no features that could be extended; build them without --extend")
    with one_at_a_time(prepared.folder), writing(prepared.folder, BUILD, ADVICE, queue=True):
        _check_schema(prepared, schema)
        taken = Taken.read(prepared.folder)
        logs = Logs(log_source, schema, options, [log.types for log in taken.logs])
        last = prepared.manifest["request_microseconds"][1]
        files = NewFiles(logs, taken, Holder("the features", f"the features in '{prepared.folder}'", ANEW, last))
        if not files.any:
            return None
        with atomic_folder(prepared.folder) as folder:
            extension = _Extension(prepared, files, windows, folder)
            new_ids = extension.build()
    prepared.say_exact_from(options)
    new = extension.new
    return Extended(prepared, sum(len(each.files) for each in new.all), new.log.rows, new_ids, files.gone)


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


class _Extension:
    """One extension. new: the logs, of which only new files are read."""

    def __init__(self, before: Prepared, files: NewFiles, windows: dict[str, Window], folder: Path) -> None:
        self.before, self.files, self.logs, self.taken = before, files, files.logs, files.taken
        self.windows, self.folder = windows, folder
        self.new = files.only()
        self.manifest = before.manifest
        self.first, self.last = self.manifest["request_microseconds"]

    def build(self) -> dict[str, int]:
        """Writes the new folder; gives the number of new ids of each feature."""
        serving, counts = self.folder / "serving", self.folder / "counts"
        for each in (serving, counts):
            each.mkdir()
        with Steps(self.new, self._new_windows, self.folder / "scratch") as steps:
            kept, before_requests = self.folder / "requests", self.before.folder / "requests"
            counted = self.files.count(steps, statistics=True, kept=kept, before=before_requests)
            self.new, requests = steps.logs, steps.requests
            self.taken = self.taken.with_new(self.new, counted.spans)
            self._check_splits(counted, requests)
            pipeline = self._load()
            pipeline.merge(counted.counts, counted.key_types)
            new_ids = pipeline.grow()
            save_counts(pipeline, counts)
            end, before = self.logs.options.asked_from(counted.last[0]), self.before.serving.resolve()
            steps.look_up(pipeline, serving, end=end, training=None, before=before)
            pipeline.save(serving)
            add_latest(counted, self.logs.schema, self.before.serving, self.last)
            save_latest(counted, serving)
            train_end = self.windows["train"][1]
            assert train_end is not None
            known_by = {"train": train_end, "validation": counted.last[0], "test": counted.last[0]}
            splits = steps.encode(serving, self.folder / "encoded", known_by)
        self.taken.write(self.folder)
        self._write_manifest(pipeline, counted, requests, splits, new_ids)
        return new_ids

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

    def _check_splits(self, counted: Counted, requests: Requests) -> None:
        if any(counted.rows.values()):
            return
        first, rows = self.files.begin(counted, requests), self.new.log.rows
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
