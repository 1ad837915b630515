"""Columns of one file of a log in canonical types; what can't be read names the file, the column and the first row."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.types as pt

from mmoe_rec.errors import UserError
from mmoe_rec.features.columns import Use, canonical
from mmoe_rec.features.log_checks import BadFile
from mmoe_rec.files import first_line


def file_column(address: str, column: str, use: Use, values: pa.Array, time_unit: str | None, start: int) -> pa.Array:
    """A column in its canonical type; the first of `values` is row `start` of the file. Raises BadFile."""
    try:
        return _valid(column, use, values, time_unit)
    except UserError as error:
        fine, wrong = 0, len(values)  # the first rows that can be read, and that can't
        while wrong - fine > 1:
            middle = (fine + wrong) // 2
            try:
                _valid(column, use, values[:middle], time_unit)
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
        # The word may be one of other rows of the file.
        decoded = array.dictionary_decode()
        decoded.validate(full=True)
        return decoded.dictionary_encode()
    return array
