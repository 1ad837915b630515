"""Datasets of encoded rows in Parquet files, whose row groups are read into arrays."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.errors import UserError, first_line
from mmoe_rec.features.layout import EncodedInputs, Layout, label_types
from mmoe_rec.log.columns import hash_column, splitmix64
from mmoe_rec.point_in_time.arrays import Ragged, concat_ragged, one_array, rebatch

ADVICE = "Run mmoe-rec features again."


class ValidationPart(StrEnum):
    """A part of the validation users. One part selects models and the other evaluates them, so no row does both."""

    SELECTION = "selection"
    EVALUATION = "evaluation"

    def contains(self, users: pa.Array) -> np.ndarray:
        """Return whether each of N `users` belongs to this part, shape (N,), bool.

        A bit of a hash decides, so a user is in the same part on all days and for all models. The user's hash is hashed
        again, because samples of users are drawn by the first hash.
        """
        is_evaluation = splitmix64(hash_column(users)) >= np.uint64(1 << 63)
        return is_evaluation if self is ValidationPart.EVALUATION else ~is_evaluation


@dataclass(frozen=True)
class LabeledRows:
    """N encoded rows with labels.

    Attributes:
        encoded: Inputs of the rows.
        labels: (N, T) float32, or float64 if a task is a regression. NaN is unobserved.
        weights: (N,) float64 weights (see `row_weights`), None if all rows weigh 1.
        row_numbers: (N,) int64 positions of the rows among all rows of the dataset. Only `read_row_group` sets them.
    """

    encoded: EncodedInputs
    labels: np.ndarray
    weights: np.ndarray | None = None
    row_numbers: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def slice(self, start: int, stop: int) -> "LabeledRows":
        """Return a range of rows as views.

        Args:
            start: First row.
            stop: End of the range, exclusive.
        """
        return self._with(self.encoded.slice(start, stop), lambda part: part[start:stop])

    def take(self, rows: np.ndarray) -> "LabeledRows":
        """Return the rows at the indices `rows`, as copies."""
        return self._with(self.encoded.take(rows), lambda part: part.take(rows, axis=0))

    def _with(self, encoded: EncodedInputs, change: Callable[[np.ndarray], np.ndarray]) -> "LabeledRows":
        optional = (None if values is None else change(values) for values in (self.weights, self.row_numbers))
        return LabeledRows(encoded, change(self.labels), *optional)

    @staticmethod
    def concatenate(parts: "Sequence[LabeledRows]") -> "LabeledRows":
        """Concatenate one or more `parts`, as copies."""
        ids: dict[str, np.ndarray | Ragged] = {}
        for name, first in parts[0].encoded.ids.items():
            columns: Any = [part.encoded.ids[name] for part in parts]
            ids[name] = concat_ragged(columns) if isinstance(first, Ragged) else np.concatenate(columns)
        optional: Any = zip(*((part.weights, part.row_numbers) for part in parts), strict=True)
        return LabeledRows(
            EncodedInputs(ids, np.concatenate([part.encoded.dense for part in parts])),
            np.concatenate([part.labels for part in parts]),
            *(None if values[0] is None else np.concatenate(values) for values in optional),
        )


class EncodedDataset:
    """The encoded rows of a folder, with files sorted by name.

    Attributes:
        layout: Layout of the rows.
        uses_part: Whether rows are restricted to a part of the users. If either part has no observed label, all rows
            are used.
        has_weights: Whether the log has a column of weights.
        rows: Number of rows.
        row_groups: File index and row group index of each row group that has rows, in file order.
        row_group_sizes: (number of row groups,) int64 numbers of rows.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        *,
        joint_labels: bool = False,
        weighted: bool = False,
        part: ValidationPart | None = None,
    ) -> None:
        """Open the files, and read only their footers (and users and labels if `part` is given).

        Args:
            folder: Folder of the files.
            layout: Layout of the rows.
            joint_labels: Whether tasks with `conditional_on` get the joint label (both labels are positive), which
                their loss uses, instead of their own label.
            weighted: Whether to divide the rows' weights by their sampling rates.
            part: Part of the users to keep.

        Raises:
            UserError: There are no rows, or a file can't be read or lacks a column.
        """
        self.layout = layout
        self._weighted = weighted
        names, types = [task.loss_label if joint_labels else task.name for task in layout.tasks], label_types(layout)
        self._labels = [f"label.{name}" for name in names]
        self._label_type = np.result_type(*(types[name].to_pandas_dtype() for name in names))
        self._files = sorted(folder.glob("*.parquet"), key=lambda file: file.name)
        if not self._files:
            raise UserError(f"There is no .parquet file of encoded rows in '{folder}'. {ADVICE}")
        self._metadata = []
        for file in self._files:
            with file_errors(file):
                self._metadata.append(pq.read_metadata(file))
        self.has_weights = "weight" in self._metadata[0].schema.to_arrow_schema().names
        inputs = [*(f"id.{key.name}" for key in layout.ids), *(f"dense.{number.name}" for number in layout.dense)]
        users = ["user"] if part is not None else []
        self._columns = [*inputs, *self._labels, *self.weight_columns(weighted), *users]
        self._require(self._columns)
        groups = [(index, group) for index, file in enumerate(self._metadata) for group in range(file.num_row_groups)]
        counts = {(file, group): self._metadata[file].row_group(group).num_rows for file, group in groups}
        self._part = part
        if part is not None:
            kept, label_counts = dict[tuple[int, int], int](), np.zeros(2, np.int64)
            for group in groups:
                table = self._read(group, ["user", *self._labels])
                is_kept = self._is_kept(table)
                kept[group] = int(is_kept.sum())
                is_observed = ~np.all([np.isnan(table.column(name).to_numpy()) for name in self._labels], axis=0)
                label_counts += np.bincount(is_kept[is_observed], minlength=2)
            self._part = part if label_counts.all() else None
            counts = counts if self._part is None else kept
        self.uses_part = self._part is not None
        self.row_groups = [group for group, rows in counts.items() if rows]
        self.row_group_sizes = np.array([counts[group] for group in self.row_groups], np.int64)
        self.rows = int(self.row_group_sizes.sum())
        self._starts = dict(zip(self.row_groups, np.cumsum(self.row_group_sizes) - self.row_group_sizes, strict=True))
        if not self.rows:
            raise UserError(f"The files in '{folder}' have no rows. Check the times of the split. {ADVICE}")

    def _require(self, columns: Sequence[str]) -> None:
        """Raise UserError if a file lacks a column."""
        for file, metadata in zip(self._files, self._metadata, strict=True):
            names = metadata.schema.to_arrow_schema().names
            if missing := [name for name in columns if name not in names]:
                raise UserError(f"'{file}' lacks the column '{missing[0]}'. {ADVICE}")

    def weight_columns(self, weighted: bool) -> list[str]:
        """Return the columns that `row_weights` reads, including the sampling rate if `weighted` is true."""
        return [*(["weight"] if self.has_weights else []), *(["sampling_rate"] if weighted else [])]

    def read_row_group(self, group: tuple[int, int], take: np.ndarray | None = None) -> LabeledRows:
        """Read a row group.

        Args:
            group: File index and row group index.
            take: (n,) int64 indices of the group's rows to return. None returns all rows in file order.

        Raises:
            UserError: The file can't be read.
        """
        table = self._read(group, self._columns)
        if self._part is not None:
            table = table.filter(pa.array(self._is_kept(table)))
        rows = self._convert(table, self._starts[group] + np.arange(len(table)))
        return rows if take is None else rows.take(take)

    def stream(self, batch_size: int, columns: Sequence[str] = ()) -> Iterator[tuple[LabeledRows, pa.Table]]:
        """Yield all rows in file order, with additional columns.

        Args:
            batch_size: Number of rows at a time. The last batch can have fewer rows.
            columns: Additional columns, which the table contains.

        Raises:
            UserError: A file can't be read or lacks a column.
        """
        self._require(columns)
        all_columns = list(dict.fromkeys([*self._columns, *columns]))
        for table in rebatch(self._tables(batch_size, all_columns), batch_size):
            yield self._convert(table), table.select(list(columns))

    def _tables(self, batch_size: int, columns: list[str]) -> Iterator[pa.Table]:
        for index, file in enumerate(self._files):
            with file_errors(file), self._open(index) as parquet:
                for batch in parquet.iter_batches(batch_size, columns=columns):
                    table = pa.Table.from_batches([batch])
                    yield table if self._part is None else table.filter(pa.array(self._is_kept(table)))

    def _read(self, group: tuple[int, int], columns: list[str]) -> pa.Table:
        file, number = group
        with file_errors(self._files[file]), self._open(file) as parquet:
            # Use one thread. The reader decodes several groups at a time, and training steps need the other cores.
            return parquet.read_row_group(number, columns=columns, use_threads=False)

    def _is_kept(self, table: pa.Table) -> np.ndarray:
        assert self._part is not None
        return self._part.contains(one_array(table.column("user")))

    def _open(self, file: int) -> pq.ParquetFile:
        return pq.ParquetFile(self._files[file], metadata=self._metadata[file])

    def _convert(self, table: pa.Table, numbers: np.ndarray | None = None) -> LabeledRows:
        columns = [table.column(name).to_numpy() for name in self._labels]
        labels = np.stack(columns, axis=1, dtype=self._label_type)
        weights = row_weights(table.select(self.weight_columns(self._weighted)))
        weights = None if weights is None else weights.astype(np.float64)
        return LabeledRows(EncodedInputs.from_arrow(table, self.layout), labels, weights, numbers)


def row_weights(table: pa.Table) -> np.ndarray | None:
    """Return weight / sampling_rate of N rows, (N,). A missing column counts as 1. None if both are missing."""
    weights = table.column("weight").to_numpy() if "weight" in table.column_names else None
    if "sampling_rate" in table.column_names:
        inverse_rate = 1 / table.column("sampling_rate").to_numpy()
        weights = inverse_rate if weights is None else weights * inverse_rate
    return weights


@contextmanager
def file_errors(file: Path) -> Iterator[None]:
    """Convert errors of Arrow and of the file system to a UserError with the name of the file."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        problem = f"'{file}' cannot be read, it may be truncated or corrupt: {first_line(error)}"
        raise UserError(f"{problem}. {ADVICE}") from error
