"""Columns of one file of a log in canonical types; errors name the file, the column and the first bad row.

While files are read, their values are checked for what features and labels need in order to mean something.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from mmoe_rec.errors import UserError
from mmoe_rec.log.checks import BadFile, format_time, open_parquet
from mmoe_rec.log.columns import canonical
from mmoe_rec.log.files import first_line, path_values
from mmoe_rec.log.rows import LogRows
from mmoe_rec.log.stand_ins import places_of
from mmoe_rec.settings.columns import SplitColumn, Use
from mmoe_rec.settings.schema import Schema


def columns_of(address: str) -> set[str]:
    """Those of a file, with those that stand in its path. Raises BadFile where it is no Parquet file."""
    with open_parquet(address) as parquet:
        return {*parquet.schema_arrow.names, *path_values(address)}


def with_path_values(table: pa.Table, address: str, names: Iterable[str]) -> pa.Table:
    """A file's columns, with those that stand in its path instead, of these names, as strings."""
    for name, value in path_values(address).items():
        if name in set(names) - set(table.column_names):
            table = table.append_column(name, pa.array([value] * len(table), pa.string()))
    return table


def next_batch(batches: Iterator[pa.RecordBatch], address: str, schema: pa.Schema) -> pa.RecordBatch | None:
    """The next batch of a file of this schema, None after the last. Raises BadFile where it can't be read."""
    try:
        return next(batches, None)
    except (pa.ArrowException, OSError) as error:
        fixed = [f"'{each.name}'" for each in schema if pa.types.is_fixed_size_list(each.type)]
        if fixed and "lists to be of size" in str(error):
            what = f"holds null among lists of a fixed size, which Arrow writes and cannot read: {', '.join(fixed)}"
            raise BadFile(f"'{address}' {what}; write lists of any size", address) from None
        raise BadFile(f"'{address}' is damaged: {first_line(error)}; write the file again", address) from None


def file_column(address: str, column: str, use: Use, values: pa.Array, time_unit: str | None, start: int) -> pa.Array:
    """A column in its canonical type; the first of `values` is row `start` of the file. Raises BadFile."""
    try:
        return _valid(column, use, values, time_unit)
    except UserError as error:
        row = start + find_first_fault(lambda some: _valid(column, use, some, time_unit), values)
        raise BadFile(f"'{address}': {first_line(error)}{first_row(row)}", address) from None


Values = TypeVar("Values", pa.Array, Sequence[Any])


def find_first_fault(read: Callable[[Values], object], values: Values) -> int:
    """The first row that `read` can't read, as it raises UserError. It can't read all of them."""

    def fails(row: int) -> bool:
        try:
            read(take_part(values, 0, row + 1))
        except UserError:
            return True
        return False

    return bisect_left(range(len(values) - 1), True, key=fails)


def take_part(values: Values, begin: int, end: int) -> Values:
    """The rows from one number to another."""
    if isinstance(values, pa.Array):  # taken, not sliced: a slice of lists keeps the elements of all of them
        return values.take(pa.array(np.arange(begin, end)))
    return values[begin:end]


def first_row(row: int) -> str:
    """The end of a sentence about rows of a file."""
    return f" (the first is row {row} of the file, counted from 0)"


def _valid(column: str, use: Use, values: pa.Array, time_unit: str | None) -> pa.Array:
    array = canonical(column, use, values, time_unit, coded=True)
    try:
        if pt.is_dictionary(array.type):
            return _with_valid_words(array)
        if array.type == pa.list_(pa.string()):
            array.validate(full=True)
    except pa.ArrowInvalid as error:
        raise UserError(f"column '{column}' holds text that is not UTF-8: {error}") from None
    return array


def _with_valid_words(array: pa.DictionaryArray) -> pa.DictionaryArray:
    try:
        array.dictionary.validate(full=True)
    except pa.ArrowInvalid:
        # The invalid word may belong to other rows of the file.
        decoded = array.dictionary_decode()
        decoded.validate(full=True)
        return decoded.dictionary_encode()
    return array


_LARGEST_LABEL = float(np.finfo(np.float32).max)  # models compute in float32


@dataclass
class Wrong:
    """The wrong values of a column in one file: how many, the first one's row and value, and their range."""

    count: int = 0
    row: int = 0
    first: float = 0
    least: float = 0
    largest: float = 0

    def add(self, values: np.ndarray, mask: np.ndarray, start: int) -> None:
        """Counts the rows of `values` (N,) where `mask` (N,) is true; the first of them is the file's row `start`."""
        if not mask.any():
            return
        wrong = values[mask]
        if not self.count:
            self.row, self.first = start + int(mask.argmax()), wrong[0]
            self.least, self.largest = wrong[0], wrong[0]
        self.count += len(wrong)
        self.least, self.largest = min(self.least, wrong.min()), max(self.largest, wrong.max())


@dataclass(frozen=True)
class ValueCheck:
    """A check of one column: its `values` (N,), which of them are `wrong`, and what the error `says` about those."""

    column: str
    values: Callable[[LogRows], np.ndarray]
    wrong: Callable[[np.ndarray], np.ndarray]
    says: Callable[[Wrong], str]


def log_value_checks(schema: Schema, now: int) -> list[ValueCheck]:
    """What a log's values must hold so that features and labels mean something."""
    columns = schema.columns
    keys = filter(None, (columns.user, columns.candidate, columns.time, columns.request))
    checks = [_no_null(column, "every row needs one") for column in keys]
    checks.append(_no_future(columns.time, now, "requests"))
    if (rate := columns.sampling_rate) is not None:
        checks.append(
            ValueCheck(
                rate,
                lambda rows: rows.numbers(rate),
                lambda values: ~((values > 0) & (values <= 1)),
                lambda found: (
                    f"column '{rate}' holds {'null' if np.isnan(found.first) else f'{found.first:g}'} "
                    f"({found.count} rows are not in (0, 1]); fix the data or remove columns.sampling_rate"
                ),
            )
        )
    if (weight := columns.weight) is not None:
        checks.append(
            ValueCheck(
                weight,
                lambda rows: rows.numbers(weight),
                lambda values: ~((values > 0) & (values <= _LARGEST_LABEL)),
                lambda found: (
                    f"column '{weight}' holds {'null' if np.isnan(found.first) else f'{found.first:g}'} "
                    f"({found.count} rows are not above 0 and finite); fix the data or remove columns.weight"
                ),
            )
        )
    if schema.split is not None:
        checks.append(_split_check(schema.split))
    checks += [_label_check(name, task.label, task.kind) for name, task in schema.tasks.items()]
    for name, feature in schema.features.items():
        for column, length in feature.list_lengths.items():
            checks += _vector_checks(name, column, length)
    return checks


def _split_check(split: SplitColumn) -> ValueCheck:
    listed = ", ".join(repr(each) for values in split.values.values() for each in values)
    return ValueCheck(
        split.column,
        lambda rows: places_of(rows.coded(split.column), split),
        lambda places: places < 0,
        lambda found: (
            f"column '{split.column}' of split.column holds something else than {listed} in {found.count} rows: list "
            "it under split.train, split.validation or split.test, or leave these rows out"
        ),
    )


def event_value_checks(time: str, now: int) -> list[ValueCheck]:
    """What the values of a log of events must hold."""
    return [_no_null(time, "every event needs a time"), _no_future(time, now, "events")]


def _no_null(column: str, need: str) -> ValueCheck:
    return ValueCheck(
        column,
        lambda rows: rows.coded(column).is_null().to_numpy(zero_copy_only=False),
        lambda nulls: nulls,
        lambda found: f"column '{column}' is null in {found.count} rows; {need}",
    )


def _no_future(column: str, now: int, what: str) -> ValueCheck:
    return ValueCheck(
        column,
        lambda rows: rows.times(column),
        lambda times: times > now,
        lambda found: (
            f"column '{column}' holds {found.count} {what} in the future: {what} from "
            f"{format_time(int(found.least))} to {format_time(int(found.largest))}, later than {format_time(now)}; "
            "fix the data, or set `columns.time_unit` if the column holds integers in another unit"
        ),
    )


def _vector_checks(feature: str, column: str, size: int) -> list[ValueCheck]:
    what = f"column '{column}' of feature '{feature}' holds"
    return [
        ValueCheck(
            column,
            lambda rows: list_lengths(rows.column(column)),
            lambda lengths: (lengths >= 0) & (lengths != size),
            lambda found: (
                f"{what} a list of {found.first} numbers, but its `size` is {size} ({found.count} rows); write "
                "lists of that length, or null where there is none"
            ),
        ),
        ValueCheck(
            column,
            lambda rows: _elements_not_finite(rows.column(column)),
            lambda elements: elements > 0,
            lambda found: (
                f"{what} null, NaN or infinity within a list ({found.count} rows); write finite numbers, or "
                "null instead of the whole list"
            ),
        ),
    ]


def list_lengths(lists: pa.Array) -> np.ndarray:
    """(N,) int64 lengths of lists, -1 for null ones."""
    if pt.is_null(lists.type):
        return np.full(len(lists), -1)
    return lists.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def _elements_not_finite(lists: pa.Array) -> np.ndarray:
    """(N,) int64 how many elements of each list are null, NaN or infinite."""
    lengths = np.maximum(list_lengths(lists), 0)
    if not lengths.sum():
        return np.zeros(len(lists), np.int64)
    wrong = ~np.isfinite(lists.flatten().to_numpy(zero_copy_only=False))  # null is NaN
    row = np.repeat(np.arange(len(lists)), lengths)
    return np.bincount(row[wrong], minlength=len(lists))


def _label_check(task: str, label: str, kind: str) -> ValueCheck:
    if kind == "regression":
        return ValueCheck(
            label,
            lambda rows: rows.numbers(label),
            lambda values: np.abs(values) > _LARGEST_LABEL,
            lambda found: (
                f"label column '{label}' of task '{task}' holds "
                f"{'an infinite value' if np.isinf(found.first) else f'{found.first:g}, too large for 32 bits'}; "
                f"make it null ({found.count} rows)"
            ),
        )
    return ValueCheck(
        label,
        lambda rows: rows.numbers(label),
        lambda values: ~np.isnan(values) & (values != 0) & (values != 1),
        lambda found: (
            f"label column '{label}' of binary task '{task}' holds {found.first:g} "
            f"({found.count} rows are neither 0 nor 1); fix the data or set the task's kind to regression"
        ),
    )
