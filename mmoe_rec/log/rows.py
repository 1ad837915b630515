"""Rows of a log, or of requests, in canonical types, with caches for repeated reads by features.

A task with `conditional_on` has two labels. Its own label is observed only in rows where the label of the
`conditional_on` task is 1. Its joint outcome (both labels are 1, as in ESMM: Ma et al., SIGIR 2018) is observed in all
rows, and is 0 if the label of the `conditional_on` task is 0.

Rows of a plain table get substitutes for missing columns, so that code that reads rows needs no special case. The user
is the request or the row number, the candidate is the row number, and the time is the index of the row's split in
`SPLITS`, in microseconds. Features can't read these columns (see `Schema`), and no output contains them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from mmoe_rec.errors import UserError
from mmoe_rec.log.columns import UTC_MICROSECONDS, combine_hashes, hash_column
from mmoe_rec.point_in_time.arrays import DedupedRagged, fill_nulls, one_array
from mmoe_rec.point_in_time.join import Lookups
from mmoe_rec.settings.log_columns import SplitColumn, Task, joint_task_name
from mmoe_rec.settings.schema import Schema

MICROSECONDS_PER_DAY = 86_400_000_000
FEATURE_BATCH_ROWS = 16_384
"""Maximum number of rows whose features are computed together. A larger request is not split."""
ColumnFunction = Callable[[pa.Array], np.ndarray]


class LogRows:
    """N rows of a table with canonical columns (see `mmoe_rec.log.columns`)."""

    _row_numbers: np.ndarray | None = None
    make_lookups = staticmethod(Lookups.sort)
    """Function that makes lookups of N keys and times."""

    def __init__(
        self,
        table: pa.Table,
        schema: Schema,
        results: Mapping[str, Any] | None = None,
        row_numbers: np.ndarray | None = None,
    ) -> None:
        """Wrap a table.

        Args:
            table: Canonical columns. Strings may be dictionary-coded.
            schema: Schema of the log.
            results: Precomputed values of features for these rows, such as counters, by name of the result.
            row_numbers: Number of each row in its log, (N,) int64. None for rows that are not from a log.
        """
        self.table = table
        self._row_numbers = row_numbers
        self._start(schema, results)

    def _start(self, schema: Schema, results: Mapping[str, Any] | None = None) -> None:
        self.schema = schema
        self.results = dict(results or {})
        self._hashes: dict[tuple[str, ...], np.ndarray] = {}
        self._lookups: dict[tuple[str, ...], Lookups] = {}
        self._times: dict[str | None, np.ndarray] = {}

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def row_numbers(self) -> np.ndarray:
        """Number of each row in its log, (N,) int64."""
        assert self._row_numbers is not None, "these rows were not read from a log"
        return self._row_numbers

    def filter(self, mask: np.ndarray) -> "LogRows":
        """Return the rows where `mask`, (N,) bool, is true, without `results` unless all rows are kept."""
        if mask.all():
            return self
        numbers = None if self._row_numbers is None else self._row_numbers[mask]
        return LogRows(self.table.filter(pa.array(mask)), self.schema, row_numbers=numbers)

    def iter_batches(self, rows: int) -> "Iterator[LogRows]":
        """Yield batches of at most `rows` rows, with their part of `results`."""
        if 0 < len(self) <= rows:
            yield self
            return
        for start in range(0, len(self), rows):
            batch = slice(start, start + rows)
            results = {n: v.take(batch) if isinstance(v, DedupedRagged) else v[batch] for n, v in self.results.items()}
            numbers = None if self._row_numbers is None else self._row_numbers[batch]
            yield LogRows(self.table.slice(start, rows), self.schema, results, numbers)

    def with_own_results(self) -> Self:
        """Return a shallow copy with its own `results`, so that changes of them don't affect these rows."""
        rows = copy(self)
        rows.results = dict(self.results)
        return rows

    def with_times(self, times: np.ndarray) -> "LogRows":
        """Return a copy without `results`, with new request `times`, (N,) int64 microseconds since 1970 UTC."""
        name = self.schema.columns.time
        column = pa.array(times).cast(UTC_MICROSECONDS)
        table = self.table.set_column(self.table.column_names.index(name), name, column)
        return LogRows(table, self.schema, row_numbers=self._row_numbers)

    def has_column(self, name: str) -> bool:
        """Return whether the rows have the column `name`."""
        return bool(self.table.schema.get_field_index(name) >= 0)

    def column(self, name: str) -> pa.Array:
        """Return the column `name` as one array, with decoded strings."""
        column = self.raw_column(name)
        return column.dictionary_decode() if pt.is_dictionary(column.type) else column

    def raw_column(self, name: str) -> pa.Array:
        """Return the column `name` as one array. Strings may be dictionary-coded."""
        return one_array(self.table.column(name))

    def apply(self, name: str, function: ColumnFunction) -> np.ndarray:
        """Return the results of an elementwise function of a column, shape (N,).

        Args:
            name: Name of the column.
            function: Elementwise function of an Arrow array as `raw_column` returns it.
        """
        return function(self.raw_column(name))

    def numbers(self, name: str) -> np.ndarray:
        """Return the numeric column `name` as (N,) float64, with NaN for null."""
        try:
            return self.apply(name, _numbers)
        except UserError as error:
            raise UserError(f"column '{name}' {error}") from None

    def hashes(self, names: Sequence[str]) -> np.ndarray:
        """Return a hash of the values of columns `names` in each row, (N,) uint64."""
        key = tuple(names)
        if key not in self._hashes:
            parts = [self.hashes([name]) for name in names] if len(key) > 1 else [self.apply(names[0], hash_column)]
            self._hashes[key] = combine_hashes(parts)
        return self._hashes[key]

    def lookups(self, names: Sequence[str]) -> Lookups:
        """Return the lookups of these rows in counters and histories whose key consists of the columns `names`."""
        key = tuple(names)
        if key not in self._lookups:
            self._lookups[key] = self.make_lookups(self.hashes(names), self.times())
        return self._lookups[key]

    def times(self, name: str | None = None) -> np.ndarray:
        """Return column `name`, by default the request time, as (N,) int64 microseconds since 1970 UTC.

        Null becomes the smallest int64.
        """
        if name not in self._times:
            column = self.column(name or self.schema.columns.time)
            null = np.iinfo(np.int64).min
            times = np.full(len(column), null) if pt.is_null(column.type) else fill_nulls(column.cast(pa.int64()), null)
            self._times[name] = np.asarray(times)
        return self._times[name]

    def requests(self) -> pa.Array:
        """Return request ids, (N,) int64 or string.

        Without a request column, the id is a hash of user and time. If ids are unique only within a user, it is a hash
        of user and id.
        """
        columns = self.schema.columns
        if columns.request is not None:
            if columns.request_scope == "log":
                return self.column(columns.request)
            return pa.array(self.hashes([columns.user, columns.request]).view(np.int64))
        return pa.array(combine_hashes([self.hashes([columns.user]), self.times().view(np.uint64)]).view(np.int64))

    def request_hashes(self) -> np.ndarray:
        """Return (N,) uint64 hashes of the request ids."""
        columns = self.schema.columns
        if columns.request is None:
            return hash_column(self.requests())
        return self.hashes([columns.request] if columns.request_scope == "log" else [columns.user, columns.request])

    def request_codes(self) -> np.ndarray:
        """Return (N,) int64 codes of the requests. Codes start at 0, and rows of one request have the same code."""
        return np.unique(self.request_hashes(), return_inverse=True)[1]

    def row_hashes(self) -> np.ndarray:
        """Return a hash of each row's request and candidate, (N,) uint64. Repeated rows have equal hashes."""
        return combine_hashes([self.request_hashes(), self.hashes([self.schema.columns.candidate])])

    def labels(self, task: Task, label_cutoff: int) -> np.ndarray:
        """Return a task's labels, (N,) float64, with NaN for unobserved labels.

        A label is unobserved if it is null, excluded by `observed_when`, or not final at `label_cutoff`, or if the
        label of the `conditional_on` task is not 1.

        Args:
            task: Task of the schema.
            label_cutoff: Time in microseconds since 1970 UTC.
        """
        labels = self.numbers(task.label)
        observed = self.times() + label_delay(task, self.schema) <= label_cutoff
        if task.conditional_on is not None:
            observed &= self.labels(self.schema.tasks[task.conditional_on], label_cutoff) == 1
        if task.observed_when is not None:
            rule = task.observed_when
            observed &= _equals(self.column(rule.column), rule.column, rule.equals)
        return np.where(observed, labels, np.nan)


class CachedColumn:
    """A column whose values never change, which caches the results of elementwise functions."""

    def __init__(self, values: pa.Array) -> None:
        self.values = values
        self._cache: dict[ColumnFunction, np.ndarray] = {}

    def apply(self, function: ColumnFunction, indices: np.ndarray) -> np.ndarray:
        """Return an elementwise function's results for N selected values, shape (N,).

        Args:
            function: Elementwise function.
            indices: Indices of the values, (N,) int64. -1 selects null.
        """
        if function not in self._cache:
            self._cache[function] = np.append(function(self.values), function(pa.nulls(1, self.values.type)))
        return self._cache[function].take(indices, mode="wrap")


@dataclass(frozen=True)
class CachedValues:
    """N values that refer to a stored column.

    Attributes:
        column: Stored values.
        indices: Index of each value in the column, (N,) int64. -1 stands for null or for the value in `fallback`.
        fallback: All N values, also where the index is not -1. None if index -1 stands for null.
        seen: Whether each value with index -1 has occurred in later events, (N,) bool. None if no value has.
    """

    column: CachedColumn
    indices: np.ndarray
    fallback: pa.Array | None = None
    seen: np.ndarray | None = None

    @property
    def unseen(self) -> np.ndarray:
        """Whether each value has occurred neither in `column` nor in later events, (N,) bool."""
        return self.indices < 0 if self.seen is None else (self.indices < 0) & ~self.seen

    def array(self) -> pa.Array:
        """Return all N values."""
        if self.fallback is not None:
            return self.fallback
        return self.column.values.take(pa.array(self.indices, mask=self.indices < 0))

    def apply(self, function: ColumnFunction) -> np.ndarray:
        """Return the results of the elementwise `function`, of shape (N,)."""
        results = self.column.apply(function, self.indices)
        if self.fallback is not None and len(not_stored := np.flatnonzero(self.indices < 0)):
            results[not_stored] = function(self.fallback.take(pa.array(not_stored)))
        return results

    def take(self, rows: np.ndarray) -> "CachedValues":
        """Return the values at the indices `rows`, (M,) int64, in this order."""
        fallback = None if self.fallback is None else self.fallback.take(pa.array(rows))
        return CachedValues(self.column, self.indices[rows], fallback, None if self.seen is None else self.seen[rows])


class ServingRows(LogRows):
    """N rows of canonical columns for serving.

    A request has few rows, so each row is looked up in counters and histories on its own. `LogRows` sorts all lookups
    first, which is faster for many rows.
    """

    make_lookups = staticmethod(Lookups.one_per_row)

    def __init__(self, columns: Mapping[str, pa.Array | CachedValues], rows: int, schema: Schema) -> None:
        """Wrap canonical columns.

        Args:
            columns: Columns of N values, by name.
            rows: Number of rows N.
            schema: Schema of the log.
        """
        self._columns, self._rows = columns, rows
        self._start(schema)

    def unseen(self, name: str) -> np.ndarray:
        """Return whether each value of a column is unseen, (N,) bool. All False if the column isn't `CachedValues`."""
        column = self._columns[name]
        return column.unseen if isinstance(column, CachedValues) else np.zeros(self._rows, bool)

    def __len__(self) -> int:
        return self._rows

    def has_column(self, name: str) -> bool:
        return name in self._columns

    def raw_column(self, name: str) -> pa.Array:
        column = self._columns[name]
        return column.array() if isinstance(column, CachedValues) else column

    def apply(self, name: str, function: ColumnFunction) -> np.ndarray:
        column = self._columns[name]
        return column.apply(function) if isinstance(column, CachedValues) else function(column)


class RequestRows(ServingRows):
    """N candidates of R requests. Columns of user and context are stored once per request, and repeated on demand."""

    def __init__(
        self, shared: ServingRows, columns: Mapping[str, pa.Array | CachedValues], request_index: np.ndarray
    ) -> None:
        """Store the columns of requests and candidates.

        Args:
            shared: R rows with the columns of user and context.
            columns: Columns of the N candidates, by name.
            request_index: Index of each candidate's request, (N,) int64.
        """
        super().__init__(columns, len(request_index), shared.schema)
        self.shared, self.request_index = shared, request_index
        self._spread: dict[str, pa.Array] = {}

    def request_codes(self) -> np.ndarray:
        return self.request_index

    def has_column(self, name: str) -> bool:
        return name in self._columns or self.shared.has_column(name)

    def raw_column(self, name: str) -> pa.Array:
        if name in self._columns:
            return super().raw_column(name)
        if name not in self._spread:
            self._spread[name] = self.shared.raw_column(name).take(pa.array(self.request_index))
        return self._spread[name]

    def take(self, name: str, rows: np.ndarray) -> pa.Array:
        """Return a column's values for some candidates.

        Args:
            name: Name of the column.
            rows: Indices of the candidates, (M,) int64.
        """
        if name in self._columns:
            column, indices = self._columns[name], rows
        else:
            column, indices = self.shared._columns[name], self.request_index[rows]
        return column.take(indices).array() if isinstance(column, CachedValues) else column.take(pa.array(indices))

    def apply(self, name: str, function: ColumnFunction) -> np.ndarray:
        if name in self._columns:
            return super().apply(name, function)
        return self.shared.apply(name, function)[self.request_index]

    def times(self, name: str | None = None) -> np.ndarray:
        name = name or self.schema.columns.time
        if name not in self._columns and name not in self._times:
            self._times[name] = self.shared.times(name)[self.request_index]
        return super().times(name)

    def hashes(self, names: Sequence[str]) -> np.ndarray:
        key = tuple(names)
        if key not in self._hashes and not any(name in self._columns for name in key):
            self._hashes[key] = self.shared.hashes(key)[self.request_index]
        return super().hashes(key)


def _numbers(column: pa.Array) -> np.ndarray:
    if pt.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pt.is_null(column.type):
        return np.full(len(column), np.nan)
    if pt.is_string(column.type):
        raise UserError("must hold numbers, found strings")
    return column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)


def label_delay(task: Task, schema: Schema) -> int:
    """Return the microseconds from a request until the labels of a task and of its `conditional_on` task are final.

    Args:
        task: Task of the schema.
        schema: Schema with all tasks.
    """
    own = round(task.label_delay_days * MICROSECONDS_PER_DAY)
    return own if task.conditional_on is None else max(own, label_delay(schema.tasks[task.conditional_on], schema))


def _equals(column: pa.Array, name: str, value: bool | int | float | str) -> np.ndarray:
    if pt.is_null(column.type):
        return np.zeros(len(column), bool)
    _check_same_type(column, name, "an `observed_when`", value)
    if not pt.is_string(column.type):
        return _numbers(column) == float(value)
    return fill_nulls(pc.equal(column, value), False).to_numpy(zero_copy_only=False)


def _check_same_type(column: pa.Array, name: str, setting: str, value: bool | int | float | str) -> None:
    """Raise UserError if `setting` compares a text column with a number, or a numeric column with text."""
    if (is_text := pt.is_string(column.type)) != isinstance(value, str):
        content, write = ("text", "in quotes") if is_text else ("numbers", "without quotes")
        problem = f"column '{name}' holds {content}, but {setting} compares it with {value!r}"
        raise UserError(f"{problem}. Write the value {write}.")


_FOREVER = np.iinfo(np.int64).max


def compute_labels(rows: LogRows, label_cutoff: int) -> dict[str, np.ndarray]:
    """Return labels by name of task or joint outcome (`joint_task_name`), (N,) float64, with NaN for unobserved labels.

    A joint outcome is unobserved until both labels are final, even if the `conditional_on` label is already 0.
    Otherwise recent rows would contribute zeros before ones, and the outcome would seem too rare.

    Args:
        rows: N rows.
        label_cutoff: Time in microseconds since 1970 UTC. Labels that are not final at this time are unobserved.
    """
    tasks = rows.schema.tasks
    labels = {name: rows.labels(task, label_cutoff) for name, task in tasks.items()}
    outcomes = {}
    for name, task in tasks.items():
        if task.conditional_on is not None:
            matured = rows.times() + label_delay(task, rows.schema) <= label_cutoff
            not_engaged = (labels[task.conditional_on] == 0) & matured
            outcomes[joint_task_name(task.conditional_on, name)] = np.where(not_engaged, 0.0, labels[name])
    return labels | outcomes


def pending_labels(rows: LogRows, label_cutoff: int) -> dict[str, int]:
    """Return the number of labels that `rows` have but that were not final at `label_cutoff`, by task.

    Args:
        rows: Rows of the log.
        label_cutoff: Time in microseconds since 1970 UTC.
    """
    counts = {}
    for name, task in rows.schema.tasks.items():
        late = rows.times() + label_delay(task, rows.schema) > label_cutoff
        counts[name] = int((~np.isnan(rows.labels(task, _FOREVER)[late])).sum()) if late.any() else 0
    return counts


def add_missing_times(table: pa.Table, schema: Schema) -> pa.Table:
    """Add a substitute time column (index of the split) if the log has no times.

    Args:
        table: Canonical columns.
        schema: Schema of the log.
    """
    if schema.columns.has_time:
        return table
    split = schema.split
    times = np.zeros(len(table), np.int64) if split is None else split_indices(table.column(split.column), split)
    return table.append_column(schema.columns.time, pa.array(times).cast(UTC_MICROSECONDS))


def add_missing_ids(table: pa.Table, schema: Schema, first_row: int) -> pa.Table:
    """Add substitute user and candidate columns if the log has none (request or row number, and row number).

    Args:
        table: Canonical columns.
        schema: Schema of the log.
        first_row: Number of the table's first row in the log.
    """
    columns, numbers = schema.columns, pa.array(np.arange(first_row, first_row + len(table)))
    if not columns.has_user:
        users = numbers
        if columns.request is not None:
            users = pa.array(hash_column(one_array(table.column(columns.request))).view(np.int64))
        table = table.append_column(columns.user, users)
    return table if columns.has_candidate else table.append_column(columns.candidate, numbers)


def reject_plain_table(schema: Schema, operation: str) -> None:
    """Raise UserError if the log is a plain table without users, candidates or times.

    Args:
        schema: Schema of the log.
        operation: Operation that needs these columns, for the message.
    """
    columns = schema.columns
    present = {"user": columns.has_user, "candidate": columns.has_candidate, "time": columns.has_time}
    if lacking := [f"columns.{name}" for name, is_present in present.items() if not is_present]:
        raise UserError(f"{operation} needs {' and '.join(lacking)}, but the settings lack them")


def split_indices(column: pa.ChunkedArray | pa.Array, split: SplitColumn) -> np.ndarray:
    """Return the index of each row's split in `SPLITS`, (N,) int64, -1 for values that the settings don't list.

    Args:
        column: Values of the split column.
        split: Settings that list the values of each split.

    Raises:
        UserError: The settings list text for a numeric column, or numbers for a text column.
    """
    values = one_array(column) if isinstance(column, pa.ChunkedArray) else column
    values = values.dictionary_decode() if pt.is_dictionary(values.type) else values
    indices = np.full(len(values), -1)
    for index, (name, listed) in enumerate(split.values.items()):
        if pt.is_null(values.type):
            continue
        for value in listed:
            _check_same_type(values, split.column, f"split.{name}", value)
        wanted = pa.array([value if isinstance(value, str) else int(value) for value in listed], values.type)
        indices[fill_nulls(pc.is_in(values, value_set=wanted), False).to_numpy(zero_copy_only=False)] = index
    return indices
