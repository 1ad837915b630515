"""Columns of one file of a log in canonical types; errors name the file, the column and the first bad row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from mmoe_rec.errors import UserError
from mmoe_rec.log.checks import BadFile, open_parquet
from mmoe_rec.log.columns import canonical
from mmoe_rec.log.files import first_line, path_values
from mmoe_rec.settings.columns import Use


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
        fine, wrong = 0, len(values)  # the first rows that can be read, and that can't
        while wrong - fine > 1:
            middle = (fine + wrong) // 2
            try:
                # Taken, not sliced: a slice of lists keeps the elements of all of them.
                _valid(column, use, values.take(pa.array(np.arange(middle))), time_unit)
                fine = middle
            except UserError:
                wrong = middle
        raise BadFile(f"'{address}': {first_line(error)}{first_row(start + fine)}", address) from None


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
