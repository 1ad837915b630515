"""What a journal holds as files of the logs: what counts of its rows, for `build`, `--extend` and training to read.

A refresh cuts the journal: it notes the position of the last batch. The rows between two cuts give at most one file a
log, `journal-ID-POSITION.parquet`, with the columns and types of the log's other files; a file that is there stays.
With the files it keeps, for each log, which rows came so far (a checkpoint), so that batches can be removed. Several
models may share a journal: a log goes on from its own last checkpoint, whichever model's refresh kept it.
"""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt
import sqlalchemy as sql
from sqlalchemy.engine import Connection

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError
from mmoe_rec.live.duplicates import FORGET_AFTER_DAYS, Counts, Duplicates, NewRows
from mmoe_rec.live.journal import ABOUT, BATCHES, CHECKPOINTS, CUTS, STATES, Batch, Journal
from mmoe_rec.log.columns import canonical, column_uses, event_uses
from mmoe_rec.log.files import MAGIC, find_local, is_remote, local_path, would_find
from mmoe_rec.settings.columns import Use
from mmoe_rec.settings.schema import Schema

ROWS_OF_A_FILE = 2**20
_PART_BYTES = 2**26
_NAME = re.compile(r"journal-([0-9a-f]{32})-([0-9]+)\.parquet")
_COLUMNS = b"mmoe_rec.columns"
"""Metadata of a file: the columns that the model read for which it was written, as a JSON list; others are null."""


@dataclass(frozen=True)
class Written:
    """files: those of the cuts, also those that were there; counts: log -> rows by what became of them; unknown: log of
    events that the schema does not have -> rows, which are in no file; early: rows left out by `later_than`."""

    files: list[Path]
    counts: Mapping[str | None, Counts]
    unknown: Mapping[str, int]
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
    journal: Journal,
    schema: Schema,
    through: int,
    log: str,
    after: int = 0,
    forget_after_days: int = FORGET_AFTER_DAYS,
    later_than: int | None = None,
) -> Written:
    """Writes the files of the cuts later than `after` up to `through`, and keeps a checkpoint there.

    Args:
        after: the last position whose rows the logs hold, 0 for none; files of logs of which no checkpoint is kept
            there are written of earlier cuts, too.
        log: where the interaction log is (`data.log`); other logs are where the schema has them (`events.NAME.path`).
        later_than: leave out rows of this time (microseconds) and before, as a server does whose tables know nothing
            of the journal.

    Raises:
        UserError: a place can't take files, or the journal is damaged.
    """
    writing = _Writing(journal.id, schema, log, later_than)
    duplicates = duplicates_at(journal, schema, after, forget_after_days, missing=writing.add)
    for cut, batches in _read_by_cuts(journal, after, through):
        writing.add(cut, duplicates.filter(batches))
    writing.flush()
    if through:
        _keep_checkpoint(journal, through, duplicates, writing.last_files)
    return Written(writing.files, writing.counts, duplicates.unknown, writing.early)


def duplicates_at(
    journal: Journal,
    schema: Schema,
    position: int,
    forget_after_days: int = FORGET_AFTER_DAYS,
    missing: Callable[[int, Mapping[str | None, NewRows]], None] | None = None,
) -> Duplicates:
    """What is remembered of the rows up to a position.

    missing: is given, with their cut, the rows up to there that no checkpoint holds, such as those of a log that only
    other models than those refreshed so far have.

    Raises UserError where the journal is damaged.
    """
    duplicates = Duplicates(schema, forget_after_days)
    with journal.reading() as connection:
        kept = {source: _restore(connection, journal, duplicates, source, position) for source in duplicates.sources}
    for cut, batches in _read_by_cuts(journal, min(kept.values()), position):
        rows = duplicates.filter([each for each in batches if kept.get(each.source, position) < each.position])
        if missing is not None:
            missing(cut, rows)
    return duplicates


def logs_beyond(journal: Journal, schema: Schema, position: int) -> list[str | None]:
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


def _read_by_cuts(journal: Journal, after: int, through: int) -> Iterator[tuple[int, list[Batch]]]:
    """Batches after a position, each with the first cut that is not before it."""
    with journal.reading() as connection:
        place = CUTS.c.position
        cuts = sql.select(place).where(place > after, place < through).order_by(place)
        ends = [*connection.execute(cuts).scalars(), through]
    for end in ends:
        while batches := journal.read(after, through=end, leftovers=True):
            after = batches[-1].position
            yield end, batches
        after = max(after, end)


def _restore(
    connection: Connection, journal: Journal, duplicates: Duplicates, source: str | None, position: int
) -> int:
    """Restores a log's last checkpoint up to a position whose state is there; returns its position, 0 for none."""
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
        parts = [state[begin : begin + _PART_BYTES] for begin in range(0, len(state), _PART_BYTES)]
        with journal.appending() as connection:
            of = CHECKPOINTS.c.log == log
            before = sql.select(sql.func.max(CHECKPOINTS.c.position), sql.func.max(CHECKPOINTS.c.last_file))
            last, file = connection.execute(before.where(of, CHECKPOINTS.c.position <= position)).one()
            if last == position:  # another model's refresh has kept it
                continue
            last_file = max(file or 0, last_files.get(source, 0))
            connection.execute(sql.insert(CHECKPOINTS).values(position=position, log=log, last_file=last_file))
            for part, data in enumerate(parts):
                checksum = _checksum(position, log, part, data)
                row = {"position": position, "log": log, "part": part, "checksum": checksum, "data": data}
                connection.execute(sql.insert(STATES).values(**row))


def _checksum(position: int, log: str, part: int, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(f"{position} {part} {log}".encode()))


def check_columns(journal: str, schema: Schema, log: str, held: Mapping[str | None, int]) -> None:
    """Raises UserError where files of a journal, by its id, lack columns that a model reads, as the refresh of another
    model wrote them.

    held: log -> the last cut whose file the model's tables hold; only later ones are looked at.
    """
    for source, (_, place) in _places(schema, log).items():
        for path in [] if is_remote(place) else find_local(local_path(place))[0]:
            named = _NAME.fullmatch(path.name)
            if named is None or named[1] != journal or int(named[2]) <= held.get(source, 0):
                continue
            try:
                written = json.loads((pq.read_schema(path).metadata or {})[_COLUMNS])
            except (pa.ArrowException, OSError, KeyError):  # it is of an earlier version, or the build tells of it
                continue
            if missing := sorted(_uses(schema)[source].keys() - set(written)):
                raise UserError(
                    f"'{path}' was written by the refresh of a model that does not read the column '{missing[0]}', so "
                    "values of it that callers sent are not in this file: models that share a journal must read the "
                    "same columns; where no caller sent the column then, as it is new, run refresh without --journal "
                    "once, which takes the file as it is, with nulls"
                )


def _uses(schema: Schema) -> dict[str | None, dict[str, Use]]:
    """Log -> its columns."""
    uses: dict[str | None, dict[str, Use]] = {None: column_uses(schema)}
    return uses | {name: event_uses(schema, name) for name in schema.events}


def _places(schema: Schema, log: str) -> dict[str | None, tuple[str, str]]:
    """Log -> the setting that says where it is, and its value."""
    places: dict[str | None, tuple[str, str]] = {None: ("data.log", log)}
    return places | {name: (f"data.events.{name}.path", each.path) for name, each in schema.events.items()}


class _Writing:
    """Writes the rows that it is given, cut after cut, into one file for each cut and log.

    files: also those that were there; last_files: log -> the last cut that has a file.
    """

    def __init__(
        self,
        journal: str,
        schema: Schema,
        log: str,
        later_than: int | None,
    ) -> None:
        self._journal, self._schema, self._later_than = journal, schema, later_than
        self._uses, self._places = _uses(schema), _places(schema, log)
        self._cut, self._tables = 0, dict[str | None, list[pa.Table]]()
        self.files, self.counts, self.early = list[Path](), dict[str | None, Counts](), 0
        self.last_files: dict[str | None, int] = {}

    def add(self, cut: int, new: Mapping[str | None, NewRows]) -> None:
        """Takes rows up to a cut that is not earlier than the one before."""
        if cut != self._cut:
            self.flush()
            self._cut = cut
        for source, rows in new.items():
            later = _later(rows, self._schema, self._later_than)
            self.early += len(rows.table) - len(later)
            self._tables.setdefault(source, []).append(later)
            self.counts.setdefault(source, Counts()).add(rows.counts)

    def flush(self) -> None:
        """Writes what it was given."""
        name = f"journal-{self._journal}-{self._cut:012d}.parquet"
        for source, tables in self._tables.items():
            table = pa.concat_tables(tables, promote_options="default").combine_chunks()
            if not table.num_rows:
                continue
            setting, place = self._places[source]
            path = _folder(place, setting, name) / name
            if not path.exists():
                _write(path, table, self._uses[source], _pattern(place), self._schema.columns.time_unit)
            self.files.append(path)
            self.last_files[source] = self._cut
        self._tables = {}


def _later(new: NewRows, schema: Schema, moment: int | None) -> pa.Table:
    if moment is None:
        return new.table
    return new.table.filter(pa.array(new.rows(schema).times() > moment))


def _folder(source: str, setting: str, name: str) -> Path:
    """The folder whose file of that name belongs to a log."""
    if is_remote(source):
        raise UserError(
            f"`{setting}` '{source}' is remote, where no journal's files can be written; use a local folder"
        )
    path = Path(local_path(source))
    if path.is_dir():
        return path
    fixed = list(takewhile(lambda part: not MAGIC & set(part), path.parts))
    folder = Path(*fixed)
    if len(fixed) < len(path.parts) and folder.is_dir() and would_find(str(path), [folder / name]):
        return folder
    raise UserError(
        f"`{setting}` '{source}' is no folder, and no pattern that takes in '{name}' in a folder: the journal's files "
        "would not belong to the log; set it to a folder"
    )


def _pattern(source: str) -> pa.Schema | None:
    """The columns and types of a log's first file that is none of a journal, else of its first one; None: no file."""
    found, _ = find_local(local_path(source))
    for path in sorted(found, key=lambda path: (path.name.startswith("journal-"), str(path))):
        try:
            return pq.read_schema(path)
        except (pa.ArrowException, OSError):
            continue
    return None


def _write(path: Path, table: pa.Table, uses: Mapping[str, Use], pattern: pa.Schema | None, unit: str | None) -> None:
    columns = pa.table(dict(_columns(table, uses, pattern, unit)))
    columns = columns.replace_schema_metadata({_COLUMNS: json.dumps(sorted(uses))})
    try:
        with atomic_file(path) as temporary:
            pq.write_table(columns, temporary, compression="zstd")
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"'{path}' can't be written: {str(error).splitlines()[0]}") from None


def _columns(
    table: pa.Table, uses: Mapping[str, Use], pattern: pa.Schema | None, unit: str | None
) -> Iterator[tuple[str, pa.Array]]:
    fields = {} if pattern is None else {field.name: field.type for field in pattern}
    for name, kind in fields.items():
        if name in uses:
            yield name, _as_type(name, uses[name], table.column(name).combine_chunks(), kind, unit)
        else:
            yield name, pa.nulls(table.num_rows, kind)
    for name in [each for each in uses if each not in fields]:  # such as those in the paths of a log's files
        yield name, table.column(name).combine_chunks()


def _as_type(name: str, use: Use, values: pa.Array, kind: pa.DataType, unit: str | None) -> pa.Array:
    """Canonical values in a file's type; as they are where that could not hold them, as both are read alike."""
    if pt.is_null(values.type):
        return pa.nulls(len(values), kind)
    try:
        given = values.cast(pa.timestamp(unit or "us", tz="UTC")) if use == "time" and pt.is_integer(kind) else values
        cast = given.cast(kind)
        if canonical(name, use, cast, unit).equals(values):
            return cast
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UserError):
        pass
    return values
