"""What a journal holds as files of the logs: what counts of its rows, for `build`, `--extend` and training to read.

The rows between two cuts give at most one file a log, `journal-ID-POSITION.parquet` (see README.md). Several models may
share a journal: the journal says of each log up to where files hold it, whichever model's refresh wrote them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt
import sqlalchemy as sql

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError, first_line
from mmoe_rec.live.journal import Journal
from mmoe_rec.live.journal_rows import JournalRows, find_uses
from mmoe_rec.live.journal_tables import ABOUT, BATCHES, CUTS, LOGS, add_log
from mmoe_rec.live.row_keys import forget_keys
from mmoe_rec.log.columns import canonical
from mmoe_rec.log.files import find_local, is_remote, local_path, split_glob, takes_in
from mmoe_rec.settings.columns import Use
from mmoe_rec.settings.schema import Schema

ROWS_OF_A_FILE = 2**20


@dataclass
class WrittenFiles:
    """files: those of the cuts, also those that were there; counts: log -> rows by outcome; unknown: log of events that
    the schema does not have -> rows, which are in no file; early: rows left out by `later_than`."""

    files: list[Path] = field(default_factory=list)
    counts: dict[str | None, Counter[str]] = field(default_factory=dict)
    unknown: Mapping[str, int] = field(default_factory=dict)
    early: int = 0


def cut_journal(journal: Journal) -> int:
    """Cuts the journal after the last batch, and before that where a file would get too many rows; returns the last
    cut, 0 for none. Keys of rows of long ago are forgotten. Raises UserError where nothing can be appended."""
    place = BATCHES.c.position
    with journal.appending() as connection:
        forget_keys(connection, time.time_ns() // 1_000)
        last = connection.execute(sql.select(sql.func.max(CUTS.c.position))).scalar() or 0
        sizes = sql.select(place, BATCHES.c.rows).where(place > last).order_by(place)
        position, rows, cuts, is_new = last, 0, list[int](), False
        for position, size in connection.execute(sizes):
            rows, is_new = rows + size, True
            if rows >= ROWS_OF_A_FILE:
                cuts.append(position)
                rows, is_new = 0, False
        if is_new:
            cuts.append(position)
        if cuts:
            connection.execute(sql.insert(CUTS), [{"position": each} for each in cuts])
        return int(position)


def write_files(
    journal: Journal, schema: Schema, through: int, log: str, after: int = 0, later_than: int | None = None
) -> WrittenFiles:
    """Write the files of the cuts later than `after` up to `through`.

    Args:
        journal: The journal.
        schema: Schema of the model that is refreshed.
        through: The last cut.
        log: Where the interaction log is (`data.log`). Other logs are where the schema has them (`events.NAME.path`).
        after: The last position whose rows the model's tables hold, 0 for none. A log whose rows no refresh has written
            up to there is written from its own last position on. Files that are there stay as they are.
        later_than: Leave out rows of this time (microseconds) and before, as a server does whose tables know nothing of
            the journal.

    Raises:
        UserError: A place can't take files, or the journal is damaged.
    """
    written, uses, place = WrittenFiles(), find_uses(schema), BATCHES.c.position
    with journal.reading() as connection:
        held = {each.log: each.written for each in connection.execute(sql.select(LOGS))}
        cuts = list(connection.execute(sql.select(CUTS.c.position).order_by(CUTS.c.position)).scalars())
        new = sql.select(BATCHES.c.log, sql.func.sum(BATCHES.c.rows)).where(place > after, place <= through)
        rows_of = {row[0]: int(row[1]) for row in connection.execute(new.group_by(BATCHES.c.log))}
    written.unknown = {name: rows for name, rows in rows_of.items() if name and name not in uses}
    for source in uses:
        begin = min(after, held.get(source or "", 0))
        for start, cut in pairwise([begin, *(each for each in cuts if begin < each < through), through]):
            if batches := journal.read_log(source, start, cut):
                _write_cut(journal, JournalRows.join(batches, schema), schema, cut, log, later_than, written)
    with journal.appending() as connection:
        for name in (source or "" for source in uses):
            add_log(connection, name)
            mine = LOGS.c.log == name, LOGS.c.written < through
            connection.execute(sql.update(LOGS).where(*mine).values(written=through))
    return written


def _write_cut(
    journal: Journal,
    rows: JournalRows,
    schema: Schema,
    cut: int,
    log: str,
    later_than: int | None,
    written: WrittenFiles,
) -> None:
    """Write the file of a log's rows up to a cut, unless it is there or would be empty."""
    source, table, name = rows.source, rows.table, f"journal-{journal.id}-{cut:012d}.parquet"
    if later_than is not None:
        table = table.filter(pa.array(rows.rows(schema).times() > later_than))
    written.early += len(rows.table) - len(table)
    written.counts.setdefault(source, Counter()).update(rows.counts)
    if not table.num_rows:
        return
    place = log if source is None else schema.events[source].path
    path = _find_folder(place, "data.log" if source is None else f"data.events.{source}.path", name) / name
    uses = find_uses(schema)[source]
    if not path.exists():
        _write(path, table, uses, _find_pattern(place), schema.columns.time_unit)
    written.files.append(path)


def find_removed_logs(journal: Journal, schema: Schema, position: int) -> list[str | None]:
    """Return the schema's logs of which rows were removed from the journal after a position. Tables that know the
    journal up to there lack these rows, but the logs' files hold them."""
    with journal.reading() as connection:
        removed = {each.log: each.removed for each in connection.execute(sql.select(LOGS))}
    return [source for source in (None, *schema.events) if removed.get(source or "", 0) > position]


def remove_batches(journal: Journal, position: int) -> None:
    """Remove the batches up to a position whose rows files hold. Those of a log that no refreshed model has stay."""
    with journal.appending() as connection:
        for log, written in connection.execute(sql.select(LOGS.c.log, LOGS.c.written)).all():
            gone = BATCHES.c.log == log, BATCHES.c.position <= min(written, position)
            last = sql.select(sql.func.max(BATCHES.c.position)).where(*gone, BATCHES.c.rows > 0)
            if (removed := connection.execute(last).scalar()) is not None:
                connection.execute(sql.update(LOGS).where(LOGS.c.log == log).values(removed=removed))
            connection.execute(sql.delete(BATCHES).where(*gone))
        # Positions up to here may be missing, though batches of a log that no refreshed model has are still there.
        connection.execute(sql.update(ABOUT).where(ABOUT.c.removed < position).values(removed=position))


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
