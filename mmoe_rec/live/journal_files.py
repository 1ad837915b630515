"""What a journal holds as files of the logs: what counts of its rows, for `build`, `--extend` and training to read.

The rows between two cuts give at most one file a log, `journal-ID-POSITION.parquet` (see README.md). With the files a
refresh keeps, for each log, which rows came so far (a checkpoint). Several models may share a journal: a log goes on
from its own last checkpoint, whichever model's refresh kept it.
"""

from __future__ import annotations

import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt
import sqlalchemy as sql
from sqlalchemy.engine import Connection

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError, first_line
from mmoe_rec.live.duplicates import Duplicates, NewRows, find_uses
from mmoe_rec.live.journal import ABOUT, BATCHES, CHECKPOINTS, CUTS, STATES, Journal
from mmoe_rec.log.columns import canonical
from mmoe_rec.log.files import find_local, is_remote, local_path, split_glob, takes_in
from mmoe_rec.settings.columns import Use
from mmoe_rec.settings.schema import Schema

ROWS_OF_A_FILE = 2**20
_PART_BYTES = 2**26
_COLUMNS = b"mmoe_rec.columns"
"""Metadata of files of earlier versions, which hold only the columns that one model reads: a JSON list."""


@dataclass
class WrittenFiles:
    """files: those of the cuts, also those that were there; last_files: log -> the last cut that has a file; counts:
    log -> rows by what became of them; unknown: log of events that the schema does not have -> rows, which are in no
    file; early: rows left out by `later_than`."""

    files: list[Path] = field(default_factory=list)
    last_files: dict[str | None, int] = field(default_factory=dict)
    counts: dict[str | None, Counter[str]] = field(default_factory=dict)
    unknown: Mapping[str, int] = field(default_factory=dict)
    early: int = 0


def cut_journal(journal: Journal) -> int:
    """Cuts the journal after the last batch, and before that where a file would get too many rows; returns the last
    cut, 0 for none. Raises UserError where nothing can be appended."""
    place = BATCHES.c.position
    with journal.appending() as connection:
        last = connection.execute(sql.select(sql.func.max(CUTS.c.position))).scalar() or 0
        sizes = sql.select(place, BATCHES.c.rows).where(place > last).order_by(place)
        position, rows, cuts = last, 0, list[int]()
        for position, size in connection.execute(sizes):
            rows += size
            if rows >= ROWS_OF_A_FILE:
                cuts.append(position)
                rows = 0
        if rows:
            cuts.append(position)
        if cuts:
            connection.execute(sql.insert(CUTS), [{"position": each} for each in cuts])
        return int(position)


def write_files(
    journal: Journal, schema: Schema, through: int, log: str, after: int = 0, later_than: int | None = None
) -> WrittenFiles:
    """Writes the files of the cuts later than `after` up to `through`, and keeps a checkpoint there.

    log: where the interaction log is (`data.log`); other logs are where the schema has them (`events.NAME.path`);
    after: the last position whose rows the logs hold, 0 for none; files of logs of which no checkpoint is kept there
    are written of earlier cuts, too; later_than: leave out rows of this time (microseconds) and before, as a server
    does whose tables know nothing of the journal. Raises UserError where a place can't take files, a file that is there
    lacks columns, or the journal is damaged.
    """
    written, duplicates, uses = WrittenFiles(), Duplicates(schema), find_uses(schema)
    for cut, new in read_on(journal, duplicates, after, through):
        name = f"journal-{journal.id}-{cut:012d}.parquet"
        for source, rows in new.items():
            table = rows.table
            if later_than is not None:
                table = table.filter(pa.array(rows.rows(schema).times() > later_than))
            written.early += len(rows.table) - len(table)
            written.counts.setdefault(source, Counter()).update(rows.counts)
            if not table.num_rows:
                continue
            place = log if source is None else schema.events[source].path
            path = _find_folder(place, "data.log" if source is None else f"data.events.{source}.path", name) / name
            if path.exists():
                _check_columns(path, uses[source])
            else:
                _write(path, table, uses[source], _find_pattern(place), schema.columns.time_unit)
            written.files.append(path)
            written.last_files[source] = cut
    written.unknown = duplicates.unknown
    if through:
        _keep_checkpoint(journal, through, duplicates, written.last_files)
    return written


def read_on(
    journal: Journal, duplicates: Duplicates, after: int, through: int
) -> Iterator[tuple[int, dict[str | None, NewRows]]]:
    """Goes on after a position to another one: gives the rows that count up to each cut, and those up to the end.

    First come rows up to `after` that no checkpoint holds, such as those of a log that only other models than those
    refreshed so far have. duplicates: new; what is remembered of rows up to `after` is restored into it.

    Raises UserError where the journal is damaged.
    """
    with journal.reading() as connection:
        kept = {source: _restore(connection, journal, duplicates, source, after) for source in duplicates.sources}
        position, place = min(kept.values()), CUTS.c.position
        cuts = sql.select(place).where(place > position, place < through).order_by(place)
        ends = [*connection.execute(cuts).scalars(), through]
    for end in ends:
        parts = dict[str | None, list[NewRows]]()
        while batches := journal.read(position, through=end, leftovers=True):
            position = batches[-1].position
            new = duplicates.filter([each for each in batches if kept.get(each.source, after) < each.position])
            for source, rows in new.items():
                parts.setdefault(source, []).append(rows)
        yield end, {source: NewRows.join(several) for source, several in parts.items()}


def find_removed_logs(journal: Journal, schema: Schema, position: int) -> list[str | None]:
    """The schema's logs of which rows that count were removed from the journal after a position: tables that know the
    journal up to there lack them, but the logs' files hold them."""
    with journal.reading() as connection:
        removed = connection.execute(sql.select(ABOUT.c.removed)).scalar_one()
        if removed <= position:
            return []
        last = sql.select(CHECKPOINTS.c.log, sql.func.max(CHECKPOINTS.c.last_file))
        last = last.where(CHECKPOINTS.c.position <= removed).group_by(CHECKPOINTS.c.log)
        last_files = {each.log: each[1] for each in connection.execute(last)}
    return [source for source in (None, *schema.events) if last_files.get(source or "", 0) > position]


def remove_batches(journal: Journal, position: int) -> None:
    """Removes the batches up to a position of which files and a checkpoint hold what counts. Those of a log that no
    refreshed model has stay."""
    with journal.appending() as connection:
        latest = sql.select(CHECKPOINTS.c.log, sql.func.max(CHECKPOINTS.c.position))
        latest = latest.where(CHECKPOINTS.c.position <= position).group_by(CHECKPOINTS.c.log)
        for log, last in connection.execute(latest).all():
            connection.execute(sql.delete(BATCHES).where(BATCHES.c.log == log, BATCHES.c.position <= last))
            connection.execute(sql.delete(STATES).where(STATES.c.log == log, STATES.c.position < last))
        connection.execute(sql.update(ABOUT).where(ABOUT.c.removed < position).values(removed=position))


def _restore(
    connection: Connection, journal: Journal, duplicates: Duplicates, source: str | None, position: int
) -> int:
    """Restores a log's last checkpoint up to a position; returns its position, 0 for none."""
    log = source or ""
    last = sql.select(sql.func.max(CHECKPOINTS.c.position))
    kept = connection.execute(last.where(CHECKPOINTS.c.log == log, CHECKPOINTS.c.position <= position)).scalar()
    if kept is None:
        return 0
    of = STATES.c.log == log, STATES.c.position == kept
    parts = connection.execute(sql.select(STATES).where(*of).order_by(STATES.c.part)).all()
    try:
        if any(each.checksum != _checksum(kept, log, each.part, each.data) for each in parts):
            raise ValueError("a checksum is wrong")
        with np.load(io.BytesIO(b"".join(each.data for each in parts)), allow_pickle=False) as arrays:
            duplicates.restore(source, arrays)
    except (ValueError, KeyError, OSError, EOFError, BadZipFile):
        raise UserError(
            f"the journal '{journal.name}' is damaged at what it remembers of log '{log}' up to batch {kept}: restore "
            "its files from a copy"
        ) from None
    return int(kept)


def _keep_checkpoint(
    journal: Journal, position: int, duplicates: Duplicates, last_files: Mapping[str | None, int]
) -> None:
    for source in duplicates.sources:
        log, memory = source or "", io.BytesIO()
        np.savez(memory, **duplicates.to_arrays(source))  # type: ignore[arg-type]
        state = memory.getvalue()
        with journal.appending() as connection:
            last = sql.select(CHECKPOINTS).where(CHECKPOINTS.c.log == log, CHECKPOINTS.c.position == position)
            if connection.execute(last).first() is not None:  # another model's refresh has kept it
                continue
            connection.execute(sql.insert(CHECKPOINTS).values((position, log, last_files.get(source, 0))))
            for part, begin in enumerate(range(0, len(state), _PART_BYTES)):
                data = state[begin : begin + _PART_BYTES]
                checksum = _checksum(position, log, part, data)
                connection.execute(sql.insert(STATES).values((position, log, part, checksum, data)))


def _checksum(position: int, log: str, part: int, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(f"{position} {part} {log}".encode()))


def _find_folder(source: str, setting: str, name: str) -> Path:
    """The folder whose file of that name belongs to a log."""
    if is_remote(source):
        raise UserError(
            f"`{setting}` '{source}' is remote, where no journal's files can be written; use a local folder"
        )
    folder = Path(split_glob(local_path(source))[0])
    if folder.is_dir() and takes_in(source, [folder / name]):
        return folder
    raise UserError(
        f"`{setting}` '{source}' is no folder, and no pattern that takes in '{name}' in a folder: the journal's files "
        "would not belong to the log; set it to a folder"
    )


def _find_pattern(source: str) -> Mapping[str, pa.DataType]:
    """The columns and types of a log's first file that is none of a journal, else of its first one."""
    for path in sorted(find_local(local_path(source)), key=lambda path: (path.name.startswith("journal-"), str(path))):
        try:
            return {field.name: field.type for field in pq.read_schema(path)}
        except (pa.ArrowException, OSError):
            continue
    return {}


def _check_columns(path: Path, uses: Mapping[str, Use]) -> None:
    """Raises UserError for a file that an earlier version wrote for a model that reads fewer columns."""
    try:
        held = json.loads((pq.read_schema(path).metadata or {})[_COLUMNS])
    except (pa.ArrowException, OSError, KeyError):  # it holds all columns, or the build tells of it
        return
    if missing := sorted(uses.keys() - set(held)):
        raise UserError(
            f"'{path}' was written by an earlier version for a model that does not read the column '{missing[0]}', so "
            "values of it that callers sent are not in this file: run refresh without --journal once, which takes the "
            "file as it is, with nulls"
        )


def _write(
    path: Path, table: pa.Table, uses: Mapping[str, Use], pattern: Mapping[str, pa.DataType], unit: str | None
) -> None:
    columns = {name: pa.nulls(table.num_rows, kind) for name, kind in pattern.items()}
    for name in table.column_names:  # others than the pattern's are such as those in files' paths
        values = table.column(name).combine_chunks()
        columns[name] = _as_type(name, uses.get(name), values, pattern[name], unit) if name in pattern else values
    try:
        with atomic_file(path) as temporary:
            pq.write_table(pa.table(columns), temporary, compression="zstd")
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"'{path}' can't be written: {first_line(error)}") from None


def _as_type(name: str, use: Use | None, values: pa.Array, kind: pa.DataType, unit: str | None) -> pa.Array:
    """Canonical values in a file's type; as they are where that could not hold them, as both are read alike. use: None
    for a column that only other models read."""
    if pt.is_null(values.type):
        return pa.nulls(len(values), kind)
    if use is None and pt.is_timestamp(values.type):
        use = "time"
    try:
        given = values.cast(pa.timestamp(unit or "us", tz="UTC")) if use == "time" and pt.is_integer(kind) else values
        cast = given.cast(kind)
        again = cast.cast(values.type) if use is None else canonical(name, use, cast, unit)
        if again.equals(values):
            return cast
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UserError):
        pass
    return values
