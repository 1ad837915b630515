"""Small folders of encoded rows whose values name their row; their order and its split over ranks, a row at a time."""

import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.batches.encoded_dataset import LabeledRows
from mmoe_rec.batches.row_reader import GOLDEN, EpochOrder, ShuffleWindow
from mmoe_rec.features.layout import DenseInput, EncodedInputs, IdInput, Layout, TableSpec, TaskOutput, arrow_columns
from mmoe_rec.point_in_time.arrays import Ragged

LAYOUT = Layout(
    tables=(TableSpec("items", 1000),),
    ids=(IdInput("item", "items"), IdInput("history", "items", is_list=True), IdInput("slot", "items", placement=True)),
    dense=(DenseInput("price"), DenseInput("age")),
    tasks=(TaskOutput("click", "binary"), TaskOutput("stars", "regression")),
)


def columns_of(encoded: EncodedInputs, layout: Layout) -> dict[str, pa.Array]:
    """Encoded rows as the columns of a file."""
    dense = {item.name: encoded.dense[:, place] for place, item in enumerate(layout.dense)}
    return arrow_columns(encoded.ids, dense, layout)


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
    encoded = EncodedInputs(
        {
            "item": np.array(rows, np.int64),
            "history": Ragged(np.array([item for ids in lists for item in ids], np.int64), lengths),
            "slot": np.array(rows, np.int64) % 7,
        },
        np.stack([np.array(rows, np.float32) / 2, -np.array(rows, np.float32)], axis=1),
    )
    columns = columns_of(encoded, LAYOUT)
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


def row_numbers(rows: LabeledRows) -> np.ndarray:
    """The row numbers of rows, copies included. (N,) int64."""
    item = rows.encoded.ids["item"]
    assert isinstance(item, np.ndarray)
    return item


def real(rows: LabeledRows) -> list[int]:
    """The row numbers of rows, without copies: every real row has an observed click."""
    return row_numbers(rows)[~np.isnan(rows.labels[:, 0])].tolist()


def assert_values(rows: LabeledRows) -> None:
    """Every value of every row is that of its row number, checked by a loop; copies have no labels."""
    ragged = rows.encoded.ids["history"]
    slot = rows.encoded.ids["slot"]
    assert isinstance(ragged, Ragged)
    assert isinstance(slot, np.ndarray)
    begin = 0
    for i, row in enumerate(row_numbers(rows).tolist()):
        end = begin + int(ragged.lengths[i])
        assert ragged.values[begin:end].tolist() == history(row)
        begin = end
        assert slot[i] == row % 7
        assert rows.encoded.dense[i].tolist() == [row / 2, -row]
        copy = np.isnan(rows.labels[i, 0])
        assert copy or rows.labels[i, 0] == row
        np.testing.assert_equal(rows.labels[i, 1], np.nan if copy or stars(row) is None else stars(row))
    assert begin == len(ragged.values)
    assert ragged.values.dtype == slot.dtype == np.int32
    assert rows.encoded.dense.dtype == np.float32
    assert rows.labels.dtype == np.float64  # stars are a regression


Row = tuple[int, int]  # row group, row in it


def window_order(order: EpochOrder, window: ShuffleWindow) -> list[Row]:
    """The rows of a window by rising key."""
    keyed = []
    for number, group in enumerate(window.groups.tolist()):
        permutation = order.permutation(group).tolist()
        offset = (window.shift + number * GOLDEN) % 1.0
        keyed += [((j + offset) / len(permutation), number, j, (group, row)) for j, row in enumerate(permutation)]
    return [row for *_, row in sorted(keyed)]


def global_batches(order: EpochOrder, batch_size: int, position: int) -> list[list[Row]]:
    """The next rows of the order, `batch_size` at a time, each batch arranged by where its rows' groups lie."""
    placed = [(window, row) for window in order.windows for row in window_order(order, window)]
    return [_arranged(placed[first : first + batch_size]) for first in range(position, len(placed), batch_size)]


def _arranged(batch: list[tuple[ShuffleWindow, Row]]) -> list[Row]:
    keyed = []
    seen: dict[int, int] = {}
    counts: dict[int, int] = {}
    for _, (group, _) in batch:
        counts[group] = counts.get(group, 0) + 1
    for window, (group, row) in batch:
        number = window.groups.tolist().index(group)
        sizes = window.sizes.tolist()
        within = (seen.get(group, 0) + 0.5) * (sizes[number] / counts[group])
        seen[group] = seen.get(group, 0) + 1
        keyed.append(((sum(sizes[:number]) + within) / sum(sizes), window.start, number, seen[group], (group, row)))
    return [row for *_, row in sorted(keyed)]


def slots(batch: list[Row], rank: int, world_size: int, rows_per_rank: int) -> list[tuple[Row, bool]]:
    """The rank's rows of a batch that is stretched over all slots, and whether each is a copy of the slot before."""
    total = rows_per_rank * world_size
    taken = [slot * len(batch) // total for slot in range(total)]
    every = [(batch[place], slot > 0 and taken[slot - 1] == place) for slot, place in enumerate(taken)]
    return every[rank * rows_per_rank : (rank + 1) * rows_per_rank]


def background_threads() -> list[threading.Thread]:
    """The threads of `Prefetch` and of readers that are alive."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(("prefetch", "reader"))]
