"""Rows that callers send, checked as a build checks a log's files, before anything of them is written.

A batch is refused whole, with one sentence that names the first wrong row, counted from 0, and its column.
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from mmoe_rec.errors import RequestError, UserError, first_line, quoted, suggest
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.live.journal_rows import EVENT_ID, find_uses
from mmoe_rec.log.checks import event_value_checks, find_first_fault, log_value_checks
from mmoe_rec.log.columns import list_label_columns
from mmoe_rec.log.given import to_arrow
from mmoe_rec.log.rows import LogRows
from mmoe_rec.settings.log_columns import Use
from mmoe_rec.settings.schema import Remembering, Schema

MOST_ROWS = 10_000
TOLERANCE_MICROSECONDS = 60_000_000
"""A caller's clock may be so far ahead of the server's."""
_FOREVER = np.iinfo(np.int64).max
_LONGEST_SENTENCE = 400


@dataclass(frozen=True)
class _EventColumn:
    """use: what it is read as; expected: its type, None where any that `use` allows will do; booleans: whether it may
    hold true and false, as the log does."""

    use: Use
    required: bool
    expected: pa.DataType | None
    booleans: bool


class RowChecks:
    """What rows of the interaction log, and of each log of events, must hold.

    pipeline: that was fitted to the log; most_rows: of a batch.
    """

    def __init__(self, pipeline: FeaturePipeline, most_rows: int = MOST_ROWS) -> None:
        self.schema, self.most_rows = pipeline.schema, most_rows
        schema, known = pipeline.schema, pipeline.column_types()
        self._columns: dict[str | None, dict[str, _EventColumn]] = {}
        ids = {schema.columns.user, schema.columns.candidate, schema.columns.request}
        for source, uses in find_uses(schema).items():
            required = _required(schema) if source is None else uses.keys()
            self._columns[source] = {
                name: _EventColumn(
                    use, name in required, known.get(name) if use != "time" else None, name in pipeline.booleans
                )
                for name, use in uses.items()
            }
            self._columns[source].setdefault(EVENT_ID, _EventColumn("key", False, None, False))
        inputs = schema.input_columns().items()
        self.attributes = [name for name, role in inputs if role in ("user", "candidate") and name not in ids]
        """Columns of users and candidates that features read, and that rows of the interaction log may leave out."""
        # Columns of a role that no feature reads are left out, as those of a request are.
        self._unread = schema.column_roles.keys() - self._columns[None].keys()

    def read_json(self, source: str | None, rows: Any, now: int | None = None) -> pa.Table:
        """A canonical table of rows as JSON gives them, a list of objects of columns and values.

        source: name of a log of events, None for the interaction log; now: microseconds since 1970 UTC; later times are
        refused. By default the clock's. Raises RequestError naming the row and the column.
        """
        columns = self._of(source)
        if not isinstance(rows, list) or not rows:
            raise RequestError("the rows must be a list of at least one object of columns and values")
        if len(rows) > self.most_rows:
            raise RequestError(f"there are more than {self.most_rows:,} rows; send them in several calls")
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                raise RequestError(f"row {number} must be an object of columns and values, found {type(row).__name__}")
            if (wrong := self._wrong_names(source, row)) is not None:
                raise _in_row(number, wrong)
        given = [name for name in columns if any(name in row for row in rows)]
        arrays = {name: self._read_column(name, columns[name], [row.get(name) for row in rows]) for name in given}
        return self._check(source, arrays, now)

    def _of(self, source: str | None) -> dict[str, _EventColumn]:
        if source not in self._columns:
            known = ", ".join(self.schema.events) or "none"
            raise RequestError(f"there is no log of events {quoted(source)}; there are: {known}")
        return self._columns[source]

    def _wrong_names(self, source: str | None, given: Collection[str]) -> str | None:
        """What is wrong with the columns that are given, as a sentence."""
        columns, wrong = self._columns[source], []
        unread = self._unread if source is None else set()
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
        row = find_first_fault(read, values)
        try:
            read(values[row : row + 1])
        except UserError as error:
            reason = error
        raise _in_row(row, _short(reason))

    def _check(self, source: str | None, arrays: dict[str, pa.Array], now: int | None) -> pa.Table:
        size = len(next(iter(arrays.values())))
        table = {}
        for name, array in arrays.items():
            table[name] = array if array.null_count < size else pa.nulls(size)
        rate = self.schema.columns.sampling_rate
        if source is None and rate is not None:  # rows that no one has sampled were kept for certain
            is_given = rate in table and not pt.is_null(table[rate].type)
            table[rate] = table[rate].fill_null(1.0) if is_given else pa.array(np.ones(size))
        rows = LogRows(pa.table(table), self.schema)
        latest = (time.time_ns() // 1_000 if now is None else now) + TOLERANCE_MICROSECONDS
        for check in (
            log_value_checks(self.schema, latest)
            if source is None
            else event_value_checks(self.schema.events[source].time, latest)
        ):
            if rows.has(check.column) and (wrong := check.find(rows)) is not None:
                raise _in_row(*wrong)
        ids = table.get(EVENT_ID)
        if ids is not None and pt.is_string(ids.type) and (row := pc.index(ids, "").as_py()) >= 0:
            what = "is empty, as which all rows would be the same event; give null where a row has no id"
            raise _in_row(row, f"column '{EVENT_ID}' {what}")
        if source is None:
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
        if isinstance(feature, Remembering) and feature.events is None:
            names |= feature.event_reads(schema).keys()
    # Attributes of users and candidates are known to whoever takes the rows, and completed where they are left out.
    attributes = {name for name, role in schema.column_roles.items() if role in ("user", "candidate")}
    return names - (attributes - {columns.user, columns.candidate})


def _in_row(number: int, sentence: str) -> RequestError:
    return RequestError(f"row {number}: {sentence}")


def _short(error: Exception) -> str:
    text = first_line(error)
    return text if len(text) <= _LONGEST_SENTENCE else f"{text[:_LONGEST_SENTENCE]}..."
