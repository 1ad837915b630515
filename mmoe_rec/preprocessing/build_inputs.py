"""The logs of a feature build, and the record of the files whose rows the features include (`files.json`).

The record makes it possible to add only new files later. A file that features include is never read again. Features
therefore stay valid if the file is removed, but a file with changed bytes is an error. Files are identified by their
bytes, not by name or time. A file that was skipped because it was bad counts as new once it has been repaired.
"""

import copy
import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from mmoe_rec.errors import UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log.checks import BadFile, LogFile, PathColumns, SkippedFile, type_names
from mmoe_rec.log.database import DEFAULT_MEMORY_GIB
from mmoe_rec.log.files import FileInfo, compute_checksums, is_remote, source_includes
from mmoe_rec.log.reader import EventLogFiles, Log, no_usable_files_error
from mmoe_rec.point_in_time.join import Window
from mmoe_rec.progress import say
from mmoe_rec.settings.log_columns import ColumnUse
from mmoe_rec.settings.schema import Schema
from mmoe_rec.settings.sections import Data, EngineName, ErrorOrKeep, FirstOrError, Settings

_NEVER = int(np.iinfo(np.int64).max)


@dataclass(frozen=True)
class BuildOptions:
    """Options of a feature build, as described in `mmoe_rec.settings.sections.Data`. They don't define features."""

    engine: EngineName = "local"
    workers: int | None = None
    rows_in_memory: int = 1_048_576
    memory_gib: float = DEFAULT_MEMORY_GIB
    skip_bad_files: bool = False
    on_duplicates: ErrorOrKeep = "error"
    on_future_times: ErrorOrKeep = "error"
    on_conflicting_times: FirstOrError = "first"

    @staticmethod
    def of(data: Data) -> "BuildOptions":
        """Return the options in the section `data` of settings."""
        return BuildOptions(**{option.name: getattr(data, option.name) for option in fields(BuildOptions)})

    @property
    def skipped_checks(self) -> list[str]:
        """Names of the settings that allow rows which are usually mistakes, such as repeated rows."""
        return [name for name in ("on_duplicates", "on_future_times") if getattr(self, name) == "keep"]

    @property
    def max_time(self) -> int | None:
        """Latest valid time of a row, in microseconds. None stands for a day after the log is opened."""
        return None if self.on_future_times == "error" else _NEVER


DEFAULT_OPTIONS = BuildOptions()


@dataclass(frozen=True)
class BuildInputs:
    """Log, schema, splits and output folder of a feature build.

    Attributes:
        source: URI of the interaction log.
        schema: Schema of the log.
        windows: Request times [start, end) of each split, in microseconds.
        work: Parent folder of the features.
        options: Options of the build.
    """

    source: str
    schema: Schema
    windows: dict[str, Window]
    work: Path
    options: BuildOptions = DEFAULT_OPTIONS

    @staticmethod
    def of(settings: Settings) -> "BuildInputs":
        """Return the inputs of a build with these settings."""
        data = settings.data
        return BuildInputs(
            data.log, settings.schema_, settings.split.windows(), Path(data.work_dir), BuildOptions.of(data)
        )

    @cached_property
    def logs(self) -> "Logs":
        """Interaction log and event logs. Their files are listed and checked at the first access."""
        return Logs(self.source, self.schema, self.options)


# An example path for each kind of Parquet file that is written to `data.work_dir`. No log may include such a path.
_SERVED = ("features/serving", "model/features", "refreshed/model/features")
_WRITTEN = (
    *(f"{folder}/{name}" for folder in _SERVED for name in ("latest.user.parquet", "x.memory/part-00000.parquet")),
    "features/counts/x.parquet",
    "features/encoded/train/part-00000.parquet",
    "features/requests/rows.parquet",
    "evaluation/encoded/test/part-00000.parquet",
    "champion/validation/part-00000.parquet",
)


def check_work_outside_logs(log_source: str, schema: Schema, work: Path) -> None:
    """Raise if a log would include files that are written to the work folder.

    Args:
        log_source: URI of the interaction log.
        schema: Schema with the event logs.
        work: Work folder (`data.work_dir`).

    Raises:
        UserError: A log includes the work folder.
    """
    sources = {"data.log": log_source} | {f"data.events.{name}.path": log.path for name, log in schema.events.items()}
    for setting, source in sources.items():
        if source_includes(source, [work / name for name in _WRITTEN]):
            raise UserError(
                f"`{setting}` '{source}' includes files that are written to `data.work_dir` '{work}'. "
                "Set `data.work_dir` to a folder outside the log."
            )


class Logs:
    """An interaction log with its event logs."""

    def __init__(
        self,
        source: str,
        schema: Schema,
        options: BuildOptions,
        types: Sequence[Mapping[str, str]] | None = None,
        extra_columns: Mapping[str, ColumnUse] | None = None,
    ) -> None:
        """Open the logs.

        Args:
            source: URI of the interaction log.
            schema: Schema of the logs.
            options: Options of the build.
            types: Column -> type name, for the interaction log and then for each event log. Files must have these
                types. None infers the types.
            extra_columns: Additional columns of the interaction log, as in `Log`.
        """
        self.schema, self.options = schema, options
        skip = options.skip_bad_files
        of_log, *of_events = types or [{}] * (1 + len(schema.events))
        self.log = Log(
            source, schema, skip_bad_files=skip, types=of_log, max_time=options.max_time, extra_columns=extra_columns
        )
        self.events = [
            EventLogFiles(name, self.log, skip_bad_files=skip, types=event_types)
            for name, event_types in zip(schema.events, of_events, strict=True)
        ]

    @property
    def all(self) -> list[Log]:
        """Interaction log, followed by the event logs."""
        return [self.log, *self.events]

    @property
    def rows(self) -> int:
        """Number of rows of all logs."""
        return sum(log.rows for log in self.all)

    def without_bad_files(self, faults: Sequence[BadFile | None]) -> "Logs":
        """Return the logs without the bad files in `faults`, which become skipped files.

        Raises:
            UserError: The interaction log has no usable file.
        """
        remaining = self._with([log.without_bad_files(faults) for log in self.all])
        if self.log.files and not remaining.log.files:
            raise no_usable_files_error(self.log.source, remaining.log.skipped)
        return remaining

    def without_copies(self) -> "Logs":
        """Return the logs without duplicate files (same bytes), and report the skipped files."""
        copies = [_find_copies(log.files) for log in self.all]
        say_copies(copies)
        return self._with([log.without_files(uris) for log, uris in zip(self.all, copies, strict=True)])

    def _with(self, logs: Sequence[Any]) -> "Logs":
        changed = copy.copy(self)
        changed.log, *changed.events = logs
        return changed

    def without_files(self, excluded: Sequence[Collection[str]]) -> "Logs":
        """Return the logs without the `excluded` URIs, one collection for each log of `all`.

        Raises:
            UserError: The remaining files have no rows.
        """
        remaining = self._with([log.without_files(uris) for log, uris in zip(self.all, excluded, strict=True)])
        if not remaining.rows:
            raise UserError(f"the new files of the log '{self.log.source}' have no rows")
        return remaining


def adapt_schema(settings: Settings, schema: Schema) -> Schema:
    """Return a model's schema with the event logs and the columns of sampling rate, weight and split of the settings.

    Args:
        settings: Settings of the logs to read.
        schema: Schema of the model.
    """
    events = {name: settings.data.events.get(name, event) for name, event in schema.events.items()}
    of_rows = {"sampling_rate": settings.columns.sampling_rate, "weight": settings.columns.weight}
    columns = schema.columns.model_copy(update=of_rows)
    return schema.model_copy(update={"events": events, "columns": columns, "split": settings.split.split_column})


def open_model_logs(
    settings: Settings, pipeline: FeaturePipeline, types: Sequence[Mapping[str, str]] | None = None
) -> Logs:
    """Open the logs that the settings name, to compute a model's features from them.

    The model may have been trained on other logs, with other sampling rates, weights and splits.

    Args:
        settings: Settings with the logs.
        pipeline: Feature pipeline of the model.
        types: Column types, as in `Logs`. None requires only the types of the model's key columns.

    Raises:
        UserError: The log has times and the model's training log had none, or the other way round.
    """
    schema = pipeline.schema
    if schema.columns.has_time != settings.columns.has_time:
        descriptions = ("has no times (a plain table)", f"has times (in column '{schema.columns.time}')")
        raise UserError(
            f"the model was trained on a log that {descriptions[schema.columns.has_time]}, but the log of the settings "
            f"has {'' if settings.columns.has_time else 'no '}times (columns.time). Use a log like the model's."
        )
    schema = adapt_schema(settings, schema)
    types = key_types(pipeline, schema) if types is None else types
    return Logs(settings.data.log, schema, BuildOptions.of(settings.data), types)


def key_types(pipeline: FeaturePipeline, schema: Schema) -> list[dict[str, str]]:
    """Return the type name of each key column of a model, for the interaction log and then for each event log.

    Args:
        pipeline: Feature pipeline of the model.
        schema: Schema with the event logs.
    """
    types = pipeline.key_types
    # Leave out the time column of an event log. The interaction log may have a key column of the same name.
    return [types, *({n: kind for n, kind in types.items() if n != event.time} for event in schema.events.values())]


def _identify(file: "LogFile | IncludedFile", checksum: str | None) -> tuple[Any, ...]:
    """Return a file's size, checksum and path columns. The URI replaces the checksum if it or the rows are missing."""
    return file.bytes, checksum if checksum and file.rows else file.uri, file.path_columns


def _find_copies(files: Sequence[LogFile]) -> dict[str, str]:
    """Map the URI of each duplicate file to the URI of the first file with the same bytes and path columns."""
    first = dict[tuple[Any, ...], str]()
    sums = compute_checksums(files).items()
    originals = {file.uri: first.setdefault(_identify(file, checksum), file.uri) for file, checksum in sums}
    return {uri: original for uri, original in originals.items() if original != uri}


def say_copies(copies: Sequence[Mapping[str, str]]) -> None:
    """Print the number of skipped duplicate files. `copies` maps URIs of duplicates to originals, for each log."""
    if pairs := [pair for log_copies in copies for pair in log_copies.items()]:
        such_as = f"such as '{pairs[0][0]}' (same as '{pairs[0][1]}')"
        say(f"skipped {len(pairs):,} duplicate files (same content), {such_as}")


_OF_A_JOURNAL = re.compile(r"journal-([0-9a-f]{32})-([0-9]+)\.parquet")
Span = tuple[int, int]
Spans = Mapping[tuple[str | None, str], Span]
"""First and last time of a file's rows, in microseconds, by (event log or None for the interaction log, URI)."""


@dataclass(frozen=True)
class IncludedFile(FileInfo):
    """A file of a log whose rows the features include.

    Attributes:
        path_columns: Names and values of columns that are read from the file's path, such as `day=7/`.
        rows: Number of rows.
        first: Earliest time of a row, in microseconds. None if the file has no rows.
        last: Latest time of a row, in microseconds. None if the file has no rows.
        checksum: Checksum of the file's bytes. None if they couldn't be read.
    """

    path_columns: PathColumns
    rows: int
    first: int | None
    last: int | None
    checksum: str | None = None


@dataclass
class IncludedLog:
    """Record of the files of one log.

    Attributes:
        files: Included files by URI.
        skipped: Skipped files by URI.
        types: Column -> name of its type, such as "int64".
    """

    files: dict[str, IncludedFile] = field(default_factory=dict)
    skipped: dict[str, SkippedFile] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Number of rows of all files."""
        return sum(file.rows for file in self.files.values())

    @property
    def digest(self) -> str:
        """Fingerprint of the names, sizes and row counts of the included files."""
        files = [file for _, file in sorted(self.files.items())]
        text = "\n".join(f"{PurePath(file.uri).name} {file.bytes} {file.rows}" for file in files)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class FileChanges:
    """Changes of one log's files since they were included. Strings are URIs.

    Attributes:
        included: Record of the included files. A file that was moved or touched has its current URI and version.
        copies: Duplicate file -> included or new file with the same bytes.
        missing: Included files that no longer exist.
        changed: Included files that have changed or can't be used any more.
        new: Usable files that are not included yet.
        skipped: Files that were skipped before and have not changed.
        bad: New files that can't be used.
    """

    included: IncludedLog
    copies: dict[str, str]
    missing: list[str]
    changed: list[str]
    new: set[str]
    skipped: list[str]
    bad: list[SkippedFile]


@dataclass
class IncludedFiles:
    """Included files of the interaction log, and then of each event log."""

    logs: list[IncludedLog]

    @staticmethod
    def of(logs: Logs, spans: Spans) -> "IncludedFiles":
        """Return the record of all files that were read or skipped.

        Args:
            logs: Logs that were read.
            spans: First and last times of the files.
        """
        return IncludedFiles([IncludedLog() for _ in logs.all]).with_new(logs, spans)

    @staticmethod
    def read(folder: Path) -> "IncludedFiles":
        """Read `files.json` from a folder.

        Raises:
            UserError: The file is missing or damaged.
        """
        try:
            record = json.loads((folder / "files.json").read_text(encoding="utf-8"))
            return IncludedFiles([_log_from(tree) for tree in record["logs"]])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"the features in '{folder}' have no readable record of the log's files (files.json); "
                "build them again without --extend"
            ) from None

    def write(self, folder: Path) -> None:
        """Write `files.json` to a folder."""
        logs = [
            {
                "files": [asdict(log.files[uri]) for uri in sorted(log.files)],
                "skipped": [asdict(log.skipped[uri]) for uri in sorted(log.skipped)],
                "types": dict(sorted(log.types.items())),
            }
            for log in self.logs
        ]
        (folder / "files.json").write_text(json.dumps({"logs": logs}), encoding="utf-8")

    def changes(self, logs: Logs) -> list[FileChanges]:
        """Return the changes of each log's files. Logs and records are paired in order. Unpaired logs are ignored."""
        return [_changes(included, log) for included, log in zip(self.logs, logs.all, strict=False)]

    def with_new(self, logs: Logs, spans: Spans) -> "IncludedFiles":
        """Return this record with the files of `logs` added. Files skipped earlier stay listed while the log has them.

        Args:
            logs: Logs with only the new files.
            spans: First and last times of the new files.
        """
        return IncludedFiles([_with_new(log, new, spans) for log, new in zip(self.logs, logs.all, strict=True)])

    @property
    def digest(self) -> str:
        """Fingerprint of all included files and their versions, 16 hexadecimal digits."""
        files = [sorted((file.uri, file.bytes, file.version) for file in log.files.values()) for log in self.logs]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]

    @property
    def journal(self) -> dict[str, Any] | None:
        """ID of the journal that wrote the files ("id"), and number of the last included journal file ("through").

        None if no journal wrote a file. If several journals did, the one with the latest row counts.
        """
        journals: dict[str, tuple[int, int]] = {}
        for file in (file for log in self.logs for file in log.files.values()):
            if (name := parse_journal_name(file.uri)) is not None:
                latest, through = journals.get(name[0], (0, 0))
                journals[name[0]] = max(latest, file.last or 0), max(through, name[1])
        if not journals:
            return None
        newest = max(journals, key=lambda journal: journals[journal])
        return {"id": newest, "through": journals[newest][1]}

    @property
    def skipped(self) -> list[SkippedFile]:
        """Skipped files of all logs, sorted by URI without duplicates."""
        files = {file.uri: file for log in reversed(self.logs) for file in log.skipped.values()}
        return [files[uri] for uri in sorted(files)]


def parse_journal_name(uri: str) -> tuple[str, int] | None:
    """Return the ID of the journal and the number in a journal file's name, None for any other file."""
    name = _OF_A_JOURNAL.fullmatch(PurePath(uri).name)
    return None if name is None else (name[1], int(name[2]))


def _log_from(tree: Mapping[str, Any]) -> IncludedLog:
    files = [
        IncludedFile(**{**file, "path_columns": tuple(map(tuple, file["path_columns"]))}) for file in tree["files"]
    ]
    skipped = [SkippedFile(**file) for file in tree["skipped"]]
    return IncludedLog({file.uri: file for file in files}, {file.uri: file for file in skipped}, tree["types"])


def _changes(previous: IncludedLog, log: Log) -> FileChanges:
    usable = {file.uri: file for file in log.files}
    included, lost = dict[str, IncludedFile](), dict[str, IncludedFile]()
    for uri, before in previous.files.items():
        same = uri in log.found_files and _same(before, log.found_files[uri])
        (included if same and (uri not in usable or usable[uri].path_columns == before.path_columns) else lost)[uri] = (
            before
        )
    uris = {_identify(file, file.checksum): uri for uri, file in previous.files.items()}
    copies = dict[str, str]()
    for file, checksum in compute_checksums([file for uri, file in usable.items() if uri not in included]).items():
        uri, identity = file.uri, _identify(file, checksum)
        if (original := uris.get(identity)) in lost:  # The file was touched, renamed or moved.
            included[uri] = replace(lost.pop(original), uri=uri, version=file.version)
        elif original is not None:
            copies[uri] = original
        if uri not in copies:
            uris[identity] = uri
    skipped = [u for u, bad in previous.skipped.items() if u in log.found_files and _same(bad, log.found_files[u])]
    seen = included.keys() | lost.keys() | copies.keys() | set(skipped)
    return FileChanges(
        included=IncludedLog(included | lost, previous.skipped, previous.types),
        copies=copies,
        missing=[uri for uri in lost if uri not in log.found_files],
        changed=[uri for uri in lost if uri in log.found_files],
        new=usable.keys() - seen,
        skipped=skipped,
        bad=[file for file in log.skipped if file.uri not in seen | previous.skipped.keys()],
    )


def _same(before: FileInfo, now: FileInfo) -> bool:
    return (before.bytes, before.version) == (now.bytes, now.version)


def _with_new(included: IncludedLog, log: Log, spans: Spans) -> IncludedLog:
    files = dict(included.files)
    for file, checksum in compute_checksums(log.files).items():
        first, last = spans.get((log.name, file.uri), (None, None))
        facts = file.uri, file.bytes, file.version, file.path_columns, file.rows
        files[file.uri] = IncludedFile(*facts, first, last, checksum)
    skipped = {uri: file for uri, file in included.skipped.items() if uri in log.found_files}
    skipped |= {file.uri: file for file in log.skipped}
    skipped = {uri: file for uri, file in skipped.items() if uri not in files}
    return IncludedLog(files, skipped, included.types | type_names(log.types))


def short_names(uris: Sequence[str]) -> dict[str, str]:
    """Map URIs to short names for a report.

    A name consists of the last parts of the path, equally many for each URI, so that all names differ. A URI with a
    colon, such as `models:/shop@champion`, is its own name.

    Raises:
        UserError: A URI occurs twice.
    """
    if twice := next((uri for uri in uris if uris.count(uri) > 1), None):
        raise UserError(f"'{twice}' is given twice, and would be compared with itself; give --compare-to another one")
    parts = [[uri] if ":" in uri else uri.rstrip("/").split("/") for uri in uris]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return dict(zip(uris, names, strict=True))
    return {uri: uri for uri in uris}


def check_output_folder(out: Path, settings: Settings | None = None) -> None:
    """Raise if a folder can't take results.

    Args:
        out: Folder for results (`--out`).
        settings: Settings with logs and a work folder. None only checks that `out` is not a file.

    Raises:
        UserError: `out` is a file, is the work folder, or lies in a log or in an output folder such as `model`.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out '{out}' is a file; name a folder")
    if settings is None:
        return
    real, work = Path(os.path.realpath(out)), Path(settings.data.work_dir)
    sources = [settings.data.log, *(event.path for event in settings.data.events.values())]
    reserved = [Path(source) for source in sources if not is_remote(source) and Path(source).is_dir()]
    outputs = ("features", "checkpoints", "model", "comparison", "tuning", "unsent")
    reserved += [work / name for name in outputs]
    inside = next((folder for folder in reserved if real.is_relative_to(os.path.realpath(folder))), None)
    if inside is not None or real == Path(os.path.realpath(work)):
        raise UserError(f"--out '{out}' lies in '{inside or work}', which holds other things; name another folder")
