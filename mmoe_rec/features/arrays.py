"""Arrow arrays without copies that are not needed: both pyarrow functions copy where there is nothing to do."""

from __future__ import annotations

import pyarrow as pa


def one_array(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array; a single chunk is given as it is."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def filled(array: pa.Array, value: object) -> pa.Array:
    """An array with `value` for nulls; one without nulls is given as it is."""
    return array.fill_null(value) if array.null_count else array
