"""Small folders of encoded rows whose values name their row."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.batches.encoded_rows import Rows
from mmoe_rec.features.encoded import Encoded
from mmoe_rec.features.layout import DenseInput, IdInput, Layout, Table, TaskOutput
from mmoe_rec.point_in_time.lists import Ragged

LAYOUT = Layout(
    tables=(Table("items", 1000),),
    ids=(IdInput("item", "items"), IdInput("history", "items", many=True), IdInput("slot", "items", placement=True)),
    dense=(DenseInput("price"), DenseInput("age")),
    tasks=(TaskOutput("click", "binary"), TaskOutput("stars", "regression")),
)


def history(row: int) -> list[int]:
    """The ids of the ragged input of a row: none to four of them."""
    return [row * 10 + i for i in range(row * 7 % 5)]


def stars(row: int) -> float | None:
    """The second label of a row, unobserved for every third."""
    return None if row % 3 == 0 else float(row)


def table(rows: range) -> pa.Table:
    """Encoded rows of which each value is a function of the row's number."""
    lists = [history(row) for row in rows]
    lengths = np.array([len(ids) for ids in lists], np.int32)
    encoded = Encoded(
        {
            "item": np.array(rows, np.int64),
            "history": Ragged(np.array([each for ids in lists for each in ids], np.int64), lengths),
            "slot": np.array(rows, np.int64) % 7,
        },
        np.stack([np.array(rows, np.float32) / 2, -np.array(rows, np.float32)], axis=1),
    )
    columns = encoded.to_arrow(LAYOUT)
    columns["label.click"] = pa.array([float(row) for row in rows], pa.float32())
    columns["label.stars"] = pa.array([stars(row) for row in rows], pa.float64())
    columns["sampling_rate"] = pa.array([1 / (1 + row % 4) for row in rows], pa.float32())
    columns["user"] = pa.array([f"user {row}" for row in rows], pa.string())
    return pa.table(columns)


def write(folder: Path, files: list[list[int]]) -> int:
    """Writes a file per list, with row groups of the given sizes, zeros included; returns the number of rows."""
    folder.mkdir()
    start = 0
    for index, sizes in enumerate(files):
        with pq.ParquetWriter(folder / f"{index:03}.parquet", table(range(0)).schema) as writer:
            for size in sizes:
                writer.write_table(table(range(start, start + size)), row_group_size=max(size, 1))
                start += size
    return start


def numbers(rows: Rows) -> np.ndarray:
    """The row numbers of rows, copies included. (N,) int64."""
    item = rows.encoded.ids["item"]
    assert isinstance(item, np.ndarray)
    return item


def real(rows: Rows) -> list[int]:
    """The row numbers of rows, without copies: every real row has an observed click."""
    return numbers(rows)[~np.isnan(rows.labels[:, 0])].tolist()


def assert_values(rows: Rows) -> None:
    """Every value of every row is that of its row number, checked by a loop; copies have no labels."""
    ragged = rows.encoded.ids["history"]
    slot = rows.encoded.ids["slot"]
    assert isinstance(ragged, Ragged)
    assert isinstance(slot, np.ndarray)
    begin = 0
    for i, row in enumerate(numbers(rows).tolist()):
        end = begin + int(ragged.lengths[i])
        assert ragged.values[begin:end].tolist() == history(row)
        begin = end
        assert slot[i] == row % 7
        assert rows.encoded.dense[i].tolist() == [row / 2, -row]
        copy = np.isnan(rows.labels[i, 0])
        assert copy or rows.labels[i, 0] == row
        np.testing.assert_equal(rows.labels[i, 1], np.nan if copy or stars(row) is None else stars(row))
    assert begin == len(ragged.values)
    assert ragged.values.dtype == slot.dtype == np.int64
    assert rows.encoded.dense.dtype == np.float32
    assert rows.labels.dtype == np.float64  # stars are a regression
