"""Rows on their way into a journal, and out of it: checked, joined for servers, and written as files of the logs.

Rows that callers send are checked as a build checks a log's files. A batch is refused whole, with one sentence that
names the first wrong row, counted from 0, and its column.

A refresh writes at most one file a log for a million rows, `journal-ID-POSITION.parquet` (see README.md). The files
themselves say up to where a log has them, so a refresh that was killed is simply repeated. Their columns have canonical
types, which are read as the types of the log's other files are.
"""

import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import RequestError, UserError, first_line, quoted, suggest
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.live.journal import Batch, Journal, RowKeys
from mmoe_rec.log.checks import event_value_checks, find_first_invalid, log_value_checks
from mmoe_rec.log.columns import column_uses, combine_hashes, event_column_uses, hash_column, list_label_columns
from mmoe_rec.log.files import is_remote, local_path, source_includes, split_glob
from mmoe_rec.log.reader import event_rows
from mmoe_rec.log.request_values import to_arrow
from mmoe_rec.log.rows import LogRows
from mmoe_rec.progress import say
from mmoe_rec.settings.log_columns import ColumnUse
from mmoe_rec.settings.schema import EventFeature, Schema

EVENT_ID = "event_id"
"""The column in which a caller may give an event's ID, where the log has no column of that name."""
MAX_FILE_ROWS = 2**20


def column_uses_by_log(schema: Schema) -> dict[str | None, dict[str, ColumnUse]]:
    """Return the columns of each log, and the use that each column is read as. None is the interaction log."""
    uses: dict[str | None, dict[str, ColumnUse]] = {None: column_uses(schema)}
    return uses | {name: event_column_uses(schema, name) for name in schema.events}


def make_batch(log_name: str | None, table: pa.Table, schema: Schema, accepted_at: int | None = None) -> Batch:
    """Make a batch whose duplicate rows the journal leaves out.

    Args:
        log_name: Name of the log of events, None for the interaction log.
        table: Canonical rows.
        schema: Schema of the model whose server has accepted them.
        accepted_at: Microseconds since 1970 UTC. By default the clock's.
    """
    columns = column_uses_by_log(schema)[log_name]
    rows = LogRows(_completed(table, columns), schema)
    moment = time.time_ns() // 1_000 if accepted_at is None else accepted_at
    return Batch(log_name, moment, table, keys=_find_keys(rows, log_name, columns))


def _find_keys(rows: LogRows, log_name: str | None, columns: Collection[str]) -> RowKeys:
    """Compute the keys of rows of a log of which the schema reads some columns."""
    schema: Schema = rows.schema
    time = schema.columns.time if log_name is None else schema.events[log_name].time
    keys: list[tuple[int, ...]] = [()] * len(rows)
    if rows.has_column(EVENT_ID) and EVENT_ID not in columns:
        ids, log = rows.column(EVENT_ID), hash_column(pa.array([f"event {log_name or ''}"] * len(rows)))
        events = zip(_signed(log, hash_column(ids)), ids.is_valid().to_pylist(), strict=True)
        keys = [(key,) if is_given else () for key, is_given in events]
    requests = None
    if log_name is None:
        keys = [(*events, row) for events, row in zip(keys, _signed(rows.row_hashes()), strict=True)]
        if schema.columns.request is not None:
            users = _signed(rows.hashes([schema.columns.user]))
            requests = list(zip(_signed(rows.request_hashes()), users, strict=True))
    return RowKeys(time, rows.times(time), keys, requests)


def _signed(*hashes: np.ndarray) -> list[int]:
    """Combine (N,) uint64 hashes to integers that SQL can hold."""
    signed: list[int] = combine_hashes(hashes).view(np.int64).tolist()
    return signed


@dataclass(frozen=True)
class JournalRows:
    """Rows of one log that count, in the journal's order.

    Attributes:
        source: Name of the log of events, None for the interaction log.
        table: Columns that the log must have, null where not given, and columns that other models read.
    """

    log_name: str | None
    table: pa.Table

    @staticmethod
    def join(batches: Sequence[Batch], schema: Schema) -> "JournalRows":
        """Join batches of one log. Raises UserError where their columns do not fit together."""
        try:
            tables = [batch.table for batch in batches]
            table = pa.concat_tables(tables, promote_options="default").combine_chunks()
        except pa.ArrowException as error:
            raise UserError(f"rows of the journal do not fit together: {first_line(error)}") from None
        log_name = batches[0].log_name
        time = schema.columns.time if log_name is None else schema.events[log_name].time
        if time not in table.column_names:
            raise UserError(f"rows of the journal have no column '{time}', so it is another model's")
        uses = column_uses_by_log(schema)[log_name]
        others = [name for name in table.column_names if name not in uses and name != EVENT_ID]
        return JournalRows(log_name, _completed(table, uses).select([*uses, *others]))

    def rows(self, schema: Schema) -> LogRows:
        """Return the rows as features read them."""
        return LogRows(self.table, schema) if self.log_name is None else event_rows(self.table, schema, self.log_name)


def _group_by_log(batches: Iterable[Batch]) -> dict[str | None, list[Batch]]:
    """Group batches by their log, None for the interaction log."""
    logs: dict[str | None, list[Batch]] = {}
    for batch in batches:
        logs.setdefault(batch.log_name, []).append(batch)
    return logs


def join_by_log(batches: Iterable[Batch], schema: Schema) -> dict[str | None, JournalRows]:
    """Join the batches of each log that the schema has."""
    logs = _group_by_log(batches).items()
    return {log_name: JournalRows.join(some, schema) for log_name, some in logs if log_name in (None, *schema.events)}


def _completed(table: pa.Table, columns: dict[str, ColumnUse]) -> pa.Table:
    for column in columns:
        if column not in table.column_names:
            table = table.append_column(column, pa.nulls(len(table)))
    return table


def write_journal_files(
    journal: Journal, schema: Schema, log: str, after: int = 0, later_than: int | None = None
) -> int:
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
    position, through, left_out, folders = after, journal.last_position(), Counter[str](), dict[str | None, Path]()
    places: dict[str | None, tuple[str, str]] = {None: (log, "data.log")}
    places |= {name: (events.path, f"data.events.{name}.path") for name, events in schema.events.items()}
    while batches := journal.read(position, MAX_FILE_ROWS, through):
        position = batches[-1].position
        for log_name, new in _group_by_log(batches).items():
            if log_name not in places:
                left_out[f"of a log of events '{log_name}', which the settings do not have"] += sum(map(len, new))
                continue
            if log_name not in folders:
                folders[log_name] = _find_folder(*places[log_name], _name(journal, position))
            names = (path.stem for path in folders[log_name].glob(_name(journal)))
            held = max((int(name.rpartition("-")[2]) for name in names), default=0)
            if not (new := [batch for batch in new if batch.position > held]):
                continue
            rows = JournalRows.join(new, schema)
            table = rows.table
            if later_than is not None:
                table = table.filter(pa.array(rows.rows(schema).times() > later_than))
                left_out["no later than the model's tables, which may hold them"] += len(rows.table) - len(table)
            if len(table):
                path = folders[log_name] / _name(journal, position)
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
    if folder.is_dir() and source_includes(source, [folder / name]):
        return folder
    raise UserError(
        f"`{setting}` '{source}' is no folder, and no pattern that takes in '{name}' in a folder: the journal's files "
        "would not belong to the log; set it to a folder"
    )


MAX_CALL_ROWS = 10_000
CLOCK_TOLERANCE_US = 60_000_000
"""A caller's clock may be so far ahead of the server's."""
_FOREVER = np.iinfo(np.int64).max
_LONGEST_SENTENCE = 400


@dataclass(frozen=True)
class _EventColumn:
    """use: what it is read as; expected: its type, None where any that `use` allows will do; booleans: whether it may
    hold true and false, as the log does."""

    use: ColumnUse
    required: bool
    expected: pa.DataType | None
    booleans: bool


class RowValidator:
    """What rows of the interaction log, and of each log of events, must hold.

    pipeline: that was fitted to the log; most_rows: of a batch.
    """

    def __init__(self, pipeline: FeaturePipeline, max_rows: int = MAX_CALL_ROWS) -> None:
        self.schema, self.max_rows = pipeline.schema, max_rows
        schema, known = pipeline.schema, pipeline.column_types()
        self._columns: dict[str | None, dict[str, _EventColumn]] = {}
        ids = {schema.columns.user, schema.columns.candidate, schema.columns.request}
        for log_name, uses in column_uses_by_log(schema).items():
            required = _required(schema) if log_name is None else uses.keys()
            self._columns[log_name] = {
                name: _EventColumn(
                    use, name in required, known.get(name) if use != "time" else None, name in pipeline.booleans
                )
                for name, use in uses.items()
            }
            self._columns[log_name].setdefault(EVENT_ID, _EventColumn("key", False, None, False))
        inputs = schema.input_columns().items()
        self.optional_attributes = [name for name, role in inputs if role in ("user", "candidate") and name not in ids]
        """Columns of users and candidates that features read, and that rows of the interaction log may leave out."""
        # Columns of a role that no feature reads are left out, as those of a request are.
        self._unread = schema.column_roles.keys() - self._columns[None].keys()

    def read_json(self, log_name: str | None, rows: Any, now: int | None = None) -> pa.Table:
        """A canonical table of rows as JSON gives them, a list of objects of columns and values.

        log_name: name of a log of events, None for the interaction log; now: microseconds since 1970 UTC; later times
        are refused. By default the clock's. Raises RequestError naming the row and the column.
        """
        columns = self._of(log_name)
        if not isinstance(rows, list) or not rows:
            raise RequestError("the rows must be a list of at least one object of columns and values")
        if len(rows) > self.max_rows:
            raise RequestError(f"there are more than {self.max_rows:,} rows; send them in several calls")
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                raise RequestError(f"row {number} must be an object of columns and values, found {type(row).__name__}")
            if (wrong := self._wrong_names(log_name, row)) is not None:
                raise _in_row(number, wrong)
        given = [name for name in columns if any(name in row for row in rows)]
        arrays = {name: self._read_column(name, columns[name], [row.get(name) for row in rows]) for name in given}
        return self._check(log_name, arrays, now)

    def _of(self, log_name: str | None) -> dict[str, _EventColumn]:
        if log_name not in self._columns:
            known = ", ".join(self.schema.events) or "none"
            raise RequestError(f"there is no log of events {quoted(log_name)}; there are: {known}")
        return self._columns[log_name]

    def _wrong_names(self, log_name: str | None, given: Collection[str]) -> str | None:
        """What is wrong with the columns that are given, as a sentence."""
        columns, wrong = self._columns[log_name], []
        unread = self._unread if log_name is None else set()
        if unknown := [name for name in given if name not in columns and name not in unread]:
            # A model knows only what it reads of its log, so this may be a column of the log, or a mistyped one.
            hint = f"leave it out; {suggest(unknown[0], columns)}"
            wrong.append(f"the model was trained without a column {quoted(unknown[0])}: {hint}")
        if missing := [name for name, each in columns.items() if each.required and name not in given]:
            wrong.append(f"there is no column '{missing[0]}'")
        return "; and ".join(wrong) or None

    def _read_column(self, name: str, column: _EventColumn, values: Sequence[Any]) -> pa.Array:
        """Read a column of rows. An error names the first row that can't be read."""

        def read(some: Sequence[Any]) -> pa.Array:
            unit = self.schema.columns.time_unit
            return to_arrow(name, some, column.use, column.expected, unit, column.booleans)

        try:
            return read(values)
        except UserError as error:
            reason = error
        row = find_first_invalid(read, values)
        try:
            read(values[row : row + 1])
        except UserError as error:
            reason = error
        raise _in_row(row, _short(reason))

    def _check(self, log_name: str | None, arrays: dict[str, pa.Array], now: int | None) -> pa.Table:
        size = len(next(iter(arrays.values())))
        table = {}
        for name, array in arrays.items():
            table[name] = array if array.null_count < size else pa.nulls(size)
        rate = self.schema.columns.sampling_rate
        if log_name is None and rate is not None:  # rows that no one has sampled were kept for certain
            is_given = rate in table and not pt.is_null(table[rate].type)
            table[rate] = table[rate].fill_null(1.0) if is_given else pa.array(np.ones(size))
        rows = LogRows(pa.table(table), self.schema)
        latest = (time.time_ns() // 1_000 if now is None else now) + CLOCK_TOLERANCE_US
        for check in (
            log_value_checks(self.schema, latest)
            if log_name is None
            else event_value_checks(self.schema.events[log_name].time, latest)
        ):
            if rows.has_column(check.column) and (wrong := check.find(rows)) is not None:
                raise _in_row(*wrong)
        ids = table.get(EVENT_ID)
        if ids is not None and pt.is_string(ids.type) and (row := pc.index(ids, "").as_py()) >= 0:
            what = "is empty, as which all rows would be the same event; give null where a row has no id"
            raise _in_row(row, f"column '{EVENT_ID}' {what}")
        if log_name is None:
            self._check_requests(rows)
            self._check_labels(rows)
        return rows.table

    def _check_requests(self, rows: LogRows) -> None:
        if self.schema.columns.request is None:
            return
        request, user = rows.request_hashes(), rows.hashes([self.schema.columns.user])
        _, first, inverse = np.unique(request, return_index=True, return_inverse=True)
        if (other := np.flatnonzero(user != user[first][inverse])).size:
            row = int(other[0])
            raise _in_row(
                row,
                f"column '{self.schema.columns.user}' holds another user than row {int(first[inverse[row]])}, of the "
                f"same request by column '{self.schema.columns.request}'",
            )

    def _check_labels(self, rows: LogRows) -> None:
        for name, task in self.schema.tasks.items():
            try:
                rows.labels(task, _FOREVER)
            except UserError as error:
                raise RequestError(f"task '{name}' can't be read: {_short(error)}") from None


def _required(schema: Schema) -> set[str]:
    """Columns of the interaction log without which a row would count for less than it should."""
    columns = schema.columns
    names = {columns.user, columns.candidate, columns.time, *filter(None, [columns.request, columns.weight])}
    names.update(list_label_columns(schema))
    for feature in schema.features.values():
        if isinstance(feature, EventFeature) and feature.events is None:
            names |= feature.event_reads(schema).keys()
    # Attributes of users and candidates are known to whoever takes the rows, and completed where they are left out.
    attributes = {name for name, role in schema.column_roles.items() if role in ("user", "candidate")}
    return names - (attributes - {columns.user, columns.candidate})


def _in_row(number: int, sentence: str) -> RequestError:
    return RequestError(f"row {number}: {sentence}")


def _short(error: Exception) -> str:
    text = first_line(error)
    return text if len(text) <= _LONGEST_SENTENCE else f"{text[:_LONGEST_SENTENCE]}..."
