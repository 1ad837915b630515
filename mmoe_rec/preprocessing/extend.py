"""Adds new files of a log to existing features: the state of the days before and the new rows give the next state.

docs/how-to/build-large-logs.md describes the treatment of late and repeated rows.

The tables of a model (`<artifact>/features`) move on by themselves, by the model's own features: `extend_tables` adds
new files to them; `rebuild_tables` makes them of all files. From the same rows both give the same files to the last
byte, but for a history that remembers an item in the hashed bucket where it was before its id got a row: one that is
made anew has that row.
"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.atomic import atomic_folder
from mmoe_rec.errors import UserError, first_line
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.locks import write_lock
from mmoe_rec.log.checks import format_time
from mmoe_rec.log.rows import reject_plain_table
from mmoe_rec.point_in_time.join import Window
from mmoe_rec.preprocessing.build_inputs import (
    BuildInputs,
    IncludedFiles,
    Logs,
    check_work_outside_logs,
    parse_journal_name,
    say_copies,
)
from mmoe_rec.preprocessing.build_steps import BuildSteps
from mmoe_rec.preprocessing.count_and_encode import LogCounts
from mmoe_rec.preprocessing.prepare import (
    BUILD_LOCK_TEXTS,
    FeatureFolder,
    compute_fingerprint,
    write_features,
    write_manifest,
)
from mmoe_rec.preprocessing.request_times import RequestCounts
from mmoe_rec.progress import say
from mmoe_rec.settings.schema import Schema
from mmoe_rec.settings.sections import diff_settings


class NewFiles:
    """The new files of logs. taken: those that `owner` knows, in the plural, such as "the features in 'work'", with
    requests up to `last`, microseconds; anew: what to do where files can't be added; gone: those that the logs lack.

    Raises UserError where a file that was taken in has changed, or no new file can be used.
    """

    def __init__(self, logs: Logs, included: IncludedFiles, owner: str, last: int, advice: str) -> None:
        self.logs, self.owner, self.last, self.advice = logs, owner, last, advice
        self.changes = included.changes(logs)
        self.included = IncludedFiles([each.included for each in self.changes])
        self._check_unchanged()
        self.missing = [uri for each in self.changes for uri in each.missing]
        say_copies([each.copies for each in self.changes])
        if not self.any and (bad := [left for each in self.changes for left in each.bad]):
            raise UserError(
                f"none of the new files of the log '{logs.log.source}' can be used; the first: {bad[0].reason}"
            )

    @property
    def any(self) -> bool:
        """Whether there is a new file."""
        return any(each.new for each in self.changes)

    def new_logs(self) -> Logs:
        """The logs with only their new files to read. Raises UserError where there are no rows to read."""
        old = [log.found_files.keys() - each.new for log, each in zip(self.logs.all, self.changes, strict=True)]
        return self.logs.without_files(old)

    def count(self, steps: BuildSteps, statistics: bool, requests_dir: Path, previous: Path) -> LogCounts:
        """Counts the rows of the new files. kept, before: folders of requests, see `BuildSteps.count`. Raises UserError
        where rows can't be added."""
        counted = steps.count(statistics=statistics, requests_dir=requests_dir, previous=previous)
        self._check_late(counted, steps)
        self._check_events(counted, steps.logs)
        return counted

    def first_request_time(self, counted: LogCounts, requests: RequestCounts) -> int:
        """Microseconds of the first new request."""
        return requests.first_request_time if self.logs.schema.columns.request is not None else counted.first

    def _check_unchanged(self) -> None:
        reasons = {each.uri: each.reason for log in self.logs.all for each in log.skipped}
        for uri in (uri for each in self.changes for uri in each.changed):
            what = f"can't be used any more ({reasons[uri]})" if uri in reasons else "has changed"
            raise UserError(f"'{uri}' {what} since {self.owner} were built from it; put it back, or {self.advice}")

    def _check_late(self, counted: LogCounts, steps: BuildSteps) -> None:
        """Tells of requests that are no later than those held. Raises UserError where they may be the same ones."""
        first, known = self.first_request_time(counted, steps.requests), self.last
        spans = {file.uri: counted.spans.get((None, file.uri)) for file in steps.logs.log.files}
        late = [uri for uri, span in spans.items() if span is not None and span[0] <= known]
        if first > known or not late:
            return
        earlier = steps.requests.earlier
        if earlier is not None and any(parse_journal_name(uri) is None for uri in late):
            raise UserError(
                f"'{late[0]}' holds a row requested at {format_time(earlier)}, which is earlier than rows of its "
                f"request that {self.owner} hold already. They would get its time. Take such rows out of the log, or "
                f"{self.advice}"
            )
        such_as = f"'{late[0]}'" + (f" and {len(late) - 1:,} other new files" if len(late) > 1 else "")
        say(
            f"{such_as} came late, with requests from {format_time(first)} on, as {self.owner} know requests up to "
            f"{format_time(known)} already: the late rows count, but are no rows to train on, as what they could have "
            "known is no longer remembered"
        )

    def _check_events(self, counted: LogCounts, new: Logs) -> None:
        """Raises UserError where new files may hold all events of a file that is gone: as many, of its times. Tells of
        those that may hold the events of a file that is still there."""
        if new.options.on_duplicates == "keep":
            return
        for log, changes in zip(new.events, self.changes[1:], strict=True):
            spans = {file: counted.spans.get((log.name, file.uri)) for file in log.files}  # None without rows
            for old in changes.included.files.values():
                if old.first is None or old.last is None:
                    continue
                near = [file for file, span in spans.items() if span and span[0] <= old.last and span[1] >= old.first]
                times = [time for file in near for time in spans[file] or ()]
                covered = near and min(times) <= old.first and max(times) >= old.last
                if not covered or sum(file.rows for file in near) < old.rows:
                    continue
                told = f"new files of events '{log.name}', such as '{near[0].uri}', may hold the events of "
                told += f"'{old.uri}': they are of its times, and at least as many. "
                if old.uri not in changes.missing:
                    say(f"{told}If they are the same, they count twice: remove the new files, and {self.advice}")
                    continue
                raise UserError(
                    f"{told}It is gone: put it back and remove the new ones, or {self.advice}. If they are others, set "
                    "data.on_duplicates to keep"
                )


REBUILD_ADVICE = "build the features anew, without --extend"


@dataclass(frozen=True)
class Extension:
    """Features with `files` that were added. rows: new ones of the interaction log; new_ids: by feature; gone: files
    that the features hold and the log does not."""

    features: FeatureFolder
    files: int
    rows: int
    new_ids: Mapping[str, int]
    missing: Sequence[str]


def extend(inputs: BuildInputs) -> Extension | None:
    """Add new files to the features in `work`. An error leaves the old features.

    Args:
        inputs: Log, schema and folder, with the splits of the new rows.

    Returns:
        The extension, None without new files.

    Raises:
        UserError: There are no features of this schema. An old file has changed. New rows may repeat old requests, or
            new events those of a removed file. No new request is later than the old ones, or none lies in a split. A
            file can't be read.
    """
    schema = inputs.schema
    reject_plain_table(schema, "adding days to features")
    check_work_outside_logs(inputs.source, schema, inputs.work)
    features = FeatureFolder(inputs.work / "features")
    if not (features.folder / "manifest.json").is_file():
        raise UserError(f"'{features.folder}' holds no features that could be extended; build them without --extend")
    with write_lock(features.folder, *BUILD_LOCK_TEXTS, wait=True):
        _check_schema(features, schema)
        included = IncludedFiles.read(features.folder)
        logs = Logs(inputs.source, schema, inputs.options, [log.types for log in included.logs])
        last = features.manifest["request_microseconds"][1]
        files = NewFiles(logs, included, f"the features in '{features.folder}'", last, REBUILD_ADVICE)
        if not files.any:
            return None
        with atomic_folder(features.folder) as folder:
            extended = _extend(features, files, inputs.windows, folder)
    return extended


def _check_schema(features: FeatureFolder, schema: Schema) -> None:
    previous = FeaturePipeline.load(features.serving, stores=False).schema
    found = next(diff_settings(previous.identity(), schema.identity()), None)
    for section in ("tasks", "features", "events"):  # layouts, look-ups and files follow their order
        old_order, order = list(getattr(previous, section)), list(getattr(schema, section))
        if found is None and old_order != order:
            found = (section, f"in the order {', '.join(old_order)}", f"in the order {', '.join(order)}")
    if found is not None:
        where, old, new = found
        raise UserError(
            f"setting '{where}' is {old} in the features in '{features.folder}' and {new} now; {REBUILD_ADVICE}, or "
            "restore the setting"
        )


def _extend(previous: FeatureFolder, files: NewFiles, windows: dict[str, Window], folder: Path) -> Extension:
    logs, new, was = files.logs, files.new_logs(), previous.manifest
    first, last = was["request_microseconds"]
    # The splits without the time of old requests.
    later = {name: (last + 1 if start is None else max(start, last + 1), end) for name, (start, end) in windows.items()}
    with BuildSteps(new, later, folder / "scratch") as steps:
        counted = files.count(
            steps, statistics=True, requests_dir=folder / "requests", previous=previous.folder / "requests"
        )
        new = steps.logs
        included = files.included.with_new(new, counted.spans)
        _check_splits(files, counted, steps)
        pipeline = FeaturePipeline.load(previous.serving, stores=False)
        try:
            for name, counts in pipeline.counts.items():
                counts.merge(type(counts).from_table(pq.read_table(previous.folder / "counts" / f"{name}.parquet")))
        except (OSError, pa.ArrowException, KeyError) as error:
            raise UserError(
                f"'{previous.folder}/counts' is lost or damaged ({first_line(error)}): {REBUILD_ADVICE}"
            ) from None
        pipeline.merge(counted.counts, counted.key_types)
        new_ids = pipeline.grow()
        counted.load_latest(previous.serving, logs.schema)
        counted.first = min(first, counted.first)
        manifest = write_features(steps, pipeline, counted, included, windows, folder, previous.serving.resolve())
    whole = compute_fingerprint(logs, windows)
    # Not that of a build of all files, whose ids have other rows: a model knows its features by the fingerprint.
    fingerprint = hashlib.sha256(f"{was['fingerprint']} {whole}".encode()).hexdigest()[:16]
    manifest["skipped_checks"] = sorted({*was["skipped_checks"], *logs.options.skipped_checks})
    write_manifest(folder, {"fingerprint": fingerprint, **manifest, "extends": was["fingerprint"]})
    return Extension(
        previous, sum(len(each.files) for each in new.all), counted.rows_by_log[None], new_ids, files.missing
    )


def _check_splits(files: NewFiles, counted: LogCounts, steps: BuildSteps) -> None:
    if any(counted.rows.values()):
        return
    first, rows = files.first_request_time(counted, steps.requests), steps.logs.log.rows
    if not counted.rows_by_log[None] or first > counted.last or counted.last <= files.last:
        raise UserError(
            f"none of the {rows:,} new rows is of a new request later than {format_time(files.last)}, up to when "
            f"{files.owner} hold requests, so none of them would be encoded: add them together with those of later "
            f"requests, with ids that were not used before, or {files.advice}"
        )
    raise UserError(
        f"none of the {rows:,} new rows lies in a split: they were requested from {format_time(first)} to "
        f"{format_time(counted.last)}; set `split.train_start`, `split.train_end`, `split.validation_end` and "
        "`split.test_end` around them"
    )


REBUILD_TABLES_ADVICE = "make the tables anew with --rebuild, which reads all files of the log"


@dataclass(frozen=True)
class WrittenTables:
    """Tables that were written.

    Attributes:
        files: Number of files that were read.
        rows: Rows of the interaction log that were added.
        events: Rows of logs of events that were added.
        as_of: Time of the last request that the tables know, microseconds.
        digest: Checksum of the files that the tables hold.
        journal: Part of a journal that the tables hold, see `IncludedFiles.journal`.
        missing: Files that the tables hold and the log lacks.
    """

    files: int
    rows: int
    events: int
    as_of: int
    digest: str
    journal: Mapping[str, Any] | None
    missing: Sequence[str] = ()


def extend_tables(features: Path, last: int, logs: Logs, included: IncludedFiles, out: Path) -> WrittenTables | None:
    """Writes features whose tables go on with the new files of logs into an empty folder; None where none has a row.

    features: of the model; last: microseconds of the last request that its tables know; logs: to be read by the model's
    schema, with the types of `included`. Raises UserError as `extend`.
    """
    files, requests = NewFiles(logs, included, "the model's tables", last, REBUILD_TABLES_ADVICE), features / "requests"
    new = zip(logs.all, files.changes, strict=True)
    if not any(file.rows for log, changes in new for file in log.files if file.uri in changes.new):
        return None
    if logs.schema.columns.request is not None and not requests.is_dir():
        raise UserError(f"'{requests}', the requests that the model's tables hold, is missing; {REBUILD_TABLES_ADVICE}")
    with BuildSteps(files.new_logs(), {}, out / "scratch") as steps:
        counted = files.count(steps, statistics=False, requests_dir=out / "requests", previous=requests)
        if not any(counted.rows_by_log.values()):  # all came before
            return None
        counted.load_latest(features, logs.schema)
        as_of = max(last, counted.last)
        included = files.included.with_new(steps.logs, counted.spans)
        return _write_tables(steps, counted, features, out, as_of, included, files.missing, previous=features.resolve())


def rebuild_tables(features: Path, logs: Logs, out: Path) -> WrittenTables:
    """Writes features with tables of all rows of logs into an empty folder.

    features: of the model, without a need for its tables. Raises UserError where the log can't be used.
    """
    with BuildSteps(logs.without_copies(), {}, out / "scratch") as steps:
        counted = steps.count(statistics=False, requests_dir=out / "requests")
        included = IncludedFiles.of(steps.logs, counted.spans)
        return _write_tables(steps, counted, features, out, counted.last, included)


def _write_tables(
    steps: BuildSteps,
    counted: LogCounts,
    features: Path,
    out: Path,
    as_of: int,
    included: IncludedFiles,
    missing: Sequence[str] = (),
    previous: Path | None = None,
) -> WrittenTables:
    """Writes memories as of just after the last request, latest attributes, and what was fitted."""
    pipeline = FeaturePipeline.load(features, stores=False)
    steps.look_up(pipeline, out, end=as_of + 1, training=None, previous=previous)
    pipeline.save(out)
    counted.save_latest(out)
    for log in steps.logs.all:
        log.check_unchanged()
    shutil.rmtree(out / "scratch", ignore_errors=True)
    included.write(out)
    for each in included.skipped:
        say(f"left out, until it is written again: {each.reason}")
    files, rows = sum(len(log.files) for log in steps.logs.all), counted.rows_by_log[None]
    return WrittenTables(
        files, rows, sum(counted.rows_by_log.values()) - rows, as_of, included.digest, included.journal, missing
    )
