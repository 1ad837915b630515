"""Add new files to existing features, without reading the old files again.

docs/how-to/build-large-logs.md describes the treatment of late and repeated rows.

A model has its own copy of the features (`<artifact>/features`). The tables of this copy are the event stores of
counters and histories, and the latest attributes of users and candidates. They can be updated without the vocabularies
and statistics: `extend_tables` adds new files to the tables, and `rebuild_tables` builds the tables from all files.

Both functions give identical bytes for the same rows, with one exception. Histories store the embedding row of each
item. If an ID gets its own embedding row only after some events, an extended history keeps a shared, hashed row for
these events. A rebuilt history has the ID's own row.
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


class _NewFiles:
    """The files of logs that features don't include yet. `missing` lists included files that no longer exist."""

    def __init__(self, logs: Logs, included: IncludedFiles, owner: str, last: int, advice: str) -> None:
        """Compare the files of logs with the included files. Raise UserError if an included file has changed.

        Args:
            logs: Logs with old and new files.
            included: Files that were included before.
            owner: Name of the features that include files, in messages. A plural such as "the features in 'work'".
            last: Time of the last included request, in microseconds.
            advice: Advice for messages about files that can't be added, as an imperative.
        """
        self.logs, self.owner, self.last, self.advice = logs, owner, last, advice
        self.changes = included.changes(logs)
        self.included = IncludedFiles([log_changes.included for log_changes in self.changes])
        self._check_unchanged()
        self.missing = [uri for log_changes in self.changes for uri in log_changes.missing]
        say_copies([log_changes.copies for log_changes in self.changes])
        if not self.any and (bad := [file for log_changes in self.changes for file in log_changes.bad]):
            raise UserError(
                f"none of the new files of the log '{logs.log.source}' can be used; the first: {bad[0].reason}"
            )

    @property
    def any(self) -> bool:
        """Whether there is a new file."""
        return any(log_changes.new for log_changes in self.changes)

    def new_logs(self) -> Logs:
        """Return the logs with only the new files. Raise UserError if they have no rows."""
        old = [log.found_files.keys() - diff.new for log, diff in zip(self.logs.all, self.changes, strict=True)]
        return self.logs.without_files(old)

    def count(self, steps: BuildSteps, statistics: bool, requests_dir: Path, previous: Path) -> LogCounts:
        """Count the rows of the new files. Raise UserError if these rows can't be added."""
        counted = steps.count(statistics=statistics, requests_dir=requests_dir, previous=previous)
        self._check_late(counted, steps)
        self._check_events(counted, steps.logs)
        return counted

    def first_request_time(self, counted: LogCounts, requests: RequestCounts) -> int:
        """Return the time of the first request that begins in the new files, in microseconds."""
        return requests.first_request_time if self.logs.schema.columns.request is not None else counted.first

    def _check_unchanged(self) -> None:
        reasons = {file.uri: file.reason for log in self.logs.all for file in log.skipped}
        for uri in (uri for log_changes in self.changes for uri in log_changes.changed):
            problem = f"can't be used any more ({reasons[uri]})" if uri in reasons else "has changed"
            raise UserError(f"'{uri}' {problem} since {self.owner} were built from it. Restore it, or {self.advice}.")

    def _check_late(self, counted: LogCounts, steps: BuildSteps) -> None:
        """Print a message about new files with requests that are no later than the last included request.

        Raises:
            UserError: A new row is earlier than all included rows of its request, so the request's time would change.
        """
        first, last = self.first_request_time(counted, steps.requests), self.last
        spans = {file.uri: counted.spans.get((None, file.uri)) for file in steps.logs.log.files}
        late = [uri for uri, span in spans.items() if span is not None and span[0] <= last]
        if first > last or not late:
            return
        earlier = steps.requests.earlier
        if earlier is not None and any(parse_journal_name(uri) is None for uri in late):
            raise UserError(
                f"'{late[0]}' has a row requested at {format_time(earlier)}, which is earlier than all rows of the "
                f"same request that {self.owner} include. Remove such rows from the log, or {self.advice}."
            )
        names = f"'{late[0]}'" + (f" and {len(late) - 1:,} other new files" if len(late) > 1 else "")
        say(
            f"{names} came late, with requests from {format_time(first)} on: {self.owner} include requests up to "
            f"{format_time(last)} already. Late rows count as events, but not as training rows, because the counters "
            "and histories of their time are no longer available."
        )

    def _check_events(self, counted: LogCounts, new: Logs) -> None:
        """Print a message about new files of event logs that may repeat the events of an included file.

        This is suspected if they cover the time span of the included file and have at least as many events.

        Raises:
            UserError: The new files may repeat the events of an included file that no longer exists.
        """
        if new.options.on_duplicates == "keep":
            return
        for log, changes in zip(new.events, self.changes[1:], strict=True):
            spans = {file: counted.spans.get((log.name, file.uri)) for file in log.files}  # None without rows.
            for old in changes.included.files.values():
                if old.first is None or old.last is None:
                    continue
                near = [file for file, span in spans.items() if span and span[0] <= old.last and span[1] >= old.first]
                times = [time for file in near for time in spans[file] or ()]
                covered = near and min(times) <= old.first and max(times) >= old.last
                if not covered or sum(file.rows for file in near) < old.rows:
                    continue
                text = f"new files of events '{log.name}', such as '{near[0].uri}', may repeat the events of "
                text += f"'{old.uri}': they cover the same times and have at least as many events. "
                if old.uri not in changes.missing:
                    say(f"{text}If the events are the same, they count twice. Remove the new files, and {self.advice}.")
                    continue
                raise UserError(
                    f"{text}The old file is missing. Restore it and remove the new files, or {self.advice}. If the "
                    "events are different, set data.on_duplicates to keep."
                )


REBUILD_ADVICE = "build the features again without --extend"


@dataclass(frozen=True)
class Extension:
    """Features to which new files were added.

    Attributes:
        features: Extended features.
        files: Number of added files.
        rows: Number of added rows of the interaction log.
        new_ids: Number of IDs that were added to the vocabulary of each feature.
        missing: URIs of included files that no longer exist.
    """

    features: FeatureFolder
    files: int
    rows: int
    new_ids: Mapping[str, int]
    missing: Sequence[str]


def extend(inputs: BuildInputs) -> Extension | None:
    """Add new files to the features in `inputs.work`. If there is an error, the old features stay as they are.

    Args:
        inputs: Inputs of the build. Its splits divide the new rows.

    Returns:
        Counts of the extension, None without new files.

    Raises:
        UserError: There are no features of this schema. An old file has changed. A new row is earlier than all old rows
            of its request. New event files may repeat a deleted file. No new request is later than the old requests, or
            none lies in a split. A file can't be read.
    """
    schema = inputs.schema
    reject_plain_table(schema, "adding days to features")
    check_work_outside_logs(inputs.source, schema, inputs.work)
    features = FeatureFolder(inputs.work / "features")
    if not (features.folder / "manifest.json").is_file():
        raise UserError(f"'{features.folder}' has no features to extend. Build them without --extend.")
    with write_lock(features.folder, *BUILD_LOCK_TEXTS, wait=True):
        _check_schema(features, schema)
        included = IncludedFiles.read(features.folder)
        logs = Logs(inputs.source, schema, inputs.options, [log.types for log in included.logs])
        last = features.manifest["request_microseconds"][1]
        files = _NewFiles(logs, included, f"the features in '{features.folder}'", last, REBUILD_ADVICE)
        if not files.any:
            return None
        with atomic_folder(features.folder) as folder:
            extended = _extend(features, files, inputs.windows, folder)
    return extended


def _check_schema(features: FeatureFolder, schema: Schema) -> None:
    previous = FeaturePipeline.load(features.serving, stores=False).schema
    difference = next(diff_settings(previous.identity(), schema.identity()), None)
    for section in ("tasks", "features", "events"):  # Layouts and files depend on the order of entries.
        old_order, order = list(getattr(previous, section)), list(getattr(schema, section))
        if difference is None and old_order != order:
            difference = (section, f"in the order {', '.join(old_order)}", f"in the order {', '.join(order)}")
    if difference is not None:
        setting, old, new = difference
        raise UserError(
            f"setting '{setting}' is {old} in the features in '{features.folder}' and {new} now; {REBUILD_ADVICE}, or "
            "restore the setting"
        )


def _extend(previous: FeatureFolder, files: _NewFiles, windows: dict[str, Window], folder: Path) -> Extension:
    logs, new, old_manifest = files.logs, files.new_logs(), previous.manifest
    first, last = old_manifest["request_microseconds"]
    # Splits of the new rows begin after the last old request.
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
                f"'{previous.folder}/counts' is missing or damaged ({first_line(error)}): {REBUILD_ADVICE}"
            ) from None
        pipeline.merge(counted.counts, counted.key_types)
        new_ids = pipeline.grow()
        counted.load_latest(previous.serving, logs.schema)
        counted.first = min(first, counted.first)
        manifest = write_features(steps, pipeline, counted, included, windows, folder, previous.serving.resolve())
    whole = compute_fingerprint(logs, windows)
    # A model identifies its features by the fingerprint. A build from all files assigns other embedding rows to IDs
    # than an extension, so the two need different fingerprints.
    fingerprint = hashlib.sha256(f"{old_manifest['fingerprint']} {whole}".encode()).hexdigest()[:16]
    manifest["skipped_checks"] = sorted({*old_manifest["skipped_checks"], *logs.options.skipped_checks})
    write_manifest(folder, {"fingerprint": fingerprint, **manifest, "extends": old_manifest["fingerprint"]})
    return Extension(
        previous, sum(len(log.files) for log in new.all), counted.rows_by_log[None], new_ids, files.missing
    )


def _check_splits(files: _NewFiles, counted: LogCounts, steps: BuildSteps) -> None:
    if any(counted.rows.values()):
        return
    first, rows = files.first_request_time(counted, steps.requests), steps.logs.log.rows
    if not counted.rows_by_log[None] or first > counted.last or counted.last <= files.last:
        raise UserError(
            f"none of the {rows:,} new rows is of a new request later than {format_time(files.last)}, the time of the "
            f"last request in {files.owner}. Add them with later requests that have new ids, or {files.advice}."
        )
    raise UserError(
        f"none of the {rows:,} new rows lies in a split: they were requested from {format_time(first)} to "
        f"{format_time(counted.last)}. Set `split.train_start`, `split.train_end`, `split.validation_end` and "
        "`split.test_end` to include them."
    )


REBUILD_TABLES_ADVICE = "rebuild the tables from all files of the log with --rebuild"


@dataclass(frozen=True)
class WrittenTables:
    """Facts about tables (event stores and latest attributes) that were written.

    Attributes:
        files: Number of files that were read.
        rows: Number of added rows of the interaction log.
        events: Number of added rows of event logs.
        as_of: Time of the last request in the tables, in microseconds.
        digest: Fingerprint of the files that the tables include.
        journal: Journal and last journal file that the tables include, see `IncludedFiles.journal`.
        missing: URIs of included files that no longer exist.
    """

    files: int
    rows: int
    events: int
    as_of: int
    digest: str
    journal: Mapping[str, Any] | None
    missing: Sequence[str] = ()


def extend_tables(features: Path, last: int, logs: Logs, included: IncludedFiles, out: Path) -> WrittenTables | None:
    """Add new files to a model's tables (event stores and latest attributes), and write the model's features to `out`.

    Args:
        features: Folder of the model's features.
        last: Time of the last request in the tables, in microseconds.
        logs: Logs with the model's schema, opened with the column types in `included`.
        included: Files that the tables include.
        out: Empty folder for the extended features.

    Returns:
        Facts about the tables, None without new rows. Rows that repeat rows of included files are not new.

    Raises:
        UserError: Rows can't be added, as in `extend`.
    """
    files = _NewFiles(logs, included, "the model's tables", last, REBUILD_TABLES_ADVICE)
    requests = features / "requests"
    new = zip(logs.all, files.changes, strict=True)
    if not any(file.rows for log, changes in new for file in log.files if file.uri in changes.new):
        return None
    if logs.schema.columns.request is not None and not requests.is_dir():
        raise UserError(f"'{requests}' is missing, so repeated requests can't be found; {REBUILD_TABLES_ADVICE}")
    with BuildSteps(files.new_logs(), {}, out / "scratch") as steps:
        counted = files.count(steps, statistics=False, requests_dir=out / "requests", previous=requests)
        if not any(counted.rows_by_log.values()):  # All rows repeat rows of earlier files.
            return None
        counted.load_latest(features, logs.schema)
        as_of = max(last, counted.last)
        included = files.included.with_new(steps.logs, counted.spans)
        return _write_tables(steps, counted, features, out, as_of, included, files.missing, previous=features.resolve())


def rebuild_tables(features: Path, logs: Logs, out: Path) -> WrittenTables:
    """Build a model's tables (event stores and latest attributes) from all files, and write its features to `out`.

    Args:
        features: Folder of the model's features. The tables in it are not read.
        logs: Logs with the model's schema.
        out: Empty folder for the features.

    Raises:
        UserError: A log can't be used.
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
    """Write the fitted pipeline, the latest attributes, and event stores for lookups after `as_of`."""
    pipeline = FeaturePipeline.load(features, stores=False)
    steps.look_up(pipeline, out, end=as_of + 1, training=None, previous=previous)
    pipeline.save(out)
    counted.save_latest(out)
    for log in steps.logs.all:
        log.check_unchanged()
    shutil.rmtree(out / "scratch", ignore_errors=True)
    included.write(out)
    for file in included.skipped:
        say(f"skipped until it is written again: {file.reason}")
    files, rows = sum(len(log.files) for log in steps.logs.all), counted.rows_by_log[None]
    return WrittenTables(
        files, rows, sum(counted.rows_by_log.values()) - rows, as_of, included.digest, included.journal, missing
    )
