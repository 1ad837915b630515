"""Rows that callers send, checked as a build checks a log's files, before anything of them is written.

A batch is refused whole, with one sentence that names the first wrong row, counted from 0, and its column.

Rows may come as an Arrow IPC stream: bytes of unknown origin, which may not take any amount of memory. Arrow itself
reads compressed buffers, and dictionaries whose long words many rows share, into as much memory as they ask for; and it
takes offsets that point anywhere for granted until they are validated.
"""

from __future__ import annotations

import difflib
import struct
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from mmoe_rec.errors import RequestError, UserError, quoted
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.live.duplicates import EVENT_ID
from mmoe_rec.log.checks import format_time
from mmoe_rec.log.columns import canonical, column_uses, event_uses
from mmoe_rec.log.files import first_line
from mmoe_rec.log.given import microseconds, to_arrow
from mmoe_rec.log.rows import LogRows
from mmoe_rec.log.values import ValueCheck, Wrong, event_value_checks, log_value_checks
from mmoe_rec.point_in_time.arrays import one_array
from mmoe_rec.settings.columns import Use
from mmoe_rec.settings.schema import Remembering, Schema

MOST_ROWS = 10_000
TOLERANCE_MICROSECONDS = 60_000_000
"""By how much a caller's clock may be ahead of the server's."""
LONGEST_STRING = 4_096
"""Characters. What a row holds is kept in the journal, in files of the log and in tables, so that a body's size is no
bound for it."""
_FOREVER = np.iinfo(np.int64).max
_LONGEST_SENTENCE = 400
_RECORD_BATCH, _DICTIONARY_BATCH = 3, 2  # kinds of messages, in Arrow's Message.fbs
_END = b"\xff\xff\xff\xff\0\0\0\0"
MOST_TEXT_BYTES = 64 * 2**20
"""Characters of all columns of coded strings, of all rows together."""


def known_types(pipeline: FeaturePipeline) -> dict[str, pa.DataType]:
    """The types of columns as a fitted pipeline's log had them, where it knows more than how they are read."""
    types = {name: pa.type_for_alias(kind) for name, kind in pipeline.key_types.items()}
    for encoder in pipeline.encoders.values():
        types |= encoder.column_types()
    return types


@dataclass(frozen=True)
class _Column:
    """use: what it is read as; expected: its type, None where any that `use` allows will do; boolean: whether it may
    hold true and false, which are no ids."""

    use: Use
    required: bool
    expected: pa.DataType | None
    boolean: bool


class RowChecks:
    """What rows of the interaction log, and of each log of events, must hold.

    types: of columns, where they are known (`known_types`); most_rows: of a batch.
    """

    def __init__(
        self, schema: Schema, types: Mapping[str, pa.DataType] | None = None, most_rows: int = MOST_ROWS
    ) -> None:
        self.schema, self.most_rows = schema, most_rows
        known = types or {}
        self._columns: dict[str | None, dict[str, _Column]] = {}
        for source in (None, *schema.events):
            uses = column_uses(schema) if source is None else event_uses(schema, source)
            required = _required(schema) if source is None else set(uses)
            ids = {schema.columns.user, schema.columns.candidate, schema.columns.request}
            self._columns[source] = {
                name: _Column(use, name in required, known.get(name) if use != "time" else None, name not in ids)
                for name, use in uses.items()
            }
            self._columns[source].setdefault(EVENT_ID, _Column("key", False, None, False))
        self._value_checks: dict[str | None, list[ValueCheck]] = {None: log_value_checks(schema, _FOREVER)}
        for name, log in schema.events.items():
            self._value_checks[name] = event_value_checks(log.time, _FOREVER)
        ids = {schema.columns.user, schema.columns.candidate}
        self.attributes = [
            name for name, role in schema.input_columns().items() if role in ("user", "candidate") and name not in ids
        ]
        """Columns of users and candidates that features read, and that rows of the interaction log may leave out."""
        # Columns of a role that no feature reads are left out, as those of a request are.
        self._unread: dict[str | None, set[str]] = {None: schema.column_roles.keys() - self._columns[None].keys()}

    def of_json(self, source: str | None, rows: Any, now: int | None = None) -> pa.Table:
        """A canonical table of rows as JSON gives them, a list of objects of columns and values.

        Args:
            source: name of a log of events, None for the interaction log.
            now: microseconds since 1970 UTC; later times are refused. By default the clock's.

        Raises:
            RequestError: naming the row and the column.
        """
        columns = self._of(source)
        if not isinstance(rows, list) or not rows:
            raise RequestError("the rows must be a list of at least one object of columns and values")
        if len(rows) > self.most_rows:
            raise _too_many(self.most_rows)
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                raise RequestError(f"row {number} must be an object of columns and values, found {type(row).__name__}")
            if (wrong := self._wrong_names(source, row)) is not None:
                raise _in_row(number, wrong)
        given = [name for name in columns if any(name in row for row in rows)]
        arrays = {name: self._json_column(name, columns[name], [row.get(name) for row in rows]) for name in given}
        return self._checked(source, arrays, now)

    def of_stream(self, source: str | None, data: bytes, now: int | None = None) -> pa.Table:
        """The same of an Arrow IPC stream."""
        return self.of_table(source, _read_stream(data, self.most_rows), now)

    def of_table(self, source: str | None, table: pa.Table, now: int | None = None) -> pa.Table:
        """The same of an Arrow table."""
        columns = self._of(source)
        if not table.num_rows:
            raise RequestError("the table must have at least one row")
        if table.num_rows > self.most_rows:
            raise _too_many(self.most_rows)
        given = dict(zip(table.column_names, _plain_columns(table), strict=True))
        if len(given) < table.num_columns:
            names = table.column_names
            twice = next(name for place, name in enumerate(names) if name in names[:place])
            raise RequestError(f"column {quoted(twice)} is given twice")
        if (wrong := self._wrong_names(source, given)) is not None:
            raise RequestError(wrong)
        arrays = {name: self._arrow_column(name, each, given[name]) for name, each in columns.items() if name in given}
        return self._checked(source, arrays, now)

    def _of(self, source: str | None) -> dict[str, _Column]:
        if source not in self._columns:
            known = ", ".join(self.schema.events) or "none"
            raise RequestError(f"there is no log of events {quoted(source)}; there are: {known}")
        return self._columns[source]

    def _wrong_names(self, source: str | None, given: Collection[str]) -> str | None:
        """What is wrong with the columns that are given, as a sentence."""
        columns = self._columns[source]
        unknown = [name for name in given if name not in columns and name not in self._unread.get(source, set())]
        missing = [name for name, each in columns.items() if each.required and name not in given]
        lacking = f"there is no column '{missing[0]}'" if missing else None
        if not unknown:
            return lacking
        return "; and ".join(filter(None, (self._unknown(source, unknown[0]), lacking)))

    def _unknown(self, source: str | None, name: str) -> str:
        columns = list(self._columns[source])
        near = difflib.get_close_matches(name[:100], columns, n=1)
        # A model knows no more of its log than what it reads, so this may be a column of the log, or a mistyped one.
        hint = (
            f"did you mean '{near[0]}'? If not, leave it out"
            if near
            else f"leave it out; it knows {', '.join(columns)}"
        )
        return f"the model was trained without a column {quoted(name)}: {hint}"

    def _json_column(self, name: str, column: _Column, values: Sequence[Any]) -> pa.Array:
        unit = self.schema.columns.time_unit

        def read(some: Sequence[Any]) -> pa.Array:
            if not column.boolean and any(isinstance(value, bool) for value in some):
                raise RequestError(f"column '{name}' holds true or false, which is no id")
            return to_arrow(name, some, column.use, column.expected, unit)

        return _read(read, lambda begin, end: values[begin:end], len(values))

    def _arrow_column(self, name: str, column: _Column, values: pa.ChunkedArray) -> pa.Array:
        whole = one_array(values)
        texts = pt.is_string(whole.type) or pt.is_large_string(whole.type)
        if column.use == "time" and texts:
            return self._json_column(name, column, whole.to_pylist())
        unit = self.schema.columns.time_unit

        def read(some: pa.Array) -> pa.Array:
            if not column.boolean and pt.is_boolean(some.type):
                raise RequestError(f"column '{name}' holds true or false, which is no id")
            array = canonical(name, column.use, some, unit)
            if column.use == "time":
                for end in _ends(array):
                    microseconds(name, end, "us")
            return _finite(name, array, column.expected)

        def some(begin: int, end: int) -> pa.Array:
            return whole if end - begin == len(whole) else whole.take(pa.array(np.arange(begin, end)))

        return _read(read, some, len(whole))

    def _checked(self, source: str | None, arrays: dict[str, pa.Array], now: int | None) -> pa.Table:
        size = len(next(iter(arrays.values())))
        table = {}
        for name, array in arrays.items():
            _check_lengths(name, array)
            table[name] = array if array.null_count < size else pa.nulls(size)
        rate = self.schema.columns.sampling_rate
        if source is None and rate is not None:  # rows that no one has sampled were kept for certain
            is_given = rate in table and not pt.is_null(table[rate].type)
            table[rate] = table[rate].fill_null(1.0) if is_given else pa.array(np.ones(size))
        rows = LogRows(pa.table(table), self.schema)
        self._check_values(source, rows)
        if rows.has(EVENT_ID) and (empty := np.flatnonzero(_is_empty(rows.table[EVENT_ID]))).size:
            what = "is empty, as which all rows would be the same event; give null where a row has no id"
            raise _in_row(int(empty[0]), f"column '{EVENT_ID}' {what}")
        moment = time.time_ns() // 1_000 if now is None else now
        self._check_times(source, rows, moment + TOLERANCE_MICROSECONDS)
        if source is None:
            self._check_requests(rows)
            self._check_labels(rows)
        return rows.table

    def _check_values(self, source: str | None, rows: LogRows) -> None:
        for check in self._value_checks[source]:
            if rows.has(check.column):
                values = check.values(rows)
                if (mask := check.wrong(values)).any():
                    wrong = Wrong()
                    wrong.add(values, mask, 0)
                    raise _in_row(wrong.row, check.says(wrong))

    def _check_times(self, source: str | None, rows: LogRows, latest: int) -> None:
        name = self.schema.columns.time if source is None else self.schema.events[source].time
        times = rows.times(name)
        if (late := np.flatnonzero(times > latest)).size:
            row = int(late[0])
            found = format_time(int(times[row]))
            now = format_time(latest - TOLERANCE_MICROSECONDS)
            raise _in_row(row, f"column '{name}' holds {found}, a time later than the server's, {now}")

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
    found = {columns.user, columns.candidate, columns.time, *filter(None, [columns.request, columns.weight])}
    for task in schema.tasks.values():
        found.add(task.label)
        if task.observed_when is not None:
            found.add(task.observed_when.column)
    for feature in schema.features.values():
        if isinstance(feature, Remembering) and feature.events is None:
            found |= feature.event_reads(schema).keys()
    # Attributes of users and candidates are known to whoever takes the rows, and completed where they are left out.
    attributes = {name for name, role in schema.column_roles.items() if role in ("user", "candidate")}
    return found - (attributes - {columns.user, columns.candidate})


def _is_empty(values: pa.ChunkedArray) -> np.ndarray:
    """(N,) bool, whether each value is the empty string."""
    array = one_array(values)
    if not pt.is_string(array.type) and not pt.is_dictionary(array.type):
        return np.zeros(len(array), bool)
    sizes = pc.binary_length(array.cast(pa.string())).fill_null(1)
    return np.asarray(sizes.to_numpy(zero_copy_only=False)) == 0


def _check_lengths(name: str, array: pa.Array) -> None:
    """Raises RequestError for a string that is too long, also within a list."""
    if array.nbytes <= LONGEST_STRING or not pt.is_string(_element(array.type)):
        return
    strings = array.flatten() if pt.is_list(array.type) else array
    sizes = pc.utf8_length(strings).fill_null(0).to_numpy(zero_copy_only=False)
    if (long := np.flatnonzero(sizes > LONGEST_STRING)).size:
        place = int(long[0])
        row = pc.list_parent_indices(array)[place].as_py() if pt.is_list(array.type) else place
        raise _in_row(
            row,
            f"column '{name}' holds a string of {int(sizes[place]):,} characters; those of events have at most "
            f"{LONGEST_STRING:,}",
        )


def _read(read: Callable[[Any], pa.Array], some: Callable[[int, int], Any], size: int) -> pa.Array:
    """What `read` makes of all values; an error names the first row that it can't read, unless it could read none."""
    try:
        return read(some(0, size))
    except UserError as error:
        told = _short(error)
    if (of_none := _told(read, some(0, 0))) is not None:
        raise RequestError(of_none)
    fine, wrong = 0, size
    while wrong - fine > 1:
        middle = (fine + wrong) // 2
        if (sentence := _told(read, some(0, middle))) is None:
            fine = middle
        else:
            wrong, told = middle, sentence
    raise _in_row(fine, _told(read, some(fine, fine + 1)) or told)


def _told(read: Callable[[Any], pa.Array], values: Any) -> str | None:
    """What is wrong with values; None where they can be read."""
    try:
        read(values)
    except UserError as error:
        return _short(error)
    return None


def _finite(name: str, array: pa.Array, expected: pa.DataType | None) -> pa.Array:
    """Raises RequestError for NaN and infinity, and for another type than expected."""
    numbers = array.flatten() if pt.is_list(array.type) else array
    if pt.is_floating(numbers.type) and not np.isfinite(numbers.drop_null().to_numpy(zero_copy_only=False)).all():
        raise RequestError(f"column '{name}' holds NaN or infinity; give null for a missing number")
    if expected is not None and not pt.is_null(array.type) and _element(array.type) != _element(expected):
        raise RequestError(f"column '{name}' must hold {expected}, as in the log; found {array.type}")
    return array


def _element(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pt.is_list(kind) else kind


def _ends(times: pa.Array) -> list[int]:
    found = times.cast(pa.int64()).drop_null().to_numpy(zero_copy_only=False)
    return [int(found.min()), int(found.max())] if len(found) else []


def _in_row(number: int, sentence: str) -> RequestError:
    return RequestError(f"row {number}: {sentence}")


def _short(error: Exception) -> str:
    text = first_line(error)
    return text if len(text) <= _LONGEST_SENTENCE else f"{text[:_LONGEST_SENTENCE]}..."


def _read_stream(data: bytes, most_rows: int) -> pa.Table:
    """The table of a stream, validated. Raises RequestError for anything else, or more rows."""
    try:
        _check_plain(data)
        batches, rows, source = [], 0, pa.BufferReader(data)
        with pa.ipc.open_stream(source) as reader:
            for field in reader.schema:
                if not _is_plain(field.type):
                    kind = str(field.type)[:60]
                    raise RequestError(f"column {quoted(field.name)} is of Arrow's type {kind}, which is not taken")
            for batch in reader:
                rows += batch.num_rows
                if rows > most_rows:
                    raise _too_many(most_rows)
                batches.append(batch)
            table = pa.Table.from_batches(batches, reader.schema)
            _check_end(data, source.tell())
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, struct.error, IndexError, MemoryError) as error:
        raise RequestError(f"the body is no Arrow IPC stream that can be read: {first_line(error)[:200]}") from None
    return table


def _too_many(most_rows: int) -> RequestError:
    """The error of more rows than may come together."""
    return RequestError(f"there are more than {most_rows:,} rows; send them in several calls")


def _plain_columns(table: pa.Table) -> list[pa.ChunkedArray]:
    """A validated table's columns with their strings written out. Raises RequestError where that would be too much
    text."""
    columns, text = [], 0
    for name, column in zip(table.column_names, table.columns, strict=True):
        kind = column.type
        if pt.is_dictionary(kind) and _is_text(kind.value_type):
            text += sum(map(_text_bytes, column.chunks))
            if text > MOST_TEXT_BYTES:
                raise RequestError(f"column {quoted(name)} holds more than {MOST_TEXT_BYTES:,} bytes of text")
            column = pa.chunked_array([chunk.dictionary_decode() for chunk in column.chunks], kind.value_type)  # noqa: PLW2901
        columns.append(column)
    return columns


def _is_plain(kind: pa.DataType) -> bool:
    """Whether values of a type take no more memory once they are read than they do in the stream, or, where they are
    coded strings, as much as is counted."""
    if pt.is_list(kind) or pt.is_large_list(kind):
        return _is_value(kind.value_type)
    return _is_value(kind) or (pt.is_dictionary(kind) and _is_text(kind.value_type))


def _is_value(kind: pa.DataType) -> bool:
    numbers = pt.is_integer(kind) or pt.is_floating(kind) or pt.is_boolean(kind)
    return numbers or pt.is_timestamp(kind) or pt.is_date(kind) or pt.is_null(kind) or _is_text(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pt.is_string(kind) or pt.is_large_string(kind)


def _text_bytes(coded: pa.DictionaryArray) -> int:
    lengths = pc.binary_length(coded.dictionary).take(coded.indices)
    return int(pc.sum(lengths.cast(pa.int64())).as_py() or 0)


def _check_end(data: bytes, end: int) -> None:
    """Raises RequestError where the stream that was read up to a byte has no end, or is not all that was sent."""
    if not data[:end].endswith(_END):
        raise RequestError("the Arrow stream has no end marker, so it may be cut off; close its writer before sending")
    if end < len(data):
        raise RequestError(f"{len(data) - end:,} bytes follow the end of the Arrow stream; send one stream in a call")


def _check_plain(data: bytes) -> None:
    """Raises RequestError where a message of the stream is compressed."""
    for message in pa.ipc.MessageReader.open_stream(data):
        flat = message.metadata.to_pybytes()
        table = struct.unpack_from("<I", flat, 0)[0]
        kind = flat[_field(flat, table, 1)] if _field(flat, table, 1) else 0
        if kind in (_RECORD_BATCH, _DICTIONARY_BATCH):
            batch = _follow(flat, _field(flat, table, 2))
            if kind == _DICTIONARY_BATCH:
                batch = _follow(flat, _field(flat, batch, 1))
            if _field(flat, batch, 3):
                raise RequestError("the Arrow stream is compressed; send it without compression")


def _field(flat: bytes, table: int, number: int) -> int:
    """Place of a field of a table in a flatbuffer, 0 where it is not given."""
    entries = table - struct.unpack_from("<i", flat, table)[0]
    if 4 + 2 * number >= struct.unpack_from("<H", flat, entries)[0]:
        return 0
    offset = struct.unpack_from("<H", flat, entries + 4 + 2 * number)[0]
    return table + offset if offset else 0


def _follow(flat: bytes, place: int) -> int:
    return place + int(struct.unpack_from("<I", flat, place)[0])
