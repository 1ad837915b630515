"""Reading an interaction log: Parquet files, checked against the schema before the first row is used.

A `Log` knows the files and cuts them into `LogPart`s; its `reader` reads any part, in this process or another.
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
    """Consecutive row groups of one file, their number of rows, and the columns in the file's path."""

    uri: str
    groups: tuple[int, ...]
    path_columns: PathColumns
    rows: int


@dataclass(frozen=True)
class LogPart:
    """Consecutive rows of a log; `start` is the number of the first."""

    start: int
    rows: int
    pieces: tuple[Piece, ...]


def split_into_parts(files: Sequence[LogFile], rows_per_part: int) -> list[LogPart]:
    """The files as parts of at least `rows_per_part` rows (except the last), cut between row groups."""
    parts: list[LogPart] = []
    groups: list[tuple[LogFile, int]] = []
    start, rows = 0, 0
    for file, group in [(each, number) for each in files for number, count in enumerate(each.row_group_sizes) if count]:
        groups.append((file, group))
        rows += file.row_group_sizes[group]
        if rows >= rows_per_part:
            parts.append(LogPart(start, rows, _pieces_of(groups)))
            groups, start, rows = [], start + rows, 0
    return [*parts, LogPart(start, rows, _pieces_of(groups))] if groups else parts


def _pieces_of(groups: Sequence[tuple[LogFile, int]]) -> tuple[Piece, ...]:
    pieces = []
    for file, its in groupby(groups, key=lambda group: group[0]):
        numbers = tuple(number for _, number in its)
        pieces.append(
            Piece(file.uri, numbers, file.path_columns, sum(file.row_group_sizes[number] for number in numbers))
        )
    return tuple(pieces)


READ_BATCH_ROWS = 131_072
ROWS_PER_PART = 262_144


@dataclass(frozen=True)
class LogReader:
    """Reads parts of an interaction log, or of a log of events; small and picklable.

    uses: columns to read, at least those of user and time; now: microseconds since 1970 UTC; later times are an error;
    events: name of the log of events, None for the interaction log;
    time_overrides: Parquet file of each `row` that gets the `time` of its request, rising by row (see
    `mmoe_rec.preprocessing.request_times`); None: rows have their own times; repeats: Parquet file of each `row` that
    does not count, None for none.
    """

    schema: Schema
    uses: dict[str, ColumnUse]
    max_time: int
    events: str | None = None
    time_overrides: Path | None = None
    excluded_rows: Path | None = None

    @property
    def time(self) -> str:
        """The column with the rows' time."""
        return self.schema.columns.time if self.events is None else self.schema.events[self.events].time

    @property
    def checks(self) -> list[ValueCheck]:
        """What the values must hold."""
        if self.events is not None:
            return event_value_checks(self.time, self.max_time)
        return [each for each in log_value_checks(self.schema, self.max_time) if each.column in self.uses]

    def read(self, part: LogPart, spans: dict[str, tuple[int, int]] | None = None) -> Iterator[LogRows]:
        """Batches of at most `READ_BATCH_ROWS` rows in canonical types, with the values that features rely on checked;
        events as rows of the task `EVENT_TASK` at the time of each event.

        spans: gets file -> first and last time of its rows, microseconds.

        Raises BadFile for a damaged, changed or invalid file, and UserError where a remote place can't be reached.
        """
        row, (excluded_rows,) = part.start, _read_columns(self.excluded_rows, part, "row")
        # Rows of the part, rising, and the time that each has instead of its own.
        moved, time = _read_columns(self.time_overrides, part, "row", "time")
        # Those of small files are joined, so that a batch is worth its overhead.
        tables = (table for piece in part.pieces for table in self._checked(piece, spans))
        for table in rebatch(tables, READ_BATCH_ROWS):
            if self.events is not None:
                yield event_rows(table, self.schema, self.events)
                continue
            numbers = row + np.arange(len(table))
            rows = LogRows(add_missing_ids(table, self.schema, row), self.schema, row_numbers=numbers)
            here = slice(*np.searchsorted(moved, [row, row + len(table)]))
            if len(moved[here]):
                times = rows.times().copy()
                times[moved[here] - row] = time[here]
                rows = rows.with_times(times)
            row += len(table)
            if len(counted := rows.filter(~np.isin(numbers, excluded_rows))):
                yield counted

    def _checked(self, piece: Piece, spans: dict[str, tuple[int, int]] | None) -> Iterator[pa.Table]:
        """Tables of canonical columns."""
        checks = self.checks
        for start, table in read_piece(piece, self.uses, self.schema.columns.time_unit):
            rows = LogRows(table, self.schema)
            for check in checks:
                try:
                    wrong = check.find(rows)
                except UserError as error:
                    raise BadFile(f"'{piece.uri}': {error}", piece.uri) from None
                if wrong is not None:
                    row, what = wrong
                    raise BadFile(f"'{piece.uri}': {what}{describe_row(start + row)}", piece.uri)
            timed = add_missing_times(table, self.schema)
            if spans is not None and len(times := LogRows(timed, self.schema).times(self.time)):
                first, last = int(times.min()), int(times.max())
                before = spans.get(piece.uri, (first, last))
                spans[piece.uri] = min(first, before[0]), max(last, before[1])
            yield timed


def find_bad_file(task: tuple[LogReader, Piece]) -> BadFile | None:
    """Read a piece of a file to its end. Returns what is wrong with the file, None for nothing."""
    reader, piece = task
    try:
        for _ in reader.read(LogPart(0, piece.rows, (piece,))):
            pass
    except BadFile as fault:
        return fault
    return None


def _read_columns(path: Path | None, part: LogPart, *names: str) -> list[np.ndarray]:
    """Columns of a Parquet file of each `row`, as far as these are of a part; of no file, empty ones."""
    if path is None:
        return [np.empty(0, np.int64) for _ in names]
    inside = [("row", ">=", part.start), ("row", "<", part.start + part.rows)]
    return [column.to_numpy() for column in pq.read_table(path, columns=list(names), filters=inside).columns]


def event_rows(table: pa.Table, schema: Schema, name: str) -> LogRows:
    """Canonical columns of the log of events of that name, as far as they were read, as rows of the task `EVENT_TASK`
    at the time of each event."""
    time = schema.events[name].time
    uses = [column for column in event_column_uses(schema, name) if column != time]
    keys = {column: table.column(column) for column in uses if column in table.column_names}
    label = pa.array(np.ones(table.num_rows))
    return LogRows(pa.table({**keys, schema.columns.time: table.column(time), EVENT_TASK.label: label}), schema)


class Log:
    """The files of an interaction log.

    Attributes:
        name: Name of a log of events, None for the interaction log.
        found: All files that are there.
        files: The files that can be used.
        types: Types of their columns.
        reader: Reads a part of them.
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
            source: A folder of Parquet files, one file or a glob, as a local path or an fsspec address.
            schema: Schema of the log.
            skip_bad_files: Whether to list unusable files in `skipped` instead of raising an error.
            types: Required types of columns, in words. By default the types of most files.
            now: Microseconds since 1970 UTC. Reading a later request is an error. By default a day from now.
            more: Further columns that all files must have, and how to read them.

        Raises:
            BadFile: A file is unreadable, lacks a column or has another type than most. The first such file is named.
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
        """Rows of all files."""
        return sum(file.rows for file in self.files)

    def parts(self, rows_per_part: int = ROWS_PER_PART) -> list[LogPart]:
        """The files as parts of at least `rows_per_part` rows (except the last), cut between row groups."""
        return split_into_parts(self.files, rows_per_part)

    def stream(self) -> Iterator[LogRows]:
        """All rows in order, see the reader."""
        for part in self.parts():
            yield from self.reader.read(part)

    def check_unchanged(self) -> None:
        """Raises BadFile where a file has been written again since the log was opened; one that is gone passes."""
        now = {file.uri: (file.bytes, file.version) for file in find_files(self.source)}
        for file in self.files:
            if now.get(file.uri, (file.bytes, file.version)) != (file.bytes, file.version):
                raise _changed(file.uri)

    def pieces(self, reader: LogReader | None = None) -> list[tuple[LogReader, Piece]]:
        """Every piece of all files, with its reader, by default the log's own: tasks of `find_bad_file`."""
        return [(reader or self.reader, piece) for part in self.parts() for piece in part.pieces]

    def without_bad_files(self, faults: Iterable[BadFile | None]) -> Self:
        """The same log with further files left out, each with its first fault. Types stay those of all files."""
        bad = {fault.uri: str(fault) for fault in reversed(list(faults)) if fault is not None}
        fewer = self.without_files(bad)
        more = [SkippedFile(f.uri, f.bytes, f.version, bad[f.uri]) for f in self.files if f.uri in bad]
        fewer.skipped = [*self.skipped, *more]
        return fewer

    def without_files(self, addresses: Collection[str]) -> Self:
        """The same log without the files at these addresses."""
        fewer = copy.copy(self)
        fewer.files = [file for file in self.files if file.uri not in addresses]
        return fewer


class EventLogFiles(Log):
    """The files of a further log of events, see `EventLog`, with the `max_time` of the interaction log, whose types its
    key columns must have. Errors are those of `Log`."""

    name: str

    def __init__(
        self, name: str, log: Log, *, skip_bad_files: bool = False, types: Mapping[str, str] | None = None
    ) -> None:
        self.name, self.schema, self.max_time = name, log.schema, log.max_time
        self.uses, self.source = event_column_uses(self.schema, name), self.schema.events[name].path
        self._open(f"data.events.{name}.path", skip_bad_files, types)
        for column, kind in self.types.items():
            if column in log.types and log.types[column] != kind and column != self.reader.time:
                raise UserError(
                    f"column '{column}' is {kind} in events '{name}' and {log.types[column]} in log '{log.source}'; "
                    "write both with one type"
                )


def no_usable_files_error(source: str, skipped: Sequence[SkippedFile]) -> UserError:
    """The error when all files of a log are left out."""
    first = min(skipped, key=lambda each: each.uri)
    return UserError(f"none of the {len(skipped)} files of the log '{source}' can be used; the first: {first.reason}")


def read_piece(piece: Piece, uses: dict[str, ColumnUse], time_unit: str | None) -> Iterator[tuple[int, pa.Table]]:
    """Batches in canonical types, each with the number of its first row within the file. Raises BadFile."""
    uri, path_columns = piece.uri, dict(piece.path_columns)
    in_file = [column for column in uses if column not in path_columns]
    coded = [column for column in in_file if uses[column] in ("key", "any")]
    with open_parquet(uri, coded) as parquet:
        row_group_sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
        there = sum(row_group_sizes[group] for group in piece.groups if group < len(row_group_sizes))
        if there != piece.rows or not set(in_file) <= set(parquet.schema_arrow.names):
            raise _changed(uri)
        start = sum(row_group_sizes[: piece.groups[0]])
        batches = parquet.iter_batches(READ_BATCH_ROWS, list(piece.groups), in_file, use_threads=False)
        while (batch := next_batch(batches, uri)) is not None:
            raw = {column: batch.column(column) for column in in_file}
            raw |= {column: pa.repeat(pa.scalar(value), batch.num_rows) for column, value in path_columns.items()}
            yield (
                start,
                pa.table({c: canonicalize_file_column(uri, c, use, raw[c], time_unit) for c, use in uses.items()}),
            )
            start += batch.num_rows


def _changed(uri: str) -> BadFile:
    return BadFile(f"'{uri}' has changed since the log was opened; start again", uri)
