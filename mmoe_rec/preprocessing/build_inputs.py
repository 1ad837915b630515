"""The logs that a build reads, and which files features hold, `files.json`: so that days can be added.

No file is read again once its rows were counted, so one that is gone changes nothing, and one with other bytes does. A
file is told by its bytes, not by its name or time. One that was left out counts as new once it has been mended.
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
    """How features are built, as described in `mmoe_rec.settings.sections.Data`; no choice changes a feature."""

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
        """Return the options in a section of settings."""
        return BuildOptions(**{each.name: getattr(data, each.name) for each in fields(BuildOptions)})

    @property
    def skipped_checks(self) -> list[str]:
        """Settings by which a build does not look for rows that most logs hold only by mistake."""
        return [name for name in ("on_duplicates", "on_future_times") if getattr(self, name) == "keep"]

    @property
    def max_time(self) -> int | None:
        """The moment, microseconds, that no time of the log may lie after; None is the clock's."""
        return None if self.on_future_times == "error" else _NEVER


DEFAULT_OPTIONS = BuildOptions()


@dataclass(frozen=True)
class BuildInputs:
    """The log, schema and splits of a build of features, opened once, and the folder that gets the features.

    Attributes:
        source: URI of the interaction log.
        schema: Schema of the log.
        windows: Request times [start, end) of each split, in microseconds.
        work: Folder of the features.
        options: How to build.
    """

    source: str
    schema: Schema
    windows: dict[str, Window]
    work: Path
    options: BuildOptions = DEFAULT_OPTIONS

    @staticmethod
    def of(settings: Settings) -> "BuildInputs":
        """Return the inputs that settings name."""
        data = settings.data
        return BuildInputs(
            data.log, settings.schema_, settings.split.windows(), Path(data.work_dir), BuildOptions.of(data)
        )

    @cached_property
    def logs(self) -> "Logs":
        """The logs with the files that they have when they are first asked for."""
        return Logs(self.source, self.schema, self.options)


# One of each kind of Parquet file that is written to `data.work_dir`.
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
    """Raises UserError where a log would read what is written to the folder `work`."""
    sources = {"data.log": log_source} | {f"data.events.{name}.path": each.path for name, each in schema.events.items()}
    for setting, source in sources.items():
        if source_includes(source, [work / each for each in _WRITTEN]):
            raise UserError(
                f"`{setting}` '{source}' takes in what is written to `data.work_dir` '{work}': it would be read "
                "as rows of "
                "the log; set `data.work_dir` to a folder that lies outside"
            )


class Logs:
    """An interaction log with its logs of events. types: of the columns of each of them, and more: further columns of
    the interaction log, as `Log` takes them."""

    def __init__(
        self,
        source: str,
        schema: Schema,
        options: BuildOptions,
        types: Sequence[Mapping[str, str]] | None = None,
        extra_columns: Mapping[str, ColumnUse] | None = None,
    ) -> None:
        self.schema, self.options = schema, options
        skip = options.skip_bad_files
        of_log, *of_events = types or [{}] * (1 + len(schema.events))
        self.log = Log(
            source, schema, skip_bad_files=skip, types=of_log, max_time=options.max_time, extra_columns=extra_columns
        )
        self.events = [
            EventLogFiles(name, self.log, skip_bad_files=skip, types=each)
            for name, each in zip(schema.events, of_events, strict=True)
        ]

    @property
    def all(self) -> list[Log]:
        """The interaction log, then the logs of events."""
        return [self.log, *self.events]

    @property
    def rows(self) -> int:
        """Rows of all of them."""
        return sum(each.rows for each in self.all)

    def without_bad_files(self, faults: Sequence[BadFile | None]) -> "Logs":
        """The same logs without the files that have these faults. Raises UserError where nothing is left to read of
        the interaction log."""
        fewer = self._with([each.without_bad_files(faults) for each in self.all])
        if self.log.files and not fewer.log.files:
            raise no_usable_files_error(self.log.source, fewer.log.skipped)
        return fewer

    def without_copies(self) -> "Logs":
        """The same logs with one of the files whose bytes are the same; says which others are left out."""
        copies = [_find_copies(log.files) for log in self.all]
        say_copies(copies)
        return self._with([log.without_files(each) for log, each in zip(self.all, copies, strict=True)])

    def _with(self, logs: Sequence[Any]) -> "Logs":
        changed = copy.copy(self)
        changed.log, *changed.events = logs
        return changed

    def without_files(self, not_read: Sequence[Collection[str]]) -> "Logs":
        """The same logs without some of their files: addresses for each of `all`. Raises UserError where the others
        have no rows."""
        rest = self._with([log.without_files(done) for log, done in zip(self.all, not_read, strict=True)])
        if not rest.rows:
            raise UserError(f"the new files of the log '{self.log.source}' have no rows")
        return rest


def adapt_schema(settings: Settings, schema: Schema) -> Schema:
    """The schema of a model, as it reads the settings' logs."""
    events = {name: settings.data.events.get(name, event) for name, event in schema.events.items()}
    of_rows = {"sampling_rate": settings.columns.sampling_rate, "weight": settings.columns.weight}
    columns = schema.columns.model_copy(update=of_rows)
    return schema.model_copy(update={"events": events, "columns": columns, "split": settings.split.split_column})


def open_model_logs(
    settings: Settings, pipeline: FeaturePipeline, types: Sequence[Mapping[str, str]] | None = None
) -> Logs:
    """The settings' logs, to be read by the features of a model that may have been trained on logs elsewhere, with
    other rates, weights and splits of rows.

    types: of the columns of each log, None for those of the model's keys.
    """
    schema = pipeline.schema
    if schema.columns.has_time != settings.columns.has_time:
        ways = ("has no times (a plain table)", f"has times (in column '{schema.columns.time}')")
        raise UserError(
            f"the model was trained on a log that {ways[schema.columns.has_time]}, but the log of the settings has "
            f"{'times' if settings.columns.has_time else 'none'} (columns.time): the model's features can't read it"
        )
    schema = adapt_schema(settings, schema)
    types = key_types(pipeline, schema) if types is None else types
    return Logs(settings.data.log, schema, BuildOptions.of(settings.data), types)


def key_types(pipeline: FeaturePipeline, schema: Schema) -> list[dict[str, str]]:
    """Types of the columns of a log and of each log of events, those of the model's keys."""
    kinds = pipeline.key_types
    # The time column of events may be named like a key of the log.
    return [kinds, *({n: kind for n, kind in kinds.items() if n != each.time} for each in schema.events.values())]


def _identify(file: "LogFile | IncludedFile", checksum: str | None) -> tuple[Any, ...]:
    """The bytes of a file and the columns in its path, by which it is known; without rows, by its address."""
    return file.bytes, checksum if checksum and file.rows else file.uri, file.path_columns


def _find_copies(files: Sequence[LogFile]) -> dict[str, str]:
    """Addresses of files -> that of an earlier one with the same bytes, and columns in its path."""
    first = dict[tuple[Any, ...], str]()
    sums = compute_checksums(files).items()
    found = {file.uri: first.setdefault(_identify(file, checksum), file.uri) for file, checksum in sums}
    return {uri: other for uri, other in found.items() if other != uri}


def say_copies(copies: Sequence[Mapping[str, str]]) -> None:
    """Tells people which files are left out: file -> another one with the same bytes, for each log."""
    if pairs := [pair for each in copies for pair in each.items()]:
        such_as = f"such as '{pairs[0][0]}' ('{pairs[0][1]}')"
        say(f"left out: {len(pairs):,} files with the bytes of another one, {such_as}; they count once")


_OF_A_JOURNAL = re.compile(r"journal-([0-9a-f]{32})-([0-9]+)\.parquet")
Span = tuple[int, int]
Spans = Mapping[tuple[str | None, str], Span]
"""(name of a log of events or None, file) -> first and last time of its rows, microseconds."""


@dataclass(frozen=True)
class IncludedFile(FileInfo):
    """A file whose rows were counted. in_path: columns that stand in its path; first, last: times of its rows,
    microseconds, None without rows; checksum: of its bytes, None where it could not be read."""

    path_columns: PathColumns
    rows: int
    first: int | None
    last: int | None
    checksum: str | None = None


@dataclass
class IncludedLog:
    """The files of one log by address, and the types of its columns in words."""

    files: dict[str, IncludedFile] = field(default_factory=dict)
    skipped: dict[str, SkippedFile] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(file.rows for file in self.files.values())

    @property
    def digest(self) -> str:
        """A fingerprint of the names, sizes and row counts of all files that were taken in."""
        files = [file for _, file in sorted(self.files.items())]
        text = "\n".join(f"{PurePath(file.uri).name} {file.bytes} {file.rows}" for file in files)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class FileChanges:
    """What has become of one log's files. held: those taken in before, under the names and times that they have now;
    gone, changed: some of these; copies: files that lie beside one of these, its copy; new: to be read;
    skipped: before, and as they were then; bad: new files that can't be used.
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
    """The files of the interaction log, and then of each log of events."""

    logs: list[IncludedLog]

    @staticmethod
    def of(logs: Logs, spans: Spans) -> "IncludedFiles":
        """All files of logs that were read, and those left out."""
        return IncludedFiles([IncludedLog() for _ in logs.all]).with_new(logs, spans)

    @staticmethod
    def read(folder: Path) -> "IncludedFiles":
        """What `write` wrote. Raises UserError where it is missing or damaged."""
        try:
            found = json.loads((folder / "files.json").read_text(encoding="utf-8"))
            return IncludedFiles([_log_from(each) for each in found["logs"]])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"the features in '{folder}' have no readable record of the log's files (files.json); "
                "build them anew, without --extend"
            ) from None

    def write(self, folder: Path) -> None:
        """Writes `files.json`."""
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
        """What has become of the files of each log; of those that are in both, should the settings have changed."""
        return [_changes(taken, log) for taken, log in zip(self.logs, logs.all, strict=False)]

    def with_new(self, logs: Logs, spans: Spans) -> "IncludedFiles":
        """These files and those that `logs` reads; files that were left out stay as long as they are there."""
        return IncludedFiles([_with_new(taken, log, spans) for taken, log in zip(self.logs, logs.all, strict=True)])

    @property
    def digest(self) -> str:
        """What tells all files that were taken in from any others, as they were then: 16 hexadecimal digits."""
        files = [sorted((file.uri, file.bytes, file.version) for file in log.files.values()) for log in self.logs]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]

    @property
    def journal(self) -> dict[str, Any] | None:
        """What of a journal of live events the files hold, by their names: the journal's "id", and the last segment
        "through" which they do; None for nothing. Of several journals, the one with the latest rows."""
        found: dict[str, tuple[int, int]] = {}
        for file in (file for log in self.logs for file in log.files.values()):
            if (name := parse_journal_name(file.uri)) is not None:
                latest, through = found.get(name[0], (0, 0))
                found[name[0]] = max(latest, file.last or 0), max(through, name[1])
        if not found:
            return None
        newest = max(found, key=lambda each: found[each])
        return {"id": newest, "through": found[newest][1]}

    @property
    def skipped(self) -> list[SkippedFile]:
        """All files that were left out, each once, though it may belong to several logs."""
        found = {file.uri: file for log in reversed(self.logs) for file in log.skipped.values()}
        return [found[uri] for uri in sorted(found)]


def parse_journal_name(uri: str) -> tuple[str, int] | None:
    """The id of the journal whose rows a file holds, and the cut up to which, by its name; None for another file."""
    name = _OF_A_JOURNAL.fullmatch(PurePath(uri).name)
    return None if name is None else (name[1], int(name[2]))


def _log_from(tree: Mapping[str, Any]) -> IncludedLog:
    files = [
        IncludedFile(**{**each, "path_columns": tuple(map(tuple, each["path_columns"]))}) for each in tree["files"]
    ]
    skipped = [SkippedFile(**each) for each in tree["skipped"]]
    return IncludedLog({each.uri: each for each in files}, {each.uri: each for each in skipped}, tree["types"])


def _changes(taken: IncludedLog, log: Log) -> FileChanges:
    usable = {file.uri: file for file in log.files}
    included, lost = dict[str, IncludedFile](), dict[str, IncludedFile]()
    for at, before in taken.files.items():
        is_here = at in log.found_files and _same(before, log.found_files[at])
        (included if is_here and (at not in usable or usable[at].path_columns == before.path_columns) else lost)[at] = (
            before
        )
    known = {_identify(file, file.checksum): at for at, file in taken.files.items()}
    copies = dict[str, str]()
    for file, checksum in compute_checksums([file for at, file in usable.items() if at not in included]).items():
        at, identity = file.uri, _identify(file, checksum)
        if (of := known.get(identity)) in lost:  # It was touched, renamed or moved.
            included[at] = replace(lost.pop(of), uri=at, version=file.version)
        elif of is not None:
            copies[at] = of
        if at not in copies:
            known[identity] = at
    skipped = [at for at, bad in taken.skipped.items() if at in log.found_files and _same(bad, log.found_files[at])]
    known_files = included.keys() | lost.keys() | copies.keys() | set(skipped)
    return FileChanges(
        included=IncludedLog(included | lost, taken.skipped, taken.types),
        copies=copies,
        missing=[at for at in lost if at not in log.found_files],
        changed=[at for at in lost if at in log.found_files],
        new=usable.keys() - known_files,
        skipped=skipped,
        bad=[each for each in log.skipped if each.uri not in known_files | taken.skipped.keys()],
    )


def _same(before: FileInfo, now: FileInfo) -> bool:
    return (before.bytes, before.version) == (now.bytes, now.version)


def _with_new(taken: IncludedLog, log: Log, spans: Spans) -> IncludedLog:
    files = dict(taken.files)
    for file, checksum in compute_checksums(log.files).items():
        first, last = spans.get((log.name, file.uri), (None, None))
        facts = file.uri, file.bytes, file.version, file.path_columns, file.rows
        files[file.uri] = IncludedFile(*facts, first, last, checksum)
    skipped = {uri: file for uri, file in taken.skipped.items() if uri in log.found_files}
    skipped |= {file.uri: file for file in log.skipped}
    skipped = {uri: file for uri, file in skipped.items() if uri not in files}
    return IncludedLog(files, skipped, taken.types | type_names(log.types))


def short_names(addresses: Sequence[str]) -> dict[str, str]:
    """Addresses with names for files and folders, by the ends of their paths that tell them apart; other addresses are
    names. Raises UserError where one comes twice."""
    if twice := next((each for each in addresses if addresses.count(each) > 1), None):
        raise UserError(f"'{twice}' is given twice, and would be compared with itself; give --compare-to another one")
    parts = [[each] if ":" in each else each.rstrip("/").split("/") for each in addresses]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return dict(zip(addresses, names, strict=True))
    return {each: each for each in addresses}


def check_output_folder(out: Path, settings: Settings | None = None) -> None:
    """Raises UserError for a folder of results that is a file, or lies where the log or what is made of it lies."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out '{out}' is a file; name a folder")
    if settings is None:
        return
    real, work = Path(os.path.realpath(out)), Path(settings.data.work_dir)
    sources = [settings.data.log, *(each.path for each in settings.data.events.values())]
    taken = [Path(each) for each in sources if not is_remote(each) and Path(each).is_dir()]
    ours = ("features", "checkpoints", "model", "comparison", "tuning", "unsent")
    taken += [work / name for name in ours]
    inside = next((each for each in taken if real.is_relative_to(os.path.realpath(each))), None)
    if inside is not None or real == Path(os.path.realpath(work)):
        raise UserError(f"--out '{out}' lies in '{inside or work}', which holds other things; name another folder")
