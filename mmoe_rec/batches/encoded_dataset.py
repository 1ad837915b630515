"""A folder of encoded Parquet rows: which row groups there are, and reading them into arrays."""

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

ADVICE = "run mmoe-rec features again"


class ValidationPart(StrEnum):
    """A part of the validation users. One part selects a model and the other judges it, so that no row does both."""

    SELECTION = "selecting"
    EVALUATION = "judging"

    def contains(self, users: pa.Array) -> np.ndarray:
        """Return whether each user belongs to this part, as an array of bool, shape (N,).

        A bit of the user's hash decides, so a user stays in the same part from day to day and for every model. The hash
        is mixed once more, because samples of users are taken by the hash itself.
        """
        is_judging = splitmix64(hash_column(users)) >= np.uint64(1 << 63)
        return is_judging if self is ValidationPart.EVALUATION else ~is_judging


@dataclass(frozen=True)
class LabeledRows:
    """N encoded rows with their labels.

    labels: (N, T) float32, or float64 where a task is a regression, NaN is unobserved; weights: (N,) float64, see
    `row_weights`; numbers: (N,) int64, of the rows in file order, where a row group was read.
    """

    encoded: EncodedInputs
    labels: np.ndarray
    weights: np.ndarray | None = None
    row_numbers: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def slice(self, start: int, stop: int) -> "LabeledRows":
        """Rows start to stop (exclusive, at most N), as views."""
        return self._with(self.encoded.slice(start, stop), lambda part: part[start:stop])

    def take(self, rows: np.ndarray) -> "LabeledRows":
        """The given rows, in the given order, as copies."""
        return self._with(self.encoded.take(rows), lambda part: part.take(rows, axis=0))

    def _with(self, encoded: EncodedInputs, change: Callable[[np.ndarray], np.ndarray]) -> "LabeledRows":
        others = (None if each is None else change(each) for each in (self.weights, self.row_numbers))
        return LabeledRows(encoded, change(self.labels), *others)

    @staticmethod
    def concatenate(parts: "Sequence[LabeledRows]") -> "LabeledRows":
        """The rows of all parts (at least one), in order, as copies."""
        ids: dict[str, np.ndarray | Ragged] = {}
        for name, first in parts[0].encoded.ids.items():
            columns: Any = [part.encoded.ids[name] for part in parts]
            ids[name] = concat_ragged(columns) if isinstance(first, Ragged) else np.concatenate(columns)
        others: Any = zip(*((part.weights, part.row_numbers) for part in parts), strict=True)
        return LabeledRows(
            EncodedInputs(ids, np.concatenate([part.encoded.dense for part in parts])),
            np.concatenate([part.labels for part in parts]),
            *(None if each[0] is None else np.concatenate(each) for each in others),
        )


class EncodedDataset:
    """The encoded rows of a folder, files in order of their names. Only the footers are read at first.

    joint_labels: labels of tasks with `conditional_on` are those that they are learnt from, over all rows, and not
    their own; weighted: rows weigh 1 / the rate at which they were sampled; part:
    keep only the rows of these users, or all rows if one of the two parts would have no label, see `uses_part`.

    `uses_part`: whether `part` was given and both parts have observed labels;
    `has_weights`: whether the log has a column of weights, which rows count by besides; `rows`: number of rows;
    `row_groups`: (file index, row group index) of every row group that has rows, in file order; `row_group_sizes`:
    (len(groups),) int64, the rows of each. Raises UserError where there are no rows, or a file cannot be read or lacks
    a column.
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
        self.layout = layout
        self._weighted = weighted
        learnt, types = [task.loss_label if joint_labels else task.name for task in layout.tasks], label_types(layout)
        self._labels = [f"label.{name}" for name in learnt]
        self._label_type = np.result_type(*(types[name].to_pandas_dtype() for name in learnt))
        self._files = sorted(folder.glob("*.parquet"), key=lambda file: file.name)
        if not self._files:
            raise UserError(f"there is no .parquet file of encoded rows in '{folder}'; {ADVICE}")
        self._metadata = []
        for file in self._files:
            with _naming(file):
                self._metadata.append(pq.read_metadata(file))
        self.has_weights = "weight" in self._metadata[0].schema.to_arrow_schema().names
        inputs = [*(f"id.{each.name}" for each in layout.ids), *(f"dense.{each.name}" for each in layout.dense)]
        users = ["user"] if part is not None else []
        self._columns = [*inputs, *self._labels, *self.weight_columns(weighted), *users]
        self._require(self._columns)
        groups = [(each, group) for each, file in enumerate(self._metadata) for group in range(file.num_row_groups)]
        counts = {(file, group): self._metadata[file].row_group(group).num_rows for file, group in groups}
        self._part = part
        if part is not None:
            kept, labelled = dict[tuple[int, int], int](), np.zeros(2, np.int64)
            for group in groups:
                table = self._read(group, ["user", *self._labels])
                is_kept = self._is_kept(table)
                kept[group] = int(is_kept.sum())
                is_observed = ~np.all([np.isnan(table.column(name).to_numpy()) for name in self._labels], axis=0)
                labelled += np.bincount(is_kept[is_observed], minlength=2)
            self._part = part if labelled.all() else None
            counts = counts if self._part is None else kept
        self.uses_part = self._part is not None
        self.row_groups = [group for group, rows in counts.items() if rows]
        self.row_group_sizes = np.array([counts[group] for group in self.row_groups], np.int64)
        self.rows = int(self.row_group_sizes.sum())
        self._starts = dict(zip(self.row_groups, np.cumsum(self.row_group_sizes) - self.row_group_sizes, strict=True))
        if not self.rows:
            raise UserError(f"the files of '{folder}' hold no rows; check the split's times, then {ADVICE}")

    def _require(self, columns: Sequence[str]) -> None:
        """Raises UserError where a file lacks one of the columns."""
        for file, metadata in zip(self._files, self._metadata, strict=True):
            names = metadata.schema.to_arrow_schema().names
            if missing := [name for name in columns if name not in names]:
                raise UserError(f"'{file}' lacks the column '{missing[0]}'; {ADVICE}")

    def weight_columns(self, weighted: bool) -> list[str]:
        """The columns that say what rows count, as `row_weights` reads them; weighted: by their rate of sampling
        too."""
        return [*(["weight"] if self.has_weights else []), *(["sampling_rate"] if weighted else [])]

    def read_row_group(self, group: tuple[int, int], take: np.ndarray | None = None) -> LabeledRows:
        """The rows of a row group, (file index, row group index).

        take: (n,) int64, which of these rows to return, in which order; None returns all. Raises UserError for a file
        that cannot be read.
        """
        table = self._read(group, self._columns)
        if self._part is not None:
            table = table.filter(pa.array(self._is_kept(table)))
        rows = self._convert(table, self._starts[group] + np.arange(len(table)))
        return rows if take is None else rows.take(take)

    def stream(self, batch_size: int, columns: Sequence[str] = ()) -> Iterator[tuple[LabeledRows, pa.Table]]:
        """All rows in file order, `batch_size` at a time (the last ones fewer), with the columns asked for beside them.

        Raises UserError for a file that cannot be read or lacks one of the columns.
        """
        self._require(columns)
        wanted = list(dict.fromkeys([*self._columns, *columns]))
        for table in rebatch(self._tables(batch_size, wanted), batch_size):
            yield self._convert(table), table.select(list(columns))

    def _tables(self, batch_size: int, columns: list[str]) -> Iterator[pa.Table]:
        for index, file in enumerate(self._files):
            with _naming(file), self._open(index) as parquet:
                for batch in parquet.iter_batches(batch_size, columns=columns):
                    table = pa.Table.from_batches([batch])
                    yield table if self._part is None else table.filter(pa.array(self._is_kept(table)))

    def _read(self, group: tuple[int, int], columns: list[str]) -> pa.Table:
        file, number = group
        with _naming(self._files[file]), self._open(file) as parquet:
            # One thread: the reader decodes several groups at a time, beside a training step that needs the rest.
            return parquet.read_row_group(number, columns=columns, use_threads=False)

    def _is_kept(self, table: pa.Table) -> np.ndarray:
        assert self._part is not None
        return self._part.contains(one_array(table.column("user")))

    def _open(self, file: int) -> pq.ParquetFile:
        return pq.ParquetFile(self._files[file], metadata=self._metadata[file])

    def _convert(self, table: pa.Table, numbers: np.ndarray | None = None) -> LabeledRows:
        labels = np.empty((table.num_rows, len(self.layout.tasks)), self._label_type)
        for index, name in enumerate(self._labels):
            labels[:, index] = table.column(name).to_numpy()
        weights = row_weights(table.select(self.weight_columns(self._weighted)))
        weights = None if weights is None else weights.astype(np.float64)
        return LabeledRows(EncodedInputs.from_arrow(table, self.layout), labels, weights, numbers)


def row_weights(table: pa.Table) -> np.ndarray | None:
    """(N,) what each row counts: its `weight` / its `sampling_rate`, of those columns that a table has; None of
    none."""
    weights = table.column("weight").to_numpy() if "weight" in table.column_names else None
    if "sampling_rate" in table.column_names:
        by_rate = 1 / table.column("sampling_rate").to_numpy()
        weights = by_rate if weights is None else weights * by_rate
    return weights


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Errors of Arrow and of the file system as a UserError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        what = f"'{file}' cannot be read, it may be truncated or corrupt: {first_line(error)}"
        raise UserError(f"{what}; {ADVICE}") from error
