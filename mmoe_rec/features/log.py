"""Reading an interaction log: Parquet files, checked against the schema before the first row is used.

A `Log` knows the files and cuts them into `LogPart`s; its `reader` reads any part, in this process or another.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Generic, NoReturn, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from mmoe_rec.errors import UserError
from mmoe_rec.features.columns import Use, canonical, column_uses, event_uses
from mmoe_rec.features.log_checks import (
    BadFile,
    LeftOut,
    LogFile,
    Partition,
    ValueCheck,
    Wrong,
    check_files,
    event_value_checks,
    format_time,  # noqa: F401 - offered here with what it describes
    log_value_checks,
    open_parquet,
)
from mmoe_rec.features.rows import MICROSECONDS_PER_DAY, LogRows
from mmoe_rec.files import FoundFile, find_files, first_line
from mmoe_rec.schema import EVENT, Schema

ROWS_AT_A_TIME = 131_072
ROWS_PER_PART = 262_144


@dataclass(frozen=True)
class Piece:
    """Consecutive row groups of one file, their rows, and the columns that stand in the file's path."""

    address: str
    groups: tuple[int, ...]
    partition: Partition
    rows: int


@dataclass(frozen=True)
class LogPart:
    """Consecutive rows of a log; `start` is the number of the first."""

    start: int
    rows: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class LogReader:
    """Reads parts of an interaction log; small and picklable.

    uses: columns to read, at least those of user and time; now: microseconds since 1970 UTC; requests after it are an
    error.
    """

    schema: Schema
    uses: dict[str, Use]
    now: int

    def read(self, part: LogPart) -> Iterator[LogRows]:
        """Batches of at most `ROWS_AT_A_TIME` rows in canonical types, with the values that features rely on checked.

        Raises:
            BadFile: a file is damaged, has changed, or holds values that can't be.
            UserError: a remote place can't be reached.
        """
        checks = [each for each in log_value_checks(self.schema, self.now) if each.column in self.uses]
        for table in _tables(part, self.uses, self.schema, checks):
            yield LogRows(table, self.schema)


@dataclass(frozen=True)
class EventReader:
    """Reads parts of a log of events; small and picklable."""

    name: str
    schema: Schema
    uses: dict[str, Use]
    now: int

    def read(self, part: LogPart) -> Iterator[LogRows]:
        """Batches of events, as rows of the task `EVENT` at the time of each event. Raises as `LogReader.read`."""
        time = self.schema.events[self.name].time
        for table in _tables(part, self.uses, self.schema, event_value_checks(time, self.now)):
            keys = {column: table.column(column) for column in self.uses if column != time}
            label = pa.array(np.ones(table.num_rows))
            named = {**keys, self.schema.columns.time: table.column(time), EVENT.label: label}
            yield LogRows(pa.table(named), self.schema)


Reader = TypeVar("Reader", LogReader, EventReader)


class _Files(Generic[Reader]):
    """Rows of files, read in parts. files: those that were checked; reader: what reads a part of them."""

    files: list[LogFile]
    reader: Reader

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(file.rows for file in self.files)

    def parts(self, rows_per_part: int = ROWS_PER_PART) -> list[LogPart]:
        """The files as parts of at least `rows_per_part` rows (but the last), at the borders of row groups."""
        return _parts(self.files, rows_per_part)

    def stream(self) -> Iterator[LogRows]:
        """All rows in order, see the reader."""
        for part in self.parts():
            yield from self.reader.read(part)


class Log(_Files[LogReader]):
    """The files of an interaction log. Opening it reads every file's footer and checks columns and types.

    Args:
        source: a folder of Parquet files, one file or a glob; a local path or an fsspec address.
        skip_bad_files: leave out files that can't be used, see `left_out`, instead of an error.
        left_out: files that are not even opened.
        now: microseconds since 1970 UTC; later requests are an error when read. By default in a day's time.

    Raises:
        BadFile: the first file that is unreadable, lacks a column or has another type than most.
        UserError: there is no log, it has no rows, or it can't be reached.
    """

    def __init__(
        self,
        source: str,
        schema: Schema,
        *,
        skip_bad_files: bool = False,
        left_out: Sequence[LeftOut] = (),
        now: int | None = None,
    ) -> None:
        self.source = source
        self.schema = schema
        self.uses = column_uses(schema)
        self.now = int(time.time() * 1e6) + MICROSECONDS_PER_DAY if now is None else now
        self.files, self.types, self.left_out = _open_files(
            source, find_files(source), self.uses, schema, skip_bad_files, left_out
        )
        if not self.rows:
            raise UserError(f"the log '{source}' has no rows")
        self.reader = LogReader(schema, self.uses, self.now)

    def digest(self) -> str:
        """A fingerprint of file names, sizes and row counts."""
        text = "\n".join(f"{PurePath(file.address).name} {file.bytes} {file.rows}" for file in self.files)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class EventRows(_Files[EventReader]):
    """The files of a further log of events, see `mmoe_rec.schema.EventLog`. Key columns must have the log's types.

    Args and errors: as `Log`, whose `now` it shares.
    """

    def __init__(self, name: str, log: Log, *, skip_bad_files: bool = False, left_out: Sequence[LeftOut] = ()) -> None:
        self.name, self.schema = name, log.schema
        self.time = self.schema.events[name].time
        self.uses = event_uses(self.schema, name)
        source = self.schema.events[name].path
        found = find_files(source, f"data.events.{name}.path")
        self.files, types, self.left_out = _open_files(source, found, self.uses, self.schema, skip_bad_files, left_out)
        for column, kind in types.items():
            if column in log.types and log.types[column] != kind and column != self.time:
                raise UserError(
                    f"column '{column}' is {kind} in events '{name}' and {log.types[column]} in log '{log.source}'; "
                    "write both with one type"
                )
        self.reader = EventReader(name, self.schema, self.uses, log.now)


def _open_files(
    source: str,
    found: Sequence[FoundFile],
    uses: dict[str, Use],
    schema: Schema,
    skip_bad_files: bool,
    left_out: Sequence[LeftOut],
) -> tuple[list[LogFile], dict[str, pa.DataType], list[LeftOut]]:
    not_opened = {each.address for each in left_out}
    wanted = [file for file in found if file.address not in not_opened]
    files, types, bad = check_files(wanted, uses, schema.columns.time_unit, skip_bad_files)
    if not files:
        first = min((*left_out, *bad), key=lambda each: each.address)
        raise UserError(f"none of the {len(found)} files of the log '{source}' can be used; the first: {first.reason}")
    return files, types, [*left_out, *bad]


def _parts(files: Sequence[LogFile], rows_per_part: int) -> list[LogPart]:
    parts: list[LogPart] = []
    pieces: list[Piece] = []
    start, rows = 0, 0

    def finish() -> None:
        nonlocal start, rows
        if pieces:
            parts.append(LogPart(start, rows, tuple(pieces)))
        pieces.clear()
        start, rows = start + rows, 0

    for file in files:
        groups: list[int] = []
        rows_before = rows
        for group, group_rows in enumerate(file.group_rows):
            if not group_rows:
                continue
            groups.append(group)
            rows += group_rows
            if rows >= rows_per_part:
                pieces.append(Piece(file.address, tuple(groups), file.partition, rows - rows_before))
                finish()
                groups, rows_before = [], 0
        if groups:
            pieces.append(Piece(file.address, tuple(groups), file.partition, rows - rows_before))
    finish()
    return parts


def _tables(part: LogPart, uses: dict[str, Use], schema: Schema, checks: Sequence[ValueCheck]) -> Iterator[pa.Table]:
    """Tables of canonical columns. Those of small files come together, so that a batch is worth its overhead."""
    waiting: list[pa.Table] = []
    for piece in part.pieces:
        for _, table in _piece_tables(piece, uses, schema.columns.time_unit):
            rows = LogRows(table, schema)
            for check in checks:
                if _is_wrong(rows, check, piece.address):
                    _raise_wrong(piece, check, uses, schema)
            if waiting and sum(each.num_rows for each in waiting) + table.num_rows > ROWS_AT_A_TIME:
                yield _together(waiting)
                waiting = []
            waiting.append(table)
    if waiting:
        yield _together(waiting)


def _together(tables: list[pa.Table]) -> pa.Table:
    if len(tables) == 1:
        return tables[0]
    return pa.concat_tables(tables, promote_options="default").combine_chunks()


def _piece_tables(piece: Piece, uses: dict[str, Use], time_unit: str | None) -> Iterator[tuple[int, pa.Table]]:
    """Batches in canonical types, each with the number of its first row within the file."""
    address, partition = piece.address, dict(piece.partition)
    in_file = [column for column in uses if column not in partition]
    coded = [column for column in in_file if uses[column] in ("key", "any")]
    with open_parquet(address, coded) as parquet:
        group_rows = [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
        there = sum(group_rows[group] for group in piece.groups if group < len(group_rows))
        if there != piece.rows or not set(in_file) <= set(parquet.schema_arrow.names):
            raise BadFile(f"'{address}' has changed since the log was opened; start again", address)
        start = sum(group_rows[: piece.groups[0]])
        batches = parquet.iter_batches(ROWS_AT_A_TIME, row_groups=list(piece.groups), columns=in_file)
        while (batch := _next(batches, address)) is not None:
            raw = {column: batch.column(column) for column in in_file}
            raw |= {column: pa.repeat(pa.scalar(value), batch.num_rows) for column, value in partition.items()}
            yield start, pa.table({c: _canonical(address, c, use, raw[c], time_unit, start) for c, use in uses.items()})
            start += batch.num_rows


def _next(batches: Iterator[pa.RecordBatch], address: str) -> pa.RecordBatch | None:
    try:
        return next(batches, None)
    except (pa.ArrowException, OSError) as error:
        raise BadFile(f"'{address}' is damaged: {first_line(error)}; write the file again", address) from None


def _canonical(address: str, column: str, use: Use, values: pa.Array, time_unit: str | None, start: int) -> pa.Array:
    try:
        return _valid(column, use, values, time_unit)
    except UserError as error:
        fine, wrong = 0, len(values)  # the first rows that can be read, and that can't
        while wrong - fine > 1:
            middle = (fine + wrong) // 2
            try:
                _valid(column, use, values[:middle], time_unit)
                fine = middle
            except UserError:
                wrong = middle
        raise BadFile(f"'{address}': {first_line(error)}{_first_row(start + fine)}", address) from None


def _valid(column: str, use: Use, values: pa.Array, time_unit: str | None) -> pa.Array:
    array = canonical(column, use, values, time_unit, coded=True)
    try:
        if pt.is_dictionary(array.type):
            return _with_valid_words(array)
        if array.type == pa.list_(pa.string()):
            array.validate(full=True)
    except pa.ArrowInvalid as error:
        raise UserError(f"column '{column}' holds text that is not UTF-8: {error}") from None
    return array


def _with_valid_words(array: pa.DictionaryArray) -> pa.DictionaryArray:
    try:
        array.dictionary.validate(full=True)
    except pa.ArrowInvalid:
        # The word may be one of other rows of the file.
        decoded = array.dictionary_decode()
        decoded.validate(full=True)
        return decoded.dictionary_encode()
    return array


def _is_wrong(rows: LogRows, check: ValueCheck, address: str) -> bool:
    try:
        return bool(check.wrong(check.values(rows)).any())
    except UserError as error:
        raise BadFile(f"'{address}': {error}", address) from None


def _raise_wrong(piece: Piece, check: ValueCheck, uses: dict[str, Use], schema: Schema) -> NoReturn:
    """Says how much of the whole file is wrong, however the log was cut into parts."""
    address, found = piece.address, Wrong()
    with open_parquet(address) as parquet:
        groups = tuple(range(parquet.metadata.num_row_groups))
        partition = tuple(pair for pair in piece.partition if pair[0] == check.column)
        whole = Piece(address, groups, partition, parquet.metadata.num_rows)
    for start, table in _piece_tables(whole, {check.column: uses[check.column]}, schema.columns.time_unit):
        values = check.values(LogRows(table, schema))
        found.add(values, check.wrong(values), start)
    raise BadFile(f"'{address}': {check.says(found)}{_first_row(found.row)}", address)


def _first_row(row: int) -> str:
    return f" (the first is row {row} of the file, counted from 0)"
