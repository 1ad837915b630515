"""Read an interaction log from Parquet files, and check the files against the schema before using the first row.

A `Log` lists the files and cuts them into `LogPart`s. `Log.reader` reads any part, in this process or another.
"""

import copy
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.errors import UserError
from mmoe_rec.log.checks import (
    BadFile,
    LogFile,
    PathColumns,
    SkippedFile,
    ValueCheck,
    canonicalize_file_column,
    check_files,
    describe_row,
    event_value_checks,
    log_value_checks,
    next_batch,
    open_parquet,
)
from mmoe_rec.log.columns import column_uses, event_column_uses
from mmoe_rec.log.files import find_files
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY, LogRows, add_missing_ids, add_missing_times
from mmoe_rec.point_in_time.arrays import rebatch
from mmoe_rec.settings.log_columns import EVENT_TASK, ColumnUse
from mmoe_rec.settings.schema import Schema


@dataclass(frozen=True)
class Piece:
    """Consecutive row groups of one file (indices `groups`), their number of rows, and the file's path columns."""

    uri: str
    groups: tuple[int, ...]
    path_columns: PathColumns
    rows: int


@dataclass(frozen=True)
class LogPart:
    """Consecutive rows of a log.

    Attributes:
        start: Number of the first row in the log.
        rows: Number of rows.
        pieces: Row groups that contain these rows, one piece for each file.
    """

    start: int
    rows: int
    pieces: tuple[Piece, ...]


def _split_into_parts(files: Sequence[LogFile], rows_per_part: int) -> list[LogPart]:
    """Cut files between row groups into parts. All parts but the last have at least `rows_per_part` rows."""
    parts: list[LogPart] = []
    groups: list[tuple[LogFile, int]] = []
    start, rows = 0, 0
    for file, group in [(f, index) for f in files for index, count in enumerate(f.row_group_sizes) if count]:
        groups.append((file, group))
        rows += file.row_group_sizes[group]
        if rows >= rows_per_part:
            parts.append(LogPart(start, rows, _pieces_of(groups)))
            groups, start, rows = [], start + rows, 0
    return [*parts, LogPart(start, rows, _pieces_of(groups))] if groups else parts


def _pieces_of(groups: Sequence[tuple[LogFile, int]]) -> tuple[Piece, ...]:
    pieces = []
    for file, file_groups in groupby(groups, key=lambda group: group[0]):
        indices = tuple(index for _, index in file_groups)
        rows = sum(file.row_group_sizes[index] for index in indices)
        pieces.append(Piece(file.uri, indices, file.path_columns, rows))
    return tuple(pieces)


READ_BATCH_ROWS = 131_072
ROWS_PER_PART = 262_144


@dataclass(frozen=True)
class LogReader:
    """A small, picklable reader for parts of an interaction log or an event log.

    Attributes:
        schema: Schema of the log.
        uses: Columns to read and how to read them. They include the user and time columns.
        max_time: Latest valid time, in microseconds since 1970 UTC. A later time is an error.
        events: Name of the event log, None for the interaction log.
        time_overrides: Parquet file with the columns `row` (number in the log, ascending) and `time` (microseconds) of
            rows whose time to replace (see `mmoe_rec.preprocessing.request_times`). None keeps all times.
        excluded_rows: Parquet file with the numbers of rows to skip in column `row`. None skips no rows.
    """

    schema: Schema
    uses: dict[str, ColumnUse]
    max_time: int
    events: str | None = None
    time_overrides: Path | None = None
    excluded_rows: Path | None = None

    @property
    def time(self) -> str:
        """Name of the time column."""
        return self.schema.columns.time if self.events is None else self.schema.events[self.events].time

    @property
    def checks(self) -> list[ValueCheck]:
        """Checks of the values in the columns of `uses`."""
        if self.events is not None:
            return event_value_checks(self.time, self.max_time)
        return [check for check in log_value_checks(self.schema, self.max_time) if check.column in self.uses]

    def read(self, part: LogPart, spans: dict[str, tuple[int, int]] | None = None) -> Iterator[LogRows]:
        """Yield a part's checked rows in canonical types, in batches of at most `READ_BATCH_ROWS` rows.

        Rows of an event log are converted by `event_rows`.

        Args:
            part: Rows to read.
            spans: Dictionary to fill: URI of a file -> first and last time of its rows, in microseconds since 1970 UTC.

        Raises:
            BadFile: A file is damaged, changed or invalid.
            UserError: A remote file system can't be reached.
        """
        row, (excluded_rows,) = part.start, _read_columns(self.excluded_rows, part, "row")
        # Row numbers with replaced times, in ascending order, and the replacement times.
        override_rows, override_times = _read_columns(self.time_overrides, part, "row", "time")
        # Join the tables of small files, because each batch has a fixed overhead.
        tables = (table for piece in part.pieces for table in self._checked(piece, spans))
        for table in rebatch(tables, READ_BATCH_ROWS):
            if self.events is not None:
                yield event_rows(table, self.schema, self.events)
                continue
            numbers = row + np.arange(len(table))
            rows = LogRows(add_missing_ids(table, self.schema, row), self.schema, row_numbers=numbers)
            in_batch = slice(*np.searchsorted(override_rows, [row, row + len(table)]))
            if len(override_rows[in_batch]):
                times = rows.times().copy()
                times[override_rows[in_batch] - row] = override_times[in_batch]
                rows = rows.with_times(times)
            row += len(table)
            if len(counted := rows.filter(~np.isin(numbers, excluded_rows))):
                yield counted

    def _checked(self, piece: Piece, spans: dict[str, tuple[int, int]] | None) -> Iterator[pa.Table]:
        """Yield tables of canonical columns whose values passed all checks, and update `spans` as in `read`."""
        checks = self.checks
        for start, table in read_piece(piece, self.uses, self.schema.columns.time_unit):
            rows = LogRows(table, self.schema)
            for check in checks:
                try:
                    wrong = check.find(rows)
                except UserError as error:
                    raise BadFile(f"'{piece.uri}': {error}", piece.uri) from None
                if wrong is not None:
                    row, problem = wrong
                    raise BadFile(f"'{piece.uri}': {problem}{describe_row(start + row)}", piece.uri)
            timed = add_missing_times(table, self.schema)
            if spans is not None and len(times := LogRows(timed, self.schema).times(self.time)):
                first, last = int(times.min()), int(times.max())
                span = spans.get(piece.uri, (first, last))
                spans[piece.uri] = min(first, span[0]), max(last, span[1])
            yield timed


def find_bad_file(task: tuple[LogReader, Piece]) -> BadFile | None:
    """Read all row groups of a `task` from `Log.pieces`, and return the file's error, None without errors."""
    reader, piece = task
    try:
        for _ in reader.read(LogPart(0, piece.rows, (piece,))):
            pass
    except BadFile as fault:
        return fault
    return None


def _read_columns(path: Path | None, part: LogPart, *names: str) -> list[np.ndarray]:
    """Read columns of a Parquet file for the row numbers of a part. Without a file, return empty columns."""
    if path is None:
        return [np.empty(0, np.int64) for _ in names]
    filters = [("row", ">=", part.start), ("row", "<", part.start + part.rows)]
    return [column.to_numpy() for column in pq.read_table(path, columns=list(names), filters=filters).columns]


def event_rows(table: pa.Table, schema: Schema, name: str) -> LogRows:
    """Convert events to rows as in an interaction log, so that counters and histories read both in the same way.

    The request time of a row is the time of the event. The row's label of the task `EVENT_TASK` is 1.

    Args:
        table: Columns of the events, with the Arrow types of `mmoe_rec.log.columns`. Only the time is required. Of the
            other columns, those that features read are kept.
        schema: Schema of the log.
        name: Name of the event log.
    """
    time = schema.events[name].time
    uses = [column for column in event_column_uses(schema, name) if column != time]
    keys = {column: table.column(column) for column in uses if column in table.column_names}
    label = pa.array(np.ones(table.num_rows))
    return LogRows(pa.table({**keys, schema.columns.time: table.column(time), EVENT_TASK.label: label}), schema)


class Log:
    """Files of an interaction log, or of an event log (subclass `EventLogFiles`).

    Attributes:
        name: Name of an event log, None for the interaction log.
        found_files: Files that existed when the log was opened, by URI, usable or not.
        files: Usable files.
        types: Canonical types of the columns.
        skipped: Unusable files, with the reasons.
        reader: Reader for parts of the log.
    """

    name: str | None = None

    def __init__(
        self,
        source: str,
        schema: Schema,
        *,
        skip_bad_files: bool = False,
        types: Mapping[str, str] | None = None,
        max_time: int | None = None,
        extra_columns: Mapping[str, ColumnUse] | None = None,
    ) -> None:
        """Read every file's footer and check columns and types.

        Args:
            source: A folder of Parquet files, one file or a glob, as a local path or an fsspec URI.
            schema: Schema of the log.
            skip_bad_files: Whether to list unusable files in `skipped` instead of raising an error.
            types: Column -> name of the required type, by default the type in most files.
            max_time: Latest valid time, in microseconds since 1970 UTC (default: a day from now). Reading a later
                request raises BadFile.
            extra_columns: Additional columns that all files must have, and how to read them.

        Raises:
            BadFile: A file is unreadable, lacks a column or has an unexpected type. The error names the first bad file.
            UserError: There is no log, it has no rows, or it can't be reached.
        """
        self.source, self.schema, self.uses = source, schema, column_uses(schema) | dict(extra_columns or {})
        self.max_time = int(time.time() * 1e6) + MICROSECONDS_PER_DAY if max_time is None else max_time
        self._open("data.log", skip_bad_files, types)
        if not self.rows:
            raise UserError(f"the log '{source}' has no rows")

    def _open(self, setting: str, skip_bad_files: bool, types: Mapping[str, str] | None) -> None:
        found_files, unit = find_files(self.source, setting), self.schema.columns.time_unit
        self.found_files = {file.uri: file for file in found_files}
        self.files, self.types, self.skipped = check_files(found_files, self.uses, unit, skip_bad_files, types or {})
        if not self.files:
            raise no_usable_files_error(self.source, self.skipped)
        self.reader = LogReader(self.schema, self.uses, self.max_time, self.name)

    @property
    def rows(self) -> int:
        """Number of rows of all files."""
        return sum(file.rows for file in self.files)

    def parts(self, rows_per_part: int = ROWS_PER_PART) -> list[LogPart]:
        """Return parts, cut between row groups. All parts but the last have at least `rows_per_part` rows."""
        return _split_into_parts(self.files, rows_per_part)

    def stream(self) -> Iterator[LogRows]:
        """Yield all rows in order, in batches of at most `READ_BATCH_ROWS` rows."""
        for part in self.parts():
            yield from self.reader.read(part)

    def check_unchanged(self) -> None:
        """Raise BadFile if a file was rewritten after the log was opened. Deleted files are no error."""
        current = {file.uri: (file.bytes, file.version) for file in find_files(self.source)}
        for file in self.files:
            if current.get(file.uri, (file.bytes, file.version)) != (file.bytes, file.version):
                raise _changed(file.uri)

    def pieces(self, reader: LogReader | None = None) -> list[tuple[LogReader, Piece]]:
        """Return all pieces as arguments of `find_bad_file`, each with `reader` or else the log's reader."""
        return [(reader or self.reader, piece) for part in self.parts() for piece in part.pieces]

    def without_bad_files(self, faults: Iterable[BadFile | None]) -> Self:
        """Return a copy of the log that skips the files in `faults`. Column types stay the same."""
        bad = {fault.uri: str(fault) for fault in reversed(list(faults)) if fault is not None}
        fewer = self.without_files(bad)
        newly_skipped = [SkippedFile(f.uri, f.bytes, f.version, bad[f.uri]) for f in self.files if f.uri in bad]
        fewer.skipped = [*self.skipped, *newly_skipped]
        return fewer

    def without_files(self, uris: Collection[str]) -> Self:
        """Return a copy of the log without the files at these URIs."""
        fewer = copy.copy(self)
        fewer.files = [file for file in self.files if file.uri not in uris]
        return fewer


class EventLogFiles(Log):
    """Files of an event log (see `EventLog`)."""

    name: str

    def __init__(
        self, name: str, log: Log, *, skip_bad_files: bool = False, types: Mapping[str, str] | None = None
    ) -> None:
        """Read every file's footer and check columns and types.

        Args:
            name: Name of the event log.
            log: Interaction log, which sets `max_time` and the types of columns that both logs have.
            skip_bad_files: Whether to list unusable files in `skipped` instead of raising an error.
            types: Column -> name of the required type, by default the type in most files.

        Raises:
            BadFile: A file is unreadable, lacks a column or has an unexpected type.
            UserError: There is no usable file, or a column has another type in the interaction log.
        """
        self.name, self.schema, self.max_time = name, log.schema, log.max_time
        self.uses, self.source = event_column_uses(self.schema, name), self.schema.events[name].path
        self._open(f"data.events.{name}.path", skip_bad_files, types)
        for column, kind in self.types.items():
            if column in log.types and log.types[column] != kind and column != self.reader.time:
                raise UserError(
                    f"column '{column}' has the type {kind} in events '{name}', but {log.types[column]} in the log "
                    f"'{log.source}'. Write both with the same type."
                )


def no_usable_files_error(source: str, skipped: Sequence[SkippedFile]) -> UserError:
    """Return the error for a log without usable files.

    Args:
        source: Folder, file or glob of the log.
        skipped: Unusable files, at least one.
    """
    first = min(skipped, key=lambda file: file.uri)
    return UserError(f"the log '{source}' has no usable file among {len(skipped)}. The first problem: {first.reason}")


def read_piece(piece: Piece, uses: dict[str, ColumnUse], time_unit: str | None) -> Iterator[tuple[int, pa.Table]]:
    """Yield batches in canonical types, each after the number of its first row within the file.

    Args:
        piece: Row groups to read.
        uses: Columns to read and how to read them.
        time_unit: Unit of integer times, None if times are timestamps.

    Raises:
        BadFile: The file is damaged, has changed, or has values that can't be converted.
    """
    uri, path_columns = piece.uri, dict(piece.path_columns)
    in_file = [column for column in uses if column not in path_columns]
    coded = [column for column in in_file if uses[column] in ("key", "any")]
    with open_parquet(uri, coded) as parquet:
        row_group_sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
        rows = sum(row_group_sizes[group] for group in piece.groups if group < len(row_group_sizes))
        if rows != piece.rows or not set(in_file) <= set(parquet.schema_arrow.names):
            raise _changed(uri)
        start = sum(row_group_sizes[: piece.groups[0]])
        batches = parquet.iter_batches(READ_BATCH_ROWS, list(piece.groups), in_file, use_threads=False)
        while (batch := next_batch(batches, uri)) is not None:
            raw = {column: batch.column(column) for column in in_file}
            raw |= {column: pa.repeat(pa.scalar(value), batch.num_rows) for column, value in path_columns.items()}
            columns = {c: canonicalize_file_column(uri, c, use, raw[c], time_unit) for c, use in uses.items()}
            yield start, pa.table(columns)
            start += batch.num_rows


def _changed(uri: str) -> BadFile:
    return BadFile(f"'{uri}' has changed since the log was opened. Run the command again.", uri)
