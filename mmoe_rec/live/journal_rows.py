"""Rows on their way into a journal, and out of it: for servers, and as files of the logs.

A refresh writes at most one file a log for a million rows, `journal-ID-POSITION.parquet` (see README.md). The files
themselves say up to where a log has them, so a refresh that was killed is simply repeated. Their columns have canonical
types, which are read as the types of the log's other files are.
"""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError, first_line
from mmoe_rec.live.journal import Batch, Journal
from mmoe_rec.live.row_keys import EVENT_ID, find_keys
from mmoe_rec.log.columns import column_uses, event_uses
from mmoe_rec.log.files import is_remote, local_path, split_glob, takes_in
from mmoe_rec.log.reader import event_rows
from mmoe_rec.log.rows import LogRows, maturity
from mmoe_rec.point_in_time.join import known_at
from mmoe_rec.settings.log_columns import Use
from mmoe_rec.settings.schema import Schema

ROWS_OF_A_FILE = 2**20
_FOREVER = np.iinfo(np.int64).max


def find_uses(schema: Schema) -> dict[str | None, dict[str, Use]]:
    """Return the columns of each log, and the use that each column is read as. None is the interaction log."""
    uses: dict[str | None, dict[str, Use]] = {None: column_uses(schema)}
    return uses | {name: event_uses(schema, name) for name in schema.events}


def make_batch(source: str | None, table: pa.Table, schema: Schema, accepted_at: int | None = None) -> Batch:
    """Make a batch whose duplicate rows the journal leaves out.

    Args:
        source: Name of the log of events, None for the interaction log.
        table: Canonical rows.
        schema: Schema of the model whose server has accepted them.
        accepted_at: Microseconds since 1970 UTC. By default the clock's.
    """
    columns = find_uses(schema)[source]
    rows = LogRows(_completed(table, columns), schema)
    moment = time.time_ns() // 1_000 if accepted_at is None else accepted_at
    return Batch(source, moment, table, keys=find_keys(rows, source, columns))


@dataclass(frozen=True)
class JournalRows:
    """Rows of one log that count, in the journal's order.

    Attributes:
        source: Name of the log of events, None for the interaction log.
        table: Columns that the log must have, null where not given, and columns that other models read.
        counts: Rows by outcome, see `mmoe_rec.live.row_keys.Judged`.
    """

    source: str | None
    table: pa.Table
    counts: Counter[str]

    @staticmethod
    def join(batches: Sequence[Batch], schema: Schema) -> "JournalRows":
        """Join batches of one log. Raises UserError where their columns do not fit together."""
        try:
            tables = [batch.table for batch in batches]
            table = pa.concat_tables(tables, promote_options="default").combine_chunks()
        except pa.ArrowException as error:
            raise UserError(f"rows of the journal do not fit together: {first_line(error)}") from None
        counts, source = Counter[str](), batches[0].source
        for batch in batches:
            counts.update(batch.counts)
        uses = find_uses(schema)[source]
        others = [name for name in table.column_names if name not in uses and name != EVENT_ID]
        return JournalRows(source, _completed(table, uses).select([*uses, *others]), counts)

    def rows(self, schema: Schema) -> LogRows:
        """Return the rows as features read them."""
        return LogRows(self.table, schema) if self.source is None else event_rows(self.table, schema, self.source)

    def count_late(self, schema: Schema, as_of: int) -> int:
        """Count the rows of which at least one label was available at `as_of` (microseconds) already."""
        rows = self.rows(schema)
        if self.source is not None:
            return int((known_at(rows.times(), 0) <= as_of).sum())
        late = np.zeros(len(rows), bool)
        for task in schema.tasks.values():
            late |= ~np.isnan(rows.labels(task, _FOREVER)) & (known_at(rows.times(), maturity(task, schema)) <= as_of)
        return int(late.sum())


def _group_by_log(batches: Iterable[Batch]) -> dict[str | None, list[Batch]]:
    """Group batches by their log, None for the interaction log."""
    logs: dict[str | None, list[Batch]] = {}
    for batch in batches:
        logs.setdefault(batch.source, []).append(batch)
    return logs


def join_by_log(batches: Iterable[Batch], schema: Schema) -> dict[str | None, JournalRows]:
    """Join the batches of each log that the schema has."""
    logs = _group_by_log(batches).items()
    return {source: JournalRows.join(some, schema) for source, some in logs if source in (None, *schema.events)}


def _completed(table: pa.Table, columns: dict[str, Use]) -> pa.Table:
    for column in columns:
        if column not in table.column_names:
            table = table.append_column(column, pa.nulls(len(table)))
    return table


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
        for source, new in _group_by_log(batches).items():
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
                try:
                    with atomic_file(path) as temporary:
                        pq.write_table(table, temporary, compression="zstd")
                except (OSError, pa.ArrowException) as error:
                    raise UserError(f"'{path}' can't be written: {first_line(error)}") from None
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
