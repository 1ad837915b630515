"""Check rows that callers send to a journal, concatenate its batches for servers, and write its rows to log files.

Rows from callers must pass the same checks as a log's files in a feature build. If one row is invalid, the whole batch
is rejected.

A refresh writes the rows of each log to files `journal-ID-POSITION.parquet`, with about a million rows each. POSITION
is the position of the last batch that the file may contain. An interrupted refresh can simply be repeated, because the
file names show which batches are already written.
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
"""Column for an ID by which the journal recognizes a resent event, unless features read a column of this name."""
MAX_FILE_ROWS = 2**20


def _column_uses_by_log(schema: Schema) -> dict[str | None, dict[str, ColumnUse]]:
    """Return log name (None: interaction log) -> column that the features read -> how the column is used."""
    uses: dict[str | None, dict[str, ColumnUse]] = {None: column_uses(schema)}
    return uses | {name: event_column_uses(schema, name) for name in schema.events}


def make_batch(log_name: str | None, table: pa.Table, schema: Schema, accepted_at: int | None = None) -> Batch:
    """Build a batch with keys, so that the journal skips its duplicate rows.

    Args:
        log_name: Name of the event log, None for the interaction log.
        table: Rows, with columns of the canonical types of `mmoe_rec.log.columns`.
        schema: Schema of the model whose server accepted the rows.
        accepted_at: Time of acceptance, microseconds since 1970 UTC. None reads the clock.
    """
    columns = _column_uses_by_log(schema)[log_name]
    rows = LogRows(_add_missing_columns(table, columns), schema)
    time_us = time.time_ns() // 1_000 if accepted_at is None else accepted_at
    return Batch(log_name, time_us, table, keys=_make_keys(rows, log_name, columns))


def _make_keys(rows: LogRows, log_name: str | None, columns: Collection[str]) -> RowKeys:
    """Compute the keys of rows from their event IDs and, in the interaction log, from request and candidate.

    `columns` are the columns of this log that the features read.
    """
    schema: Schema = rows.schema
    time = schema.columns.time if log_name is None else schema.events[log_name].time
    keys: list[tuple[int, ...]] = [()] * len(rows)
    if rows.has_column(EVENT_ID) and EVENT_ID not in columns:
        ids, log = rows.column(EVENT_ID), hash_column(pa.array([f"event {log_name or ''}"] * len(rows)))
        event_keys = zip(_signed(log, hash_column(ids)), ids.is_valid().to_pylist(), strict=True)
        keys = [(key,) if is_given else () for key, is_given in event_keys]
    requests = None
    if log_name is None:
        keys = [(*event_keys, row) for event_keys, row in zip(keys, _signed(rows.row_hashes()), strict=True)]
        if schema.columns.request is not None:
            users = _signed(rows.hashes([schema.columns.user]))
            requests = list(zip(_signed(rows.request_hashes()), users, strict=True))
    return RowKeys(time, rows.times(time), keys, requests)


def _signed(*hashes: np.ndarray) -> list[int]:
    """Combine (N,) uint64 hashes into N signed integers, which SQL can store."""
    signed: list[int] = combine_hashes(hashes).view(np.int64).tolist()
    return signed


@dataclass(frozen=True)
class JournalRows:
    """Rows of one log without duplicates, in the journal's order.

    Attributes:
        log_name: Name of the event log, None for the interaction log.
        table: First all columns of this log that the model's features read, null if no row gave them. Further columns
            of the rows may follow.
    """

    log_name: str | None
    table: pa.Table

    @staticmethod
    def join(batches: Sequence[Batch], schema: Schema) -> "JournalRows":
        """Concatenate batches of one log.

        Args:
            batches: At least one batch.
            schema: Schema of the model that reads the rows.

        Raises:
            UserError: The batches have different types for a column, or the time column is missing.
        """
        try:
            table = pa.concat_tables([batch.table for batch in batches], promote_options="default").combine_chunks()
        except pa.ArrowException as error:
            raise UserError(f"rows of the journal do not fit together: {first_line(error)}") from None
        log_name = batches[0].log_name
        time = schema.columns.time if log_name is None else schema.events[log_name].time
        if time not in table.column_names:
            raise UserError(f"rows of the journal have no column '{time}', so the journal belongs to another model")
        uses = _column_uses_by_log(schema)[log_name]
        extra_columns = [name for name in table.column_names if name not in uses and name != EVENT_ID]
        return JournalRows(log_name, _add_missing_columns(table, uses).select([*uses, *extra_columns]))

    def to_log_rows(self, schema: Schema) -> LogRows:
        """Return the rows as `LogRows`, the form that feature computation reads."""
        return LogRows(self.table, schema) if self.log_name is None else event_rows(self.table, schema, self.log_name)


def _group_by_log(batches: Iterable[Batch]) -> dict[str | None, list[Batch]]:
    """Group batches by their log, None for the interaction log."""
    logs: dict[str | None, list[Batch]] = {}
    for batch in batches:
        logs.setdefault(batch.log_name, []).append(batch)
    return logs


def join_by_log(batches: Iterable[Batch], schema: Schema) -> dict[str | None, JournalRows]:
    """Concatenate the batches of each log in the schema.

    Args:
        batches: Batches of any logs.
        schema: Schema of the model that reads the rows. Batches of other logs than the schema's are skipped.

    Returns:
        Log name (None for the interaction log) -> rows of the log.

    Raises:
        UserError: A log's batches can't be concatenated (see `JournalRows.join`).
    """
    return {
        log_name: JournalRows.join(log_batches, schema)
        for log_name, log_batches in _group_by_log(batches).items()
        if log_name in (None, *schema.events)
    }


def _add_missing_columns(table: pa.Table, columns: dict[str, ColumnUse]) -> pa.Table:
    for column in columns:
        if column not in table.column_names:
            table = table.append_column(column, pa.nulls(len(table)))
    return table


def write_journal_files(
    journal: Journal, schema: Schema, log: str, after: int = 0, later_than: int | None = None
) -> int:
    """Write the rows of a journal to files of the logs. Existing files stay unchanged.

    Args:
        journal: Journal to read.
        schema: Schema of the model to refresh.
        log: Location of the interaction log (`data.log`). The schema has the locations of event logs
            (`events.NAME.path`).
        after: Position of the last batch that the model's tables of counters and histories include, 0 for none.
        later_than: Skip rows up to this time (microseconds), since the tables may include them. None skips no rows.

    Returns:
        Position of the journal's last batch. The files now contain the journal up to it.

    Raises:
        UserError: Files can't be written to a folder, or the journal is damaged.
    """
    position, through, skipped, folders = after, journal.last_position(), Counter[str](), dict[str | None, Path]()
    sources: dict[str | None, tuple[str, str]] = {None: (log, "data.log")}
    sources |= {name: (events.path, f"data.events.{name}.path") for name, events in schema.events.items()}
    while batches := journal.read(position, MAX_FILE_ROWS, through):
        position = batches[-1].position
        for log_name, new in _group_by_log(batches).items():
            if log_name not in sources:
                skipped[f"the settings have no event log '{log_name}'"] += sum(map(len, new))
                continue
            if log_name not in folders:
                folders[log_name] = _find_folder(*sources[log_name], _file_name(journal, position))
            names = (path.stem for path in folders[log_name].glob(_file_name(journal)))
            written_until = max((int(name.rpartition("-")[2]) for name in names), default=0)
            if not (new := [batch for batch in new if batch.position > written_until]):
                continue
            rows = JournalRows.join(new, schema)
            table = rows.table
            if later_than is not None:
                table = table.filter(pa.array(rows.to_log_rows(schema).times() > later_than))
                skipped["not later than the model's tables, which may include them"] += len(rows.table) - len(table)
            if len(table):
                path = folders[log_name] / _file_name(journal, position)
                try:
                    with atomic_file(path) as temporary:
                        pq.write_table(table, temporary, compression="zstd")
                except (OSError, pa.ArrowException) as error:
                    raise UserError(f"'{path}' can't be written: {first_line(error)}") from None
    for reason, count in (+skipped).items():
        say(f"skipped {count:,} rows of the journal: {reason}")
    return through


def _file_name(journal: Journal, position: int | None = None) -> str:
    """Return the name of the file with rows up to a position. Without a position, return a pattern of all names."""
    return f"journal-{journal.id}-{'*' if position is None else f'{position:012d}'}.parquet"


def _find_folder(source: str, setting: str, name: str) -> Path:
    """Return the folder of the log at `source`. Raise UserError if a file `name` there would not belong to the log."""
    if is_remote(source):
        problem = f"`{setting}` '{source}' is remote, so the journal's files can't be written there"
        raise UserError(f"{problem}. Use a local folder.")
    folder = Path(split_glob(local_path(source))[0])
    if folder.is_dir() and source_includes(source, [folder / name]):
        return folder
    raise UserError(
        f"`{setting}` '{source}' is not a folder, and its pattern doesn't match '{name}'. The journal's files would "
        "not belong to the log. Set it to a folder."
    )


MAX_CALL_ROWS = 10_000
CLOCK_TOLERANCE_US = 60_000_000
"""Limit on how far a caller's clock may be ahead of the server's."""
_FOREVER = np.iinfo(np.int64).max
_MAX_SENTENCE_CHARACTERS = 400


@dataclass(frozen=True)
class _EventColumn:
    """Requirements for the values of one column."""

    use: ColumnUse
    required: bool
    expected: pa.DataType | None  # Type of the values. None allows any type that fits the use.
    booleans: bool  # Whether true and false are allowed.


class RowValidator:
    """Checks of the rows that callers send, for the interaction log and each event log."""

    def __init__(self, pipeline: FeaturePipeline, max_rows: int = MAX_CALL_ROWS) -> None:
        """Derive the checks from a model.

        Args:
            pipeline: Feature pipeline of the model, fitted to the log.
            max_rows: Maximum number of rows in a batch.
        """
        self.schema, self.max_rows = pipeline.schema, max_rows
        schema, types = pipeline.schema, pipeline.column_types()
        self._columns: dict[str | None, dict[str, _EventColumn]] = {}
        ids = {schema.columns.user, schema.columns.candidate, schema.columns.request}
        for log_name, uses in _column_uses_by_log(schema).items():
            required = _required_columns(schema) if log_name is None else uses.keys()
            self._columns[log_name] = {
                name: _EventColumn(
                    use, name in required, types.get(name) if use != "time" else None, name in pipeline.booleans
                )
                for name, use in uses.items()
            }
            self._columns[log_name].setdefault(EVENT_ID, _EventColumn("key", False, None, False))
        inputs = schema.input_columns().items()
        self.optional_attributes = [name for name, role in inputs if role in ("user", "candidate") and name not in ids]
        """Columns of users and candidates that rows of the interaction log may omit although features read them."""
        # Columns with a role that no feature reads are accepted and ignored, as in requests.
        self._unread = schema.column_roles.keys() - self._columns[None].keys()

    def read_json(self, log_name: str | None, rows: Any, now: int | None = None) -> pa.Table:
        """Check rows from JSON and return them as a table of canonical types (see `mmoe_rec.log.columns`).

        Args:
            log_name: Name of an event log, None for the interaction log.
            rows: Parsed JSON. It must be a list of objects, each with the columns and values of one row.
            now: Current time, microseconds since 1970 UTC. A row that is later by more than `CLOCK_TOLERANCE_US` is
                invalid. None reads the clock.

        Raises:
            RequestError: A row is invalid. The message names the row and the column.
        """
        columns = self._columns_of(log_name)
        if not isinstance(rows, list) or not rows:
            raise RequestError("the rows must be a list of at least one object of columns and values")
        if len(rows) > self.max_rows:
            raise RequestError(f"there are more than {self.max_rows:,} rows; send them in several calls")
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                raise RequestError(f"row {number} must be an object of columns and values, found {type(row).__name__}")
            if (problem := self._column_problem(log_name, row)) is not None:
                raise _row_error(number, problem)
        given = [name for name in columns if any(name in row for row in rows)]
        arrays = {name: self._read_column(name, columns[name], [row.get(name) for row in rows]) for name in given}
        return self._check(log_name, arrays, now)

    def _columns_of(self, log_name: str | None) -> dict[str, _EventColumn]:
        if log_name not in self._columns:
            available = ", ".join(self.schema.events) or "none"
            raise RequestError(f"there is no event log {quoted(log_name)}. Event logs: {available}")
        return self._columns[log_name]

    def _column_problem(self, log_name: str | None, given: Collection[str]) -> str | None:
        """Describe unknown and missing columns in one sentence, or return None."""
        columns, problems = self._columns[log_name], []
        unread = self._unread if log_name is None else set()
        if unknown := [name for name in given if name not in columns and name not in unread]:
            # The model knows only the columns that it reads, so the unknown column may be a typo or exist in the log.
            hint = f"leave it out; {suggest(unknown[0], columns)}"
            problems.append(f"the model was trained without a column {quoted(unknown[0])}: {hint}")
        if missing := [name for name, column in columns.items() if column.required and name not in given]:
            problems.append(f"there is no column '{missing[0]}'")
        return "; and ".join(problems) or None

    def _read_column(self, name: str, column: _EventColumn, values: Sequence[Any]) -> pa.Array:
        """Convert a column of rows. An error names the first invalid row."""

        def read(part: Sequence[Any]) -> pa.Array:
            return to_arrow(name, part, column.use, column.expected, self.schema.columns.time_unit, column.booleans)

        try:
            return read(values)
        except UserError as error:
            reason = error
        row = find_first_invalid(read, values)
        try:
            read(values[row : row + 1])
        except UserError as error:
            reason = error
        raise _row_error(row, _shorten(reason))

    def _check(self, log_name: str | None, arrays: dict[str, pa.Array], now: int | None) -> pa.Table:
        size = len(next(iter(arrays.values())))
        table = {name: array if array.null_count < size else pa.nulls(size) for name, array in arrays.items()}
        rate = self.schema.columns.sampling_rate
        if log_name is None and rate is not None:  # Rows without a sampling rate weren't sampled, so their rate is 1.
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
                raise _row_error(*wrong)
        ids = table.get(EVENT_ID)
        if ids is not None and pt.is_string(ids.type) and (row := pc.index(ids, "").as_py()) >= 0:
            problem = "is empty, so all such rows would be the same event. Give null if a row has no ID."
            raise _row_error(row, f"column '{EVENT_ID}' {problem}")
        if log_name is None:
            self._check_requests(rows)
            self._check_labels(rows)
        return rows.table

    def _check_requests(self, rows: LogRows) -> None:
        if self.schema.columns.request is None:
            return
        request, user = rows.request_hashes(), rows.hashes([self.schema.columns.user])
        _, first, inverse = np.unique(request, return_index=True, return_inverse=True)
        if (other_users := np.flatnonzero(user != user[first][inverse])).size:
            row, columns = int(other_users[0]), self.schema.columns
            problem = f"column '{columns.user}' holds another user than row {int(first[inverse[row]])}"
            raise _row_error(row, f"{problem}, of the same request by column '{columns.request}'")

    def _check_labels(self, rows: LogRows) -> None:
        for name, task in self.schema.tasks.items():
            try:
                rows.labels(task, _FOREVER)
            except UserError as error:
                raise RequestError(f"the labels of task '{name}' can't be read: {_shorten(error)}") from None


def _required_columns(schema: Schema) -> set[str]:
    """Return the columns that a row of the interaction log needs so that counters and histories can include the row."""
    columns = schema.columns
    names = {columns.user, columns.candidate, columns.time, *filter(None, [columns.request, columns.weight])}
    names.update(list_label_columns(schema))
    for feature in schema.features.values():
        if isinstance(feature, EventFeature) and feature.events is None:
            names |= feature.event_reads(schema).keys()
    # Servers fill in attributes of users and candidates that a row omits.
    attributes = {name for name, role in schema.column_roles.items() if role in ("user", "candidate")}
    return names - (attributes - {columns.user, columns.candidate})


def _row_error(number: int, sentence: str) -> RequestError:
    return RequestError(f"row {number}: {sentence}")


def _shorten(error: Exception) -> str:
    text = first_line(error)
    return text if len(text) <= _MAX_SENTENCE_CHARACTERS else f"{text[:_MAX_SENTENCE_CHARACTERS]}..."
