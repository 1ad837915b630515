"""Rows of a log, or of requests, in canonical types; what features ask for repeatedly is cached. What describes a
request stands once, and is spread over its candidates where rows need it.

Labels are each task's own, and the outcome over all rows of a satisfaction that follows engagement. A task with
`conditional_on` exists only where the given task's label is 1. Its own label is unobserved elsewhere; its outcome
(engaged and satisfied, as in ESMM: Ma et al., SIGIR 2018) is 0 where there was no engagement.

A row of a plain table gets what stands in for what the table lacks: for a user, its request or its number in the log;
for a candidate, its number; for a time, the place of its split among `SPLITS`, microseconds. So nothing that reads rows
has to know about it. Features can't read these columns (see `Schema`), and no output holds them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
"""Rows whose features are made together, at most, unless a single request has more."""
ColumnFunction = Callable[[pa.Array], np.ndarray]


class LogRows:
    """N rows; `table` holds canonical columns (see `mmoe_rec.log.columns`), strings dictionary-coded or not.

    results: name -> what counters and histories give for these rows, where it was looked up before; row_numbers: (N,)
    int64 of each row in its log, None for rows of none.
    """

    _row_numbers: np.ndarray | None = None
    _ask = staticmethod(Lookups.sort)

    def __init__(
        self,
        table: pa.Table,
        schema: Schema,
        results: Mapping[str, Any] | None = None,
        row_numbers: np.ndarray | None = None,
    ) -> None:
        self.table = table
        self._row_numbers = row_numbers
        self._start(schema, results)

    def _start(self, schema: Schema, results: Mapping[str, Any] | None = None) -> None:
        self.schema = schema
        self.results = dict(results or {})
        self._hashes: dict[tuple[str, ...], np.ndarray] = {}
        self._look_ups: dict[tuple[str, ...], Lookups] = {}
        self._times: dict[str | None, np.ndarray] = {}

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def row_numbers(self) -> np.ndarray:
        """(N,) int64 number of each row in the log that it was read from."""
        assert self._row_numbers is not None, "these rows were not read from a log"
        return self._row_numbers

    def filter(self, mask: np.ndarray) -> "LogRows":
        """The rows where `mask` (N,) bool is true."""
        if mask.all():
            return self
        numbers = None if self._row_numbers is None else self._row_numbers[mask]
        return LogRows(self.table.filter(pa.array(mask)), self.schema, row_numbers=numbers)

    def iter_batches(self, rows: int) -> "Iterator[LogRows]":
        """The rows with their results, at most so many at a time."""
        if 0 < len(self) <= rows:
            yield self
            return
        for start in range(0, len(self), rows):
            its = slice(start, start + rows)
            known = {n: e.take(its) if isinstance(e, DedupedRagged) else e[its] for n, e in self.results.items()}
            numbers = None if self._row_numbers is None else self._row_numbers[its]
            yield LogRows(self.table.slice(start, rows), self.schema, known, numbers)

    def with_times(self, times: np.ndarray) -> "LogRows":
        """The same rows with (N,) int64 other times of their requests, microseconds."""
        name = self.schema.columns.time
        column = pa.array(times).cast(UTC_MICROSECONDS)
        table = self.table.set_column(self.table.column_names.index(name), name, column)
        return LogRows(table, self.schema, row_numbers=self._row_numbers)

    def has_column(self, name: str) -> bool:
        """Whether the rows have this column."""
        return bool(self.table.schema.get_field_index(name) >= 0)

    def column(self, name: str) -> pa.Array:
        """A column as one array."""
        column = self.raw_column(name)
        return column.dictionary_decode() if pt.is_dictionary(column.type) else column

    def raw_column(self, name: str) -> pa.Array:
        """A column as one array, with strings as they are held."""
        return one_array(self.table.column(name))

    def apply(self, name: str, function: ColumnFunction) -> np.ndarray:
        """(N,) what a function makes of a column's values (as `coded` gives them), of each value for itself."""
        return function(self.raw_column(name))

    def numbers(self, name: str) -> np.ndarray:
        """(N,) float64 of a column of numbers, NaN where null."""
        try:
            return self.apply(name, _numbers)
        except UserError as error:
            raise UserError(f"column '{name}' {error}") from None

    def hashes(self, names: Sequence[str]) -> np.ndarray:
        """(N,) uint64 hash of one column or of the combination of several."""
        key = tuple(names)
        if key not in self._hashes:
            parts = [self.hashes([name]) for name in names] if len(key) > 1 else [self.apply(names[0], hash_column)]
            self._hashes[key] = combine_hashes(parts)
        return self._hashes[key]

    def lookups(self, names: Sequence[str]) -> Lookups:
        """The rows' look-ups by these columns."""
        key = tuple(names)
        if key not in self._look_ups:
            self._look_ups[key] = self._ask(self.hashes(names), self.times())
        return self._look_ups[key]

    def times(self, name: str | None = None) -> np.ndarray:
        """(N,) int64 microseconds since 1970 UTC of a time column, by default the request's; null: least int64."""
        if name not in self._times:
            column = self.column(name or self.schema.columns.time)
            null = np.iinfo(np.int64).min
            times = np.full(len(column), null) if pt.is_null(column.type) else fill_nulls(column.cast(pa.int64()), null)
            self._times[name] = np.asarray(times)
        return self._times[name]

    def requests(self) -> pa.Array:
        """The request's id, (N,) int64 or string; a hash of user and time without a request column, of user and id
        where ids are a user's own."""
        columns = self.schema.columns
        if columns.request is not None:
            if columns.request_scope == "log":
                return self.column(columns.request)
            return pa.array(self.hashes([columns.user, columns.request]).view(np.int64))
        hashed = self.hashes([columns.user])
        return pa.array(combine_hashes([hashed, self.times().view(np.uint64)]).view(np.int64))

    def request_hashes(self) -> np.ndarray:
        """(N,) uint64 hash of the request's id."""
        columns = self.schema.columns
        if columns.request is None:
            return hash_column(self.requests())
        return self.hashes([columns.request] if columns.request_scope == "log" else [columns.user, columns.request])

    def row_hashes(self) -> np.ndarray:
        """(N,) uint64 hash of request and candidate, by which two rows are known as the same one."""
        return combine_hashes([self.request_hashes(), self.hashes([self.schema.columns.candidate])])

    def labels(self, task: Task, label_cutoff: int) -> np.ndarray:
        """(N,) float64 labels, NaN where unobserved: null, ruled out, not matured at `label_cutoff` (microseconds), or
        of a task whose `conditional_on` task did not happen."""
        labels = self.numbers(task.label)
        observed = self.times() + label_delay(task, self.schema) <= label_cutoff
        if task.conditional_on is not None:
            observed &= self.labels(self.schema.tasks[task.conditional_on], label_cutoff) == 1
        if task.observed_when is not None:
            rule = task.observed_when
            observed &= _equals(self.column(rule.column), rule.column, rule.equals)
        return np.where(observed, labels, np.nan)


class CachedColumn:
    """A column of (S,) values that stays as it is. What functions make of each value is computed once, when first asked
    for; after that, a request only looks the results up."""

    def __init__(self, values: pa.Array) -> None:
        self.values = values
        self._made: dict[ColumnFunction, np.ndarray] = {}

    def apply(self, function: ColumnFunction, indices: np.ndarray) -> np.ndarray:
        """(N,) what a function makes of the values at (N,) int64 places, and of null at place -1."""
        if function not in self._made:
            self._made[function] = np.append(function(self.values), function(pa.nulls(1, self.values.type)))
        return self._made[function].take(indices, mode="wrap")


@dataclass(frozen=True)
class CachedValues:
    """N values of a stored column, by (N,) int64 places; -1 is null, or what is `conditional_on` there, (N,) values.

    known: (N,) bool which values are known, though they may not be stored; None where all that are known are stored.
    """

    column: CachedColumn
    indices: np.ndarray
    fallback: pa.Array | None = None
    seen: np.ndarray | None = None

    @property
    def unseen(self) -> np.ndarray:
        """(N,) bool whether a value is not known."""
        return self.indices < 0 if self.seen is None else (self.indices < 0) & ~self.seen

    def array(self) -> pa.Array:
        """The values."""
        if self.fallback is not None:
            return self.fallback
        return self.column.values.take(pa.array(self.indices, mask=self.indices < 0))

    def apply(self, function: ColumnFunction) -> np.ndarray:
        """(N,) what a function makes of each value."""
        made = self.column.apply(function, self.indices)
        if self.fallback is not None and len(unknown := np.flatnonzero(self.indices < 0)):
            made[unknown] = function(self.fallback.take(pa.array(unknown)))
        return made

    def take(self, rows: np.ndarray) -> "CachedValues":
        """The values of the given rows, (M,) int64, in the given order."""
        fallback = None if self.fallback is None else self.fallback.take(pa.array(rows))
        return CachedValues(self.column, self.indices[rows], fallback, None if self.seen is None else self.seen[rows])


class ServingRows(LogRows):
    """N rows given as canonical columns, which ask few of many events: each look-up is searched for itself."""

    _ask = staticmethod(Lookups.one_per_row)

    def __init__(self, columns: Mapping[str, pa.Array | CachedValues], rows: int, schema: Schema) -> None:
        self._columns, self._rows = columns, rows
        self._start(schema)

    def unseen(self, name: str) -> np.ndarray:
        """(N,) bool whether a column's values are none of those that are known; False where none are stored."""
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
    """N candidates of R requests. shared: the R requests, with the columns of user and context; columns: of the
    candidates, N values each; of: (N,) int64 the request of each candidate."""

    def __init__(
        self, shared: ServingRows, columns: Mapping[str, pa.Array | CachedValues], request_index: np.ndarray
    ) -> None:
        super().__init__(columns, len(request_index), shared.schema)
        self.shared, self.request_index = shared, request_index
        self._spread: dict[str, pa.Array] = {}

    def has_column(self, name: str) -> bool:
        return name in self._columns or self.shared.has_column(name)

    def raw_column(self, name: str) -> pa.Array:
        if name in self._columns:
            return super().raw_column(name)
        if name not in self._spread:
            self._spread[name] = self.shared.raw_column(name).take(pa.array(self.request_index))
        return self._spread[name]

    def take(self, name: str, rows: np.ndarray) -> pa.Array:
        """A column's values of the given candidates, (M,) int64, in the given order."""
        columns, places = (
            (self._columns, rows) if name in self._columns else (self.shared._columns, self.request_index[rows])
        )
        column = columns[name]
        return column.take(places).array() if isinstance(column, CachedValues) else column.take(pa.array(places))

    def apply(self, name: str, function: ColumnFunction) -> np.ndarray:
        return (
            super().apply(name, function)
            if name in self._columns
            else self.shared.apply(name, function)[self.request_index]
        )

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
    """Microseconds from a request until the task's label is final: one with `conditional_on` no sooner than that
    task's."""
    own = round(task.label_delay_days * MICROSECONDS_PER_DAY)
    return own if task.conditional_on is None else max(own, label_delay(schema.tasks[task.conditional_on], schema))


def _equals(column: pa.Array, name: str, value: bool | int | float | str) -> np.ndarray:
    if pt.is_null(column.type):
        return np.zeros(len(column), bool)
    _check_written(column, name, "an `observed_when`", value)
    if not pt.is_string(column.type):
        return _numbers(column) == float(value)
    return fill_nulls(pc.equal(column, value), False).to_numpy(zero_copy_only=False)


def _check_written(column: pa.Array, name: str, setting: str, value: bool | int | float | str) -> None:
    """Raises UserError where a setting compares text with a number."""
    if (is_text := pt.is_string(column.type)) != isinstance(value, str):
        holds, write = ("text", "in quotes") if is_text else ("numbers", "without quotes")
        raise UserError(f"column '{name}' holds {holds}, but {setting} compares it with {value!r}: write it {write}")


_FOREVER = np.iinfo(np.int64).max


def compute_labels(rows: LogRows, label_cutoff: int) -> dict[str, np.ndarray]:
    """Task or outcome -> (N,) float64 labels, NaN where unobserved at `label_cutoff` (microseconds since 1970 UTC).

    An outcome is unobserved, engagement or not, until the satisfaction's label could have matured: if the zeros of
    recent rows were known before their ones, satisfaction would seem lower than it is.
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
    """Task -> number of labels that the log holds but that had not matured at `label_cutoff`."""
    counts = {}
    for name, task in rows.schema.tasks.items():
        late = rows.times() + label_delay(task, rows.schema) > label_cutoff
        counts[name] = int((~np.isnan(rows.labels(task, _FOREVER)[late])).sum()) if late.any() else 0
    return counts


def add_missing_times(table: pa.Table, schema: Schema) -> pa.Table:
    """Canonical columns of rows, with times where the log has none."""
    if schema.columns.has_time:
        return table
    split = schema.split
    places = np.zeros(len(table), np.int64) if split is None else split_indices(table.column(split.column), split)
    return table.append_column(schema.columns.time, pa.array(places).cast(UTC_MICROSECONDS))


def add_missing_ids(table: pa.Table, schema: Schema, first_row: int) -> pa.Table:
    """Canonical columns of rows, with users and candidates where the log has none; first_row: number of the first."""
    columns, numbers = schema.columns, pa.array(np.arange(first_row, first_row + len(table)))
    if not columns.has_user:
        users = numbers
        if columns.request is not None:
            users = pa.array(hash_column(one_array(table.column(columns.request))).view(np.int64))
        table = table.append_column(columns.user, users)
    return table if columns.has_candidate else table.append_column(columns.candidate, numbers)


def reject_plain_table(schema: Schema, what: str) -> None:
    """Raises UserError where a log is a plain table, which can't have what needs users, candidates and times."""
    columns = schema.columns
    there = {"user": columns.has_user, "candidate": columns.has_candidate, "time": columns.has_time}
    if lacking := [f"columns.{name}" for name, has in there.items() if not has]:
        raise UserError(f"{what} needs {' and '.join(lacking)}, which the settings leave out, as for a plain table")


def split_indices(column: pa.ChunkedArray | pa.Array, split: SplitColumn) -> np.ndarray:
    """(N,) int64 the place of each row's split among `SPLITS`, -1 for a value that none lists. Raises UserError where
    the settings list values of another type than the column's."""
    values = one_array(column) if isinstance(column, pa.ChunkedArray) else column
    values = values.dictionary_decode() if pt.is_dictionary(values.type) else values
    places = np.full(len(values), -1)
    for place, (name, listed) in enumerate(split.values.items()):
        if pt.is_null(values.type):
            continue
        for each in listed:
            _check_written(values, split.column, f"split.{name}", each)
        wanted = pa.array([each if isinstance(each, str) else int(each) for each in listed], values.type)
        places[fill_nulls(pc.is_in(values, value_set=wanted), False).to_numpy(zero_copy_only=False)] = place
    return places
