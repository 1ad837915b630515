"""Rows on their way into a journal, and out of it: for servers, and as files of the logs.

A refresh writes at most one file a log for a million rows, `journal-ID-POSITION.parquet` (see README.md). The files
themselves say up to where a log has them, so a refresh that was killed is simply repeated. Their columns have canonical
types, which are read as the types of the log's other files are.
"""

import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError, first_line
from mmoe_rec.live.journal import Batch, Journal, RowKeys
from mmoe_rec.log.columns import column_uses, combine, event_uses, hash_column
from mmoe_rec.log.files import is_remote, local_path, split_glob, takes_in
from mmoe_rec.log.reader import event_rows
from mmoe_rec.log.rows import LogRows
from mmoe_rec.progress import say
from mmoe_rec.settings.log_columns import Use
from mmoe_rec.settings.schema import Schema

EVENT_ID = "event_id"
"""The column in which a caller may give an event's ID, where the log has no column of that name."""
ROWS_OF_A_FILE = 2**20


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
    return Batch(source, moment, table, keys=_find_keys(rows, source, columns))


def _find_keys(rows: LogRows, source: str | None, columns: Collection[str]) -> RowKeys:
    """Compute the keys of rows of a log of which the schema reads some columns."""
    schema: Schema = rows.schema
    time = schema.columns.time if source is None else schema.events[source].time
    keys: list[tuple[int, ...]] = [()] * len(rows)
    if rows.has(EVENT_ID) and EVENT_ID not in columns:
        ids, log = rows.column(EVENT_ID), hash_column(pa.array([f"event {source or ''}"] * len(rows)))
        events = zip(_signed(log, hash_column(ids)), ids.is_valid().to_pylist(), strict=True)
        keys = [(key,) if is_given else () for key, is_given in events]
    requests = None
    if source is None:
        keys = [(*events, row) for events, row in zip(keys, _signed(rows.row_hashes()), strict=True)]
        if schema.columns.request is not None:
            users = _signed(rows.hashes([schema.columns.user]))
            requests = list(zip(_signed(rows.request_hashes()), users, strict=True))
    return RowKeys(time, rows.times(time), keys, requests)


def _signed(*hashes: np.ndarray) -> list[int]:
    """Combine (N,) uint64 hashes to integers that SQL can hold."""
    signed: list[int] = combine(hashes).view(np.int64).tolist()
    return signed


@dataclass(frozen=True)
class JournalRows:
    """Rows of one log that count, in the journal's order.

    Attributes:
        source: Name of the log of events, None for the interaction log.
        table: Columns that the log must have, null where not given, and columns that other models read.
    """

    source: str | None
    table: pa.Table

    @staticmethod
    def join(batches: Sequence[Batch], schema: Schema) -> "JournalRows":
        """Join batches of one log. Raises UserError where their columns do not fit together."""
        try:
            tables = [batch.table for batch in batches]
            table = pa.concat_tables(tables, promote_options="default").combine_chunks()
        except pa.ArrowException as error:
            raise UserError(f"rows of the journal do not fit together: {first_line(error)}") from None
        source = batches[0].source
        time = schema.columns.time if source is None else schema.events[source].time
        if time not in table.column_names:
            raise UserError(f"rows of the journal have no column '{time}', so it is another model's")
        uses = find_uses(schema)[source]
        others = [name for name in table.column_names if name not in uses and name != EVENT_ID]
        return JournalRows(source, _completed(table, uses).select([*uses, *others]))

    def rows(self, schema: Schema) -> LogRows:
        """Return the rows as features read them."""
        return LogRows(self.table, schema) if self.source is None else event_rows(self.table, schema, self.source)


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


def write_files(journal: Journal, schema: Schema, log: str, after: int = 0, later_than: int | None = None) -> int:
    """Write the rows of a journal into files of the logs. Files that are there stay as they are.

    Args:
        journal: The journal.
        schema: Schema of the model that is refreshed.
        log: Where the interaction log is (`data.log`). Other logs are where the schema has them (`events.NAME.path`).
        after: The last position whose rows the model's tables hold, 0 for none.
        later_than: Leave out rows of this time (microseconds) and before, as a server does whose tables know nothing of
            the journal.

    Returns:
        The position up to which files hold the journal.

    Raises:
        UserError: A folder can't take files, or the journal is damaged.
    """
    position, through, left_out, folders = after, journal.end(), Counter[str](), dict[str | None, Path]()
    places: dict[str | None, tuple[str, str]] = {None: (log, "data.log")}
    places |= {name: (events.path, f"data.events.{name}.path") for name, events in schema.events.items()}
    while batches := journal.read(position, ROWS_OF_A_FILE, through):
        position = batches[-1].position
        for source, new in _group_by_log(batches).items():
            if source not in places:
                left_out[f"of a log of events '{source}', which the settings do not have"] += sum(map(len, new))
                continue
            if source not in folders:
                folders[source] = _find_folder(*places[source], _name(journal, position))
            names = (path.stem for path in folders[source].glob(_name(journal)))
            held = max((int(name.rpartition("-")[2]) for name in names), default=0)
            if not (new := [batch for batch in new if batch.position > held]):
                continue
            rows = JournalRows.join(new, schema)
            table = rows.table
            if later_than is not None:
                table = table.filter(pa.array(rows.rows(schema).times() > later_than))
                left_out["no later than the model's tables, which may hold them"] += len(rows.table) - len(table)
            if len(table):
                path = folders[source] / _name(journal, position)
                try:
                    with atomic_file(path) as temporary:
                        pq.write_table(table, temporary, compression="zstd")
                except (OSError, pa.ArrowException) as error:
                    raise UserError(f"'{path}' can't be written: {first_line(error)}") from None
    for why, count in (+left_out).items():
        say(f"{count:,} rows of the journal are in no file: they are {why}")
    return through


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
