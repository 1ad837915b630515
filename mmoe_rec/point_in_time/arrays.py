"""Small helpers for Arrow arrays and pandas indices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    import pandas as pd


def one_array(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array; a single chunk is given as it is, while pyarrow would copy it."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def filled(array: pa.Array, value: object) -> pa.Array:
    """An array with `value` for nulls; one without nulls is given as it is, while pyarrow would copy it."""
    return array.fill_null(value) if array.null_count else array


def shared_index(values: np.ndarray) -> pd.Index:
    """An index of (N,) values that threads may share.

    pandas builds an index's hash table when it is first asked; a second thread would look into the unfinished table and
    miss what is not there yet. This one is finished.
    """
    import pandas as pd

    index = pd.Index(values)
    index.get_indexer(index[:1])
    return index
