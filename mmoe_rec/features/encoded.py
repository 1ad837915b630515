"""Encoded rows: what a fitted pipeline makes of a table of log rows, in the order of a `Layout`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mmoe_rec.features.layout import Layout
from mmoe_rec.point_in_time.arrays import one_array
from mmoe_rec.point_in_time.lists import Ragged


def label_types(layout: Layout) -> dict[str, pa.DataType]:
    """Name of each task and outcome -> type of its encoded labels.

    A regression's are float64: float32 numbers near 1.7e9, such as times in seconds, are 128 apart.
    """
    kinds = {task.name: task.kind for task in layout.tasks} | dict.fromkeys(layout.outcomes, "binary")
    return {name: pa.float64() if kind == "regression" else pa.float32() for name, kind in kinds.items()}


# Lists of ids in an encoded file.
IDS = pa.list_(pa.field("element", pa.int32(), nullable=False))


def arrow_columns(
    ids: Mapping[str, np.ndarray | Ragged], dense: Mapping[str, np.ndarray], layout: Layout
) -> dict[str, pa.Array]:
    """Columns `id.NAME` (int32 or list of int32) and `dense.NAME` (float32), none of which has nulls, of N rows.

    ids: name -> (N,) int64 for one id a row, `Ragged` for any number; dense: name -> (N,) float32.
    """
    columns: dict[str, pa.Array] = {}
    for each in layout.ids:
        value = ids[each.name]
        if isinstance(value, Ragged):
            offsets = np.concatenate([[0], np.cumsum(value.lengths)]).astype(np.int32)
            values = pa.array(value.values.astype(np.int32, copy=False))
            columns[f"id.{each.name}"] = pa.ListArray.from_arrays(pa.array(offsets), values, type=IDS)
        else:
            columns[f"id.{each.name}"] = pa.array(value.astype(np.int32))
    for number in layout.dense:
        columns[f"dense.{number.name}"] = pa.array(np.ascontiguousarray(dense[number.name], np.float32))
    return columns


@dataclass(frozen=True)
class Encoded:
    """N encoded rows.

    ids: name -> (N,) int64 for one id a row, `Ragged` for any number; dense: (N, D) float32, columns as in
    `layout.dense`.
    """

    ids: dict[str, np.ndarray | Ragged]
    dense: np.ndarray

    def __len__(self) -> int:
        return len(self.dense)

    def slice(self, start: int, stop: int) -> Encoded:
        """Rows start to stop (exclusive, at most N), as views."""
        ids = {
            name: each.slice(start, stop) if isinstance(each, Ragged) else each[start:stop]
            for name, each in self.ids.items()
        }
        return Encoded(ids, self.dense[start:stop])

    def take(self, rows: np.ndarray) -> Encoded:
        """The given rows, in the given order."""
        ids = {name: each.take(rows) if isinstance(each, Ragged) else each[rows] for name, each in self.ids.items()}
        return Encoded(ids, self.dense[rows])

    def to_arrow(self, layout: Layout) -> dict[str, pa.Array]:
        """Columns as `arrow_columns` gives them."""
        return arrow_columns(self.ids, {each.name: self.dense[:, i] for i, each in enumerate(layout.dense)}, layout)

    @staticmethod
    def from_arrow(table: pa.Table, layout: Layout) -> Encoded:
        """Reads the columns that `to_arrow` made."""
        ids: dict[str, np.ndarray | Ragged] = {}
        for each in layout.ids:
            column = one_array(table.column(f"id.{each.name}"))
            if each.many:
                lengths = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int32)
                ids[each.name] = Ragged(column.flatten().to_numpy().astype(np.int64), lengths)
            else:
                ids[each.name] = column.to_numpy().astype(np.int64)
        dense = np.empty((table.num_rows, len(layout.dense)), np.float32)
        for index, each_dense in enumerate(layout.dense):
            dense[:, index] = table.column(f"dense.{each_dense.name}").to_numpy()
        return Encoded(ids, dense)
