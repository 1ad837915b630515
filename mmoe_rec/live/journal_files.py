"""What a journal holds as files of the logs: what counts of its rows, for `build`, `--extend` and training to read.

A refresh writes at most one file a log for a million rows, `journal-ID-POSITION.parquet` (see README.md). The files
themselves say up to where a log has them, so a refresh that was killed is simply repeated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError, first_line
from mmoe_rec.live.journal import Journal
from mmoe_rec.live.journal_rows import JournalRows, find_uses, group_by_log
from mmoe_rec.log.columns import canonical
from mmoe_rec.log.files import find_local, is_remote, local_path, split_glob, takes_in
from mmoe_rec.settings.log_columns import Use
from mmoe_rec.settings.schema import Schema

ROWS_OF_A_FILE = 2**20


@dataclass
class WrittenFiles:
    """New files of a journal's rows.

    Attributes:
        through: The position up to which files hold the journal.
        files: The files.
        counts: Rows by outcome of each log, None for the interaction log.
        unknown: Rows of logs of events that the schema does not have, which are in no file.
        early: Rows that `later_than` left out.
    """

    through: int
    files: list[Path] = field(default_factory=list)
    counts: dict[str | None, Counter[str]] = field(default_factory=dict)
    unknown: Counter[str] = field(default_factory=Counter)
    early: int = 0


def write_files(
    journal: Journal, schema: Schema, log: str, after: int = 0, later_than: int | None = None
) -> WrittenFiles:
    """Write the rows of a journal into files of the logs. Files that are there stay as they are.

    Args:
        journal: The journal.
        schema: Schema of the model that is refreshed.
        log: Where the interaction log is (`data.log`). Other logs are where the schema has them (`events.NAME.path`).
        after: The last position whose rows the model's tables hold, 0 for none.
        later_than: Leave out rows of this time (microseconds) and before, as a server does whose tables know nothing of
            the journal.

    Raises:
        UserError: A folder can't take files, or the journal is damaged.
    """
    written, position = WrittenFiles(journal.end()), after
    folders, held = dict[str | None, Path](), dict[str | None, int]()
    places: dict[str | None, tuple[str, str]] = {None: (log, "data.log")}
    for name, events in schema.events.items():
        places[name] = events.path, f"data.events.{name}.path"
    while batches := journal.read(position, ROWS_OF_A_FILE, written.through):
        position = batches[-1].position
        for source, new in group_by_log(batches).items():
            if source not in places:
                written.unknown[str(source)] += sum(map(len, new))
                continue
            if source not in folders:
                folders[source] = _find_folder(*places[source], _name(journal, position))
                names = (path.stem for path in folders[source].glob(_name(journal)))
                held[source] = max((int(name.rpartition("-")[2]) for name in names), default=0)
            if not (new := [batch for batch in new if batch.position > held[source]]):
                continue
            rows = JournalRows.join(new, schema)
            table = rows.table
            if later_than is not None:
                table = table.filter(pa.array(rows.rows(schema).times() > later_than))
            written.early += len(rows.table) - len(table)
            written.counts.setdefault(source, Counter()).update(rows.counts)
            if len(table):
                path = folders[source] / _name(journal, position)
                _write(
                    path, table, find_uses(schema)[source], _find_pattern(places[source][0]), schema.columns.time_unit
                )
                written.files.append(path)
    return written


def _name(journal: Journal, position: int | None = None) -> str:
    """Name the file of the rows up to a position. Without one, return the pattern of all names."""
    return f"journal-{journal.id}-{'*' if position is None else f'{position:012d}'}.parquet"


def _find_folder(source: str, setting: str, name: str) -> Path:
    """Find the folder whose file of that name belongs to a log."""
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
