"""Reading an interaction log: Parquet files, checked against the schema before the first row is used."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.errors import UserError
from mmoe_rec.features.columns import Use, canonical, canonical_type, column_uses, event_uses
from mmoe_rec.features.rows import LogRows
from mmoe_rec.schema import EVENT, Schema

ROWS_AT_A_TIME = 131_072


@dataclass(frozen=True)
class LogFile:
    """One Parquet file of a log."""

    path: Path
    rows: int
    bytes: int


class Log:
    """The files of an interaction log. Opening it reads every file's footer and checks columns and types."""

    def __init__(self, source: str, schema: Schema) -> None:
        self.source = source
        self.schema = schema
        self.uses = column_uses(schema)
        self.files, self.types = _check_files(find_files(source), self.uses, schema.columns.time_unit)
        if not any(file.rows for file in self.files):
            raise UserError(f"the log '{source}' has no rows")

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(file.rows for file in self.files)

    def last_time(self) -> int:
        """Time of the last request, microseconds since 1970 UTC."""
        time = self.schema.columns.time
        tables = (t for f in self.files for t in _read(f.path, {time: "time"}, self.schema.columns.time_unit))
        return max(int(LogRows(table, self.schema).times().max()) for table in tables if table.num_rows)

    def digest(self) -> str:
        """A fingerprint of file names, sizes and row counts."""
        text = "\n".join(f"{file.path.name} {file.bytes} {file.rows}" for file in self.files)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def stream(self) -> Iterator[LogRows]:
        """Batches of rows in canonical types, file by file; the values that features rely on are checked."""
        for file in self.files:
            for table in _read(file.path, self.uses, self.schema.columns.time_unit):
                rows = LogRows(table, self.schema)
                _check_values(rows, file.path)
                yield rows


class EventRows:
    """The files of a further log of events, see `mmoe_rec.schema.EventLog`. Key columns must have the log's types."""

    def __init__(self, name: str, log: Log) -> None:
        self.name, self.schema = name, log.schema
        self.time = self.schema.events[name].time
        self.uses = event_uses(self.schema, name)
        paths = find_files(self.schema.events[name].path, f"data.events.{name}.path")
        self.files, types = _check_files(paths, self.uses, self.schema.columns.time_unit)
        for column, kind in types.items():
            if column in log.types and log.types[column] != kind and column != self.time:
                raise UserError(
                    f"column '{column}' is {kind} in events '{name}' and {log.types[column]} in log '{log.source}'; "
                    "write both with one type"
                )

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(file.rows for file in self.files)

    def stream(self) -> Iterator[LogRows]:
        """Batches of events, as rows of the task `EVENT` at the time of each event."""
        for file in self.files:
            for table in _read(file.path, self.uses, self.schema.columns.time_unit):
                if nulls := table.column(self.time).null_count:
                    raise UserError(
                        f"'{file.path}': column '{self.time}' is null in {nulls} rows; every event needs a time"
                    )
                keys = {column: table.column(column) for column in self.uses if column != self.time}
                label = pa.array(np.ones(table.num_rows))
                named = {**keys, self.schema.columns.time: table.column(self.time), EVENT.label: label}
                yield LogRows(pa.table(named), self.schema)


def find_files(source: str, setting: str = "data.log") -> list[Path]:
    """Parquet files of a folder (also nested), a glob or a single path, in the order of their names."""
    path = Path(source)
    if path.is_dir():
        found = [file for file in path.rglob("*.parquet") if not _is_hidden(file.relative_to(path))]
    elif path.is_file():
        found = [path]
    else:
        found = [Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file()]
    if not found:
        what = "holds no *.parquet file" if path.is_dir() else "does not exist"
        raise UserError(f"the log '{source}' {what}; set `{setting}` to a folder, file or glob of Parquet files")
    return sorted(found)


def _is_hidden(path: Path) -> bool:
    """Whether a file is one that writers leave behind: `_temporary/...`, `.log.1a2b.tmp/...`; not Hive's `__`."""
    return path.name.startswith((".", "_")) or any(part.startswith(".") or part == "_temporary" for part in path.parts)


def _check_files(
    paths: list[Path], uses: dict[str, Use], time_unit: str | None
) -> tuple[list[LogFile], dict[str, pa.DataType]]:
    """The files, and each column's canonical type (none for a column that is null everywhere)."""
    first_seen: dict[str, tuple[pa.DataType, Path]] = {}
    files = []
    for path in paths:
        parquet = _open(path)
        arrow = parquet.schema_arrow
        for column, use in uses.items():
            if column not in arrow.names:
                raise UserError(f"'{path}' has no column '{column}'; it has {', '.join(sorted(arrow.names))}")
            if arrow.names.count(column) > 1:
                raise UserError(
                    f"'{path}' has {arrow.names.count(column)} columns called '{column}'; rename all but one"
                )
            try:
                kind = canonical_type(column, use, arrow.field(column).type, time_unit)
            except UserError as error:
                raise UserError(f"'{path}': {error}") from None
            if pa.types.is_null(kind):
                continue
            known, where = first_seen.setdefault(column, (kind, path))
            if known != kind:
                raise UserError(
                    f"column '{column}' changes its type: {known} in '{where}', {kind} in '{path}'; "
                    "write all files with one type"
                )
        files.append(LogFile(path, parquet.metadata.num_rows, path.stat().st_size))
        parquet.close()
    return files, {column: kind for column, (kind, _) in first_seen.items()}


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, pa.ArrowException, OSError) as error:
        raise UserError(
            f"'{path}' is not a readable Parquet file: {_first_line(error)}; write it again, or move it out of the log"
        ) from None


def _read(path: Path, uses: dict[str, Use], time_unit: str | None) -> Iterator[pa.Table]:
    parquet = _open(path)
    try:
        for batch in parquet.iter_batches(ROWS_AT_A_TIME, columns=list(uses)):
            raw = pa.table(batch)
            yield pa.table({c: canonical(c, use, raw.column(c), time_unit) for c, use in uses.items()})
    except UserError as error:
        raise UserError(f"'{path}': {error}") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"'{path}' is damaged: {_first_line(error)}; write the file again") from None
    finally:
        parquet.close()


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _check_values(rows: LogRows, path: Path) -> None:
    columns = rows.schema.columns
    for column in filter(None, (columns.user, columns.candidate, columns.time, columns.request)):
        nulls = rows.column(column).null_count
        if nulls:
            raise UserError(f"'{path}': column '{column}' is null in {nulls} rows; every row needs one")
    if columns.sampling_rate is not None:
        rates = rows.numbers(columns.sampling_rate)
        wrong = rates[~((rates > 0) & (rates <= 1))]
        if len(wrong):
            raise UserError(
                f"'{path}': column '{columns.sampling_rate}' holds {'null' if np.isnan(wrong[0]) else f'{wrong[0]:g}'} "
                f"({len(wrong)} rows are not above 0 and at most 1); fix the data or remove columns.sampling_rate"
            )
    for name, task in rows.schema.tasks.items():
        labels = rows.numbers(task.label)
        if task.kind == "regression" and np.isinf(labels).any():
            raise UserError(
                f"'{path}': label column '{task.label}' of task '{name}' holds an infinite value; make it null"
            )
        if task.kind == "binary":
            wrong = labels[~np.isnan(labels) & (labels != 0) & (labels != 1)]
            if len(wrong):
                raise UserError(
                    f"'{path}': label column '{task.label}' of binary task '{name}' holds {wrong[0]:g} "
                    f"({len(wrong)} rows are neither 0 nor 1); fix the data or set the task's kind to regression"
                )


def format_time(microseconds: int) -> str:
    """A time as ISO 8601 in UTC, for messages."""
    return f"{np.datetime64(microseconds // 1_000_000, 's')}+00:00"
